"""How well do maps rank the tokens of a sentence? The text half of fidelity.py (`--model all_minilm_l6_v2`).

A sample is a sentence and what is asked of it: the similarity of its embedding to that of a query, `query<TAB>sentence`, or the
score of the predicted class of a classifier, which returns [B, classes], for a line without a tab. A token's share is its
embedding times the map there; a token is removed as padding is, by its entry in the attention mask, so the others keep their
places. The first and last tokens (their marks of begin and end) are never removed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import faithfulness as ask
import torch
from sentences import SENTENCES
from torch import Tensor, nn

import sp_fx
from sp_fx.models import TextModel
from sp_fx.models.weights import weights_hash

PART = 0.2  # of the tokens, which are removed together
SUBSETS = 32  # random ones, of that part
Shares = Callable[["TextCase", slice], Tensor]  # of the tokens, [N, T]


@dataclass(frozen=True)
class TextCounts:
    batch: int = 10  # sentences explained at once
    subsets: int = SUBSETS
    parts: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5)  # of the tokens, in the curve of deletion


@dataclass(frozen=True)
class TextCase:
    """Sentences [N, T] as `ids` and `mask` (1 where there is a token), and the `aim` of each: a direction [N, width] of the
    network's output."""

    name: str
    model: nn.Module
    ids: Tensor
    mask: Tensor
    aim: Tensor
    samples: str
    embedding: str  # the name of the module that looks tokens up
    counts: TextCounts = field(default_factory=TextCounts)
    seed: int = 0

    @property
    def weights(self) -> str:
        return weights_hash(self.model)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What answers depend on."""
        return self.ids, self.mask, self.aim

    @property
    def removable(self) -> Tensor:
        """The tokens that may be removed, bool [N, T]: all but padding, the first and the last."""
        place = self.mask.cumsum(1)  # among the tokens, from 1
        return (self.mask == 1) & (place > 1) & (place < place[:, -1:])

    def piece(self, part: slice) -> dict[str, Tensor]:
        return {"input_ids": self.ids[part], "attention_mask": self.mask[part]}

    def scores(self, masks: Tensor, part: Tensor) -> Tensor:
        """Returns the score of the sentences `part` [M] (numbers) with only the tokens of `masks` [M, T] there, float64 [M]."""
        with torch.no_grad():
            y = torch.cat([self.model(input_ids=self.ids[p], attention_mask=m) for m, p in zip(masks.split(64), part.split(64))])
        return (y.double() * self.aim[part].double()).sum(1)


def text_case(net: TextModel, texts: Path | None, samples: int | None) -> TextCase:
    """Returns the case of `net` on the sentences of the file `texts` (default: those of sentences.py), the first `samples`.

    Raises:
        ValueError: no sentence, or a sentence of fewer than five tokens.
        FileNotFoundError: there is no such file.
    """
    lines = (
        [line.split("\t") for line in texts.read_text().splitlines() if line.strip()] if texts else [list(p) for p in SENTENCES]
    )
    lines = lines[:samples]
    if not lines or len({len(line) for line in lines}) != 1 or len(lines[0]) > 2:
        raise ValueError(f"expected lines of a sentence, or all of a query, a tab and a sentence; got {len(lines)} in {texts}")
    tokens = net.tokens([line[-1] for line in lines])
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    if int(mask.sum(1).min()) < 5:
        shortest = int(mask.sum(1).argmin())
        raise ValueError(f"line {shortest + 1}: a sentence has at least five tokens, got {lines[shortest][-1]!r}")
    with torch.no_grad():
        if len(lines[0]) == 2:
            queries = list(dict.fromkeys(query for query, _ in lines))
            directions = net.model(**net.tokens(queries))
            aim = directions[[queries.index(query) for query, _ in lines]]
        else:
            y = torch.cat([net.model(input_ids=i, attention_mask=m) for i, m in zip(ids.split(32), mask.split(32))])
            aim = nn.functional.one_hot(y.argmax(1), y.shape[1]).to(y.dtype)
    named = texts.name if texts else "bench/sentences.py"
    return TextCase(net.name, net.model, ids, mask, aim, f"{len(lines)} sentences of {named}", looked_up(net.model, ids))


def looked_up(model: nn.Module, ids: Tensor) -> str:
    """Returns the name of the embedding that is called with the token ids.

    Raises:
        ValueError: there is none.
    """
    found: list[str] = []

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple) -> None:
            if inputs and torch.equal(inputs[0], ids[:1]):
                found.append(name)

        return hook

    hooks = [m.register_forward_pre_hook(note(n)) for n, m in model.named_modules() if isinstance(m, nn.Embedding)]
    with torch.no_grad():
        model(input_ids=ids[:1], attention_mask=torch.ones_like(ids[:1]))
    for hook in hooks:
        hook.remove()
    if not found:
        raise ValueError(f"no nn.Embedding of {type(model).__name__} looks the token ids up")
    return found[0]


# -- methods


def text_methods(case: TextCase) -> dict[str, tuple[Shares, int]]:
    """Returns the shares of tokens, [N, T], by each method, and the passes that it takes."""
    part = slice(0, case.counts.batch)
    default = sp_fx.transform(case.model, example_inputs=case.piece(part))
    paper = sp_fx.transform(case.model, rules=sp_fx.Rules.paper(), example_inputs=case.piece(part))
    return {
        "pullback": (by(default), 1),
        "pullback, paper's rules": (by(paper), 1),
        "gradient x input": (lambda case, part: (slopes(case, part) * embedded(case, part)).sum(-1), 1),
        "gradient norm": (lambda case, part: slopes(case, part).norm(dim=-1), 1),
        "IG-50": (integrated, 50),
    }


def by(explainer: sp_fx.Explainer) -> Shares:
    def shares(case: TextCase, part: slice) -> Tensor:
        maps = explainer.pullback(case.piece(part), case.aim[part], wrt=case.embedding)
        return (maps * embedded(case, part)).sum(-1)

    return shares


def embedded(case: TextCase, part: slice) -> Tensor:
    with torch.no_grad():
        return case.model.get_submodule(case.embedding)(case.ids[part])


def slopes(case: TextCase, part: slice, times: float = 1.0) -> Tensor:
    """Returns the gradient of the score with respect to the tokens' embeddings, which are taken `times` what they are."""
    kept: list[Tensor] = []

    def scaled(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        kept.append((output.detach() * times).requires_grad_())
        return kept[-1]

    hook = case.model.get_submodule(case.embedding).register_forward_hook(scaled)
    try:
        score = (case.model(**case.piece(part)) * case.aim[part]).sum()
    finally:
        hook.remove()
    return torch.autograd.grad(score, kept[0])[0]


def integrated(case: TextCase, part: slice, steps: int = 50) -> Tensor:
    """Integrated gradients, Sundararajan et al., arXiv:1703.01365, from embeddings of zero: midpoints of `steps` pieces."""
    total = sum(slopes(case, part, (k + 0.5) / steps) for k in range(steps)) / steps
    return (total * embedded(case, part)).sum(-1)


# -- measures


def top(shares: Tensor, removable: Tensor, part: float) -> Tensor:
    """Returns which tokens are the first `part` of those that may be removed, at least one, by share: bool [N, T]. Of equal
    shares it takes by chance, not by the order of words."""
    mixed = torch.randperm(shares.shape[1], generator=torch.Generator().manual_seed(6))
    order = shares.double().masked_fill(~removable, -torch.inf)[:, mixed].argsort(dim=1, descending=True, stable=True)
    order = mixed[order]
    counts = (part * removable.sum(1) + 0.5).floor().clamp_min(1)
    ranks = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1]).expand_as(order))
    return (ranks < counts[:, None]) & removable


