"""Which temperatures and which scale are the best? `python bench/temperatures.py [--networks NAME ...] [--out FILE]`.

The soft pullback under several rules, on the pictures and questions of fidelity.py: the headline measures, means over samples.
This is what the defaults of `Rules` were chosen by.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import faithfulness as ask
import torch
from fidelity import RADII, Answers, InBatches, drops, other_class
from fidelity_cases import Case, load_case
from fidelity_table import rounded
from measures import mass_inside
from methods import Method, captum_methods
from provenance import provenance

import sp_fx

RELU, POOL = (0.6, 1.0, 1.5), (0.3, 1.0)


def ways(case: Case) -> dict[str, Method]:
    """Returns the soft pullback at each temperature in units of each sample's scale, then at measured and at absolute scales."""
    rules = {f"sample, relu {r}, max_pool {p}": sp_fx.Rules(relu=r, max_pool=p, scale="sample") for r in RELU for p in POOL}
    explainers = {name: sp_fx.transform(case.model, rules=r) for name, r in rules.items()}
    half = case.pixels[len(case.pixels) // 2 :]
    explainers["measured, relu 1.0, max_pool 1.0"] = explainers["sample, relu 1.0, max_pool 1.0"].calibrate(half.split(10))
    explainers["absolute, relu 0.6, max_pool 0.3 (paper)"] = sp_fx.transform(case.model, rules=sp_fx.Rules.paper())
    return {name: Method(e.pullback, 1) for name, e in explainers.items()} | {"gradient": captum_methods(case.model)["gradient"]}


def chosen_on(case: Case) -> Case:
    """Returns the case without the samples that only fidelity.py is to judge on."""
    if not case.fresh:
        return case
    n = case.fresh
    return dataclasses.replace(case, pixels=case.pixels[:n], target=case.target[:n], samples=f"the first {n} photographs")


def measured(case: Case, answers: Answers) -> dict[str, dict[str, float]]:
    """Returns the mean of each measure, by way and measure."""
    size, n = case.pixels.shape[2:], case.counts.sensitivity
    cells = ask.grid(*size, case.counts.cells)
    parts = ask.removed_parts(cells, case.counts.removals)
    removals = {name: ask.Removal(m, answers(f"drops {name}", drops, case, m)) for name, m in parts.items()}
    means = {}
    for name, method in ways(case).items():
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
    return means


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["zoo/residual_cnn", "squeezenet1_0"])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, default=Path("out/temperatures"))
    parser.add_argument("--out", type=Path, default=Path("bench/results/temperatures.json"))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    networks = {}
    for name in args.networks:
        case = chosen_on(load_case(name, args.data))
        facts = {"network": name, "weights_sha256": case.weights, "seed": case.seed, "samples": case.samples,
                 "counts": dataclasses.asdict(case.counts), "threads": args.threads}  # fmt: skip
        networks[name] = {
            **facts,
            "rules": measured(case, Answers(args.work, {**facts, "torch": torch.__version__}, time.monotonic() + 3600)),
        }
    args.out.write_text(
        json.dumps({**provenance(), "command": "python bench/temperatures.py", "networks": networks}, indent=1) + "\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
