"""Which temperatures, margins, scales and strides are best? `python bench/temperatures.py [--networks NAME ...] [--out FILE]`.

The soft pullback under several rules, on the questions of fidelity.py: means over samples of the headline measures, beside the
plain gradient and equal shares. This is what the defaults of `Rules` were chosen by, on these and no other pictures:

- ReLUs and max pooling: the zoo's CNN on scenes of seed 2025, SqueezeNet on ten photographs;
- clamps (ReLU6) and strides: EfficientNet-Lite0 on the ten photographs, two of scikit-learn's, and their mirror images, and that
  strides of many channels or of four stay exact, on the zoo's networks;
- GELU, and shares of queries, keys and values: the zoo's transformer on scenes of seeds 2025 and 3025;
- SiLU, and products of gated MLPs: variants of both (variants.py) on scenes of seed 2025.

What proves them is in fidelity.py: other scenes, other photographs, other networks.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from unittest import mock

import faithfulness as ask
import torch
from answers import Answers, digest
from fidelity import RADII, InBatches, drops, other_class
from fidelity_cases import Case, choosing, predicted, scenes
from fidelity_table import rounded
from measures import mass_inside
from methods import Method, captum_methods
from provenance import provenance
from scales import scaled
from shares import shared
from variants import VARIANTS, halves, variant

import sp_fx
from sp_fx import Rules, Soft
from sp_fx.gates.adjoints.affine import steps
from sp_fx.rewrite import decisions

RELU, POOL = (0.6, 1.0, 1.5), (0.3, 1.0)
EQUAL = Method(lambda x, target: torch.ones_like(x), 0, "share")


def relus() -> dict[str, Rules]:
    """At each temperature in units of each sample's scale, then by the rules of clamps, and at absolute scales."""
    rules = {f"sample, relu {r}, max_pool {p}": Rules(relu=r, max_pool=p, scale="sample") for r in RELU for p in POOL}
    rules["relu as clamps: 1.7, margin 0.4, channel"] = Rules(relu=Soft(1.7, margin=0.4, scale="channel"))
    rules["exact strides"] = Rules(stride=None)
    return rules | {"absolute, relu 0.6, max_pool 0.3 (paper)": Rules.paper()}


def clamps() -> dict[str, Rules]:
    """Round the default, Soft(1.7, 0.4, "batch_norm"), one thing changed at a time."""
    values = {
        "default: 1.7, margin 0.4, batch norm": Soft(1.7, 0.4, "batch_norm"),
        "1.2": Soft(1.2, 0.4, "batch_norm"),
        "1.4": Soft(1.4, 0.4, "batch_norm"),
        "2.0": Soft(2.0, 0.4, "batch_norm"),
        "2.4": Soft(2.4, 0.4, "batch_norm"),
        "no margin": Soft(1.7, 0.0, "batch_norm"),
        "margin 0.2": Soft(1.7, 0.2, "batch_norm"),
        "margin 0.6": Soft(1.7, 0.6, "batch_norm"),
        "margin 0.8": Soft(1.7, 0.8, "batch_norm"),
        "channel": Soft(1.7, 0.4, "channel"),
        "sample": Soft(1.7, 0.4, "sample"),
        "sample, 1.0, no margin (ReLU's)": Soft(1.0, 0.0, "sample"),
        "absolute, 0.6, no margin": Soft(0.6, 0.0, "absolute"),
    }
    rules = {name: Rules(hardtanh=value) for name, value in values.items()}
    return rules | {"exact strides": Rules(stride=None), "paper": Rules.paper()}


def gelus() -> dict[str, Rules]:
    """Round the default, Soft(1.25, 0.5); attention."""
    values = {
        "default: 1.25, margin 0.5": Soft(1.25, 0.5),
        "1.0, no margin (the forward's own, paper)": Soft(1.0, 0.0),
        "1.25, no margin": Soft(1.25, 0.0),
        "1.5, no margin": Soft(1.5, 0.0),
        "1.25, margin 0.3": Soft(1.25, 0.3),
        "1.25, margin 0.8": Soft(1.25, 0.8),
        "1.6, margin 0.5": Soft(1.6, 0.5),
    }
    rules = {name: Rules(gelu=value) for name, value in values.items()}
    return rules | {f"attention {tau}": Rules(attention=tau) for tau in (0.5, 2.0)}


def silus() -> dict[str, Rules]:
    """Round the default, the paper's 1.6; 1.25 with margin 0.85 is GELU's default, since SiLU's gate is GELU's at 1.7 times the
    distance; and constant gates of products."""
    values = {
        "default: 1.6, no margin (paper)": 1.6,
        "1.0, no margin (the forward's own)": 1.0,
        "2.0, no margin": 2.0,
        "1.25, margin 0.5": Soft(1.25, 0.5),
        "1.25, margin 0.85 (GELU's)": Soft(1.25, 0.85),
        "1.25, margin 1.2": Soft(1.25, 1.2),
        "1.6, margin 0.5": Soft(1.6, 0.5),
        "1.6, margin 0.85": Soft(1.6, 0.85),
        "2.0, margin 0.85": Soft(2.0, 0.85),
        "3.0, margin 0.85": Soft(3.0, 0.85),
    }
    rules = {name: Rules(silu=value) for name, value in values.items()}
    return rules | {"constant gates of products": Rules(product="frozen")}


