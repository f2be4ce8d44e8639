"""Networks with SiLU and with gated MLPs, which no package carries trained: what temperatures.py tries the rules of those on.

They are the zoo's networks with other gates, trained on by the zoo's own training from the zoo's weights:

- the CNN with SiLU for ReLU, as in EfficientNet;
- the transformer with the feed-forward `narrow(silu(a) * b)` for `narrow(gelu(a))`, as in Llama (SwiGLU, arXiv:2002.05202), where
  a and b are made from the same input, and b starts as 1.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch.nn.functional as F
from methods import Run
from safetensors.torch import load_file, save_file
from shares import SHARES, at_shares, named
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import sp_fx
from sp_fx import zoo
from sp_fx.zoo import train
from sp_fx.zoo.networks import FeedForward

TRAINING = {"seed": 1, "epochs": 4, "scenes": 8_000, "rate": 1e-3, "push": 6.0}
TEST_SCENES = 1_000


class GatedFeedForward(nn.Module):
    """`narrow(silu(a) * b)`, a of the zoo's own layers; `share` of the derivative of the product goes back to each factor, the
    rest to none. [B, H, W, D] to the same."""

    share = 1.0

    def __init__(self, feed: FeedForward) -> None:
        super().__init__()
        self.wide, self.neighbours, self.narrow = feed.wide, feed.neighbours, feed.narrow
        self.factor = nn.Linear(feed.wide.in_features, feed.wide.out_features)
        nn.init.zeros_(self.factor.weight)
        nn.init.ones_(self.factor.bias)

    def forward(self, x: Tensor) -> Tensor:
        near = self.neighbours(self.wide(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        product = F.silu(near) * self.factor(x)
        if self.share != 1:
            product = self.share * product + (1 - self.share) * product.detach()
        return self.narrow(product)


def replaced(network: nn.Module, kind: type[nn.Module], by: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """`network` with another module for each of a kind."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, kind):
                setattr(module, name, by(child))
    return network


VARIANTS: dict[str, Callable[[], nn.Module]] = {
    "residual_cnn, silu": lambda: replaced(zoo.load("residual_cnn"), nn.ReLU, lambda relu: nn.SiLU()),
    "pyramid_transformer, gated": lambda: replaced(zoo.load("pyramid_transformer"), FeedForward, GatedFeedForward),
}


def variant(name: str, folder: Path) -> nn.Module:
    """The trained network in eval mode: float32 [B, 3, 96, 96] in [-1, 1] to logits [B, 10]; it is trained, for some minutes,
    unless its weights are in `folder`."""
    path = folder / f"{name}.safetensors"
    if not path.exists():
        with mock.patch.dict(train.NETWORKS, VARIANTS), sdpa_kernel(SDPBackend.MATH):
            network = train.train(name, **TRAINING)  # type: ignore[arg-type]
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: value.contiguous() for key, value in network.state_dict().items()}, path)
        score = train.accuracy(network, *train.cached(train.TEST_SEED, TEST_SCENES))
        print(f"{name}: accuracy {score:.4f} on {TEST_SCENES} unseen scenes", flush=True)
    network = VARIANTS[name]()
    network.load_state_dict(load_file(path))
    return network.eval()


def halves(network: nn.Module) -> dict[str, Run]:
    """Returns the soft pullback that gives each factor of a product a half of its derivative (the half rule of AttnLRP,
    arXiv:2402.05602: what the two have add up to the product's), alone and with its shares of attention."""
    halved = copy.deepcopy(network)
    for module in halved.modules():
        if isinstance(module, GatedFeedForward):
            module.share = 0.5
    explainer = sp_fx.transform(halved)
    return {
        "halves of products": explainer.pullback,
        f"halves of products, shares {named(SHARES[0])}": at_shares(explainer, SHARES[0]),
        f"shares {named(SHARES[0])}": at_shares(sp_fx.transform(network), SHARES[0]),
    }
