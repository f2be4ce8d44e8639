"""Targets of other tasks than classification, against the gradient of what they name."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sp_fx
from helpers import relative
from sp_fx import targets


class Net(nn.Module):
    """A linear map to an output of the shape that a task has, in the container that it comes in."""

    def __init__(self, *shape, pack=lambda y: y):
        super().__init__()
        torch.manual_seed(0)
        self.shape, self.pack = shape, pack
        self.map = nn.Linear(4, torch.Size(shape).numel())

    def forward(self, x):
        return self.pack(self.map(x).view(-1, *self.shape))


X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


def agree(model, target, by_hand):
    """The pullback of a target is the gradient of what it names, `by_hand(output)`, of networks without gates."""
    plain = sp_fx.Rules(**dict.fromkeys(sp_fx.gates.rules.KINDS))
    with pytest.warns(UserWarning, match="no gate to rewrite"):
        explainer = sp_fx.transform(model, rules=plain)
    leaf = X.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(by_hand(model(leaf)).sum(), leaf)
    assert relative(explainer.pullback(X, target), wanted) <= 1e-6


@pytest.mark.parametrize("position, id", [(-1, 3), (0, 2), (torch.tensor([1, 4]), torch.tensor([0, 6])), (2, None)])
def test_a_token_at_a_position(position, id):
    def named(y):
        places = [position] * 2 if isinstance(position, int) else position.tolist()
        ids = [id] * 2 if id is None or isinstance(id, int) else id.tolist()
        return torch.stack([row[p].max() if i is None else row[p, i] for row, p, i in zip(y, places, ids)])

    agree(Net(5, 7), targets.token(position, id), named)
    agree(Net(5, 7, pack=lambda y: {"logits": y, "hidden": y * 2}), targets.token(position, id), lambda out: named(out["logits"]))


def test_the_similarity_of_two_embeddings():
    other = torch.randn(6)
    angle = lambda y, to: (y * to).sum(-1) / (y.norm(dim=-1) * to.norm(dim=-1))  # noqa: E731
    agree(Net(6), targets.similarity(other), lambda y: angle(y, other))
    pair = torch.randn(2, 6)
    agree(Net(6), targets.similarity(pair), lambda y: angle(y, pair))
    packed = Net(2, 6, pack=lambda y: {"a": y[:, 0], "b": y[:, 1]})
    agree(packed, targets.similarity(other, of=lambda out: out["b"]), lambda out: angle(out["b"], other))
    with pytest.raises(ValueError, match=r"embeddings \[B, 5\].*got \[2, 6\]"):
        sp_fx.transform(Net(6)).pullback(X, targets.similarity(torch.randn(5)))


def test_the_span_of_an_answer():
    packed = Net(2, 5, pack=lambda y: {"start_logits": y[:, 0], "end_logits": y[:, 1]})
    agree(packed, targets.span(1, 3), lambda out: out["start_logits"][:, 1] + out["end_logits"][:, 3])
    agree(packed, targets.span(), lambda out: out["start_logits"].max(1).values + out["end_logits"].max(1).values)
    output = SimpleNamespace(start_logits=torch.arange(6.0).view(2, 3), end_logits=torch.ones(2, 3))
    assert targets.span(2, 0)(output).tolist() == [3.0, 6.0]


def test_a_class_over_a_region():
    mask = torch.tensor([[1, 0, 1], [0, 0, 1]])
    agree(Net(4, 2, 3), targets.region(2, mask), lambda y: (y[:, 2] * mask).sum((1, 2)) / 3)
    each = torch.stack([mask, 1 - mask]).bool()
    agree(Net(4, 2, 3, pack=lambda y: {"out": y, "aux": y}), targets.region(1, each),
          lambda out: (out["out"][:, 1] * each).sum((1, 2)) / 3)  # fmt: skip

    def where_it_is_predicted(y):
        own = y.argmax(1) == 3
        return (y[:, 3] * own).sum((1, 2)) / own.sum((1, 2)).clamp_min(1)

    model = Net(4, 5, 6)
    assert (model(X).argmax(1) == 3).flatten(1).any(1).all()
    agree(model, targets.region(3), where_it_is_predicted)
    with pytest.raises(ValueError, match="the mask of class 0 is empty"):
        sp_fx.transform(Net(4, 2, 3)).pullback(X, targets.region(0, torch.zeros(2, 3)))
    with pytest.raises(ValueError, match="as high and wide as the output"):
        sp_fx.transform(Net(4, 2, 3)).pullback(X, targets.region(0, torch.ones(3, 3)))


def detector(order):
    """Boxes (cxcywh) and logits of four queries, in some order."""

    def pack(y):
        boxes = torch.tensor([[0.2, 0.2, 0.2, 0.2], [0.7, 0.7, 0.4, 0.4], [0.5, 0.5, 1.0, 1.0], [0.9, 0.1, 0.1, 0.1]])
        return {"logits": y[:, order], "pred_boxes": boxes[order] + 0 * y[:, :, :1]}

    return Net(4, 3, pack=pack)


def test_a_box_is_the_same_wherever_it_is_in_the_output():
    wanted = lambda out: out["logits"][:, 1, 2]  # noqa: E731
    for corners, form in (((0.52, 0.5, 0.9, 0.88), "xyxy"), ((0.7, 0.7, 0.38, 0.4), "cxcywh")):
        agree(detector([0, 1, 2, 3]), targets.box(corners, 2, form), wanted)
        agree(detector([3, 1, 0, 2]), targets.box(corners, 2, form), wanted)
        agree(detector([1, 0, 3, 2]), targets.box(corners, 2, form), lambda out: out["logits"][:, 0, 2])
    found = [{"boxes": torch.tensor([[0.0, 0, 2, 2], [4, 4, 8, 8], [4, 4, 7, 8]]), "scores": torch.tensor([0.9, 0.5, 0.8]),
              "labels": torch.tensor([1, 1, 2])}]  # fmt: skip
    assert targets.box((4.0, 4.0, 7.0, 8.0), 1)(found).tolist() == [0.5]
    with pytest.raises(ValueError, match="no box of label 7"):
        targets.box((4.0, 4.0, 7.0, 8.0), 7)(found)
    with pytest.raises(ValueError, match="'xyxy' or 'cxcywh'"):
        targets.box((0, 0, 1, 1), 1, "xywh")


def test_what_needs_no_target_of_its_own():
    agree(Net(1, pack=lambda y: y[:, 0]), None, lambda y: y)
    agree(Net(2, pack=lambda y: {"age": y[:, :1], "sex": y[:, 1:]}), lambda out: out["age"][:, 0], lambda out: out["age"])
    pairs = lambda y: {"logits_per_image": F.normalize(y, dim=-1) @ torch.eye(5)[:, :2], "other": y}  # noqa: E731
    agree(Net(5, pack=pairs), lambda out: out["logits_per_image"].diagonal(), lambda out: out["logits_per_image"].diagonal())
