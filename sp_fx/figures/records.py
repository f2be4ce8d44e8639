"""Explanations of pictures, as `sp-fx explain` writes them: a figure and a record (JSON) of each picture."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..explainer import Explainer
from ..gates.adjoints.row import Soft
from ..gates.rules import Rules
from ..models.images import Picture
from ..models.named import class_index
from .drawing import CHANGE, SLOPE, Cell, overlay, picture, product, signed_map, table

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
        is_label = labels is not None and text in labels  # some labels have commas in them
        for part in [text] if is_label else text.split(","):
            part = part.strip()
            if part.isdecimal():
                targets.append(("index", int(part)))
            elif part.startswith("top") and part[3:].isdecimal():
                if int(part[3:]) < 1:
                    raise ValueError(f"topN is the N likeliest classes, N at least 1, got {part!r}")
                targets.append(("top", int(part[3:])))
            else:
                targets.append(("index", class_index(part, labels)))
    return targets


def rules_record(rules: Rules) -> dict[str, Any]:
    """Returns every temperature by name, also those that are this version's defaults, since defaults change."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(v) for key, v in value.items()}
        return asdict(value) if isinstance(value, Soft) else value

    return {f.name: plain(getattr(rules, f.name)) for f in fields(rules)}


def explain_pictures(
    explainer: Explainer,
    pictures: Sequence[Picture],
    labels: Sequence[str] | None,
    targets: Sequence[TargetSpec],
    methods: Mapping[str, Mapping[str, Any]],
    device: torch.device | str = "cpu",
    times_input: bool = False,
) -> list[tuple[dict[str, Any], Figure]]:
    """Explain each of `pictures` by each of `methods`, names with their keyword arguments, for each of `targets`.

    Returns a record and a figure of each picture. `device` is the explainer's. `times_input`: the figure shows each map times the
    pixels too.

    Raises:
        IndexError: a target that the model does not have.
        ValueError: its output is not finite, or has no single class axis.
    """
    x = torch.stack([p.pixels for p in pictures]).to(device)
    probabilities = _probabilities(explainer, x)
    ranking = probabilities.argsort(-1, descending=True)
    indices = torch.tensor([[i for target in targets for i in _indices(target, order)] for order in ranking.tolist()])
    maps: dict[str, Tensor] = {}
    seconds = {}
    for method, options in methods.items():
        started = time.perf_counter()
        maps[method] = getattr(explainer, method)(x, indices.to(device), **options, batch_size=len(x)).cpu()
        seconds[method] = round((time.perf_counter() - started) / len(x), 4)
    after = None
    if "ascend" in maps:
        moved = x[:, None].cpu() + maps["ascend"]
        after = _probabilities(explainer, moved.flatten(0, 1).to(device)).view(*indices.shape, -1).cpu()

    def class_record(i: int, index: int) -> dict[str, Any]:
        known = labels is not None and len(labels) == probabilities.shape[1]
        label = labels[index] if known and labels is not None else f"class {index}"
        return {"index": index, "label": label, "probability": round(probabilities[i, index].item(), 6)}

    results = []
    for i, (shown, classes) in enumerate(zip(pictures, indices.tolist())):
        prediction = [class_record(i, index) for index in ranking[i, :5].tolist()]
        target_records, rows = [], []
        for k, index in enumerate(classes):
            target = class_record(i, index)
            target["maps"] = {method: {"l2": batch[i, k].norm().item()} for method, batch in maps.items()}
            cells: list[Cell] = [picture(shown.pixels, "predicted: {label} ({probability:.2f})".format(**prediction[0]))]
            for method, batch in maps.items():
                unit = CHANGE if method == "ascend" else SLOPE
                title = f"{method}: {target['label']} ({target['probability']:.2f})"
                cells.append(signed_map(batch[i, k], title, unit))
                if times_input:
                    cells.append(product(shown.pixels, batch[i, k], unit=unit))
                if after is None or method != "ascend":
                    cells.append(overlay(shown.pixels, batch[i, k]))
                else:
                    then = target["maps"][method]["probability_after"] = round(after[i, k, index].item(), 6)
                    cells.append(picture(shown.pixels + batch[i, k], f"after {methods[method]['steps']} steps: {then:.2f}"))
            target_records.append(target)
            rows.append(cells)
        record = {
            "size": list(shown.size),
            "mode": shown.mode,
            "conversions": list(shown.conversions),
            "prediction": prediction,
            "targets": target_records,
            "method": [{"name": method, **options} for method, options in methods.items()],
            **({"times_input": True} if times_input else {}),
            "seconds": seconds,
        }
        results.append((record, table(rows)))
    return results


def _probabilities(explainer: Explainer, x: Tensor) -> Tensor:
    with torch.no_grad():
        logits = explainer(x)
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        what = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"expected class scores [{len(x)}, classes] of the model, got {what}")
    if not bool(logits.isfinite().all()):
        raise ValueError("the model's scores are not finite: NaN or infinity")
    return logits.float().softmax(-1)


def _indices(target: TargetSpec, ranking: list[int]) -> list[int]:
    """Returns the classes that a target asks for of a picture whose classes, likeliest first, are `ranking`."""
    kind, number = target
    if kind == "top":
        return ranking[:number]
    if number >= len(ranking):
        raise IndexError(f"target {number} is outside 0 to {len(ranking) - 1}, the classes of the model")
    return [number]
