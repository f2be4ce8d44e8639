"""Are the maps still the same, to the bit? `python bench/digests.py --out before.json` at one commit, and at another
`python bench/digests.py --against before.json`.

Digests (SHA-256) of everything that an explainer returns, its report, its outputs, its maps by default and frozen rules, are
taken of the golden networks, of the zoo, and of every network of `bench/zoo.py` (`--networks golden zoo torchvision timm`;
weights filled from a seed); of the first two also by the paper's rules and of all methods. Maps depend on the processor, the
number of threads and the version of torch, so a file of digests holds for one machine: run both commits on it, each in one
thread (`OMP_NUM_THREADS=1`). Rows are written as they come; a second call goes on where the first ended. Only public names of
`sp_fx` are used, so that this file runs in older checkouts too.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from provenance import provenance
from torch import Tensor, nn
from zoo import example, timm_models, torchvision_models, uninitialised

import sp_fx

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers import NETS, fill, golden

Case = Callable[[], tuple[nn.Module, Tensor, Any]]  # makes the network, its input and the target
RULES = {"default": sp_fx.Rules, "paper": sp_fx.Rules.paper, "frozen": sp_fx.Rules.frozen}


def digest(value: Any) -> str:
    """Returns the digest of the bytes of a tensor, or of how anything else prints."""
    if isinstance(value, Tensor):
        value = value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(value if isinstance(value, bytes) else str(value).encode()).hexdigest()[:16]


def golden_cases() -> Iterator[tuple[str, Case]]:
    """Yields the networks of tests/golden."""
    for name in NETS:

        def case(name: str = name) -> tuple[nn.Module, Tensor, Any]:
            model, data = golden(name)
            return model, data["input"], data["target"]

        yield f"golden/{name}", case


def zoo_cases() -> Iterator[tuple[str, Case]]:
    """Yields the trained networks that ship with the package, on three scenes."""
    from sp_fx import zoo

    for name in zoo.NAMES:
        yield f"zoo/{name}", lambda name=name: (zoo.load(name), *zoo.draw(7, 3)[:2])


def filled_cases(models: Iterator[tuple[str, str, Any]], library: str) -> Iterator[tuple[str, Case]]:
    """Yields networks of a library, filled from a seed, each with a random direction of its output as the target."""
    for _, name, build in models:

        def case(build: Any = build) -> tuple[nn.Module, Tensor, Any]:
            model = fill(build())
            x = example(model)
            with torch.no_grad():
                y = sp_fx.targets.primary(model(x))
            return model, x, torch.randn(y.shape, generator=torch.Generator().manual_seed(1))

        yield f"{library}/{name}", case


SOURCES: dict[str, Callable[[], Iterator[tuple[str, Case]]]] = {
    "golden": golden_cases,
    "zoo": zoo_cases,
    "torchvision": lambda: filled_cases(torchvision_models(), "torchvision"),
    "timm": lambda: filled_cases(timm_models(), "timm"),
}


def digests_of(model: nn.Module, x: Tensor, target: Any, tracer: str, small: bool) -> dict[str, str]:
    """Returns the digests of one network by name, such as "frozen pullback"; of a `small` one also those by the paper's rules
    and of the other methods."""
    row = {}
    for name, rules in RULES.items():
        if name == "paper" and not small:
            continue
        explainer = sp_fx.transform(model, rules=rules(), tracer=tracer, example_inputs=x)
        report = explainer.report()
        facts = [(s.place, s.op, s.kind, s.status, s.temperature, s.scale, s.opaque) for s in report.sites]
        row |= {f"{name} sites": digest(facts), f"{name} words": digest(str(report))}
        row[f"{name} pullback"] = digest(explainer.pullback(x, target))
        if name == "default":
            with torch.no_grad():
                row["outputs"] = digest(sp_fx.targets.primary(explainer(x)))
        if small:
            row[f"{name} double"] = digest(explainer.double_pullback(x, target))
            row[f"{name} ascend"] = digest(explainer.ascend(x, target, bounds=(-1.0, 1.0)))
            row[f"{name} calibrated"] = digest(explainer.calibrate(x).pullback(x, target))
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--tracer", choices=("auto", "export"), default="auto")
    parser.add_argument("--out", type=Path, help="where the digests go")
    parser.add_argument("--against", type=Path, help="digests to compare with, of another commit")
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--part", type=int, nargs=2, metavar=("K", "N"), default=(0, 1), help="every N-th network, from the K-th")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    uninitialised()
    rows: dict[str, Any] = json.loads(args.out.read_text())["rows"] if args.out and args.out.exists() else {}
    expected: dict[str, Any] = json.loads(args.against.read_text())["rows"] if args.against else {}
    started, different = time.perf_counter(), 0
    cases = [case for source in args.networks for case in SOURCES[source]()]
    for name, case in cases[args.part[0] :: args.part[1]]:
        verdict = "made"
        if name in rows:
            verdict = "from the earlier call"
        elif time.perf_counter() - started > 60 * args.minutes:
            continue
        else:
            try:
                rows[name] = digests_of(*case(), args.tracer, small=name.startswith(("golden", "zoo")))
            except Exception as error:  # the same error before and after is the same behaviour
                rows[name] = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
        if args.against:
            before = expected.get(name, {})
            changed = sorted(key for key in before | rows[name] if before.get(key) != rows[name].get(key))
            different += bool(changed)
            verdict = f"DIFFERENT: {', '.join(changed)}" if changed else "equal"
        print(f"{name:52} {verdict}", flush=True)
        if args.out:
            args.out.write_text(json.dumps({**provenance(), "tracer": args.tracer, "rows": rows}, indent=1) + "\n")
        gc.collect()
    if args.against:
        print(f"{len(rows) - different} of {len(rows)} equal")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