STUDIES = {
    "zoo/residual_cnn": relus,
    "squeezenet1_0": relus,
    "efficientnet_lite0": clamps,
    "zoo/pyramid_transformer": gelus,
    "zoo/pyramid_transformer, seed 3025": gelus,
    "zoo/residual_cnn, silu": silus,
    "zoo/pyramid_transformer, gated": silus,
}


def case_of(study: str, data: Path, work: Path) -> Case:
    """Returns the network of `STUDIES` with the pictures that its rules are chosen on."""
    name, _, seed = study.partition(", seed ")
    if name[4:] in VARIANTS:
        case, model = scenes(name[4:].split(",")[0], 60, int(seed or 2025)), variant(name[4:], work)
        return dataclasses.replace(case, name=name, model=model, target=predicted(model, case.pixels))
    if name.startswith("zoo/"):
        return scenes(name[4:], 60, int(seed or 2025))
    return choosing(name, data)


def ways(case: Case, rules: dict[str, Rules]) -> dict[str, Method]:
    """Returns the soft pullback by each of the rules, and by the default ones at scales that were measured beforehand."""
    explainers = {name: sp_fx.transform(case.model, rules=r) for name, r in rules.items()}
    half = case.pixels[len(case.pixels) // 2 :]
    with mock.patch.object(decisions, "leaves_checkerboard", lambda weight, stride: max(steps(weight[2:], stride)) > 1):
        explainers["smooth strides everywhere"] = sp_fx.transform(case.model)  # of many channels, and of more than two, too
    explainers["default, calibrated"] = sp_fx.transform(case.model).calibrate(half.split(10))
    methods = {name: Method(e.pullback, 1) for name, e in explainers.items()}
    others = {"efficientnet_lite0": scaled, "zoo/pyramid_transformer": shared, "zoo/pyramid_transformer, gated": halves}
    if case.name in others:
        methods |= {name: Method(run, 1) for name, run in others[case.name](case.model).items()}
    return methods | {"gradient": captum_methods(case.model)["gradient"]}


def measured(case: Case, rules: dict[str, Rules], answers: Answers) -> dict[str, dict[str, float]]:
    """Returns the mean of each measure, by way and measure."""
    size, n = case.pixels.shape[2:], case.counts.sensitivity
    cells = ask.grid(*size, case.counts.cells)
    parts = ask.removed_parts(cells, case.counts.removals)
    removals = {name: ask.Removal(m, answers(f"drops {name}", drops, case, m)) for name, m in parts.items()}
    means = {}
    for name, method in ways(case, rules).items():
        explained = InBatches(method, case.counts.batch)
        maps = answers(f"{name} maps", explained, case.pixels, case.target)
        logit = (case.pixels[:n], other_class(case)[:n], maps[:n])
        near = (explained, case.pixels[:n], case.target[:n], maps[:n], case.counts.draws)
        shares = method.shares(case.pixels, maps)
        values = {
            **ask.removals_judged(shares, removals),
            **{m: answers(f"{name} {m}", ask.max_sensitivity, *near, radius, 4) for m, radius in RADII.items()},
            "random logit": answers(f"{name} logit", explained.of_another_class, *logit),
        }
        if case.masks is not None:
            values["mask mass"] = mass_inside(torch.ones_like(shares), shares, case.masks)
        means[name] = rounded({measure: value.nanmean().item() for measure, value in values.items()})
        print(f"{case.name:16} {name:42} " + "  ".join(f"{m} {v:.4g}" for m, v in means[name].items()), flush=True)
    equal = ask.removals_judged(EQUAL.shares(case.pixels, torch.ones_like(case.pixels)), removals)
    means["equal shares"] = rounded({m: v.mean().item() for m, v in equal.items() if m.startswith("infidelity")})
    return means


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(STUDIES), choices=list(STUDIES))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, default=Path("out/temperatures"))
    parser.add_argument("--out", type=Path, default=Path("bench/results/temperatures.json"))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    networks = {}
    for study in args.networks:
        case, rules = case_of(study, args.data, args.work), STUDIES[study]()
        facts = {"network": case.name, "weights_sha256": case.weights, "seed": case.seed, "samples": case.samples,
                 "counts": dataclasses.asdict(case.counts), "threads": args.threads}  # fmt: skip
        keyed = {
            **facts,
            "torch": torch.__version__,
            "inputs_sha256": digest(*case.inputs),
            "rules": {n: repr(r) for n, r in rules.items()},
        }
        networks[study] = {**facts, "rules": measured(case, rules, Answers(args.work, keyed, float("inf")))}
    record = {**provenance(), "command": "python bench/temperatures.py", "networks": networks}
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
