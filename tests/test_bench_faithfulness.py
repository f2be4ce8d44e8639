"""The measures of bench/ against their definitions written out, a sample and a removal at a time."""

import itertools
import math
import statistics
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[1] / "bench"
if not BENCH.exists():
    pytest.skip("the benches are not beside these tests", allow_module_level=True)
sys.path.insert(0, str(BENCH))

import faithfulness as ask  # noqa: E402
from methods import Method  # noqa: E402

G = torch.Generator().manual_seed(0)
W = torch.randn(3, 3, 8, 8, generator=G)
X = torch.randn(5, 3, 8, 8, generator=G)
CLASSES = torch.tensor([0, 2, 1, 1, 0])


def score(x, target):
    """Three linear scores and a product, so that drops are not linear."""
    linear = torch.einsum("nchw,kchw->nk", x, W)
    return (linear + 0.1 * linear.square()).gather(1, target[:, None])[:, 0]


CELLS = ask.grid(8, 8, 4)
MASKS = ask.random_cells(CELLS, 0.25, 9, torch.Generator().manual_seed(1))
SHARES = X * torch.randn(X.shape, generator=G)


def by_hand(i, k):
    """Removed share and drop of sample i, removal k."""
    removed, share = X[i].clone(), 0.0
    for y, x in itertools.product(range(8), range(8)):
        if MASKS[k, y, x]:
            removed[:, y, x] = 0
            share += float(SHARES[i, :, y, x].double().sum())
    t = CLASSES[i : i + 1]
    return share, float(score(X[i : i + 1], t)) - float(score(removed[None], t))


def test_infidelity_and_correlation():
    found = ask.removal(score, X, CLASSES, MASKS)
    for i in range(5):
        shares, drops = zip(*(by_hand(i, k) for k in range(9)), strict=True)
        assert found.drops[i].tolist() == pytest.approx(drops, abs=1e-4)  # float32 scores
        b = sum(a * d for a, d in zip(shares, drops, strict=True)) / sum(a * a for a in shares)
        expected = statistics.fmean((b * a - d) ** 2 for a, d in zip(shares, drops, strict=True))
        assert float(ask.infidelity(SHARES, found)[i]) == pytest.approx(expected, rel=1e-4)
        assert float(ask.correlation(SHARES, found)[i]) == pytest.approx(statistics.correlation(shares, drops), abs=1e-4)


def test_infidelity_is_captums():
    captum = pytest.importorskip("captum.metrics")
    masks = iter(MASKS)
    slopes = torch.where(X != 0, SHARES / X, 0)

    def perturb(x):
        mask = torch.stack([next(masks)] * len(x))[:, None]
        return x * mask, x * ~mask

    i = slice(2, 3)
    theirs = captum.infidelity(lambda x: score(x, CLASSES[i].expand(len(x))), perturb, X[i], slopes[i], n_perturb_samples=9,
                               max_examples_per_batch=1, normalize=True)  # fmt: skip
    ours = ask.infidelity(SHARES, ask.removal(score, X, CLASSES, MASKS))[i]
    assert ours.tolist() == pytest.approx(theirs.tolist(), rel=1e-3)  # theirs sums squares in float32


def test_infidelity_as_published():
    """Blocks overwritten one after the other and not put back, each sum and score written out."""
    blocks, noise = ask.grid(8, 8, 2), torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(4)) * 2 - 1
    slopes = torch.randn(X.shape, generator=torch.Generator().manual_seed(5))
    found = ask.Overwriting(blocks, noise, ask.overwritten(score, X, CLASSES, blocks, noise))
    got = ask.infidelity_published(lambda instead: slopes * (X - instead), found)
    for i in range(5):
        told, drops, t = [], [], CLASSES[i : i + 1]
        for picture in noise:
            after = X[i].clone()
            for top, left in ((0, 0), (0, 4), (4, 0), (4, 4)):
                after[:, top : top + 4, left : left + 4] = picture[:, top : top + 4, left : left + 4]
                told.append(float((slopes[i] * (X[i] - after)).double().sum()))
                drops.append(float(score(X[i : i + 1], t)) - float(score(after[None], t)))
        b = sum(a * d for a, d in zip(told, drops, strict=True)) / sum(a * a for a in told)
        expected = statistics.fmean((b * a - d) ** 2 for a, d in zip(told, drops, strict=True))
        assert float(got[i]) == pytest.approx(expected, rel=1e-4)  # float32 scores


