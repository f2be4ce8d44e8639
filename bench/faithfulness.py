"""Measures of maps against the model itself, one number a sample.

Why not Quantus or Captum: what a measure asks of the model (the score where something was removed) does not depend on the method
that is judged, and both ask it anew for every method, a sample at a time. Here each question is put once, in batches, and all
methods are judged on the same answers, which also makes every comparison paired. The formulas are theirs, with these deviations:
features are the cells of a grid, not single pixels (a pixel of a photograph removed alone changes little but rounding); removed
pixels become 0, mid-grey; and the change of the score is compared with the share of the removed pixels, for a slope the slope
times the input. `infidelity_published` alone asks what the paper's evaluation asks.

Shares are [N, C, H, W]; scores are those of one class a sample, before any softmax.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Score = Callable[[Tensor, Tensor], Tensor]  # (inputs [M, C, H, W], classes [M]) -> scores [M]


# -- what is removed ----------------------------------------------------------------------------------------------------


def grid(height: int, width: int, cells: int) -> Tensor:
    """Returns the cell of each pixel, [H, W] in 0 to cells^2 - 1: a grid of `cells` by `cells`."""
    rows, columns = torch.arange(height) * cells // height, torch.arange(width) * cells // width
    return rows[:, None] * cells + columns


def in_cells(shares: Tensor, cells: Tensor) -> Tensor:
    """Returns the sum of the shares in each cell, [N, K], in float64."""
    flat = shares.double().sum(1).flatten(1)
    return torch.zeros(len(flat), int(cells.max()) + 1, dtype=torch.float64).index_add_(1, cells.flatten(), flat)


def single_cells(cells: Tensor) -> Tensor:
    """Returns one mask a cell, bool [K, H, W]."""
    return cells == torch.arange(int(cells.max()) + 1)[:, None, None]


def random_cells(cells: Tensor, part: float, count: int, draw: torch.Generator) -> Tensor:
    """Returns masks of `part` of the cells each, bool [count, H, W]."""
    total = int(cells.max()) + 1
    chosen = torch.stack([torch.randperm(total, generator=draw) < round(part * total) for _ in range(count)])
    return chosen[:, cells]


def random_squares(height: int, width: int, sides: tuple[float, float], count: int, draw: torch.Generator) -> Tensor:
    """Returns masks of one square each, its side between `sides`, two parts of the picture's height, bool [count, H, W]."""
    masks = torch.zeros(count, height, width, dtype=torch.bool)
    least, most = (int(height * part) for part in sides)
    for mask in masks:
        side = int(torch.randint(least, most + 1, (1,), generator=draw))
        top, left = (int(torch.randint(n - side + 1, (1,), generator=draw)) for n in (height, width))
        mask[top : top + side, left : left + side] = True
    return masks


SMALL, LARGE = (1 / 16, 1 / 4), (1 / 4, 1 / 2)  # sides of squares


def removed_parts(cells: Tensor, count: int) -> dict[str, Tensor]:
    """Returns the masks of infidelity, `count` of each kind, the same at every call: squares small and large, and an eighth of
    `cells` [H, W] scattered, which are those of faithfulness correlation too.

    Three, because the answer depends on the size: a small square changes a score by little more than the network's noise.
    """
    height, width = cells.shape
    return {
        "squares": random_squares(height, width, SMALL, count, torch.Generator().manual_seed(1)),
        "large squares": random_squares(height, width, LARGE, count, torch.Generator().manual_seed(7)),
        "subsets": random_cells(cells, 0.125, count, torch.Generator().manual_seed(2)),
    }


class Removal(NamedTuple):
    """The removed `masks`, bool [K, H, W], and how far the score fell without each (`drops`), float64 [N, K]."""

    masks: Tensor
    drops: Tensor


def removal(score: Score, x: Tensor, target: Tensor, masks: Tensor) -> Removal:
    """Removes each mask from each sample, which becomes 0 there, and asks for the score."""
    drops = []
    for sample, its_class, its_score in zip(x, target, score(x, target)):
        removed = sample * ~masks[:, None]
        drops.append((its_score - score(removed, its_class.expand(len(masks)))).double())
    return Removal(masks, torch.stack(drops))


class Overwriting(NamedTuple):
    """`blocks` [H, W] in 0 to K-1, overwritten in that order and not put back, by each of the pictures `instead` [R, C, H, W],
    and how far the score had fallen after each, float64 [N, R, K]."""

    blocks: Tensor
    instead: Tensor
    drops: Tensor


def grey_pictures(shape: torch.Size, blocks: Tensor, rounds: int = 5) -> Tensor:
    """Returns `rounds` pictures [C, H, W] whose `blocks` [H, W] are each of one grey, uniform in [-1, 1], the same at every call.

    One value a block, over its pixels and channels, since that is what "uniform" draws in Quantus 0.6, which the paper's
    evaluation runs, when samples come in batches.
    """
    greys = 2 * torch.rand(rounds, int(blocks.max()) + 1, generator=torch.Generator().manual_seed(8)) - 1
    return greys[:, blocks][:, None].expand(rounds, *shape)


