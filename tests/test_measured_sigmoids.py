"""Whether a sigmoid of the network's own gave its scores, whatever became of them on the way out."""

import pytest
import torch
from torch import nn

from sp_fx.measured.sigmoids import Sigmoids

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
ENDS = {
    "module": (nn.Sigmoid(), True),
    "function": (torch.sigmoid, True),
    "in place": (lambda y: (2 * y).sigmoid_(), True),
    "reshaped": (lambda y: torch.sigmoid(y).view(3, 2, 2).flatten(1), True),
    "of half precision": (lambda y: torch.sigmoid(y.half()).float(), True),
    "rounded afterwards": (lambda y: torch.sigmoid(y).bfloat16().float(), True),
    "compiled op by op": (torch.compile(torch.sigmoid, backend="eager"), True),
    "scores": (lambda y: y, False),
    "scores between 0 and 1": (lambda y: y.sigmoid() * 0.5, False),
    "a gate": (lambda y: y * torch.sigmoid(y), False),
    "a softmax": (lambda y: y.softmax(1), False),
    "inside": (lambda y: torch.sigmoid(y) @ torch.eye(4).flip(0), False),
    "none at all": (lambda y: y[:0], False),
}


@pytest.mark.parametrize("case", ENDS)
@pytest.mark.parametrize("autograd", [False, True])
def test_scores_that_a_sigmoid_gave(case, autograd):
    end, expected = ENDS[case]
    with torch.set_grad_enabled(autograd), Sigmoids() as seen:
        scores = end(nn.Identity()(X * 1.0))
    assert seen.gave(scores) is expected
    assert not seen.gave(torch.full((3, 4), torch.nan)) and not seen.gave(torch.ones(5))


def test_a_network_with_many_gates_and_its_end():
    with Sigmoids() as seen:
        y = X
        for _ in range(20):
            y = y * torch.sigmoid(y)
        scores = torch.sigmoid(y)
    assert seen.gave(scores) and len(seen.found) < 20 and not seen.gave(y)
