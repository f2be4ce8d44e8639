"""Arguments that cannot be parsed: the message says what was expected. Help that fits a screen; completion for shells."""

import shutil
import subprocess

import pytest

from command import explain
from sp_fx.cli.commands import main
from sp_fx.cli.parser import build_parser

COMMANDS = ("explain", "text", "compile", "batch", "serve", "demo", "report", "bench", "completion")

MALFORMED = {
    "steps": (["--steps", "0"], "a whole number of at least 1"),
    "method": (["--method", "pullback,gradient"], "no method is called 'gradient'; choices: pullback, double_pullback, ascend"),
    "temperature": (["--temperature", "relu=warm"], "or 'layer4.*=0.3', with a number, none or frozen; got 'relu=warm'"),
    "device": (["--device", "cuda:99"], "'cuda:99' is no device of this machine"),
    "rules": (["--rules", "default,papers"], "no rules are called 'papers'; choices: default, paper, frozen"),
    "rules twice": (["--rules", "paper, paper"], "the same rules twice: paper, paper"),
    "mean": (["--mean", "half"], "argument --mean: expected numbers with commas between them, got 'half'"),
    "std": (["--std", "0.5;0.5"], "argument --std: expected numbers with commas between them, got '0.5;0.5'"),
    "pixels": (["--pixels", "0-255"], "argument --pixels: expected numbers with commas between them, got '0-255'"),
    "no number": (["--std", "nan"], "argument --std: expected finite numbers, got 'nan'"),
    "endless": (["--pixels", "-1,inf"], "argument --pixels: expected finite numbers, got '-1,inf'"),
    "classes": (["--num-classes", "0"], "a whole number of at least 1"),
    "size": (["--input-size", "-3"], "a whole number of at least 1"),
    "temperature of nothing": (["--temperature", "=0.3"], "expected GATE=T, such as relu=1.0"),
    "no device": (["--device", "toaster"], "'toaster' is no device of this machine"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_arguments(tmp_path, capsys, case):
    arguments, message = MALFORMED[case]
    with pytest.raises(SystemExit) as stopped:
        explain(tmp_path, tmp_path, *arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("port", ["0", "65536", "http"])
def test_a_port_that_there_is_not(port, capsys):
    with pytest.raises(SystemExit):
        main(["serve", "a.onnx", "--port", port])
    told = capsys.readouterr().err
    assert f"a port is 1 to 65535, got {port!r}" in told and len(told) < 2_000


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_a_screen(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*([command] if command else []), "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert stopped.value.code == 0 and 3 < len(lines) <= 40 and max(map(len, lines)) <= 80
    if not command:
        text = " ".join(lines)
        assert all(name in text for name in COMMANDS)
        spellings = ("resnet50", "timm/", "hf/NAME", "hf/./mine", "zoo/residual_cnn", "efficientnet_lite0", "num_classes=5")
        assert all(spelling in text for spelling in (*spellings, "mine.pt", "package.onnx", "package.pt2"))


def test_every_option_has_help_and_every_command_a_function():
    from sp_fx.cli.commands import COMMANDS as functions

    (subparsers,) = (action for action in build_parser()._actions if action.choices and action.dest == "command")
    assert tuple(subparsers.choices) == COMMANDS == tuple(functions)
    for command, parser in subparsers.choices.items():
        for action in parser._actions:
            assert action.help or action.dest in ("images", "model", "shell"), f"{command} {action.option_strings}"


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion(shell, capsys, tmp_path):
    pytest.importorskip("shtab")
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "sp-fx" in script and all(command in script for command in COMMANDS)
    assert "--class-names" in script or shell == "tcsh"  # whose completion stops at the commands
    (tmp_path / "script").write_text(script)
    if shell == "tcsh" or not shutil.which(shell):
        return
    checked = subprocess.run([shell, "-n", str(tmp_path / "script")], capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")
    if shell == "bash":
        asked = f"source {tmp_path}/script; complete -p sp-fx"
        done = subprocess.run(["bash", "-c", asked], capture_output=True, text=True)
        assert done.returncode == 0 and done.stderr == "" and "complete" in done.stdout


def test_signs_and_commas_in_one_word_or_two():
    from sp_fx.cli.commands import joined

    assert joined(["--pixels", "-1,1", "--mean", "-.5", "--std", "1"]) == ["--pixels=-1,1", "--mean=-.5", "--std", "1"]
    assert joined(["--pixels", "--json", "a", "-1,1"]) == ["--pixels", "--json", "a", "-1,1"] and joined([]) == []


@pytest.mark.parametrize("given, near", [(["--mehtod", "ascend"], "; the nearest option is --method"), (["--xyz=1"], "")])
def test_an_option_that_the_command_does_not_have(tmp_path, capsys, given, near):
    with pytest.raises(SystemExit) as stopped:
        explain(tmp_path, tmp_path, *given)
    told = capsys.readouterr().err
    assert stopped.value.code == 2 and told.startswith("usage: sp-fx explain ")
    assert f"unrecognized arguments: {' '.join(given)}{near}\n" in told
