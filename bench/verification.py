"""What does it cost that a capture is verified?

    python bench/verification.py [--networks ...] [--out bench/results/verification.json]

`transform` with an example, verified (`verify=True`), by its forward alone, and not at all, in turns, the quickest of each; and
the model's own forward and gradient on that example, the units that the difference is given in. A verification runs the model and
the graph once each, forward and back; the runs on fake tensors, which have shapes and no numbers, are in all three. The exit
status is 1 where it costs more than two gradients and `--beside` seconds.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cases import NETWORKS, UnknownNetwork, network, noise
from provenance import provenance
from torch import Tensor, nn

import sp_fx

DEFAULT = ("resnet18", "resnet50", "vit_b_16", "swin_t", "zoo/residual_cnn", "zoo/pyramid_transformer")
WAYS: dict[str, bool | str] = {"verified": True, "forward": "forward", "not verified": False}


def gradient(model: nn.Module, x: Tensor) -> Tensor:
    """Returns the gradient of the sum of the outputs: a forward and a way back."""
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(sp_fx.targets.primary(model(leaf)).sum(), leaf)[0]


def forward(model: nn.Module, x: Tensor) -> Tensor:
    """Returns the outputs, with no way back."""
    with torch.no_grad():
        return sp_fx.targets.primary(model(x))


def in_turns(ways: dict[str, Callable[[], Any]], turns: int) -> dict[str, list[float]]:
    """Returns the seconds of each way, which take turns, so that a slow minute of the machine falls on all; the first is not
    counted. Garbage is collected between them, as `timeit` does: a whole collection takes as long as a gradient, and falls on
    whichever comes."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns + 1):
        for name, run in ways.items():
            gc.collect()
            gc.disable()
            started = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - started)
            gc.enable()
    return seconds


def cost_of(name: str, batch: int, turns: int) -> dict[str, Any]:
    """Returns the row of one network: the quickest turns in seconds, ratios, and the verification in units of the network's own
    runs."""
    model, x = network(name), noise(batch, NETWORKS.get(name, 224), torch.float32, "cpu")
    ways: dict[str, Callable[[], Any]] = {
        way: lambda verify=verify: sp_fx.transform(model, example_inputs=x, verify=verify) for way, verify in WAYS.items()
    }
    ways |= {"model forward": lambda: forward(model, x), "model gradient": lambda: gradient(model, x)}
    seconds = in_turns(ways, turns)
    # As `timeit` advises: what a machine does beside only adds. Medians of five gave 1.6 and 3.3 gradients for one network.
    least = {way: min(values) for way, values in seconds.items()}
    extra = least["verified"] - least["not verified"]
    return {
        "tracer": sp_fx.transform(model, example_inputs=x, verify=False).report().tracer,
        "least_s": least,
        "ratio": {way: least[way] / least["not verified"] for way in ("verified", "forward")},
        "verification_s": extra,
        "in_gradients": extra / least["model gradient"],  # of which a verification has two: the model's and the graph's
        "beside_two_gradients_s": extra - 2 * least["model gradient"],  # clones, what a forward may change, the comparison
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(DEFAULT), help="torchvision's, timm/NAME or zoo/NAME")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--beside", type=float, default=float("inf"), help="seconds that it may take beside two gradients")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # Swin's, whose attention a symbolic trace does not see

    record: dict[str, Any] = {**provenance(), "batch": args.batch, "turns": args.turns, "networks": {}}
    heading = f"seconds, batch {args.batch}"
    print(f"{heading:28} {'not verified':>12} {'forward':>9} {'verified':>9} {'ratio':>6} {'gradients':>10} {'beside two':>11}")
    kept = True
    for name in args.networks:
        try:
            row = record["networks"][name] = cost_of(name, args.batch, args.turns)
        except UnknownNetwork as error:
            print(f"verification: {error}", file=sys.stderr)
            return 2
        seconds = [row["least_s"][way] for way in ("not verified", "forward", "verified")]
        cells = f"{seconds[0]:12.3f} {seconds[1]:9.3f} {seconds[2]:9.3f}"
        gradients, beside = row["in_gradients"], row["beside_two_gradients_s"]
        print(f"{name:28} {cells} {row['ratio']['verified']:6.2f} {gradients:10.2f} {beside:11.2f}", flush=True)
        kept &= row["beside_two_gradients_s"] <= args.beside
        if args.out:
            args.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
