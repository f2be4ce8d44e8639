"""The share of each token of a text in what is explained: the pullback at the embedding of the tokens, times the embedding."""

from __future__ import annotations

import html
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx

from ..analysis.ops import CARRIES, FACTORS, LOOKUPS, QUOTIENT, SHAPES, SIZES
from ..analysis.signals import called
from ..capture.admission import checked
from ..capture.arguments import Given
from ..capture.passed import lets_through
from ..capture.sizes import with_batch
from ..containers import refuse_nested, tensors_of
from ..methods.captured import CapturedModule
from ..methods.pullbacks import pullback
from ..methods.requests import InputError, Inputs, Request, Target
from ..methods.subgraphs import activations, find

POSITIVE, NEGATIVE = (178, 24, 43), (33, 102, 172)  # red and blue of a diverging scale, as maps of pictures have them


@dataclass(frozen=True)
class Tokens:
    """The share of each token, of a batch of B texts of L tokens.

    Attributes:
        tokens: the tokens of each text, B lists of L.
        shares: [B, L], signed: above 0 what speaks for the target, below 0 what speaks against it; 0 at padding. Of T targets a
            sample [B, T, L]. They are the inner product of the map with the embedding of each token.
        real: [B, L], True where a token is none of the padding.
        embedding: the name of the embedding.
        special: tokens that are no part of a word, such as "[CLS]" and "</s>".
    """

    tokens: list[list[str]]
    shares: Tensor
    real: Tensor
    embedding: str
    special: frozenset[str] = frozenset()

    def __len__(self) -> int:
        return len(self.tokens)

    def of(self, sample: int, target: int = 0) -> list[tuple[str, float]]:
        """The tokens of one text with their shares, without its padding."""
        shares = self.shares[sample] if self.shares.dim() == 2 else self.shares[sample, target]
        return [(t, float(s)) for t, s, real in zip(self.tokens[sample], shares, self.real[sample]) if real]

    def words(self, sample: int, target: int = 0) -> list[tuple[str, float]]:
        """The words of one text with their shares: pieces of a word, as `##ing` after `sing`, are added up."""
        marked, words, ended = self._starts_words(sample), list[tuple[str, float]](), True
        for token, share in self.of(sample, target):
            alone = token in self.special
            piece = token.startswith("##") or (marked and token[:1] not in ("Ġ", "▁", "Ċ"))
            text = token if alone else token.removeprefix("##").lstrip("▁")
            if piece and not alone and not ended:
                words[-1] = (words[-1][0] + text, words[-1][1] + share)
            else:
                words.append((text, share))
            ended = alone
        return [(readable(word) if marked and word not in self.special else word, share) for word, share in words]

    def _starts_words(self, sample: int) -> bool:
        """Whether the tokens of a text say where a word starts, as those of GPT-2 (`Ġfilm`) and T5 (`▁film`) do."""
        return any(token[:1] in ("Ġ", "▁") for token in self.tokens[sample])

    def relative(self, sample: int, target: int = 0) -> list[tuple[str, float]]:
        """The words with their parts of all that speaks for or against: the absolute values add up to 1."""
        words = self.words(sample, target)
        whole = sum(abs(share) for _, share in words) or 1.0
        return [(word, share / whole) for word, share in words]

    def __str__(self) -> str:
        """Each text on a line, each word with its part in per cent: "a film[+41] without[-3] equal[+22]"."""
        return "\n".join(
            " ".join(word + (f"[{round(100 * part):+d}]" if abs(part) >= 0.005 else "") for word, part in self.relative(i))
            for i in range(len(self))
        )

    def in_colour(self) -> str:
        """The texts for a terminal of true colours, each word on its colour of the scale."""
        lines = []
        for i in range(len(self)):
            cells = [f"\x1b[48;2;{r};{g};{b}m\x1b[38;2;0;0;0m{w}\x1b[0m" for w, (r, g, b) in self.coloured(i)]
            lines.append(" ".join(cells))
        return "\n".join(lines)

    def coloured(self, sample: int, target: int = 0) -> list[tuple[str, tuple[int, int, int]]]:
        """The words of one text with their colours: white at 0, and full at the largest share."""
        words = self.words(sample, target)
        most = max((abs(share) for _, share in words), default=0.0) or 1.0
        return [(word, colour(share / most)) for word, share in words]

    def _repr_html_(self) -> str:
        """The texts as a notebook shows them: red words speak for the target, blue ones against it."""
        return self.html()

    def html(self, titles: Sequence[str] = ()) -> str:
        """The texts as a part of a page, each under its title where there are `titles`."""
        lines = []
        for i in range(len(self)):
            lines += [f"<small>{html.escape(titles[i])}</small>"] if titles else []
            parts = dict(enumerate(part for _, part in self.relative(i)))
            spans = "".join(
                f'<span title="{100 * parts[j]:+.1f} %" style="background:rgb{c};color:#000;padding:1px 3px;margin:1px;'
                f'border-radius:3px">{html.escape(word)}</span> '
                for j, (word, c) in enumerate(self.coloured(i))
            )
            lines.append(f'<p style="line-height:1.9">{spans}</p>')
        return f'<div class="sp-fx-tokens">{"".join(lines)}<small>red: for the target, blue: against it</small></div>'


