"""Arguments that cannot be parsed: the message says what was expected."""

import pytest

from command import explain
from sp_fx.cli.commands import main

MALFORMED = {
    "steps": (["--steps", "0"], "a whole number of at least 1"),
    "method": (["--method", "pullback,gradient"], "no method is called 'gradient'; choices: pullback, double_pullback, ascend"),
    "temperature": (["--temperature", "relu=warm"], "or 'layer4.*=0.3', with a number, none or frozen; got 'relu=warm'"),
    "device": (["--device", "cuda:99"], "'cuda:99' is no device of this machine"),
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
