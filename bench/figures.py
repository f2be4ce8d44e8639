"""Pictures of the methods side by side: `python bench/figures.py [--networks NAME ...] [--out docs/figures]`.

For each network `compare_NETWORK.jpg` (rows: pictures, columns: methods, the predicted class), `accentuate_NETWORK.jpg` (ascents
toward the predicted class, by steps) and `counterfactual_NETWORK.jpg` (rows: sources, columns: target classes). `squeezenet1_0`
is left out where `--data` is not there.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import torch
from fidelity import InBatches
from fidelity_cases import Case, load_case
from methods import methods
from provenance import provenance
from torch import Tensor

import sp_fx
from sp_fx import zoo
from sp_fx.figures.records import rules_record
from sp_fx.plot import CHANGE, SLOPE, grid, picture, save, signed_map, table

COLUMNS = ("gradient", "SmoothGrad-50", "IG-50", "GuidedBackprop", "pullback", "double pullback", "ascent")
WHICH = {"squeezenet1_0": [-3, -2, -1]}  # scikit-image's photographs, whose authors put them in the public domain (CC0)
AIMS = {"squeezenet1_0": [(207, "golden retriever"), (291, "lion"), (386, "African elephant"), (972, "cliff")]}
STEPS = (2, 5, 10)


def class_names(case: Case) -> dict[int, str]:
    """Returns the names of the classes by number."""
    if case.name.startswith("zoo/"):
        return dict(enumerate(zoo.KINDS))
    from torchvision.models import SqueezeNet1_0_Weights

    return dict(enumerate(SqueezeNet1_0_Weights.DEFAULT.meta["categories"]))


def compare(case: Case, x: Tensor, target: Tensor, captions: list[str]):
    """Returns a figure with a row for each picture and a column for each method."""
    chosen, _ = methods(case.model, case.pixels, layer=case.layer)
    units = {"IG-50": "share of the score", "ascent": CHANGE}
    maps = {name: InBatches(chosen[name], 4)(x, target) for name in COLUMNS if name in chosen}
    rows = []
    for i, caption in enumerate(captions):
        cells = [signed_map(m[i], name if i == 0 else "", units.get(name, SLOPE)) for name, m in maps.items()]
        rows.append([picture(x[i], caption), *cells])
    return table(rows, dpi=80)


def accentuate(case: Case, explainer: sp_fx.Explainer, x: Tensor, target: Tensor, captions: list[str]):
    """Returns a figure of ascents toward the predicted class, a column for each of `STEPS`."""
    _, path = explainer.ascend(x, target, steps=STEPS[-1], bounds=(-1.0, 1.0), return_path=True)
    rows = []
    for i, caption in enumerate(captions):
        classes = target[i : i + 1].expand(len(STEPS) + 1)
        reached = path[[0, *STEPS], i]
        scores, probabilities = case.score(reached, classes).tolist(), case.probability(reached, classes).tolist()
        titles = [f"score {score:.1f}, p {p:.3f}" for score, p in zip(scores, probabilities)]
        after = [picture(path[k, i], f"{k} steps: {title}") for k, title in zip(STEPS, titles[1:])]
        before = picture(x[i], f"{caption.split(':')[0]}: {titles[0]}")
        rows.append([before, *after, signed_map(path[STEPS[0], i] - x[i], f"change in {STEPS[0]} steps", CHANGE)])
    return table(rows, dpi=80)


def counterfactual(case: Case, explainer: sp_fx.Explainer, x: Tensor, captions: list[str], aims: list[tuple[int, str]]):
    """Returns a figure with a row for each picture and a column for each class of `aims`, (index, name)."""
    targets = torch.tensor([[index for index, _ in aims]] * len(x))
    reached = x[:, None] + explainer.ascend(x, targets, steps=STEPS[-1], bounds=(-1.0, 1.0))
    titles = []
    for i in range(len(x)):
        probabilities = case.probability(reached[i], targets[i])
        titles.append([f"{name}: {p:.2f}" for (_, name), p in zip(aims, probabilities.tolist())])
    figure = grid(x, reached, captions, titles)
    figure.set_dpi(80)
    return figure


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["zoo/residual_cnn", "zoo/pyramid_transformer", "squeezenet1_0"])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("docs/figures"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.networks:
        if name == "squeezenet1_0" and not args.data.exists():
            print(f"{name}: left out, there is no {args.data}", file=sys.stderr)
            continue
        case = load_case(name, args.data, 10)
        case = dataclasses.replace(case, counts=dataclasses.replace(case.counts, batch=4))
        chosen = WHICH.get(name, [0, 3, 6, 8])
        x, target, names = case.pixels[chosen], case.target[chosen], class_names(case)
        captions = [f"{names[int(t)]}: {p:.3f}" for t, p in zip(target, case.probability(x, target).tolist())]
        explainer = sp_fx.transform(case.model)
        aims = AIMS.get(name, [(k, names[k]) for k in (1, 4, 7, 9) if k in names])
        stem = name.removeprefix("zoo/")
        about = {**provenance(), "network": name, "weights_sha256": case.weights, "samples": case.samples, "shown": chosen,
                 "rules": rules_record(explainer.report().rules)}  # fmt: skip
        drawn = {
            "compare": compare(case, x, target, captions),
            "accentuate": accentuate(case, explainer, x, target, captions),
            "counterfactual": counterfactual(case, explainer, x, captions, aims),
        }
        for kind, figure in drawn.items():
            save(figure, args.out / f"{kind}_{stem}.jpg", about)
        print(f"wrote {args.out}/*_{stem}.jpg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
