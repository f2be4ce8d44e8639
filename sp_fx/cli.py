"""The command `sp-fx`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from . import records
from .ascent import Ascent
from .images import Picture, Preprocessing
from .make import transform
from .models import load_model, untrained
from .plot import save
from .rules import KINDS, Rules
from .version import __version__

FORMATS = ("png", "jpg", "webp", "pdf", "svg")
RULES = {"default": Rules, "paper": Rules.paper, "frozen": Rules.frozen}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status is 0, 1 where a picture failed, or 2 for a request that cannot be met."""
    args = parser().parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, IndexError, TypeError, RuntimeError, OSError) as error:
        print(f"sp-fx: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        hint = "this command needs an extra: pip install 'sp-fx[vision]', 'sp-fx[demo]' for the shipped networks, 'sp-fx[serve]'"
        print(f"sp-fx: {error}; {hint}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="sp-fx", description="Explain image classifiers by semantic pullbacks.")
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("--model", required=True, metavar="NAME", help="a torchvision classification model, timm/NAME or zoo/NAME")
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
    explain.add_argument("--batch-size", type=positive, default=8, metavar="N", help="pictures at once (default: 8)")
    explain.add_argument("--device", type=device, default="cpu", help="cpu, cuda, cuda:1, mps, ... (default: cpu)")
    explain.add_argument("--format", choices=FORMATS, default="png", help="of the figures (default: png)")
    explain.add_argument("--out", type=Path, required=True, metavar="DIR")
    explain.set_defaults(run=run_explain)

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
    service.set_defaults(run=run_serve)

    demo = commands.add_parser("demo", help="the shipped networks on drawn scenes, offline")
    demo.add_argument("--scenes", type=positive, default=3, metavar="N")
    demo.add_argument("--format", choices=FORMATS, default="png", help="of the picture (default: png)")
    demo.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="(default: out)")
    demo.set_defaults(run=run_demo)

    report = commands.add_parser("report", parents=[model], help="every gate of a model and what becomes of it")
    report.set_defaults(run=run_report)

    bench = commands.add_parser("bench", parents=[model], help="what explaining costs on this machine, way by way")
    bench.add_argument("--device", default="cpu", help="(default: cpu)")
    bench.add_argument("--batch", type=positive, default=4, metavar="N", help="(default: 4)")
    bench.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="(default: float32)")
    bench.add_argument("--turns", type=positive, default=9, metavar="N", help="times each way is run (default: 9)")
    bench.add_argument("--peers", action="store_true", help="also Captum, pytorch-grad-cam and Zennit, where installed")
    bench.set_defaults(run=run_bench)
    return top


# -- arguments


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


def rules_of(args: argparse.Namespace) -> Rules:
    return dataclasses.replace(RULES[args.rules](), **dict(args.temperature))


# -- commands


def run_serve(args: argparse.Namespace) -> int:
    from .package import load
    from .serve import Limits, serve

    limits = Limits(
        body=args.max_body << 20,
        pixels=args.max_pixels,
        queue=args.queue,
        batch=args.batch,
        wait=args.wait_ms / 1000,
        timeout=args.timeout,
    )
    program, name = load(args.package, device=args.device, threads=args.threads), args.name or args.package.stem
    print(f"sp-fx: {name} at http://{args.host}:{args.port}/v1/models/{name}:explain", flush=True)
    serve(program, name, args.host, args.port, limits)
    return 0


def run_demo(args: argparse.Namespace) -> int:
    from .demo import run_demo

    print(f"wrote {run_demo(args.out, args.scenes, args.format)}")
    return 0