def readable(word: str) -> str:
    """Returns a word of a byte-level tokenizer, as GPT-2's `Ġcafé`, as text: each byte that is no printable letter is written as
    the letter at 256 and what number of these it is."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    bytes_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    if not all(letter in bytes_of for letter in word):
        return word
    text = bytes(bytes_of[letter] for letter in word).decode(errors="replace").strip(" ").replace("\n", "⏎")
    return text or word


def colour(value: float) -> tuple[int, int, int]:
    """The colour of a share in [-1, 1]: white at 0, red above, blue below."""
    end = POSITIVE if value >= 0 else NEGATIVE
    strength = min(abs(value), 1.0) * 0.75  # black letters stay readable
    r, g, b = (round(255 + strength * (c - 255)) for c in end)
    return r, g, b


def joined(several: Sequence[Tokens]) -> Tokens:
    """Returns the tokens of several batches as one, the shorter texts padded."""
    longest = max(one.real.shape[1] for one in several)

    def padded(t: Tensor) -> Tensor:
        return torch.nn.functional.pad(t, (0, longest - t.shape[-1]))

    return Tokens(
        [[*tokens, *[""] * (longest - len(tokens))] for one in several for tokens in one.tokens],
        torch.cat([padded(one.shares) for one in several]),
        torch.cat([padded(one.real) for one in several]),
        several[0].embedding,
        several[0].special,
    )


def tokens(
    module: CapturedModule,
    inputs: Inputs,
    target: Target,
    *,
    embedding: str | None,
    tokenizer: Any,
    forward_kwargs: Mapping[str, Any] | None,
    batch_size: int | None,
) -> Tokens:
    """`Explainer.tokens`."""
    refuse_nested(inputs)
    args, kwargs = Request(inputs, forward_kwargs=forward_kwargs).arguments(module.forward)
    with torch.inference_mode(False):
        embedded = embedded_in(module.for_call(*args, **kwargs), args, kwargs, embedding)
        if embedded.length_first and batch_size is not None:
            raise InputError(f"{embedded.name} is [L, B, width], and batch_size cuts along the first axis: leave batch_size out")
        maps = pullback(module, Request(inputs, target, forward_kwargs, embedded.name, batch_size))
    if embedded.length_first:  # [L, B, width], or of T targets [L, T, B, width]
        maps = maps.transpose(0, -2)
    real = torch.ones(embedded.values.shape[:2], dtype=torch.bool, device=embedded.values.device)
    if embedded.mask is not None:
        real = embedded.mask == real_value(embedded.mask, maps)
    words = texts_of(embedded.ids, embedded.values, tokenizer)
    special = frozenset(map(str, getattr(tokenizer, "all_special_tokens", ())))
    return Tokens(words, shares_of(maps, embedded.values, real), real, embedded.name, special)


@dataclass(frozen=True)
class Embedded:
    """The embedding of the tokens of a call.

    Attributes:
        name: of the activation.
        values: [B, L, width].
        length_first: whether they are [L, B, width] in the network, as XLNet has them.
        ids: [B, L], the argument that the embedding is looked up by; None where there is none.
        mask: [B, L], the argument that is 0 at padding; None where there is none.
    """

    name: str
    values: Tensor
    length_first: bool
    ids: Tensor | None
    mask: Tensor | None


def embedded_in(module: CapturedModule, args: tuple[Any, ...], kwargs: dict[str, Any], embedding: str | None) -> Embedded:
    """Returns the embedding of the tokens of a call of `module`: the activation `embedding`, or, for None, the first table that
    ids are looked up in.

    Raises:
        InputError: there is none, or it is of another shape.
        ValueError: `embedding` names no activation.
    """
    name = embedding or looked_up(module.graph)
    if not name:
        raise InputError("no token ids are looked up in a table: pass embedding= the name of the activation of the tokens")
    find(module.graph, name, "embedding")  # says so, where it names none
    arguments = Given(args, kwargs).by_name(module.forward)
    with torch.no_grad():
        values = module.split(name)[0](*args, **kwargs)
    if values.dim() != 3:
        raise InputError(f"{name} is of shape {list(values.shape)}; an embedding of tokens is [B, L, width]")
    flipped = values.transpose(0, 1)
    ids = ids_of(module.graph, name, arguments, values)
    length_first = ids is None or (values.shape[0] == values.shape[1] and is_length_first(module, name, args, kwargs))
    if length_first and (other := ids_of(module.graph, name, arguments, flipped)) is not None:
        ids, values = other, flipped
    else:
        length_first = False
    return Embedded(name, values, length_first, ids, mask_of(arguments, ids))


def is_length_first(module: CapturedModule, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the activation `name` has its samples on axis 1: of one sample alone, that has one entry."""
    call = with_batch(Given(args, kwargs), 1)
    with torch.no_grad():
        return bool(module.split(name)[0](*call.args, **call.kwargs).shape[1] == 1)


