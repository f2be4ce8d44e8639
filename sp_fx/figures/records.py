"""Explanations of pictures, as `sp-fx explain` writes them: figures and a record (JSON) of each picture."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..explainer import Explainer
from ..gates.adjoints.row import Soft
from ..gates.rules import Rules
from ..measured.sigmoids import Sigmoids
from ..models.classes import class_index, probabilities
from ..models.images import Picture
from ..program.program import Program
from ..targets import looks_one_hot, primary
from .drawing import CHANGE, SLOPE, Cell, overlay, picture, product, reading, signed_map, table
from .layouts import path, shown_units

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METHODS = ("pullback", "double_pullback", "ascend")

TargetSpec = tuple[str, int]  # ("top", N): the N likeliest classes of each picture; ("index", I): the class I


def parse_targets(texts: Sequence[str], labels: Sequence[str] | None) -> list[TargetSpec]:
    """Returns the targets that `texts` ask for, each an index, topN, a class name, or several with commas between them: of
    ["7, tench, top1"] it makes [("index", 7), ("index", 0), ("top", 1)].

    Raises:
        ValueError: a name that no class has, or top0.
    """
    targets: list[TargetSpec] = []
    for text in texts:
        for part in _parts(text, labels):
            if part.isdecimal() and not (labels is not None and part in labels):
                targets.append(("index", int(part)))
            elif part.startswith("top") and part[3:].isdecimal():
                if int(part[3:]) < 1:
                    raise ValueError(f"topN is the N likeliest classes, N at least 1, got {part!r}")
                targets.append(("top", int(part[3:])))
            else:
                targets.append(("index", class_index(part, labels)))
    return targets


def _parts(text: str, labels: Sequence[str] | None) -> list[str]:
    """Returns what commas separate in `text`, but for those within a label, as in "tench, Tinca tinca"."""

    def folded(parts: Sequence[str]) -> str:
        return ",".join(part.strip() for part in parts).casefold()

    parts, found, start = text.split(","), list[str](), 0
    with_commas = {folded(label.split(",")): label for label in labels or () if "," in label}
    while start < len(parts):
        end = next((end for end in range(len(parts), start + 1, -1) if folded(parts[start:end]) in with_commas), start + 1)
        found.append(parts[start].strip() if end == start + 1 else with_commas[folded(parts[start:end])])
        start = end
    return found


def rules_record(rules: Rules) -> dict[str, Any]:
    """Returns every temperature by name, also those that are this version's defaults, since defaults change."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(v) for key, v in value.items()}
        return asdict(value) if isinstance(value, Soft) else value

    return {f.name: plain(getattr(rules, f.name)) for f in fields(rules)}


@dataclass(frozen=True)
class Way:
    """A way to explain, a column of the figure. `name` is the method's, or "pullback, paper" where rules are compared; `options`
    are the method's; `run` gives the maps [B, T, C, H, W] of pixels [B, C, H, W] for classes [B, T]; `climb`, of an ascent, all
    iterates [K + 1, B, C, H, W] for the k-th classes [B]."""

    name: str
    method: str
    options: Mapping[str, Any]
    run: Callable[[Tensor, Tensor], Tensor]
    climb: Callable[[Tensor, Tensor], Tensor] | None = None

    @property
    def unit(self) -> str:
        return CHANGE if self.method == "ascend" else SLOPE


def way_of(explainer: Explainer, method: str, options: Mapping[str, Any], rules: str = "") -> Way:
    """Returns the way of an explainer's method; `rules` is what its rules are called where several are compared."""

    def run(x: Tensor, classes: Tensor) -> Tensor:
        explain = functools.partial(getattr(explainer, method), **options, batch_size=len(x))
        if looks_one_hot(classes):  # classes 0, 1 and 0 of a model of three would be taken for a one-hot row, and refused
            return torch.stack([explain(x, column) for column in classes.unbind(1)], 1)
        return explain(x, classes)

    def climb(x: Tensor, classes: Tensor) -> Tensor:
        return explainer.ascend(x, classes, **options, return_path=True)[1]

    name = f"{method}, {rules}" if rules else method
    return Way(name, method, options, run, climb if method == "ascend" else None)


