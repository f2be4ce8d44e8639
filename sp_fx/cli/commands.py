"""The commands of `sp-fx`, each a function of its parsed arguments that returns the exit status."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..build import transform
from ..figures.records import rules_record
from ..models.named import load_model
from ..rewrite.report import Report
from .explaining import noise, printed_to_stderr, run_explain, say_unused, takes_pixels
from .packing import run_batch, run_compile
from .parser import build_parser, options_of, parsed, rules_of
from .texts import run_text


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, 1 where a picture failed, 2 for a request that cannot be met, 130 where it was
    stopped by hand, 141 where nobody reads what it prints any more."""
    args = parsed(joined(sys.argv[1:] if argv is None else argv))
    unwatched()
    with warnings.catch_warnings():
        warnings.showwarning = shown(warnings.showwarning)
        try:
            status = COMMANDS[args.command](args)
            sys.stdout.flush()  # where nobody reads it, this shows here and not when Python ends
            return status
        except KeyboardInterrupt:
            print("sp-fx: stopped", file=sys.stderr)
            return 130
        except BrokenPipeError:
            with contextlib.suppress(OSError, ValueError):  # else Python says so once more when it ends
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        except ImportError as error:
            extra = EXTRAS.get((error.name or "").split(".")[0])
            hint = f"; this command needs an extra: pip install 'sp-fx[{extra}]'" if extra else ""
            print(f"sp-fx: {one_line(error)}{hint}", file=sys.stderr)
            return 2
        except (ValueError, IndexError, TypeError, RuntimeError, OSError) as error:
            notes = "".join(f" ({note})" for note in getattr(error, "__notes__", []) if note.startswith("raised by "))
            print(f"sp-fx: {one_line(error)}{notes}", file=sys.stderr)
            return 2


# The extra that brings a module. One of the user's own that is missing is no matter of theirs.
EXTRAS = {
    **dict.fromkeys(("torchvision", "timm", "PIL", "matplotlib", "safetensors", "shtab"), "vision"),
    **dict.fromkeys(("transformers", "huggingface_hub", "skimage", "efficientnet_lite_pytorch"), "models"),
    **dict.fromkeys(("onnx", "onnxscript", "onnxruntime"), "export"),
    **dict.fromkeys(("starlette", "uvicorn"), "serve"),
    "ray": "ray",
}


def unwatched() -> None:
    """No thread watches the bars of tqdm, which torch.fx makes too: where it ends while Python does, Python prints an error."""
    with contextlib.suppress(ImportError):
        from tqdm import tqdm

        tqdm.monitor_interval = 0


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def shown(otherwise: Callable[..., None]) -> Callable[..., None]:
    """Returns how warnings are printed: this package's own, which are for the user, as one line without a place in the code."""

    def show(message: Any, category: Any, filename: str, *more: Any) -> None:
        if category is UserWarning and Path(filename).is_relative_to(Path(__file__).parents[1]):
            print(f"sp-fx: {one_line(message)}", file=sys.stderr)
        else:
            otherwise(message, category, filename, *more)

    return show


def joined(argv: Sequence[str]) -> list[str]:
    """Returns the arguments with "--pixels -1,1" as "--pixels=-1,1", which argparse alone takes for an option."""
    made: list[str] = []
    for each in argv:
        if made and made[-1] in ("--pixels", "--mean", "--std") and re.match(r"-[\d.]", each):
            made[-1] += f"={each}"
        else:
            made.append(each)
    return made


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
    with printed_to_stderr(args.json):
        named = load_model(args.model, options_of(args), trained=False)
        with takes_pixels(named):
            explainer = transform(named.model, rules=rules_of(args.rules, args.temperature), example_inputs=noise(named, 2))
        say_unused(args, explainer)
        report = explainer.report()
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
    "text": run_text,
    "compile": run_compile,
    "batch": run_batch,
    "serve": run_serve,
    "demo": run_demo,
    "report": run_report,
    "bench": run_bench,
    "completion": run_completion,
}