def run_bench(args: argparse.Namespace) -> int:
    from . import timing

    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("no CUDA device here: torch.cuda.is_available() is False; use --device cpu")
    named = load_model(args.model, args.weights, args.input_size) if args.weights else untrained(args.model)
    model, side = named.model.to(args.device, getattr(torch, args.dtype)), args.input_size or named.preprocessing.crop
    x = torch.rand(args.batch, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x, target = x.to(args.device, getattr(torch, args.dtype)), torch.zeros(args.batch, dtype=torch.long, device=args.device)
    timing.verify(model, x, target)
    ways = [*timing.ours(model, x, target, rules_of(args)), *(timing.peers(model, x, target) if args.peers else [])]
    print(f"{args.model}, batch {args.batch}, {side} x {side}, {args.dtype}, {torch.get_num_threads()} threads")
    print(timing.table(timing.measure(iter(ways), x.device, args.turns)))
    return 0


def run_report(args: argparse.Namespace) -> int:
    named = load_model(args.model, args.weights, args.input_size) if args.weights else untrained(args.model)
    print(transform(named.model, rules=rules_of(args)).report())
    return 0


def run_explain(args: argparse.Namespace) -> int:
    named = load_model(args.model, args.weights, args.input_size)
    targets = records.wanted(args.target or ["top1"], named.labels)
    explainer = transform(named.model.to(args.device), rules=rules_of(args))
    side = named.preprocessing.crop
    length = Ascent(args.steps, args.step_size).length([torch.empty(1, 3, side, side)])
    ascent = {"steps": args.steps, "step_size": length, "bounds": (-1.0, 1.0)}
    chosen = {name: ascent if name == "ascend" else {} for name in args.method or ["pullback"]}
    args.out.mkdir(parents=True, exist_ok=True)
    common = {
        **named.provenance(),
        "rules": records.described(explainer.report().rules),
        "device": str(args.device),
        "versions": {"sp_fx": __version__, "torch": torch.__version__},
    }
    progress, failed, taken = Progress(len(args.images)), 0, set[str]()
    for batch in batches(args.images, named.preprocessing, args.batch_size):
        read = [(path, picture) for path, picture in batch if not isinstance(picture, Exception)]
        for path, error in batch:
            if isinstance(error, Exception):  # one damaged file does not stop the others
                progress.say(f"sp-fx: skipped {path}: {error}", sys.stderr)
                failed += 1
        found = records.explain(explainer, [p for _, p in read], named.labels, targets, chosen, args.device) if read else []
        for (path, _), (record, figure) in zip(read, found):
            name = free_name(path.stem, taken)
            out = args.out / f"{name}.{args.format}"
            full = {"image": path.name, "figure": out.name, **common, **record}
            save(figure, out, full)
            (args.out / f"{name}.json").write_text(json.dumps(full, indent=2) + "\n")
            top = record["prediction"][0]
            progress.say(f"{path.name}: {top['label']} ({top['probability']:.2f}) -> {out}")
        progress.advance(len(batch))
    progress.end()
    if failed:
        print(f"sp-fx: {failed} of {len(args.images)} pictures could not be read", file=sys.stderr)
    return 1 if failed else 0


def batches(paths: Sequence[Path], preprocessing: Preprocessing, size: int) -> Iterator[list[tuple[Path, Picture | Exception]]]:
    """The pictures at `paths`, `size` at a time, or what is wrong with them."""
    for start in range(0, len(paths), size):
        batch: list[tuple[Path, Picture | Exception]] = []
        for path in paths[start : start + size]:
            try:
                batch.append((path, preprocessing(path)))
            except (OSError, ValueError) as error:
                batch.append((path, error))
        yield batch


def free_name(stem: str, taken: set[str]) -> str:
    """`stem`, or `stem_2`, `stem_3`, ... where pictures of several folders share it."""
    name, number = stem, 1
    while name in taken:
        number += 1
        name = f"{stem}_{number}"
    taken.add(name)
    return name


class Progress:
    """A bar on stderr, where that is a terminal and there are several things to do; lines are printed above it."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.started = total, 0, time.perf_counter()
        self.shown = total > 1 and sys.stderr.isatty()
        self._draw()

    def say(self, line: str, file: Any = None) -> None:
        self._clear()
        print(line, file=file or sys.stdout, flush=self.shown)
        self._draw()

    def advance(self, count: int) -> None:
        self.done += count
        self._draw()

    def end(self) -> None:
        self._clear()

    def _draw(self) -> None:
        if self.shown:
            filled, spent = 30 * self.done // self.total, time.perf_counter() - self.started
            left = f", {spent / self.done * (self.total - self.done):.0f} s left" if self.done else ""
            print(f"\r[{'#' * filled:30}] {self.done}/{self.total}{left}\033[K", end="", file=sys.stderr, flush=True)

    def _clear(self) -> None:
        if self.shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
