"""Targets of other tasks than classification: each returns a callable of the model's output, to be passed as a target.

    token(position, id)     language models: the logit of a token, at a position of one forward with the prompt
    similarity(to)          embeddings: the cosine similarity of each sample's embedding to another
    span(start, end)        question answering: the logits of where the answer starts and ends
    region(index, mask)     segmentation: a class, over a mask
    box(box, label)         detection: a class of the box that overlaps a chosen one most, wherever in the output it is

Of a regression, None is the target where the output is [B] or [B, 1]; of an output with one tensor for each task, a callable that
takes one, `lambda out: out["age"][:, 0]`; of contrastive pairs, `lambda out: out.logits_per_image.diagonal()`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..containers import primary

Score = Callable[[Any], Tensor]  # from a model's output to one number a sample, [B]


def token(position: int | Tensor = -1, id: int | Tensor | None = None) -> Score:
    """The logit of token `id` at `position` of the output [B, L, V]: of the prompt's last position, what comes next.

    Args:
        position: a number, or one for each sample, [B]; negative ones count from the end.
        id: the token, or one for each sample, [B]; None for the one that is predicted there.

    Raises:
        ValueError: the output has other axes.
        IndexError: there is no such position or token.
    """

    def of(output: Any) -> Tensor:
        y = primary(output)
        if y.dim() != 3:
            raise ValueError(f"a token is one of an output [B, L, V], got {list(y.shape)}")
        if isinstance(position, int):
            there = y[:, position]
        else:
            samples = torch.arange(y.shape[0], device=y.device)
            there = y[samples, position.to(y.device).expand(y.shape[0])]
        if isinstance(id, int):
            return there[:, id]
        which = there.argmax(-1) if id is None else id.to(y.device).expand(y.shape[0])
        return there.gather(1, which[:, None])[:, 0]

    return of


def similarity(to: Tensor, of: Callable[[Any], Tensor] | None = None) -> Score:
    """The cosine similarity of each sample's embedding [B, D] to `to`, [D] or [B, D], a constant.

    Args:
        of: takes the embedding from the output; None where it is the output, its only tensor.

    Raises:
        ValueError: the embedding has other axes.
    """
    to = to.detach()

    def score(output: Any) -> Tensor:
        y = primary(output) if of is None else of(output)
        if y.dim() != 2 or to.shape[-1:] != y.shape[-1:]:
            raise ValueError(
                f"expected embeddings [B, {to.shape[-1]}], as the other is of shape {list(to.shape)}; got {list(y.shape)}"
            )
        return F.cosine_similarity(y, to.to(y).expand_as(y), dim=-1)

    return score


def span(start: int | None = None, end: int | None = None) -> Score:
    """The logits of the positions at which an answer starts and ends, added up: of an output with `start_logits` and `end_logits`
    [B, L]. None for the position that is predicted."""

    def of(output: Any) -> Tensor:
        found = []
        for name, position in (("start_logits", start), ("end_logits", end)):
            y = output[name] if isinstance(output, dict) else getattr(output, name)
            found.append(y.amax(1) if position is None else y[:, position])
        return found[0] + found[1]

    return of


def region(index: int, mask: Tensor | None = None) -> Score:
    """The mean logit of class `index` over the places of `mask`, of an output [B, C, H, W].

    Args:
        mask: [H, W] or [B, H, W], of truths or of weights; None for the places where the class is the predicted one.

    Raises:
        ValueError: the output has other axes than the mask, or the mask is empty: no place has the class.
    """

    def of(output: Any) -> Tensor:
        y = output["out"] if isinstance(output, dict) and "out" in output else primary(output)
        weights = (y.argmax(1) == index) if mask is None else mask.to(y.device)
        if y.dim() < 3 or weights.shape[-(y.dim() - 2) :] != y.shape[2:]:
            raise ValueError(f"a mask is as high and wide as the output {list(y.shape)}, got {list(weights.shape)}")
        weights = weights.to(y.dtype).expand(y.shape[0], *y.shape[2:]).flatten(1)
        if not bool(weights.any()):
            raise ValueError(f"the mask of class {index} is empty")
        return (y[:, index].flatten(1) * weights).sum(1) / weights.sum(1).clamp_min(1e-12)

    return of


def box(box: Tensor | tuple[float, float, float, float], label: int, form: str = "xyxy") -> Score:
    """The score of class `label` for that box of each sample which overlaps `box` most (by intersection over union): a box that
    is chosen by its number is another one as soon as two scores change places.

    Args:
        box: (x0, y0, x1, y1), or with form="cxcywh" the centre, width and height, in the units of the output's boxes.
        label: the class.

    The output has `logits` [B, N, C] and `pred_boxes` [B, N, 4] (cxcywh), as DETR's; or is a list with a dictionary for each
    sample that has `boxes` [N, 4] (xyxy), `scores` [N] and `labels` [N], as torchvision's, of which boxes with that label count.

    Raises:
        ValueError: an unknown form; a sample has no box of that label.
    """
    if form not in ("xyxy", "cxcywh"):
        raise ValueError(f"form is 'xyxy' or 'cxcywh', got {form!r}")
    chosen = corners(torch.as_tensor(box, dtype=torch.float32), form)

    def of(output: Any) -> Tensor:
        if isinstance(output, list | tuple):
            scores = []
            for each in output:
                own = each["labels"] == label
                if not bool(own.any()):
                    raise ValueError(f"a sample has no box of label {label}: it has {sorted(set(each['labels'].tolist()))}")
                best = overlap(each["boxes"][own].detach(), chosen).argmax()
                scores.append(each["scores"][own][best])
            return torch.stack(scores)
        logits, boxes = output["logits"], output["pred_boxes"]
        best = overlap(corners(boxes.detach(), "cxcywh"), chosen).argmax(-1)
        return logits[torch.arange(len(logits), device=logits.device), best, label]

    return of


def corners(boxes: Tensor, form: str) -> Tensor:
    """Boxes [..., 4] by their corners (x0, y0, x1, y1)."""
    if form == "xyxy":
        return boxes
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre - size / 2, centre + size / 2], -1)


def overlap(boxes: Tensor, chosen: Tensor) -> Tensor:
    """The intersection over union of boxes [..., 4] with one."""
    chosen = chosen.to(boxes)
    low, high = torch.maximum(boxes[..., :2], chosen[:2]), torch.minimum(boxes[..., 2:], chosen[2:])
    shared = (high - low).clamp_min(0).prod(-1)
    union = (boxes[..., 2:] - boxes[..., :2]).prod(-1) + (chosen[2:] - chosen[:2]).prod() - shared
    return shared / union.clamp_min(1e-12)
