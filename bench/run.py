"""Time explanations side by side: `python bench/run.py [--networks resnet50 ...] [--batch 4] [--repeats 9] [--out FILE]`.

The ways take turns, so that a slow minute of the machine falls on all of them; the table gives medians, their spread, and ratios
within the run. A result that is wrong is not timed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from cases import NETWORKS, correct, eager, network

import sp_fx


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    model = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")
    ]
    return f"{model[0] if model else platform.machine()}, {torch.get_num_threads()} threads"


def seconds(ways, repeats: int, device: str) -> dict[str, list[float]]:
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, run in ways.items():
            started = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn:  # the first turn warms up
                taken[name].append(time.perf_counter() - started)
    return taken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here; use --device cpu", file=sys.stderr)
        return 2

    rows = []
    print(f"{'network':16} {'way':26} {'median ms':>10} {'spread':>14} {'x forward':>10} {'x gradient':>11} {'x pullback':>11}")
    for name in args.networks:
        model = network(name).to(args.device)
        x = torch.randn(args.batch, 3, 224, 224, generator=torch.Generator().manual_seed(0)).to(args.device)
        target = torch.arange(args.batch, device=args.device)
        if not correct(model, x, target):
            print(f"{name}: the result is wrong, and is not timed", file=sys.stderr)
            return 1
        taken = seconds(eager(model, x, target), args.repeats, args.device)
        median = {way: statistics.median(times) for way, times in taken.items()}
        for way, times in taken.items():
            ratios = {base: median[way] / median[base] for base in ("forward", "gradient", "pullback")}
            rows.append(
                {"network": name, "way": way, "median_s": median[way], "min_s": min(times), "max_s": max(times), **ratios}
            )
            spread = f"{1e3 * min(times):.0f}-{1e3 * max(times):.0f}"
            print(f"{name:16} {way:26} {1e3 * median[way]:10.1f} {spread:>14} " + " ".join(f"{r:10.2f}" for r in ratios.values()))
    record = {
        "date": datetime.date.today().isoformat(),
        "device": device_name(args.device),
        "versions": {"sp_fx": sp_fx.__version__, "torch": torch.__version__},
        "batch": args.batch,
        "repeats": args.repeats,
        "rows": rows,
    }
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
