"""The pictures of docs/figures: `python bench/figures.py [--networks NAME ...] [--data DIR] [--out DIR]`.

For each network of fidelity.py: `compare_NETWORK.jpg` (rows: pictures, columns: methods, the predicted class),
`accentuate_NETWORK.jpg` (ascents toward the predicted class, by steps), `counterfactual_NETWORK.jpg` (rows: sources, columns:
target classes) and `pointing_NETWORK.jpg` (four pictures in one, and the map toward the class of each). Networks for photographs
are left out where `--data` is not there. `--blind N` writes maps of N photographs without the photographs, and these apart, for
someone to guess from.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import torch
from fidelity import InBatches
from fidelity_cases import Case, load_case, mosaic
from methods import methods
from provenance import provenance
from torch import Tensor

import sp_fx
from sp_fx import zoo
from sp_fx.figures.drawing import reading
from sp_fx.figures.records import rules_record
from sp_fx.models.carried import imagenet_labels
from sp_fx.plot import CHANGE, PART, SLOPE, grid, picture, product, save, signed_map, table

COLUMNS = ("gradient", "SmoothGrad-50", "IG-50", "GuidedBackprop", "pullback", "double pullback", "ascent")
TIMES = ("gradient", "pullback")  # shown times the input, too
NETWORKS = ("zoo/residual_cnn", "zoo/pyramid_transformer", "squeezenet1_0", "efficientnet_lite0")
PUBLIC = [-3, -2, -1]  # scikit-image's photographs, whose authors put them in the public domain (CC0)
ANIMALS = [(207, "golden retriever"), (291, "lion"), (386, "African elephant"), (972, "cliff")]
STEPS = (2, 5, 10)


def class_names(case: Case) -> dict[int, str]:
    """Returns the names of the classes by number."""
    if case.name.startswith("zoo/"):
        return dict(enumerate(zoo.KINDS))
    return dict(enumerate(imagenet_labels() or ()))


def compare(case: Case, x: Tensor, target: Tensor, captions: list[str]):
    """Returns a figure with a row for each picture and a column for each method."""
    chosen, _ = methods(case.model, case.pixels, layer=case.layer)
    units = {"IG-50": PART, "ascent": CHANGE}
    maps = {name: InBatches(chosen[name], 4)(x, target) for name in COLUMNS if name in chosen}
    rows = []
    for i, caption in enumerate(captions):
        cells = []
        for name, m in maps.items():
            cells.append(signed_map(m[i], name if i == 0 else "", units.get(name, SLOPE)))
            if name in TIMES:
                cells.append(product(x[i], m[i], title=f"{name}, times the input" if i == 0 else ""))
        rows.append([picture(x[i], caption), *cells])
    return table(rows, note=reading([SLOPE, PART, CHANGE]), dpi=80)


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


def pointed(case: Case, explainer: sp_fx.Explainer, x: Tensor, target: Tensor, names: dict[int, str]):
    """Returns a figure with a row for each four of `x` whose classes differ, in one picture of twice the side: the picture, then
    the map toward the class of each tile, times the input, as the paper shows them."""
    rows = []
    for four, classes in ((x[i : i + 4], target[i : i + 4]) for i in range(0, len(x) - 3, 4)):
        whole = mosaic(four[None])
        maps = explainer.pullback(whole, classes[None])[0]
        shown = [f"toward {names[int(k)]}" for k in classes]
        cells = [product(whole[0], m, title=title) for m, title in zip(maps, shown)]
        rows.append([picture(whole[0], "four in one"), *cells])
    return table(rows, dpi=80)


def different(target: Tensor, count: int) -> list[int]:
    """Returns the places of the first `count` samples whose classes differ from those before, fewer where there are no more."""
    first = {int(k): i for i, k in reversed(list(enumerate(target.tolist())))}
    return sorted(first.values())[:count]


def blind(case: Case, explainer: sp_fx.Explainer, names: dict[int, str], count: int, out: Path) -> None:
    """Write `blind_maps_NETWORK.png`, numbered maps times the input, and `blind_pictures_NETWORK.png`, what they are of."""
    chosen = different(case.target, count)
    x, target = case.pixels[chosen], case.target[chosen]
    maps = torch.cat([explainer.pullback(a[None], b[None]) for a, b in zip(x, target)])
    stem = case.name.removeprefix("zoo/")
    shown = [product(p, m, title=str(i + 1)) for i, (p, m) in enumerate(zip(x, maps))]
    pictures = [picture(p, f"{i + 1}: {names[int(t)]}") for i, (p, t) in enumerate(zip(x, target))]
    for name, cells in (("maps", shown), ("pictures", pictures)):
        save(table([cells[i : i + 4] for i in range(0, len(cells), 4)], dpi=130), out / f"blind_{name}_{stem}.png")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("docs/figures"))
    parser.add_argument("--blind", type=int, metavar="N")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.networks:
        of_scenes = name.startswith("zoo/")
        if not of_scenes and not args.data.exists():
            print(f"{name}: left out, there is no {args.data}", file=sys.stderr)
            continue
        case = load_case(name, args.data, 10 if of_scenes else None)
        case = dataclasses.replace(case, counts=dataclasses.replace(case.counts, batch=4))
        names, explainer = class_names(case), sp_fx.transform(case.model)
        if args.blind:
            blind(case, explainer, names, args.blind, args.out)
            continue
        chosen = [0, 3, 6, 8] if of_scenes else PUBLIC
        x, target = case.pixels[chosen], case.target[chosen]
        captions = [f"{names[int(t)]}: {p:.3f}" for t, p in zip(target, case.probability(x, target).tolist())]
        aims = [(k, names[k]) for k in (1, 4, 7, 9)] if of_scenes else ANIMALS
        stem = name.removeprefix("zoo/")
        about = {**provenance(), "network": name, "weights_sha256": case.weights, "samples": case.samples, "shown": chosen,
                 "rules": rules_record(explainer.report().rules)}  # fmt: skip
        # In one picture scenes of four kinds; of the three photographs in the public domain the cat twice.
        four = different(case.target, 8) if of_scenes else [*PUBLIC, PUBLIC[0]]
        drawn = {
            "compare": compare(case, x, target, captions),
            "accentuate": accentuate(case, explainer, x, target, captions),
            "counterfactual": counterfactual(case, explainer, x, captions, aims),
            "pointing": pointed(case, explainer, case.pixels[four], case.target[four], names),
        }
        for kind, figure in drawn.items():
            save(figure, args.out / f"{kind}_{stem}.jpg", about)
        print(f"wrote {args.out}/*_{stem}.jpg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
