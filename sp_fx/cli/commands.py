"""The commands of `sp-fx`, each a function of its parsed arguments that returns the exit status."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from ..build import transform
from ..figures import records
from ..figures.drawing import save
from ..gates.rules import Rules
from ..methods.ascent import Ascent
from ..models.images import Picture, Preprocessing
from ..models.named import load_model, untrained
from ..version import __version__
from .parser import RULES, build_parser
from .progress import Progress


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, 1 where a picture failed, or 2 for a request that cannot be met."""
    args = build_parser().parse_args(argv)
    try:
        return COMMANDS[args.command](args)
    except (ValueError, IndexError, TypeError, RuntimeError, OSError) as error:
        print(f"sp-fx: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        extras = "'sp-fx[vision]', 'sp-fx[demo]' for the shipped networks, 'sp-fx[models]' for those in packages, 'sp-fx[serve]'"
        hint = f"this command needs an extra: pip install {extras}"
        print(f"sp-fx: {error}; {hint}", file=sys.stderr)
        return 2


def rules_of(args: argparse.Namespace) -> Rules:
    """Returns the rules that `--rules` and `--temperature` say."""
    return dataclasses.replace(RULES[args.rules](), **dict(args.temperature))


# -- commands


def run_serve(args: argparse.Namespace) -> int:
    from ..packages.package import load
    from ..serving.http import serve
    from ..serving.requests import Limits

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
    from ..figures.demo import run_demo, run_real

    path = run_real(args.out, args.format) if args.real else run_demo(args.out, args.scenes, args.format)
    print(f"wrote {path}")
    return 0


def run_bench(args: argparse.Namespace) -> int:
    from . import timing

    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("no CUDA device here: torch.cuda.is_available() is False; use --device cpu")
    named = load_model(args.model, args.weights, args.input_size) if args.weights else untrained(args.model)
    model, side = named.model.to(args.device, getattr(torch, args.dtype)), args.input_size or named.preprocessing.crop
    x = torch.rand(args.batch, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x, target = x.to(args.device, getattr(torch, args.dtype)), torch.zeros(args.batch, dtype=torch.long, device=args.device)
    if args.peers:
        command = f"python bench/run.py --networks {args.model} --peers"
        print(f"sp-fx: peers are timed by the repository's `{command}` now; here are our own ways", file=sys.stderr)
    timing.verify(model, x, target)
    ways = timing.ours(model, x, target, rules_of(args))
    print(f"{args.model}, batch {args.batch}, {side} x {side}, {args.dtype}, {torch.get_num_threads()} threads")
    print(timing.format_table(timing.measure(ways, x.device, args.turns)))
    return 0


def run_report(args: argparse.Namespace) -> int:
    named = load_model(args.model, args.weights, args.input_size) if args.weights else untrained(args.model)
    print(transform(named.model, rules=rules_of(args)).report())
    return 0


def run_explain(args: argparse.Namespace) -> int:
    named = load_model(args.model, args.weights, args.input_size)
    targets = records.parse_targets(args.target or ["top1"], named.labels)
    explainer = transform(named.model.to(args.device), rules=rules_of(args))
    side = named.preprocessing.crop
    length = Ascent(args.steps, args.step_size).length([torch.empty(1, 3, side, side)])
    ascent = {"steps": args.steps, "step_size": length, "bounds": (-1.0, 1.0)}
    methods = {name: ascent if name == "ascend" else {} for name in args.method or ["pullback"]}
    args.out.mkdir(parents=True, exist_ok=True)
    common = {
        **named.provenance(),
        "rules": records.rules_record(explainer.report().rules),
        "device": str(args.device),
        "versions": {"sp_fx": __version__, "torch": torch.__version__},
    }
    explain = functools.partial(
        records.explain_pictures, labels=named.labels, targets=targets, methods=methods, device=args.device,
        times_input=args.times_input,
    )  # fmt: skip
    progress, failed, taken = Progress(len(args.images)), 0, set[str]()
    for batch in batches(args.images, named.preprocessing, args.batch_size):
        readable = [(path, picture) for path, picture in batch if not isinstance(picture, Exception)]
        for path, error in batch:
            if isinstance(error, Exception):  # one damaged file does not stop the others
                progress.say(f"sp-fx: skipped {path}: {error}", sys.stderr)
                failed += 1
        pictures = [picture for _, picture in readable]
        results = explain(explainer, pictures) if pictures else []
        for (path, _), (record, figure) in zip(readable, results):
            name = free_name(path.stem, taken)
            out = args.out / f"{name}.{args.format}"
            record = {"image": path.name, "figure": out.name, **common, **record}
            save(figure, out, record)
            (args.out / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
            top = record["prediction"][0]
            progress.say(f"{path.name}: {top['label']} ({top['probability']:.2f}) -> {out}")
        progress.advance(len(batch))
    progress.end()
    if failed:
        print(f"sp-fx: {failed} of {len(args.images)} pictures could not be read", file=sys.stderr)
    return 1 if failed else 0


def batches(paths: Sequence[Path], preprocessing: Preprocessing, size: int) -> Iterator[list[tuple[Path, Picture | Exception]]]:
    """Yields the pictures at `paths`, `size` at a time, each with its path; where one cannot be read, its error."""
    for start in range(0, len(paths), size):
        batch: list[tuple[Path, Picture | Exception]] = []
        for path in paths[start : start + size]:
            try:
                batch.append((path, preprocessing(path)))
            except (OSError, ValueError) as error:
                batch.append((path, error))
        yield batch


def free_name(stem: str, taken: set[str]) -> str:
    """Returns `stem`, or `stem_2`, `stem_3`, ... where pictures of several folders share it, and adds it to `taken`."""
    name, number = stem, 1
    while name in taken:
        number += 1
        name = f"{stem}_{number}"
    taken.add(name)
    return name


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "explain": run_explain,
    "serve": run_serve,
    "demo": run_demo,
    "report": run_report,
    "bench": run_bench,
}
