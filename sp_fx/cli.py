"""The command `sp-fx`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .explainer import Explainer, transform
from .version import __version__

METHODS = ("pullback", "double_pullback", "ascend")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status is 0, 1 where a picture failed, or 2 for a request that cannot be met."""
    args = parser().parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, IndexError, TypeError, RuntimeError, OSError) as error:
        print(f"sp-fx: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(
            f"sp-fx: {error}; this command needs an extra: pip install 'sp-fx[vision]', or 'sp-fx[demo]' for the demo",
            file=sys.stderr,
        )
        return 2


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="sp-fx", description="Explain image classifiers by semantic pullbacks.")
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("--model", required=True, metavar="NAME", help="a torchvision classification model, or timm/NAME")
    model.add_argument("--weights", type=Path, metavar="FILE", help="a state dict; without it the published one is downloaded")
    model.add_argument("--input-size", type=positive, metavar="N", help="side of the square crop (default: the model's own)")

    explain = commands.add_parser("explain", parents=[model], help="a picture and a record of why a model saw what it saw")
    explain.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    explain.add_argument("--target", type=target_of, metavar="INDEX|top3", help="a class index, or topN (default: top1)")
    explain.add_argument("--method", choices=METHODS, default="pullback")
    explain.add_argument("--steps", type=positive, default=5, help="of ascend (default: 5)")
    explain.add_argument("--step-size", type=float, help="of ascend: L2, pixels in [-1, 1] (default: 20 at 224)")
    explain.add_argument("--out", type=Path, required=True, metavar="DIR")
    explain.set_defaults(run=run_explain)

    demo = commands.add_parser("demo", help="the shipped networks on drawn scenes, offline")
    demo.add_argument("--scenes", type=positive, default=3, metavar="N")
    demo.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="(default: out)")
    demo.set_defaults(run=run_demo)

    report = commands.add_parser("report", parents=[model], help="every gate of a model and what becomes of it")
    report.set_defaults(run=run_report)
    return top


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}")
    return value


def target_of(text: str) -> tuple[str, int]:
    """`("top", N)` or `("index", N)`."""
    kind, digits = ("top", text[3:]) if text.startswith("top") else ("index", text)
    if not digits.isdecimal() or (kind == "top" and int(digits) < 1):
        raise argparse.ArgumentTypeError(f"expected a class index, or topN such as top3; got {text!r}")
    return kind, int(digits)


def run_demo(args: argparse.Namespace) -> int:
    from .demo import run_demo

    print(f"wrote {run_demo(args.out, args.scenes)}")
    return 0


def run_report(args: argparse.Namespace) -> int:
    from .models import load_model, untrained

    named = load_model(args.model, args.weights, args.input_size) if args.weights else untrained(args.model)
    print(transform(named.model).report())
    return 0


def run_explain(args: argparse.Namespace) -> int:
    from .models import load_model

    named = load_model(args.model, args.weights, args.input_size)
    explainer = transform(named.model)
    args.out.mkdir(parents=True, exist_ok=True)
    versions = {"sp_fx": __version__, "torch": torch.__version__}
    common = {**named.provenance(), "rules": str(explainer.report().rules), "versions": versions}
    failed, taken = 0, set[str]()
    for path in args.images:
        try:
            pixels = named.preprocessing(path)
        except (OSError, ValueError) as error:  # one damaged file does not stop the others
            print(f"sp-fx: skipped {path}: {error}", file=sys.stderr)
            failed += 1
            continue
        name = path.stem if path.stem not in taken else f"{path.stem}_{len(taken)}"
        taken.add(name)
        record = {"image": path.name, **common, **explain_one(explainer, pixels, named.labels, args, args.out / f"{name}.png")}
        (args.out / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
        top = record["prediction"][0]
        print(f"{path.name}: {top['label']} ({top['probability']:.2f}) -> {args.out / name}.png")
    if failed:
        print(f"sp-fx: {failed} of {len(args.images)} pictures could not be read", file=sys.stderr)
    return 1 if failed else 0


def explain_one(
    explainer: Explainer, pixels: Tensor, labels: Sequence[str] | None, args: argparse.Namespace, out: Path
) -> dict[str, Any]:
    """Explain one picture [3, H, W], write the figure, and return what the record says of it."""
    from .plot import explanation

    x = pixels[None]
    with torch.no_grad():
        probabilities = explainer(x).softmax(-1)[0]

    def named(index: int) -> dict[str, Any]:
        known = labels is not None and len(labels) == len(probabilities)
        label = labels[index] if known and labels is not None else f"class {index}"
        return {"index": index, "label": label, "probability": round(float(probabilities[index]), 6)}

    ranking = probabilities.argsort(descending=True).tolist()
    kind, number = args.target or ("top", 1)
    targets = ranking[:number] if kind == "top" else [number]
    options: dict[str, Any] = {}
    if args.method == "ascend":
        options = {"steps": args.steps, "step_size": args.step_size, "bounds": (-1.0, 1.0)}
    started = time.perf_counter()
    maps = getattr(explainer, args.method)(x, torch.tensor([targets]), **options)[0]
    seconds = time.perf_counter() - started

    told = [named(index) for index in targets]
    prediction = [named(index) for index in ranking[:5]]
    titles = [f"{args.method}: {t['label']} ({t['probability']:.2f})" for t in told]
    unit = "change of the pixels, summed over channels" if args.method == "ascend" else "pullback, summed over channels"
    caption = f"predicted: {prediction[0]['label']} ({prediction[0]['probability']:.2f})"
    figure = explanation(pixels, list(maps), titles, caption, unit)
    figure.savefig(out)
    return {
        "prediction": prediction,
        "method": {"name": args.method, **options},
        "targets": [{**t, "map_l2": float(map.norm())} for t, map in zip(told, maps)],
        "figure": out.name,
        "seconds": round(seconds, 4),
    }


if __name__ == "__main__":
    sys.exit(main())
