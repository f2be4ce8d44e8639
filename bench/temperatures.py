"""Which temperatures and which scale: `python bench/temperatures.py [--networks NAME ...] [--out FILE]`.

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
from fidelity_cases import Case, case
from fidelity_table import rounded
from measures import mass_inside
from methods import Method, captum_methods
from provenance import provenance

import sp_fx

RELU, POOL = (0.6, 1.0, 1.5), (0.3, 1.0)


def ways(the: Case) -> dict[str, Method]:
    """The soft pullback at each temperature in units of each sample's scale, then at measured and at absolute scales."""
    rules = {f"sample, relu {r}, max_pool {p}": sp_fx.Rules(relu=r, max_pool=p, scale="sample") for r in RELU for p in POOL}
    explainers = {name: sp_fx.transform(the.model, rules=r) for name, r in rules.items()}
    half = the.pixels[len(the.pixels) // 2 :]
    explainers["measured, relu 1.0, max_pool 1.0"] = explainers["sample, relu 1.0, max_pool 1.0"].calibrate(half.split(10))
    explainers["absolute, relu 0.6, max_pool 0.3 (paper)"] = sp_fx.transform(the.model, rules=sp_fx.Rules.paper())
    return {name: Method(e.pullback, 1) for name, e in explainers.items()} | {"gradient": captum_methods(the.model)["gradient"]}


def chosen_on(the: Case) -> Case:
    """Without the samples that only fidelity.py is to judge on."""
    if not the.fresh:
        return the
    n = the.fresh
    return dataclasses.replace(the, pixels=the.pixels[:n], target=the.target[:n], samples=f"the first {n} photographs")


def measured(the: Case, answers: Answers) -> dict[str, dict[str, float]]:
    size, n = the.pixels.shape[2:], the.counts.sensitivity
    cells = ask.grid(*size, the.counts.cells)
    parts = ask.removed_parts(cells, the.counts.removals)
    fell = {name: ask.Removal(m, answers(f"drops {name}", drops, the, m)) for name, m in parts.items()}
    found = {}
    for name, method in ways(the).items():
        explained = InBatches(method, the.counts.batch)
        maps = answers(f"{name} maps", explained, the.pixels, the.target)
        logit = (the.pixels[:n], other_class(the)[:n], maps[:n])
        near = (explained, the.pixels[:n], the.target[:n], maps[:n], the.counts.draws)
        shares = method.shares(the.pixels, maps)
        values = {
            **ask.removals_judged(shares, fell),
            **{m: answers(f"{name} {m}", ask.max_sensitivity, *near, radius, 4) for m, radius in RADII.items()},
            "random logit": answers(f"{name} logit", explained.of_another_class, *logit),
        }
        if the.masks is not None:
            values["mask mass"] = mass_inside(torch.ones_like(shares), shares, the.masks)
        found[name] = rounded({measure: value.nanmean().item() for measure, value in values.items()})
        print(f"{the.name:16} {name:42} " + "  ".join(f"{m} {v:.4g}" for m, v in found[name].items()), flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["zoo/residual_cnn", "squeezenet1_0"])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, default=Path("out/temperatures"))
    parser.add_argument("--out", type=Path, default=Path("bench/results/temperatures.json"))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = {}
    for name in args.networks:
        the = chosen_on(case(name, args.data))
        facts = {"network": name, "weights_sha256": the.weights, "seed": the.seed, "samples": the.samples,
                 "counts": dataclasses.asdict(the.counts), "threads": args.threads}  # fmt: skip
        found[name] = {
            **facts,
            "rules": measured(the, Answers(args.work, {**facts, "torch": torch.__version__}, time.monotonic() + 3600)),
        }
    args.out.write_text(
        json.dumps({**provenance(), "command": "python bench/temperatures.py", "networks": found}, indent=1) + "\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
