"""Do the maps find what the scenes are known to show? `python bench/zoo_truth.py [--scenes 200] [--out FILE]`.

For each network of the zoo, on scenes it has not seen: its accuracy; the share of positive input x map mass inside the object's
mask, soft pullback against plain gradient, paired; and whether an ascent toward another class (default step, bounds -1 and 1, 10
steps) makes it the likelier one, with the longest of its steps. The exit status is 1 where a claim does not hold.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from measures import mass_inside, paired_interval, pointing, share_interval
from provenance import provenance
from torch import nn

import sp_fx
from sp_fx import zoo
from sp_fx.figures.demo import class_gradient
from sp_fx.figures.records import rules_record
from sp_fx.methods.ascent import Ascent
from sp_fx.models.weights import weights_hash

STEPS = 10


def truth(name: str, scenes: zoo.Scenes, batch: int = 50) -> dict:
    """Returns all the measures of one network."""
    network = zoo.load(name)
    explainer = sp_fx.transform(network)
    numbered = (torch.arange(len(scenes.labels)), *scenes)
    parts = [one_batch(network, explainer, *part) for part in zip(*(t.split(batch) for t in numbered), strict=True)]
    seen = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    longest, step = seen["longest"].max().item(), Ascent().length([scenes.pixels])
    soft, plain = seen["pullback mass"], seen["gradient mass"]
    reached = seen["path"][:, 1:] > 0.5
    return {
        "network": name,
        "weights_sha256": weights_hash(network),
        "rules": rules_record(explainer.report().rules),
        "accuracy": seen["right"].double().mean().item(),
        "mass_inside": {"pullback": soft.mean().item(), "gradient": plain.mean().item(), "paired": paired_interval(soft - plain)},
        "pointing": {kind: seen[f"{kind} pointing"].double().mean().item() for kind in ("pullback", "gradient")},
        "mask_area": scenes.masks.double().mean().item(),
        "counterfactual": {
            "steps": STEPS, "step_size": step, "longest_step": longest,
            "above_half_at_the_end": share_interval(reached[:, -1]),
            "above_half_by_step": reached.cummax(1).values.double().mean(0).tolist(),
            "mean_probability": seen["path"].double().mean(0).tolist(),
        },
        "holds": {
            "mass": paired_interval(soft - plain)["low"] > 0,
            "counterfactual": reached[:, -1].double().mean().item() >= 0.8,
            "step": longest <= step * (1 + 1e-6),  # float32 rounding of a norm over 27648 numbers
        },
    }  # fmt: skip


def one_batch(network: nn.Module, explainer: sp_fx.Explainer, number, x, labels, masks) -> dict:
    """Returns the measures of one batch, each with the batch on axis 0; `number` [B] counts the scenes."""
    with torch.no_grad():
        predicted = network(x).argmax(1)
    # Every other class in turn: the scenes go through the kinds in tens, and the tens through the nine steps away.
    away = 1 + number // len(zoo.KINDS) % (len(zoo.KINDS) - 1)
    aim = (predicted + away) % len(zoo.KINDS)
    maps = {"pullback": explainer.pullback(x, predicted), "gradient": class_gradient(network, x)}
    _, path = explainer.ascend(x, aim, steps=STEPS, bounds=(-1.0, 1.0), return_path=True)
    with torch.no_grad():
        probabilities = network(path.flatten(0, 1)).softmax(1).unflatten(0, path.shape[:2])
    return {
        "right": predicted == labels,
        "longest": (path[1:] - path[:-1]).double().flatten(2).norm(dim=2).amax(0),
        "path": probabilities.gather(2, aim.expand(len(path), -1)[..., None])[..., 0].T,
        **{f"{kind} mass": mass_inside(x, map, masks) for kind, map in maps.items()},
        **{f"{kind} pointing": pointing(x, map, masks) for kind, map in maps.items()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--seed", type=int, default=40_000, help="of the scenes; training drew 1, its test 20000")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    scenes = zoo.draw(args.seed, args.scenes)
    rows = []
    for name in zoo.NAMES:
        row = truth(name, scenes)
        rows.append(row)
        mass, other = row["mass_inside"], row["counterfactual"]
        gain, share = mass["paired"], other["above_half_at_the_end"]
        print(
            f"{name}: accuracy {row['accuracy']:.3f}\n"
            f"  mass inside the mask ({row['mask_area']:.3f} of the area): pullback {mass['pullback']:.3f}, "
            f"gradient {mass['gradient']:.3f}, difference {gain['mean']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]\n"
            f"  another class above 0.5 after {STEPS} steps: {share['share']:.3f} [{share['low']:.3f}, {share['high']:.3f}]; "
            f"longest step {other['longest_step']:.6f} of {other['step_size']:.6f}"
        )
    if args.out:
        record = {**provenance(), "seed": args.seed, "scenes": args.scenes, "networks": rows}
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if all(all(row["holds"].values()) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
