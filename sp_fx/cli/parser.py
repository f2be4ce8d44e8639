"""The command line of `sp-fx`: its commands and their options."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ..figures import records
from ..gates.rules import KINDS, Rules
from ..version import __version__

FORMATS = ("png", "jpg", "webp", "pdf", "svg")
RULES = {"default": Rules, "paper": Rules.paper, "frozen": Rules.frozen}


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of `sp-fx COMMAND ...`."""
    top = argparse.ArgumentParser(prog="sp-fx", description="Explain image classifiers by semantic pullbacks.")
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("--model", required=True, metavar="NAME", help="of torchvision, timm/NAME, zoo/NAME, module:function")
    model.add_argument("--weights", type=Path, metavar="FILE", help="a state dict; without it the published one is downloaded")
    model.add_argument("--input-size", type=positive, metavar="N", help="side of the square crop (default: the model's own)")
    model.add_argument("--rules", choices=RULES, default="default", help="the temperatures to start from (default: default)")
    model.add_argument(
        "--temperature", type=temperature, action="append", default=[], metavar="KIND=T", help="of one kind of gate, as relu=1.0"
    )

    explain = commands.add_parser("explain", parents=[model], help="a picture and a record of why a model saw what it saw")
    explain.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    explain.add_argument(
        "--target", action="append", metavar="T", help="a class index or name, or topN; several with commas (default: top1)"
    )
    explain.add_argument(
        "--method",
        type=methods,
        action="extend",
        metavar="M",
        help=f"{', '.join(records.METHODS)}; several with commas (default: pullback)",
    )
    explain.add_argument("--steps", type=positive, default=5, help="of ascend (default: 5)")
    explain.add_argument("--step-size", type=float, help="of ascend: L2, pixels in [-1, 1] (default: 20 at 224)")
    explain.add_argument("--times-input", action="store_true", help="show each map times the pixels too")
    explain.add_argument("--batch-size", type=positive, default=8, metavar="N", help="pictures at once (default: 8)")
    explain.add_argument("--device", type=device, default="cpu", help="cpu, cuda, cuda:1, mps, ... (default: cpu)")
    explain.add_argument("--format", choices=FORMATS, default="png", help="of the figures (default: png)")
    explain.add_argument("--out", type=Path, required=True, metavar="DIR")

    service = commands.add_parser("serve", help="a package (.pt2, .onnx) behind HTTP, in KServe's form")
    service.add_argument("package", type=Path, metavar="PACKAGE")
    service.add_argument("--name", help="of the model in addresses (default: the file's, without its ending)")
    service.add_argument("--host", default="127.0.0.1", help="(default: 127.0.0.1, which other machines do not reach)")
    service.add_argument("--port", type=port, default=8080, help="(default: 8080)")
    service.add_argument("--device", help="such as cuda:1 (default: the package's)")
    service.add_argument("--threads", type=positive, metavar="N", help="of ONNX Runtime for a batch (default: its own)")
    service.add_argument("--batch", type=positive, default=8, metavar="N", help="most samples run at once (default: 8)")
    service.add_argument("--queue", type=positive, default=256, metavar="N", help="most samples that wait (default: 256)")
    service.add_argument("--wait-ms", type=float, default=12.0, metavar="MS", help="for a batch to fill (default: 12)")
    service.add_argument("--timeout", type=float, default=30.0, metavar="S", help="of a request (default: 30)")
    service.add_argument("--max-body", type=positive, default=16, metavar="MIB", help="(default: 16)")
    service.add_argument("--max-pixels", type=positive, default=32 << 20, metavar="N", help="of a picture (default: 2**25)")

    demo = commands.add_parser("demo", help="the shipped networks on drawn scenes, offline")
    demo.add_argument("--real", action="store_true", help="EfficientNet-Lite0 on photographs, from the extra 'models'")
    demo.add_argument("--scenes", type=positive, default=3, metavar="N")
    demo.add_argument("--format", choices=FORMATS, default="png", help="of the picture (default: png)")
    demo.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="(default: out)")

    commands.add_parser("report", parents=[model], help="every gate of a model and what becomes of it")

    bench = commands.add_parser("bench", parents=[model], help="what explaining costs on this machine, way by way")
    bench.add_argument("--device", default="cpu", help="(default: cpu)")
    bench.add_argument("--batch", type=positive, default=4, metavar="N", help="(default: 4)")
    bench.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="(default: float32)")
    bench.add_argument("--turns", type=positive, default=9, metavar="N", help="times each way is run (default: 9)")
    bench.add_argument("--peers", action="store_true", help=argparse.SUPPRESS)  # moved to bench/run.py
    return top


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


def methods(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in records.METHODS:
            raise argparse.ArgumentTypeError(f"no method is called {name!r}; choices: {', '.join(records.METHODS)}")
    return names


def temperature(text: str) -> tuple[str, float]:
    kind, _, value = text.partition("=")
    if kind not in KINDS:
        raise argparse.ArgumentTypeError(f"no kind of gate is called {kind!r}; choices: {', '.join(KINDS)}")
    try:
        return kind, float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected KIND=T, such as relu=1.0; got {text!r}") from None


def device(text: str) -> torch.device:
    try:
        torch.zeros(1, device=text)
        return torch.device(text)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no device of this machine: {str(error).splitlines()[0]}") from None