def shares_of(maps: Tensor, values: Tensor, real: Tensor | None) -> Tensor:
    """Returns the share of each token: the inner product of the map at the embedding [B, L, width], or [B, T, L, width] of T
    targets a sample, with the `values` there [B, L, width]; 0 where `real` [B, L] says that a token is padding."""
    several = maps.dim() > values.dim()
    shares = (maps * (values[:, None] if several else values)).sum(-1)
    if real is None:
        return shares
    return torch.where(real[:, None] if several else real, shares, 0.0)


def texts_of(ids: Tensor | None, values: Tensor, tokenizer: Any) -> list[list[str]]:
    """The tokens as text: by the tokenizer's `convert_ids_to_tokens`, a function or a sequence of words by id; else the ids."""
    if ids is None:
        return [[str(i) for i in range(values.shape[1])] for _ in range(values.shape[0])]
    rows = ids.expand(values.shape[0], -1).tolist() if ids.dim() == 2 else ids.tolist()
    if tokenizer is None:
        return [[str(i) for i in row] for row in rows]
    if hasattr(tokenizer, "convert_ids_to_tokens"):
        return [[str(t) for t in tokenizer.convert_ids_to_tokens(row)] for row in rows]
    word: Callable[[int], Any] = tokenizer if callable(tokenizer) else tokenizer.__getitem__
    try:
        return [[str(word(i)) for i in row] for row in rows]
    except Exception as error:
        kinds = "one with convert_ids_to_tokens, a function of an id, or a sequence of words by id"
        got = f"of the id {rows[0][0]} this {type(tokenizer).__name__} makes none ({error})"
        raise TypeError(f"tokenizer= makes words of ids: {kinds}; {got}") from error


def ids_of(graph: fx.Graph, name: str, arguments: Mapping[str, Any], values: Tensor) -> Tensor | None:
    """The token ids among the arguments: those that the embedding is made from, where they have an id for each of its rows."""
    seen, queue = set(), [find(graph, name, "embedding")]
    while queue:
        at = queue.pop()
        if at in seen:
            continue
        seen.add(at)
        queue += at.all_input_nodes
    names = {str(node.target).lstrip("*") for node in seen if node.op == "placeholder"}
    own = [t for n, value in arguments.items() if n in names for t in tensors_of(value)]
    fits = [t for t in own if not t.is_floating_point() and t.dim() == 2 and t.shape[1] == values.shape[1]]
    return next((t for t in fits if not of_zeros_and_ones(t)), next(iter(fits), None))