def random_subsets(removable: Tensor, count: int, seed: int) -> Tensor:
    """Returns `count` random choices of `PART` of each sentence's tokens, bool [N, count, T]."""
    draw = torch.Generator().manual_seed(seed)
    noise = torch.rand((len(removable), count, removable.shape[1]), generator=draw)
    return torch.stack([top(noise[:, k], removable, PART) for k in range(count)], 1)


def drops(case: TextCase, removed: Tensor) -> Tensor:
    """Returns how far each score falls without the tokens of `removed`, bool [N, K, T]: float64 [N, K]."""
    n, k, _ = removed.shape
    rows = torch.arange(n)
    left = (case.mask[:, None] * ~removed).flatten(0, 1)
    return case.scores(case.mask, rows)[:, None] - case.scores(left, rows.repeat_interleave(k)).view(n, k)


def judged(case: TextCase, shares: Tensor, subsets: Tensor, fallen: Tensor) -> dict[str, Tensor]:
    """Returns the measures of `shares` [N, T], float64 [N] each."""
    curve = drops(case, torch.stack([top(shares, case.removable, part) for part in case.counts.parts], 1))
    sums = (subsets * shares.double()[:, None]).sum(2)
    return {
        "deletion of a fifth": drops(case, top(shares, case.removable, PART)[:, None])[:, 0],
        "deletion to a half": curve.mean(1),
        "infidelity, tokens": ask.misfit(sums, fallen),
        "correlation, tokens": ask.pearson(sums, fallen),
    }


def measured_texts(
    case: TextCase, chosen: dict[str, tuple[Shares, int]], answers: Callable[..., Tensor]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]]]:
    """Returns every measure of every method, [N] each, by method and measure, "random" among them, which removes tokens by
    chance; and those of equal shares, which know nothing. `answers(name, compute, *args)` keeps what is computed."""
    subsets = random_subsets(case.removable, case.counts.subsets, 2)
    fallen = answers("drops subsets", drops, case, subsets)
    pieces = [slice(i, i + case.counts.batch) for i in range(0, len(case.ids), case.counts.batch)]
    results = {}
    for name, (shares, _) in chosen.items():
        ranked = answers(f"{name} shares", lambda shares=shares: torch.cat([shares(case, piece) for piece in pieces]))
        results[name] = judged(case, ranked, subsets, fallen)
    results["random"] = {"deletion of a fifth": fallen.mean(1)}
    equal = {"infidelity, tokens": ask.misfit(subsets.double().sum(2), fallen)}
    return results, {"equal shares": equal}
