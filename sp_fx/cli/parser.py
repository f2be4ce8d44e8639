"""The command line of `sp-fx`: its commands and their options. Each command's help fits a screen."""

from __future__ import annotations

import argparse
import difflib
import functools
import math
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from ..figures import records
from ..gates.rules import KINDS, Rules
from ..models.options import Options
from ..version import __version__

FORMATS = ("png", "jpg", "webp", "pdf", "svg")
RULES = {"default": Rules, "paper": Rules.paper, "frozen": Rules.frozen}
MODELS = """\
MODEL is one of
  resnet50                       a classifier of torchvision
  timm/pvt_v2_b1                 of timm
  hf/NAME                        a classifier of pictures, or one for texts, of
                                 Hugging Face's hub, or a folder: hf/./mine
  zoo/residual_cnn               one that ships (also zoo/pyramid_transformer)
  efficientnet_lite0             one that a package carries (extra 'models')
  my_networks:resnet             what resnet() of my_networks.py returns;
                                 arguments: my_networks:resnet?num_classes=5
  mine.pt                        a pickled module, with --trust-pickle
  package.onnx, package.pt2      a package that `sp-fx compile` wrote (explain)
"""
Wide = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=16, width=80)
Formatter = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=24, width=80)


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of `sp-fx COMMAND ...`."""
    text = "Explain networks by semantic pullbacks. More: sp-fx COMMAND --help"
    top = argparse.ArgumentParser(prog="sp-fx", description=text, epilog=MODELS, formatter_class=Wide)
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str, usage: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=help, usage=f"sp-fx {name} {usage}", formatter_class=Formatter, add_help=False)
        made.description = f"{help[0].upper()}{help[1:]}."
        return made

    usage = "IMAGE ... --model MODEL --out DIR [options]"
    explain_options(command("explain", "why a model sees what it sees in pictures", usage))
    text_options(command("text", "which words speak for what a model answers", "TEXT ... --model MODEL [options]"))
    compile_options(command("compile", "a model and its explanation as one file", "MODEL --out x.onnx [options]"))
    batch_options(command("batch", "a folder of pictures explained by a package", "PACKAGE FOLDER --out DIR [options]"))
    serve_options(command("serve", "a package behind HTTP, in KServe's form", "PACKAGE [options]"))

    demo = command("demo", "the shipped networks on drawn scenes, offline", "[options]")
    demo.add_argument("--real", action="store_true", help="EfficientNet-Lite0 on photographs (extra 'models')")
    demo.add_argument("--scenes", type=positive, default=3, metavar="N", help="drawn scenes (default: 3)")
    demo.add_argument("--format", choices=FORMATS, default="png", help="of the picture (default: png)")
    demo.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="(default: out)")

    report = command("report", "every gate of a model and what becomes of it", "--model MODEL [options]")
    model_options(report)
    rules_options(report)
    report.add_argument("--json", action="store_true", help="print JSON")

    bench = command("bench", "what explaining costs on this machine, way by way", "--model MODEL [options]")
    model_options(bench)
    rules_options(bench)
    bench.add_argument("--device", default="cpu", help="(default: cpu)")
    bench.add_argument("--batch", type=positive, default=4, metavar="N", help="(default: 4)")
    bench.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="(default: float32)")
    bench.add_argument("--turns", type=positive, default=9, metavar="N", help="times each way is run (default: 9)")
    bench.add_argument("--peers", action="store_true", help=argparse.SUPPRESS)  # moved to bench/run.py

    completion = command("completion", "completion for a shell", 'SHELL, as in eval "$(sp-fx completion bash)"')
    completion.add_argument("shell", choices=("bash", "zsh", "tcsh"))
    for made in commands.choices.values():  # in the last group, where it takes one line
        made._action_groups[-1].add_argument("-h", "--help", action="help", help="show this text")
    return top


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    """Returns the parsed arguments. What a command does not take ends the process with the nearest option that it does."""
    parser = build_parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        (commands,) = (action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction))
        command = commands[args.command]
        near = difflib.get_close_matches(unknown[0].partition("=")[0], command._option_string_actions, 1)
        command.error(f"unrecognized arguments: {' '.join(unknown)}{f'; the nearest option is {near[0]}' if near else ''}")
    return args


def explain_options(parser: argparse.ArgumentParser) -> None:
    parser.description = "Why a model sees what it sees in pictures."
    model_options(parser)
    rules_options(parser, several=True)
    shown = parser.add_argument_group("what is explained")
    shown.add_argument("images", nargs="+", metavar="IMAGE", help="files, folders, 'photos/*.jpg'")
    shown.add_argument("--target", action="append", metavar="T", help="class numbers or names, or topN, with commas (top1)")
    shown.add_argument("--method", type=methods, action="extend", metavar="M", help=f"{', '.join(records.METHODS)}")
    shown.add_argument("--steps", type=positive, metavar="N", help="of ascend (default: 5)")
    shown.add_argument("--step-size", type=float, metavar="L", help="of ascend: L2 of pixels in [-1, 1] (20 at 224)")
    output = parser.add_argument_group("output")
    output.add_argument("--out", type=Path, required=True, metavar="DIR", help="of the figures and records")
    output.add_argument("--times-input", action="store_true", help="show each map times the pixels too")
    output.add_argument("--path", action="store_true", help="an ascent too, and its steps, also moving")
    moving = output.add_argument("--animation", choices=("webp", "gif"), metavar="F")
    moving.help = "of --path: webp (the default) or gif"
    output.add_argument("--format", choices=FORMATS, default="png", metavar="F", help=f"{', '.join(FORMATS)} (png)")
    output.add_argument("--json", action="store_true", help="print each picture's record, a line of JSON")
    output.add_argument("--batch-size", type=positive, default=8, metavar="N", help="pictures at once (default: 8)")
    output.add_argument("--device", type=device, default="cpu", metavar="D", help="cpu, cuda, cuda:1, mps (default: cpu)")


def text_options(parser: argparse.ArgumentParser) -> None:
    parser.description = "Which words of a text speak for what a model answers, and which against it."
    parser.add_argument("texts", nargs="+", metavar="TEXT", help="in quotes")
    name = parser.add_argument("--model", required=True, metavar="MODEL")
    name.help = "all_minilm_l6_v2, hf/NAME (a classifier, language model or encoder), module:function"
    parser.add_argument("--target", metavar="T", help="class or token (default: the predicted)")
    parser.add_argument("--to", metavar="TEXT", help="of an encoder: similarity to this text")
    rules_options(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--out", type=Path, metavar="FILE", help="a picture (.png, .svg, .pdf) or a page (.html)")
    output.add_argument("--json", action="store_true", help="print each text's record, a line of JSON")


def compile_options(parser: argparse.ArgumentParser) -> None:
    parser.description = "A model (`sp-fx --help` lists their names) and its explanation as one file."
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a name, module:function, a file")
    parser.add_argument("--model", dest="named", metavar="MODEL", help="the same, as the other commands have it")
    model_options(parser, named=False)
    rules_options(parser)
    made = parser.add_argument_group("package")
    made.add_argument("--out", type=package_name, required=True, metavar="FILE", help="*.onnx, or *.pt2, which is machine code")
    made.add_argument("--method", choices=records.METHODS, default="pullback", help="(default: pullback)")
    made.add_argument("--steps", type=positive, metavar="N", help="of ascend (default: 5)")
    made.add_argument("--step-size", type=float, metavar="L", help="of ascend: L2 of pixels in [-1, 1] (20 at 224)")
    made.add_argument("--batch", type=positive, default=4, metavar="N", help="the usual batch, or the fixed one (default: 4)")
    made.add_argument("--fixed-batch", action="store_true", help="for batches of this size alone")
    made.add_argument("--device", type=device, default="cpu", help="cpu, cuda, cuda:1 (default: cpu)")
    made.add_argument("--json", action="store_true", help="print the manifest as JSON, without the probe")


def batch_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("package", type=Path, metavar="PACKAGE", help="*.onnx or *.pt2, as `sp-fx compile` makes them")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="of pictures, folders in it too")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="results; the same command goes on in it")
    parser.add_argument("--target", metavar="T", help="a class's number or name (default: the predicted)")
    parser.add_argument("--batch", type=positive, default=8, metavar="N", help="pictures at once (default: 8)")
    parser.add_argument("--workers", type=positive, default=1, metavar="N", help="processes (default: 1)")
    parser.add_argument("--threads", type=positive, default=1, metavar="N", help="of each worker (default: 1)")
    parser.add_argument("--ray", action="store_true", help="the workers are actors of Ray (extra 'ray')")
    parser.add_argument("--device", help="such as cuda:1 (default: the package's)")
    parser.add_argument("--page", type=int, default=1000, metavar="N", help="pictures on index.html (default: 1000; 0: none)")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")


def serve_options(service: argparse.ArgumentParser) -> None:
    service.add_argument("package", type=Path, metavar="PACKAGE", help="*.onnx or *.pt2, as `sp-fx compile` makes them")
    service.add_argument("--name", help="of the model in addresses (default: the file's)")
    service.add_argument("--host", default="127.0.0.1", help="(default: 127.0.0.1, this machine alone)")
    service.add_argument("--port", type=port, default=8080, help="(default: 8080)")
    service.add_argument("--device", help="such as cuda:1 (default: the package's)")
    service.add_argument("--threads", type=positive, metavar="N", help="of ONNX Runtime for a batch (default: its own)")
    service.add_argument("--batch", type=positive, default=8, metavar="N", help="most samples run at once (default: 8)")
    service.add_argument("--queue", type=positive, default=256, metavar="N", help="most samples that wait (default: 256)")
    service.add_argument("--wait-ms", type=float, default=12.0, metavar="MS", help="for a batch to fill (default: 12)")
    service.add_argument("--timeout", type=float, default=30.0, metavar="S", help="of a request (default: 30)")
    service.add_argument("--max-body", type=positive, default=16, metavar="MIB", help="(default: 16)")
    service.add_argument("--max-pixels", type=positive, default=32 << 20, metavar="N", help="of a picture (default: 2**25)")


def model_options(parser: argparse.ArgumentParser, named: bool = True) -> None:
    group = parser.add_argument_group("model")
    if named:
        group.add_argument("--model", required=True, metavar="MODEL", help="a name, module:function, a file (sp-fx --help)")
    group.add_argument("--weights", type=Path, metavar="FILE", help="a state dict; its classes are counted")
    group.add_argument("--num-classes", type=positive, metavar="N", help="of the network that is made")
    group.add_argument("--class-names", type=Path, metavar="FILE", help="one name a line, or JSON")
    group.add_argument("--multi-label", action="store_true", help="classes do not exclude each other")
    group.add_argument("--input-size", type=positive, metavar="N", help="side of the square crop, in pixels")
    group.add_argument("--resize", type=positive, metavar="N", help="what the shorter side becomes before that")
    group.add_argument("--squash", action="store_true", help="no crop: whole pictures, made square")
    group.add_argument("--mean", type=numbers, metavar="M", help="of pixels, as 0.5 or 0.485,0.456,0.406")
    group.add_argument("--std", type=numbers, metavar="S", help="of pixels, likewise")
    group.add_argument("--pixels", type=numbers, metavar="L,H", help="black and white before that (0,1); --pixels=-1,1")
    group.add_argument("--trust-pickle", action="store_true", help="unpickle files: runs code of their makers")


def rules_options(parser: argparse.ArgumentParser, several: bool = False) -> None:
    group = parser.add_argument_group("gates")
    if several:
        rules = group.add_argument("--rules", type=several_rules, default=["default"], metavar="R")
        rules.help = "default, paper or frozen; default,paper compares"
    else:
        group.add_argument("--rules", choices=RULES, default="default", help="the temperatures to start from")
    group.add_argument("--temperature", type=temperature, action="append", default=[], metavar="G=T",
                       help="relu=1.0, 'layer4.*=0.3'; also none, frozen")  # fmt: skip


def options_of(args: argparse.Namespace) -> Options:
    """Returns what the options of a command say of its model."""
    pixels = args.pixels
    if pixels is not None and len(pixels) != 2:
        raise ValueError(f"--pixels takes two numbers, what the network takes for black and white; got {len(pixels)}")
    given = {field.name: getattr(args, field.name) for field in fields(Options)}
    return Options(**given | {"pixels": None if pixels is None else (pixels[0], pixels[1])})


def rules_of(name: str, temperatures: list[tuple[str, Any]]) -> Rules:
    """Returns the rules of that name with the temperatures that `--temperature` says, of kinds and of places."""
    kinds: dict[str, Any] = {gate: tau for gate, tau in temperatures if gate in KINDS}
    places = {gate: tau for gate, tau in temperatures if gate not in KINDS}
    start = RULES[name]()
    return replace(start, **kinds, overrides={**start.overrides, **places})


# -- types of arguments; argparse puts their names into its messages, as in "invalid positive value: 'x'"


def port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 65_536:
        raise argparse.ArgumentTypeError(f"a port is 1 to 65535, got {text!r}")
    return int(text)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}")
    return value


def numbers(text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers with commas between them, got {text!r}") from None
    if not all(map(math.isfinite, values)):
        raise argparse.ArgumentTypeError(f"expected finite numbers, got {text!r}")
    return values


def methods(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in records.METHODS:
            raise argparse.ArgumentTypeError(f"no method is called {name!r}; choices: {', '.join(records.METHODS)}")
    return names


def several_rules(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in RULES:
            raise argparse.ArgumentTypeError(f"no rules are called {name!r}; choices: {', '.join(RULES)}")
    if len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"the same rules twice: {text}")
    return names


def temperature(text: str) -> tuple[str, float | str | None]:
    gate, _, value = text.rpartition("=")
    try:
        tau = {"none": None, "frozen": "frozen", "smooth": "smooth"}[value] if value.isalpha() else float(value)
    except (KeyError, ValueError):
        gate, tau = "", None
    if not gate:
        expected = "expected GATE=T, such as relu=1.0 or 'layer4.*=0.3', with a number, none or frozen"
        raise argparse.ArgumentTypeError(f"{expected}; got {text!r}")
    return gate, tau


def package_name(text: str) -> Path:
    if not text.endswith((".onnx", ".pt2")):
        raise argparse.ArgumentTypeError(f"a package is called *.onnx or *.pt2, got {text!r}")
    return Path(text)


def device(text: str) -> torch.device:
    try:
        torch.zeros(1, device=text)
        return torch.device(text)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no device of this machine: {str(error).splitlines()[0]}") from None