def overwritten(score: Score, x: Tensor, target: Tensor, blocks: Tensor, instead: Tensor) -> Tensor:
    """Returns the `drops` of an `Overwriting`."""
    so_far = (blocks <= torch.arange(int(blocks.max()) + 1)[:, None, None])[None, :, None]  # [1, K, 1, H, W]
    drops = []
    for sample, its_class, its_score in zip(x, target, score(x, target)):
        pictures = torch.where(so_far, instead[:, None], sample)  # [R, K, C, H, W]
        after = score(pictures.flatten(0, 1), its_class.expand(pictures.shape[:2].numel()))
        drops.append((its_score - after).double().view(pictures.shape[:2]))
    return torch.stack(drops)


def in_masks(shares: Tensor, masks: Tensor) -> Tensor:
    """Returns the sum of the shares in each mask, float64 [N, K]."""
    return shares.double().sum(1).flatten(1) @ masks.flatten(1).double().T


# -- measures -----------------------------------------------------------------------------------------------------------


def infidelity(shares: Tensor, removed: Removal) -> Tensor:
    """Mean of `(b a - drop)^2` over the removals, `a` the removed share, b each sample's best scale, [N]; lower is better.

    Yeh et al., "On the (In)fidelity and Sensitivity of Explanations", arXiv:1901.09392; the scale is Captum's `normalize=True`.
    """
    return misfit(in_masks(shares, removed.masks), removed.drops)


def misfit(sums: Tensor, drops: Tensor) -> Tensor:
    """Mean square of `b sums - drops` [N, K], b each sample's best scale, [N]; `sums` are of the shares that were removed."""
    square = sums.square().mean(1)
    scale = torch.where(square > 0, (sums * drops).mean(1) / square, 0)
    return (scale[:, None] * sums - drops).square().mean(1)


def occlusion(removed: Removal, cells: Tensor, channels: int) -> Tensor:
    """Returns the drop of each cell removed alone, over its pixels and `channels`: shares [N, C, H, W].

    A map by one forward for each cell, with no backward. It is asked nearly what the measures ask, so it says how much of their
    answer any share of pixels can give: what is left are products between cells.
    """
    sizes = removed.masks.flatten(1).sum(1)
    return (removed.drops / (sizes * channels)).float()[:, cells][:, None].expand(-1, channels, -1, -1)


def infidelity_published(shares: Callable[[Tensor], Tensor], overwriting: Overwriting) -> Tensor:
    """Infidelity as the paper's evaluation asks it, [N]: blocks of a quarter of the side become grey one after the other, row by
    row, none put back (a subclass of Quantus's measure, with Captum's best scale).

    `shares(instead)` are those of `x` against a picture `instead` [C, H, W]. Their sum grows with what is overwritten, and so
    does the drop: equal shares answer it nearly as well as a good map does.
    """
    sums = [in_cells(shares(instead), overwriting.blocks).cumsum(1) for instead in overwriting.instead]
    return misfit(torch.stack(sums, 1).flatten(1), overwriting.drops.flatten(1))


def removals_judged(shares: Tensor, removals: dict[str, Removal]) -> dict[str, Tensor]:
    """Returns the measures that ask about `removed_parts`."""
    return {
        "infidelity, small": infidelity(shares, removals["squares"]),
        "infidelity, large": infidelity(shares, removals["large squares"]),
        "infidelity, scattered": infidelity(shares, removals["subsets"]),
        "faithfulness correlation": correlation(shares, removals["subsets"]),
    }


def correlation(shares: Tensor, removed: Removal) -> Tensor:
    """Pearson correlation of removed share and drop, [N], NaN where either is constant; higher is better.

    With random subsets: faithfulness correlation, Bhatt et al., arXiv:2005.00631. With single features: faithfulness estimate,
    Alvarez-Melis and Jaakkola, arXiv:1806.07538.
    """
    return pearson(in_masks(shares, removed.masks), removed.drops)


def monotonicity(shares: Tensor, cells: Tensor, changes: Tensor) -> Tensor:
    """Spearman correlation of a cell's share, without its sign, and what the score may change by when the cell is redrawn, [N].

    Nguyen and Martinez, arXiv:2007.07584. `changes` [N, K]: mean squared change over the draws.
    """
    return spearman(in_cells(shares, cells).abs(), changes)