def way_of_package(program: Program, answer: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Way:
    """Returns the way of a package, whose method is the one that it was made with; `answer` gives its outputs and its maps."""

    def run(x: Tensor, classes: Tensor) -> Tensor:
        return torch.stack([answer(x, column.contiguous())[1] for column in classes.unbind(1)], 1)

    return Way(program.method, program.method, program.arguments, run)


@dataclass(frozen=True)
class Climb:
    """The path of an ascent toward one class: its `iterates` [K + 1, C, H, W] and the figure of its steps."""

    label: str
    iterates: Tensor
    strip: Figure
    titles: list[str]


@dataclass(frozen=True)
class Explained:
    """What is written of a picture: its `record`, its `figure`, and the paths that were asked for."""

    record: dict[str, Any]
    figure: Figure
    paths: list[Climb] = field(default_factory=list)


def explain_pictures(
    predict: Callable[[Tensor], Tensor],
    ways: Sequence[Way],
    pictures: Sequence[Picture],
    labels: Sequence[str] | None,
    targets: Sequence[TargetSpec],
    device: torch.device | str = "cpu",
    times_input: bool = False,
    paths: bool = False,
) -> list[Explained | ValueError]:
    """Explain each of `pictures` in each of the `ways` for each of `targets`; `predict` gives the model's class probabilities
    [B, classes], as `probabilities_of` does. A picture of which they are not finite gets an error in place of an explanation.

    `device` is the model's. `times_input`: the figure shows each map times the pixels too. `paths`: the paths of ascents too.

    Raises:
        IndexError: a target that the model does not have.
        ValueError: it has other classes than there are `labels`; what `predict` raises.
    """
    if not pictures:
        return []
    x = torch.stack([p.pixels for p in pictures]).to(device)
    chances = predict(x)
    if not bool((finite := chances.isfinite().all(1)).all()):
        good = [p for p, fine in zip(pictures, finite.tolist()) if fine]
        others = iter(explain_pictures(predict, ways, good, labels, targets, device, times_input, paths))
        broken = ValueError("the model's scores of it are not finite: NaN or infinity")
        return [next(others) if fine else broken for fine in finite.tolist()]
    if labels is not None and len(labels) != chances.shape[1]:
        raise ValueError(f"there are {len(labels)} class names, and the model has {chances.shape[1]} classes")
    ranking = chances.argsort(-1, descending=True)
    indices = torch.tensor([[i for target in targets for i in _indices(target, order)] for order in ranking.tolist()])
    maps: dict[str, Tensor] = {}
    seconds: dict[str, float] = {}
    climbs: dict[str, list[Tensor]] = {}  # of each target, [K + 1, B, C, H, W]
    for way in ways:
        started = time.perf_counter()
        if paths and way.climb is not None:
            climbs[way.name] = [way.climb(x, column.to(device)).cpu() for column in indices.unbind(1)]
            maps[way.name] = torch.stack([climb[-1] - climb[0] for climb in climbs[way.name]], 1)
        else:
            maps[way.name] = way.run(x, indices.to(device)).cpu()
        seconds[way.name] = round((time.perf_counter() - started) / len(x), 4)
    after = {}
    for way in ways:
        if way.method == "ascend":
            moved = x[:, None].cpu() + maps[way.name]
            after[way.name] = predict(moved.flatten(0, 1).to(device)).view(*indices.shape, -1)

    def class_record(of: Tensor, index: int) -> dict[str, Any]:
        label = labels[index] if labels is not None else f"class {index}"
        return {"index": index, "label": label, "probability": round(of[index].item(), 6)}

    note = reading(shown_units([way.unit for way in ways], times_input))
    results = list[Explained | ValueError]()
    for i, (shown, classes) in enumerate(zip(pictures, indices.tolist())):
        prediction = [class_record(chances[i], index) for index in ranking[i, :5].tolist()]
        target_records, rows, steps = [], [], list[Climb]()
        for k, index in enumerate(classes):
            target = class_record(chances[i], index)
            target["maps"] = {way.name: {"l2": maps[way.name][i, k].norm().item()} for way in ways}
            cells: list[Cell] = [picture(shown.pixels, "predicted: {label} ({probability:.2f})".format(**prediction[0]))]
            for way in ways:
                map = maps[way.name][i, k]
                cells.append(signed_map(map, f"{way.name}: {target['label']} ({target['probability']:.2f})", way.unit))
                if times_input:
                    cells.append(product(shown.pixels, map, unit=way.unit))
                if way.method == "ascend":
                    then = after[way.name][i, k]
                    wins = class_record(then, int(then.argmax()))
                    told = {"probability_after": round(then[index].item(), 6), "prediction_after": wins}
                    target["maps"][way.name] |= told
                    title = f"after {way.options['steps']} steps: {then[index]:.2f}"
                    if wins["index"] != index:  # its score has risen, and another's more
                        word = "still" if wins["index"] == prediction[0]["index"] else "now"
                        title += f"\n{word} {wins['label']} ({wins['probability']:.2f})"
                    cells.append(picture(shown.pixels + map, title))
                else:
                    cells.append(overlay(shown.pixels, map))
            target_records.append(target)
            if index in classes[:k]:  # asked for by name, and predicted too: it is drawn once
                continue
            rows.append(cells)
            steps += [
                climb_of(some[k][:, i], predict(some[k][:, i].to(device)), class_record, (index, prediction[0]["index"]))
                for some in climbs.values()
            ]
        record = {
            "size": list(shown.size),
            "mode": shown.mode,
            "conversions": list(shown.conversions),
            "prediction": prediction,
            "targets": target_records,
            "method": [{"name": way.name, **way.options} for way in ways],
            **({"times_input": True} if times_input else {}),
            "seconds": seconds,
        }
        results.append(Explained(record, table(rows, note=note), steps))
    return results


def climb_of(
    iterates: Tensor, chances: Tensor, named: Callable[[Tensor, int], dict[str, Any]], classes: tuple[int, int]
) -> Climb:
    """Returns the path of one ascent, with the `chances` [K + 1, classes] at each step: of the class that it climbs to, of the
    one that was predicted (both are `classes`), and of the one that is predicted at its end. `named` makes records of classes."""
    toward = classes[0]
    shown = {index: named(chances[-1], index)["label"] for index in (*classes, int(chances[-1].argmax()))}
    strip = path(iterates, chances[:, list(shown)], list(shown.values()), title=f"toward {shown[toward]}")
    numbers = chances[:, toward].tolist()
    titles = [f"{f'step {k}' if k else 'start'}: {shown[toward]} {p:.2f}" for k, p in enumerate(numbers)]
    return Climb(shown[toward], iterates, strip, titles)


def probabilities_of(model: Callable[[Tensor], Any], x: Tensor, by: str = "softmax") -> Tensor:
    """Returns the probabilities [B, classes] of a model of class scores, on the CPU; ValueError for another output. Rows of
    scores that are not finite are NaN. `by` is what makes probabilities of scores, but of those that a sigmoid has given."""
    with torch.no_grad(), Sigmoids() as sigmoids:
        outputs = model(x)
    logits = outputs if isinstance(outputs, Tensor) else primary(outputs)
    if logits.dim() != 2:
        raise ValueError(f"expected class scores [{len(x)}, classes] of the model, got {list(logits.shape)}")
    found = probabilities(logits.float().cpu(), "none" if sigmoids.gave(logits) else by)
    return torch.where(logits.isfinite().all(1, keepdim=True).cpu(), found, torch.nan)


def _indices(target: TargetSpec, ranking: list[int]) -> list[int]:
    """Returns the classes that a target asks for of a picture whose classes, likeliest first, are `ranking`."""
    kind, number = target
    if kind == "top":
        return ranking[:number]
    if number >= len(ranking):
        raise IndexError(f"target {number} is outside 0 to {len(ranking) - 1}, the classes of the model")
    return [number]