def mask_of(arguments: Mapping[str, Any], ids: Tensor | None) -> Tensor | None:
    """The mask of padding among the arguments: the tensor of two values, such as 0 and 1, that is shaped like the ids and is
    called a mask; None where there is none."""
    if ids is None:
        return None
    named: dict[str, Tensor] = {}
    for name, value in arguments.items():
        items = value.items() if isinstance(value, Mapping) else [(name, value)]
        named |= {str(n): t for n, t in items if isinstance(t, Tensor) and t is not ids and t.shape == ids.shape}
    called_so: Sequence[Tensor] = [t for n, t in named.items() if "mask" in n.lower() and len(t.unique()) <= 2]
    return next(iter(called_so), None)


def real_value(mask: Tensor, maps: Tensor) -> float:
    """Returns the value that a mask has where a token is none of the padding: 1 of transformers' masks, False of PyTorch's, 0 of
    what is added to scores. It is measured: `maps` [B, L, width] are 0 at padding. A mask that is the same everywhere hides
    nothing; where both values have maps that are not 0, it is 1, or False."""
    values = mask.unique().tolist()
    if len(values) < 2:
        return values[0] if values else 1
    if maps.dim() > 3:
        maps = maps.abs().sum(1)
    shown = [v for v in values if bool(maps[mask == v].any())]
    if len(shown) == 1:
        return shown[0]
    return 0 if mask.dtype == torch.bool or 1 not in values else 1


def of_zeros_and_ones(t: Tensor) -> bool:
    return bool(((t == 0) | (t == 1)).all())


def looked_up(graph: fx.Graph) -> str:
    """Returns the name of the activation of the tokens: of those that are looked up in a table by an input, as it came, the one
    with the largest table, which positions and types of tokens have not; else of those by what is made of inputs; "" where there
    is none."""
    inputs = set(graph.find_nodes(op="placeholder"))
    given = set(inputs)  # and what is the same numbers, in another shape or dtype
    for node in graph.nodes:
        of_sizes = node.op in ("call_function", "call_method") and called(node) in SHAPES | SIZES
        if inputs.intersection(node.all_input_nodes) and not of_sizes:
            inputs.add(node)
            is_same = is_mark(graph, node) if node.op == "call_module" else called(node) in CARRIES or node.target is checked
            if is_same or (called(node) == "getitem" and node.args[0] in given):
                given.add(node)
    order = {node: position for position, node in enumerate(graph.nodes)}
    best, found = (-1, -1), ""
    for name, node in sorted(activations(graph).items(), key=lambda pair: order[pair[1]]):
        if node in inputs and (lookup := lookup_of(graph, node, inputs)) is not None:
            score = (int(not given.isdisjoint(lookup.all_input_nodes)), rows_of(graph, lookup))
            best, found = (score, name) if score > best else (best, found)
    return found


def is_mark(graph: fx.Graph, node: fx.Node) -> bool:
    return lets_through(graph.owning_module.get_submodule(str(node.target)))  # type: ignore[union-attr]


def rows_of(graph: fx.Graph, lookup: fx.Node) -> int:
    """Returns how many rows the table of a lookup has; 0 where it is made by the forward."""
    if lookup.op == "call_module":
        return int(graph.owning_module.get_submodule(str(lookup.target)).num_embeddings)  # type: ignore[union-attr, operator, arg-type]
    tables = [n for n in lookup.all_input_nodes if n.op == "get_attr"]
    return max((attrgetter(str(n.target))(graph.owning_module).shape[0] for n in tables), default=0)


def lookup_of(graph: fx.Graph, node: fx.Node, inputs: Collection[fx.Node]) -> fx.Node | None:
    """Returns the call that a node is the result of, if that looks positions up in a table: of the call itself, of that times a
    constant, as Gemma has it, and of a mark of either; else None. `inputs` are the nodes that vary."""
    if node.op != "call_module":
        if called(node) in FACTORS | QUOTIENT:
            varying = [n for n in node.all_input_nodes if n in inputs]
            return lookup_of(graph, varying[0], inputs) if len(varying) == 1 and varying[0] is node.args[0] else None
        return node if called(node) in LOOKUPS - {"getitem"} else None
    if is_mark(graph, node):
        return lookup_of(graph, node.args[0], inputs) if isinstance(node.args[0], fx.Node) else None
    module = graph.owning_module.get_submodule(str(node.target))  # type: ignore[union-attr]
    return node if isinstance(module, torch.nn.Embedding | torch.nn.EmbeddingBag) else None