def redrawn(score: Score, x: Tensor, target: Tensor, cells: Tensor, draws: int, draw: torch.Generator) -> Tensor:
    """Mean squared change of the score when each cell's pixels are drawn anew, uniform in [-1, 1], float64 [N, K]."""
    masks, changes = single_cells(cells)[:, None], []
    for sample, its_class, its_score in zip(x, target, score(x, target)):
        total = torch.zeros(len(masks), dtype=torch.float64)
        for _ in range(draws):
            drawn = torch.rand(sample.shape, generator=draw) * 2 - 1
            total += (score(torch.where(masks, drawn, sample), its_class.expand(len(masks))) - its_score).double().square()
        changes.append(total / draws)
    return torch.stack(changes)


def curves(probability: Score, x: Tensor, target: Tensor, shares: Tensor, cells: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Area under the class's probability as cells are deleted, or inserted into grey, the largest share first; each [N].

    Petsiuk et al., "RISE", arXiv:1806.07421.
    """
    order = in_cells(shares, cells).argsort(1, descending=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1]).expand_as(order))  # of each cell
    rank = rank[:, cells].unsqueeze(1)  # [N, 1, H, W]
    cuts = [round(order.shape[1] * k / steps) for k in range(steps + 1)]
    deleted = torch.stack([probability(x * (rank >= cut), target) for cut in cuts], 1).double()
    inserted = torch.stack([probability(x * (rank < cut), target) for cut in cuts], 1).double()
    return tuple(torch.trapezoid(curve, dx=1 / steps, dim=1) for curve in (deleted, inserted))  # type: ignore[return-value]


def max_sensitivity(run: Callable[[Tensor, Tensor], Tensor], x: Tensor, target: Tensor, maps: Tensor, draws: int, radius: float,
                    seed: int) -> Tensor:  # fmt: skip
    """The largest relative change of the map, L2, over inputs within `radius` (uniform noise, the same for every method), [N].

    Yeh et al., arXiv:1901.09392. Not clamped to the pixels' box, as Captum's.
    """
    draw, worst = torch.Generator().manual_seed(seed), torch.zeros(len(x), dtype=torch.float64)
    for _ in range(draws):
        near = x + radius * (2 * torch.rand(x.shape, generator=draw) - 1)
        change = (run(near, target) - maps).double().flatten(1).norm(dim=1) / maps.double().flatten(1).norm(dim=1)
        worst = torch.maximum(worst, change)
    return worst


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarity of maps, [N]; of the maps of two classes, it is the random-logit test, Sixt et al., arXiv:1912.09818."""
    return torch.cosine_similarity(a.double().flatten(1), b.double().flatten(1))


def focus(shares: Tensor, tiles: Tensor) -> Tensor:
    """The part of the positive relevance that lies in the tiles of the target, [N]. Arias-Duart et al., arXiv:2109.15035.

    `shares` of 2 x 2 mosaics; `tiles` bool [N, 4], row by row, those that show the target.
    """
    positive = shares.double().sum(1).clamp_min(0)
    quarters = torch.stack([half.sum((1, 2)) for rows in positive.chunk(2, 1) for half in rows.chunk(2, 2)], 1)
    return (quarters * tiles).sum(1) / quarters.sum(1)


# -- correlations -------------------------------------------------------------------------------------------------------


def pearson(a: Tensor, b: Tensor) -> Tensor:
    a, b = (t.double() - t.double().mean(1, keepdim=True) for t in (a, b))
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))


def ranks(a: Tensor) -> Tensor:
    """Ranks along the last axis, ties sharing their mean, float64."""
    ordered, order = a.sort(-1)
    start = torch.searchsorted(ordered, ordered, side="left")
    end = torch.searchsorted(ordered, ordered, side="right")
    return torch.empty(a.shape, dtype=torch.float64).scatter_(-1, order, (start + end - 1).double() / 2)


def spearman(a: Tensor, b: Tensor) -> Tensor:
    return pearson(ranks(a), ranks(b))


# -- comparisons --------------------------------------------------------------------------------------------------------


def sign_flip_p(differences: Tensor, draws: int = 20_000, seed: int = 0) -> float:
    """Two-sided p-value of paired `differences` [N] having mean 0, by flipping their signs; exact up to 14 pairs."""
    n = len(differences)
    if n <= 14:
        signs = torch.tensor([[1.0 - 2 * ((k >> i) & 1) for i in range(n)] for k in range(1 << n)], dtype=torch.float64)
        extreme = (signs @ differences.double()).abs() >= differences.double().sum().abs() * (1 - 1e-12)
        return extreme.double().mean().item()
    draw = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (draws, n), generator=draw).double() * 2 - 1
    extreme = (signs @ differences.double()).abs() >= differences.double().sum().abs() * (1 - 1e-12)
    return (extreme.sum().item() + 1) / (draws + 1)


def holm(p: dict[str, float]) -> dict[str, float]:
    """Holm's adjusted p-values: the chance of one false finding in the family stays below them."""
    adjusted, worst = {}, 0.0
    for rank, name in enumerate(sorted(p, key=lambda n: (p[n], n))):
        worst = max(worst, min(1.0, p[name] * (len(p) - rank)))
        adjusted[name] = worst
    return adjusted
