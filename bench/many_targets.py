"""What do many targets from one forward cost against single calls? `python bench/many_targets.py [--targets 20] [--out FILE]`.

The ways take turns; the table gives medians. Maps that differ, or a model that runs more than once, are not timed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from cases import network
from provenance import provenance

import sp_fx
from sp_fx.cli import timing


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="resnet18")
    parser.add_argument("--targets", type=int, default=20)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    explainer = sp_fx.transform(network(args.network))
    x = torch.randn(args.batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(args.targets).expand(args.batch, -1)

    def single() -> torch.Tensor:
        return torch.stack([explainer.pullback(x, targets[:, k]) for k in range(args.targets)], 1)

    ways = {"single calls": single}
    for chunk in (None, 10, 5, 2):
        ways[f"one forward, chunk={chunk}"] = lambda chunk=chunk: explainer.pullback(x, targets, chunk=chunk)

    runs: list[int] = []
    handle = next(m for _, m in explainer.named_children()).register_forward_hook(lambda *_: runs.append(1))
    many = explainer.pullback(x, targets)
    handle.remove()
    expected = single()
    error = ((many - expected).flatten(2).norm(dim=2) / expected.flatten(2).norm(dim=2)).max().item()
    if len(runs) != 1 or error > 1e-5:
        print(f"the model ran {len(runs)} times and the maps differ by {error:.1e}: not timed", file=sys.stderr)
        return 1

    rows = timing.measure(iter((way, lambda run=run: run) for way, run in ways.items()), x.device, args.repeats)
    median = {row.way: row.median_s for row in rows}
    ratios = {way: seconds / median["single calls"] for way, seconds in median.items()}
    for way, seconds in median.items():
        print(f"{way:26} {1e3 * seconds:8.0f} ms  {ratios[way]:.2f} of single calls")
    if args.out:
        options = {name: getattr(args, name) for name in ("network", "targets", "batch", "repeats")}
        record = {**provenance(), **options, "forwards": len(runs), "error": error, "median_s": median, "ratio": ratios}
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