def test_grey_pictures():
    blocks = ask.grid(40, 40, 4)
    pictures = ask.grey_pictures(torch.Size([3, 40, 40]), blocks)
    assert pictures.shape == (5, 3, 40, 40) and torch.equal(pictures, ask.grey_pictures(torch.Size([3, 40, 40]), blocks))
    values = [pictures[r][:, blocks == k].unique() for r in range(5) for k in range(16)]
    assert {len(v) for v in values} == {1} and len({float(v) for v in values}) == 80
    assert -1 <= min(values) < -0.9 and 0.9 < max(values) <= 1


def test_occlusion_is_the_drop_of_each_cell():
    found = ask.removal(score, X, CLASSES, ask.single_cells(CELLS))
    shares = ask.occlusion(found, CELLS, 3)
    assert shares.shape == X.shape
    for k in range(16):
        removed = torch.where(CELLS == k, 0, X[2:3])
        drop = score(X[2:3], CLASSES[2:3]) - score(removed, CLASSES[2:3])
        assert float(shares[2][:, CELLS == k].sum()) == pytest.approx(float(drop), rel=1e-3, abs=1e-3)
        assert len(shares[2][:, CELLS == k].unique()) == 1


def test_shares_of_a_slope_and_of_a_share():
    slope, share = (Method(lambda x, target: x, 1, kind) for kind in ("slope", "share"))
    assert torch.equal(slope.shares(X, SHARES), SHARES * X) and torch.equal(
        slope.shares(X, SHARES, X[0])[1], SHARES[1] * (X[1] - X[0])
    )
    assert share.shares(X, SHARES) is SHARES and share.shares(X, SHARES, X[0]) is SHARES


def test_exact_shares_of_a_linear_model_are_perfect():
    def linear(x, target):
        return torch.einsum("nchw,kchw->nk", x, W).gather(1, target[:, None])[:, 0]

    shares = X * W[CLASSES]
    found = ask.removal(linear, X, CLASSES, ask.single_cells(CELLS))
    assert ask.infidelity(shares, found).max() <= 1e-8
    assert ask.correlation(shares, found).min() >= 1 - 1e-8
    assert ask.infidelity(torch.zeros_like(shares), found).tolist() == pytest.approx(found.drops.square().mean(1).tolist())
    assert ask.correlation(torch.zeros_like(shares), found).isnan().all()


