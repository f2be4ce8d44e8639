"""Time explanations side by side.

    python bench/run.py                                    # CPU: the networks of the table, batch 1 and 4, float32
    python bench/run.py --quick                            # resnet18 at 64 x 64, a minute
    python bench/run.py --networks resnet50 --peers --out bench/results/speed_cpu.json --plot bench/results/speed_cpu.png
    python bench/run.py --device cuda --peers --scaling --out bench/results/speed_cuda.json     # everything a GPU has to show

The ways take turns, so that a slow minute of the machine falls on all of them; the table gives medians, quartiles, peak memory,
what compiling took, and ratios within the run. A result that is wrong is not timed. On CUDA it goes through batch 1, 8 and 64, in
float32 and bfloat16 (channels_last), and adds the kernels' share of the copy bandwidth. Results are added to those that `--out`
holds already, a network, batch and dtype at a time.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from cases import DTYPES, NETWORKS, UnknownNetwork, network, noise
from peers import peers
from provenance import provenance

from sp_fx.cli import timing


def one(
    name: str, size: int, batch: int, dtype: torch.dtype, device: str, turns: int, with_peers: bool, wanted: Callable[[str], bool]
) -> list[dict]:
    torch.compiler.reset()  # else Dynamo refuses the ninth size or ResNet of a process, and all of them stay in memory
    model = network(name).to(device, dtype)
    x, target = noise(batch, size, dtype, device), torch.arange(batch, device=device)
    if dtype == torch.bfloat16:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    timing.verify(model, x, target)
    ways = list(timing.ours(model, x, target)) + (list(peers(model, x, target)) if with_peers else [])
    ways = [(way, make) for way, make in ways if way == timing.FORWARD or wanted(way)]
    rows = timing.measure(iter(ways), x.device, turns)
    print(f"\n{name}, batch {batch}, {size} x {size}, {str(dtype)[6:]}\n{timing.format_table(rows)}", flush=True)
    return [row.record() for row in rows]


def scaling(device: str, turns: int) -> Iterator[dict]:
    """Cost against batch, resolution and depth, a point at a time."""
    points = [("batch", n, ("resnet18", 112, n)) for n in ((1, 2, 4, 8) if device == "cpu" else (1, 4, 16, 64, 256))]
    points += [("resolution", s, ("resnet18", s, 2)) for s in (64, 128, 192, 256)]
    points += [("depth", int(n[6:]), (n, 112, 2)) for n in ("resnet18", "resnet34", "resnet50", "resnet101")]
    for axis, value, (name, size, batch) in points:
        for row in one(name, size, batch, torch.float32, device, turns, False, timing.PROGRAM.__eq__):
            yield {"axis": axis, "value": value, "network": name, **row}


def key(entry: dict) -> tuple:
    return tuple(entry[k] for k in ("network", "size", "batch", "dtype"))


def plot(record: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = [r for r in record["results"] if any(row["x_forward"] for row in r["rows"])]
    order = list(NETWORKS)
    results.sort(key=lambda r: (order.index(r["network"]) if r["network"] in order else len(order), r["batch"]), reverse=True)
    axes = sorted({p["axis"] for p in record["scaling"]})
    figure, panels = plt.subplots(
        1, 1 + len(axes), figsize=(7 + 3.4 * len(axes), 0.9 + 0.55 * max(len(results), 4)), squeeze=False
    )
    ways = [timing.PROGRAM, "pullback, eager", "gradient, eager", "gradient, compiled"]
    colours = ["#0072B2", "#56B4E9", "#D55E00", "#E69F00"]  # Okabe and Ito's, safe for the colour-blind
    for i, (way, colour) in enumerate(zip(ways, colours)):
        for j, r in enumerate(results):
            value = next((row["x_forward"] for row in r["rows"] if row["way"] == way and row["x_forward"]), None)
            if value:
                panels[0, 0].barh(j + 0.2 * (1.5 - i), value, 0.2, color=colour)
    panels[0, 0].set_yticks(range(len(results)), [f"{r['network']}, batch {r['batch']}" for r in results])
    panels[0, 0].axvline(2, color="black", linewidth=0.8, linestyle=":")
    panels[0, 0].set(xlabel="times the compiled forward (dotted: 2)", title="One explanation")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in colours]
    panels[0, 0].legend(handles, ways, fontsize=8, loc="lower center", bbox_to_anchor=(0.4, 1.03), ncols=2)
    panels[0, 0].margins(y=0.01)
    for panel, axis in zip(panels[0, 1:], axes):
        for way, colour in ((timing.PROGRAM, "#0072B2"), (timing.FORWARD, "black")):
            points = [p for p in record["scaling"] if p["axis"] == axis and p["way"] == way]
            panel.plot([p["value"] for p in points], [1e3 * p["median_s"] for p in points], "o-", color=colour, label=way)
        panel.set(xlabel=axis, ylabel="ms", title=f"Cost against {axis}")
        panel.legend(fontsize=8)
    figure.tight_layout()
    made_by = [{k: r[k] for k in ("network", "batch", "date", "device", "versions")} for r in results]
    figure.savefig(path, dpi=110, metadata={"Comment": json.dumps(made_by)})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), help="none: with --scaling, that alone")
    parser.add_argument("--batch", type=int, nargs="+")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES))
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--peers", action="store_true", help="time Captum, pytorch-grad-cam and Zennit on the same work")
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="ways named so, and the compiled forward")
    parser.add_argument("--scaling", action="store_true", help="cost against batch, resolution and depth")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    cuda = args.device == "cuda"
    if cuda and not torch.cuda.is_available():
        print("no CUDA device here: torch.cuda.is_available() is False; use --device cpu", file=sys.stderr)
        return 2
    networks, batches = (["resnet18"], [2]) if args.quick else (args.networks, args.batch or ([1, 8, 64] if cuda else [1, 4]))
    dtypes = args.dtype or (["float32", "bfloat16"] if cuda else ["float32"])

    record: dict[str, Any] = {"results": [], "scaling": [], "kernels": []}
    if args.out and args.out.exists():
        record |= json.loads(args.out.read_text())
    made_by = provenance(args.device)

    def wanted(way: str) -> bool:
        return any(text in way for text in args.only)

    def keep() -> None:
        if args.out:
            args.out.write_text(json.dumps(record, indent=1) + "\n")
        if args.plot:
            plot(record, args.plot)

    if cuda:
        import kernel_cases

        record["kernels"] = [{**row, **made_by} for row in kernel_cases.bandwidth()]
        keep()
    for name in networks:
        size = 64 if args.quick else NETWORKS.get(name, 224)
        for batch in batches:
            for dtype in dtypes:
                entry = {"network": name, "size": size, "batch": batch, "dtype": dtype, **made_by}
                try:
                    entry["rows"] = one(name, size, batch, DTYPES[dtype], args.device, args.turns, args.peers, wanted)
                except ArithmeticError as error:
                    print(f"{name}: {error}; it is not timed", file=sys.stderr)
                    return 1
                except UnknownNetwork as error:
                    print(f"run: {error}", file=sys.stderr)
                    return 2
                record["results"] = [r for r in record["results"] if key(r) != key(entry)] + [entry]
                keep()
    if args.scaling:
        record["scaling"] = []
        for row in scaling(args.device, args.turns):
            record["scaling"].append({**row, **made_by})
            keep()
    return 0


if __name__ == "__main__":
    sys.exit(main())
