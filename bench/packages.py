"""Do packages return what the explainers they were made from return, and at what cost?

    python bench/packages.py --out bench/results/packages.json                                  # every network, both formats
    python bench/packages.py --networks resnet18 --formats .onnx --out bench/results/packages.json
    python bench/packages.py --speed --networks resnet18 --out bench/results/packages.json

For each network and format: the relative L2 distance of logits and maps from the eager explainer at batch 1, 4 and 7, the file's
size, and the seconds that saving and loading took. With `--speed`, at batch 4, the `.pt2` beside the program in process, and ONNX
Runtime's explanation beside its own forward. Weights are drawn from a seed, the zoo's are trained. Results are added to those
that `--out` holds, a network and format at a time. The exit status is 1 where a bound is not kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from cases import NETWORKS as SIZES
from cases import network, noise
from provenance import provenance
from torch import Tensor, nn

import sp_fx
from sp_fx.packages import onnx as package_onnx
from sp_fx.program import compiling
from sp_fx.program.program import Program

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers import fill

NETWORKS = (
    *("zoo/residual_cnn", "zoo/pyramid_transformer", "resnet18", "resnet50", "squeezenet1_0"),
    *("timm/pvt_v2_b1", "timm/vit_tiny_patch16_224", "convnext_tiny"),
)
BATCHES, BOUND, SPEED_BOUND = (1, 4, 7), 1e-4, {".pt2": 1.1, ".onnx": 3.5}
SPEED_BATCH = 4


def model_of(name: str) -> nn.Module:
    """Returns a network. Fresh weights have layer scales of 1e-6 and zero heads, which would hide whole blocks: they are filled
    from a seed."""
    return network(name) if name.startswith("zoo/") else fill(network(name))


def relative(result: Tensor, expected: Tensor) -> float:
    """Returns the relative L2 distance."""
    return ((result - expected).norm() / expected.norm()).item()


def uncompiled(explainer: sp_fx.Explainer, x: Tensor) -> Program:
    """Returns the program that is saved: its graph, without what Inductor makes of it for this process in minutes more."""
    inductor, compiling.compiled = compiling.compiled, lambda graph, example: graph
    try:
        return explainer.compile(example_inputs=x)
    finally:
        compiling.compiled = inductor


def parity(name: str, suffix: str) -> dict[str, Any]:
    """Returns the row of one network and format: distances, size, seconds."""
    explainer = sp_fx.transform(model_of(name))
    x = noise(max(BATCHES), SIZES.get(name, 224), torch.float32, "cpu").clamp(-1, 1)
    program = uncompiled(explainer, x[:2])
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        path = program.save(Path(folder) / f"package{suffix}")
        saved = time.perf_counter()
        loaded = sp_fx.load(path)
        ready = time.perf_counter()
        distances = {}
        for batch in BATCHES:
            outputs, maps = loaded(x[:batch])
            eager = explainer(x[:batch]).detach(), explainer.pullback(x[:batch])
            distances[batch] = {"outputs": relative(outputs, eager[0]), "maps": relative(maps, eager[1])}
        size = path.stat().st_size
    worst = max(max(d.values()) for d in distances.values())
    took = f"saved in {saved - started:5.1f} s, loaded in {ready - saved:4.2f} s"
    print(f"{name:26} {suffix:5}  relative {worst:.1e}  {size / 2**20:6.1f} MiB  {took}", flush=True)
    return {"relative": distances, "worst": worst, "bytes": size, "save_s": saved - started, "load_s": ready - saved}


def speed(name: str, suffix: str, turns: int) -> dict[str, Any]:
    """Returns the medians, in turns, of the package and of what it is compared with: the program in process (.pt2), or the
    forward by ONNX Runtime (.onnx)."""
    model = model_of(name)
    x = noise(SPEED_BATCH, SIZES.get(name, 224), torch.float32, "cpu").clamp(-1, 1)
    target = torch.arange(SPEED_BATCH)
    explainer = sp_fx.transform(model)
    program = explainer.compile(example_inputs=x) if suffix == ".pt2" else uncompiled(explainer, x)
    with tempfile.TemporaryDirectory() as folder:
        loaded = sp_fx.load(program.save(Path(folder) / f"package{suffix}"))
        if suffix == ".pt2":
            ways = {"package": lambda: loaded(x, target), "program in process": lambda: program(x, target)}
        else:
            with torch.no_grad():
                exported = torch.onnx.export(model, (x,), dynamo=True, opset_version=package_onnx.OPSET, verbose=False)
            forward = onnxruntime.InferenceSession(exported.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
            feed = {forward.get_inputs()[0].name: x.numpy()}
            assert relative(torch.from_numpy(forward.run(None, feed)[0]), model(x).detach()) <= BOUND
            ways = {"package": lambda: loaded(x, target), "forward by ONNX Runtime": lambda: forward.run(None, feed)}
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(turns + 2):
            for way, run in ways.items():
                started = time.perf_counter()
                run()
                if turn > 1:
                    seconds[way].append(time.perf_counter() - started)
    median = {way: statistics.median(times) for way, times in seconds.items()}
    package, other = median.values()
    both = ", ".join(f"{way} {1e3 * middle:.1f} ms" for way, middle in median.items())
    print(f"{name:26} {suffix:5}  {both}, ratio {package / other:.2f}", flush=True)
    return {"batch": SPEED_BATCH, "turns": turns, "median_s": median, "ratio": package / other}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--formats", nargs="+", choices=[".onnx", ".pt2"], default=[".onnx", ".pt2"])
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    kind = "speed" if args.speed else "parity"
    record: dict[str, Any] = {"bound": BOUND, "speed_bounds": SPEED_BOUND, "parity": [], "speed": []}
    kept = True
    for name in args.networks:
        for suffix in args.formats:
            row = speed(name, suffix, args.turns) if args.speed else parity(name, suffix)
            kept &= row["ratio"] <= SPEED_BOUND[suffix] if args.speed else row["worst"] <= BOUND
            if args.out:  # read anew, since another network may have been added meanwhile
                record |= json.loads(args.out.read_text()) if args.out.exists() else {}
                key = {"network": name, "format": suffix}
                made_by = {**provenance(), "onnxruntime": onnxruntime.__version__}
                record[kind] = [r for r in record[kind] if not key.items() <= r.items()] + [{**key, **row, **made_by}]
                record[kind].sort(key=lambda r: (NETWORKS.index(r["network"]) if r["network"] in NETWORKS else 99, r["format"]))
                args.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