def test_cells_and_squares():
    assert CELLS.flatten().bincount().tolist() == [4] * 16
    uneven = ask.grid(7, 5, 3)
    assert uneven.shape == (7, 5) and sorted(set(uneven.flatten().tolist())) == list(range(9))
    assert ask.in_cells(SHARES, CELLS).sum(1).tolist() == pytest.approx(SHARES.double().sum((1, 2, 3)).tolist())
    assert ask.in_cells(SHARES, CELLS)[0, 5].item() == pytest.approx(SHARES[0, :, 2:4, 2:4].double().sum().item())
    assert (MASKS.flatten(1).sum(1) == 16).all() and torch.equal(ask.single_cells(CELLS).sum(0), torch.ones(8, 8))
    squares = ask.random_squares(32, 32, ask.SMALL, 50, torch.Generator().manual_seed(2))
    sides = squares.flatten(1).sum(1).double().sqrt()
    assert sides.min() >= 2 and sides.max() <= 8 and (sides == sides.round()).all()
    parts = ask.removed_parts(ask.grid(32, 32, 8), 20)
    sizes = {name: masks.flatten(1).sum(1) for name, masks in parts.items()}
    assert sizes["squares"].max() <= 64 <= sizes["large squares"].min() and sizes["large squares"].max() <= 256
    assert (sizes["subsets"] == 32 * 32 // 8).all()
    again = ask.removed_parts(ask.grid(32, 32, 8), 20)
    assert all(torch.equal(masks, again[name]) for name, masks in parts.items())


def test_curves():
    """One pixel column holds everything: deleting it first is the best possible deletion."""
    shares = torch.zeros(1, 1, 4, 4)
    shares[..., 0] = 1
    x = torch.ones(1, 1, 4, 4)

    def probability(x, target):
        return x[..., 0].mean((1, 2))

    cells = ask.grid(4, 4, 4)
    deletion, insertion = ask.curves(probability, x, torch.tensor([0]), shares, cells, 4)
    assert deletion.item() == pytest.approx(0.25 / 2) and insertion.item() == pytest.approx(1 - 0.25 / 2)
    worst, last = ask.curves(probability, x, torch.tensor([0]), -shares, cells, 4)
    assert worst.item() == pytest.approx(1 - 0.25 / 2) and last.item() == pytest.approx(0.25 / 2)


def test_monotonicity_and_redrawing():
    changes = ask.redrawn(score, X, CLASSES, CELLS, 400, torch.Generator().manual_seed(3))
    weight = torch.stack([ask.in_cells(W[c : c + 1].square(), CELLS)[0] for c in CLASSES])
    assert (ask.spearman(changes, weight) > 0.3).all()  # what may change is where the weights are large
    order = changes.argsort(1).argsort(1).double()
    assert ask.monotonicity(spread(order), CELLS, changes).tolist() == pytest.approx([1.0] * 5)


def spread(values):
    """Shares whose sums over cells are `values` [N, 16], with signs."""
    signs = torch.tensor([1.0, -1.0] * 8)
    return ((values + 1) * signs)[:, CELLS][:, None] / 4


def test_sensitivity_of_a_linear_model_is_zero():
    maps = W[CLASSES]
    assert not ask.max_sensitivity(lambda x, t: W[t], X, CLASSES, maps, 3, 0.1, 0).any()
    grown = ask.max_sensitivity(lambda x, t: x, X, CLASSES, X, 4, 0.1, 0)
    draw = torch.Generator().manual_seed(0)
    expected = [((0.1 * (2 * torch.rand(X.shape, generator=draw) - 1)).flatten(1).norm(dim=1) / X.flatten(1).norm(dim=1))
                for _ in range(4)]  # fmt: skip
    assert grown.tolist() == pytest.approx(torch.stack(expected).amax(0).tolist(), rel=1e-4)


def test_focus():
    shares = torch.zeros(1, 2, 4, 4)
    shares[0, :, 0, 0], shares[0, :, 3, 3], shares[0, :, 0, 3] = 1.0, 2.0, -5.0
    assert ask.focus(shares, torch.tensor([[True, False, False, False]])).item() == pytest.approx(1 / 3)
    assert ask.focus(shares, torch.tensor([[True, True, False, True]])).item() == 1.0


def test_ranks_share_ties():
    assert ask.ranks(torch.tensor([[3.0, 1.0, 3.0, 2.0]])).tolist() == [[2.5, 0.0, 2.5, 1.0]]
    assert ask.spearman(torch.tensor([[1.0, 2, 3]]), torch.tensor([[1.0, 8, 9000]])).item() == pytest.approx(1)


def test_sign_flips_and_holm():
    assert ask.sign_flip_p(torch.ones(5)) == pytest.approx(2 / 32)
    assert ask.sign_flip_p(torch.tensor([1.0, -1, 2, -2])) == 1.0
    many = torch.randn(60, generator=torch.Generator().manual_seed(4))
    z = abs(float(many.mean() / (many.std() / math.sqrt(60))))
    normal = math.erfc(z / math.sqrt(2))
    assert ask.sign_flip_p(many) == pytest.approx(normal, abs=0.03) and ask.sign_flip_p(many) == ask.sign_flip_p(many)
    assert ask.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.5}) == pytest.approx({"a": 0.04, "b": 0.09, "c": 0.09, "d": 0.5})
