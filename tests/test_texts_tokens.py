"""The share of each token: against the gradient by the embedding, written out here; words, padding, pictures."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sp_fx
from helpers import relative
from test_capture_sizes import Text, tokens

WORDS = ["[PAD]", "[CLS]", "a", "film", "without", "##out", "equal", "<b>", *(f"w{i}" for i in range(8, 30))]
PLAIN = sp_fx.Rules(**dict.fromkeys(sp_fx.gates.rules.KINDS))


class Tokenizer:
    def convert_ids_to_tokens(self, ids):
        return [WORDS[i] for i in ids]


def explained(rules=None, batch=2, length=7):
    example = (tokens(batch, length), torch.ones(batch, length, dtype=torch.long))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the plain gradient
        return sp_fx.transform(Text().eval(), rules=rules or sp_fx.Rules(), example_inputs=example)


def by_hand(model, ids, mask, target, length_first=False):
    """Gradient times embedding, in one number a token."""
    words = model.words(ids.t() if length_first else ids).detach().requires_grad_()
    forward, model.words.forward = model.words.forward, lambda _: words
    try:
        (slope,) = torch.autograd.grad(model(ids, mask)[:, target].sum(), words)
    finally:
        model.words.forward = forward
    shares = (slope * words).sum(-1).detach()
    return shares.t() if length_first else shares


def test_shares_are_the_map_times_the_embedding():
    model, explainer = Text().eval(), explained(PLAIN)
    for batch, length in ((2, 7), (1, 3), (3, 20)):
        ids, mask = tokens(batch, length), torch.ones(batch, length, dtype=torch.long)
        mask[0, length - 1] = 0
        found = explainer.tokens({"ids": ids, "mask": mask}, 1)
        assert found.embedding == "words" and relative(found.shares, by_hand(model, ids, mask, 1)) <= 1e-5
        assert found.shares[0, -1] == 0 and not found.real[0, -1] and len(found.of(0)) == length - 1
        assert torch.equal(found.shares, explainer.tokens((ids, mask), 1).shares)
    several = explainer.tokens((ids, mask), [[0, 1, 2]] * 3)
    assert several.shares.shape == (3, 3, 20) and relative(several.shares[:, 1], found.shares) <= 1e-5


def test_padding_has_no_share_and_changes_none():
    explainer = explained()
    ids = tokens(1, 6)
    alone = explainer.tokens((ids, torch.ones_like(ids)), 1)
    padded = explainer.tokens((F.pad(ids, (0, 9)), F.pad(torch.ones_like(ids), (0, 9))), 1)
    assert relative(padded.shares[:, :6], alone.shares) <= 1e-6 and not padded.shares[:, 6:].any()
    assert [t for t, _ in padded.of(0)] == [t for t, _ in alone.of(0)]


def test_words_and_how_they_are_shown():
    explainer = explained()
    ids = torch.tensor([[1, 2, 3, 4, 5, 7, 0]])
    mask = (ids != 0).long()
    found = explainer.tokens((ids, mask), 1, tokenizer=Tokenizer())
    assert found.tokens == [["[CLS]", "a", "film", "without", "##out", "<b>", "[PAD]"]]
    words = found.words(0)
    assert [w for w, _ in words] == ["[CLS]", "a", "film", "withoutout", "<b>"]
    assert words[3][1] == pytest.approx(float(found.shares[0, 3] + found.shares[0, 4]))
    assert sum(abs(p) for _, p in found.relative(0)) == pytest.approx(1.0)
    page = found._repr_html_()
    assert "&lt;b&gt;" in page and "<b>" not in page and page.count("<span") == 5
    assert "film[" in str(found) and "\x1b[48;2;" in found.in_colour()
    for tokenizer in (WORDS, lambda i: WORDS[i], dict(enumerate(WORDS))):
        assert explainer.tokens((ids, mask), 1, tokenizer=tokenizer).tokens == found.tokens
    assert explainer.tokens((ids, mask), 1).tokens[0][:2] == ["1", "2"]
    spaced = sp_fx.texts.tokens.Tokens([["Ġa", "Ġfil", "m"]], torch.tensor([[1.0, 2.0, 3.0]]), torch.ones(1, 3).bool(), "")
    assert spaced.words(0) == [("a", 1.0), ("film", 5.0)]


def test_what_has_no_tokens_says_so():
    explainer = sp_fx.transform(nn.Sequential(nn.Linear(4, 3), nn.ReLU()))
    with pytest.raises(TypeError, match="no token ids are looked up"):
        explainer.tokens(torch.randn(2, 4), 1)
    with pytest.raises(ValueError, match="the nearest"):
        explained().tokens((tokens(2, 7), torch.ones(2, 7).long()), 1, embedding="wordz")
    with pytest.raises(TypeError, match=r"head is of shape \[2, 3\]"):
        explained().tokens((tokens(2, 7), torch.ones(2, 7).long()), 1, embedding="head")


def test_words_are_drawn_and_saved(tmp_path):
    pytest.importorskip("matplotlib")
    ids = torch.tensor([[1, 2, 3, 4, 5, 7, 0], [1, *range(8, 14)]])
    found = explained().tokens((ids, (ids != 0).long()), 1, tokenizer=Tokenizer())
    shown = sp_fx.show(found)
    assert repr(shown) == str(found) and shown._repr_html_() == found._repr_html_()
    shown.save(tmp_path / "words.html")
    assert "&lt;b&gt;" in (tmp_path / "words.html").read_text(encoding="utf-8")
    shown.save(tmp_path / "words.png")
    assert (tmp_path / "words.png").read_bytes()[:4] == b"\x89PNG"
    drawn = [text.get_text() for text in shown.figure.texts]
    assert drawn[:-1] == [w for i in range(2) for w, _ in found.words(i)] and drawn[-1].startswith("red: for the target")
    boxes = [text.get_bbox_patch().get_facecolor()[:3] for text in shown.figure.texts[:-1]]
    shares = [s for i in range(2) for _, s in found.words(i)]
    assert all((red >= blue) == (share >= 0) for (red, _, blue), share in zip(boxes, shares))


class PlacesFirst(nn.Module):
    """Looks its positions up before its tokens."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.places, self.words, self.head = nn.Embedding(16, 8), nn.Embedding(30, 8), nn.Linear(8, 3)

    def forward(self, ids):
        places = self.places(torch.arange(ids.shape[1]))
        return self.head((self.words(ids) + places).relu().mean(1))


def test_positions_are_no_tokens():
    explainer = sp_fx.transform(PlacesFirst().eval(), example_inputs=tokens(2, 5))
    found = explainer.tokens(tokens(2, 7), 1)
    assert found.embedding == "words" and found.shares.shape == (2, 7)


class LengthFirst(nn.Module):
    """Its activations are [L, B, width], as XLNet has them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.inner, self.head = nn.Embedding(30, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, ids, mask):
        h = F.gelu(self.inner(self.words(ids.t()))) * mask.t()[..., None]
        return self.head(h.mean(0))


@pytest.mark.parametrize("batch, length", [(2, 5), (4, 4), (1, 3)])
def test_embeddings_with_the_length_first(batch, length):
    ids, mask = tokens(batch, length), torch.ones(batch, length, dtype=torch.long)
    explainer = sp_fx.transform(LengthFirst().eval(), rules=PLAIN, example_inputs=(ids, mask))
    found = explainer.tokens((ids, mask), 1)
    assert [len(row) for row in found.tokens] == [length] * batch
    assert relative(found.shares, by_hand(LengthFirst().eval(), ids, mask, 1, length_first=True)) <= 1e-5
    several = explainer.tokens((ids, mask), [[0, 1]] * batch)
    assert several.shares.shape == (batch, 2, length) and relative(several.shares[:, 1], found.shares) <= 1e-5
    program = explainer.compile("tokens", example_inputs=(ids, mask), inductor=False)
    ids, mask = tokens(3, 6), torch.ones(3, 6, dtype=torch.long)
    assert relative(program((ids, mask), 1)[1], explainer.tokens((ids, mask), 1).shares) <= 1e-5


class Scaled(nn.Embedding):
    """A table whose rows are multiplied, as those of Gemma and of M2M100 are."""

    def forward(self, ids):
        return super().forward(ids) * self.embedding_dim**0.5


def test_tables_that_are_multiplied():
    class Scales(Text):
        def __init__(self):
            super().__init__()
            weight, self.words = self.words.weight, Scaled(30, 8)
            self.words.weight = weight

    ids, mask = tokens(2, 7), torch.ones(2, 7, dtype=torch.long)
    for tracer in ("auto", "export"):
        explainer = sp_fx.transform(Scales().eval(), rules=PLAIN, example_inputs=(ids, mask), tracer=tracer)
        found = explainer.tokens((ids, mask), 1)
        assert found.embedding == "words" and relative(found.shares, by_hand(Scales().eval(), ids, mask, 1)) <= 1e-5


class Several(nn.Module):
    """Looks up positions and types before it looks up words."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.places, self.kinds, self.words = nn.Embedding(64, 8), nn.Embedding(2, 8), nn.Embedding(30, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, ids, mask, kinds):
        h = self.places((mask.cumsum(1) - 1).clamp(min=0)) + self.kinds(kinds) + self.words(ids)
        return self.head((F.gelu(h) * mask[..., None]).mean(1))


@pytest.mark.parametrize("tracer", ["fx", "export"])
def test_the_words_are_what_ids_are_looked_up_in(tracer):
    call = tokens(2, 6), torch.ones(2, 6, dtype=torch.long), torch.zeros(2, 6, dtype=torch.long)
    found = sp_fx.transform(Several().eval(), example_inputs=call, tracer=tracer).tokens(call, 1)
    assert found.embedding == "words" and found.tokens[0] == [str(i) for i in call[0][0].tolist()]


@pytest.mark.parametrize(
    "pieces, special, expected",
    [
        (["<s>", "a", "Ġfilm", "Ġwith", "out", ".", "</s>"], {"<s>", "</s>"}, ["<s>", "a", "film", "without.", "</s>"]),
        (["▁a", "▁film", "s", "</s>"], {"</s>"}, ["a", "films", "</s>"]),
        (["▁a", "<mask>", "▁b"], {"<mask>"}, ["a", "<mask>", "b"]),
        (["ĠcafÃ©", "ĠðŁĺĢ", "Ċ", "a"], set(), ["café", "😀", "⏎a"]),
        (["[CLS]", "sing", "##ing", "[SEP]"], {"[CLS]", "[SEP]"}, ["[CLS]", "singing", "[SEP]"]),
    ],
)
def test_pieces_of_words(pieces, special, expected):
    shares = torch.arange(1.0, len(pieces) + 1)[None]
    found = sp_fx.texts.tokens.Tokens([pieces], shares, torch.ones(1, len(pieces), dtype=torch.bool), "words", frozenset(special))
    words = found.words(0)
    assert [word for word, _ in words] == expected and sum(share for _, share in words) == float(shares.sum())


def test_tokenizers_that_make_no_words_of_ids():
    ids = tokens(2, 6)
    explainer = sp_fx.transform(Text().eval(), example_inputs=ids)
    with pytest.raises(TypeError, match="convert_ids_to_tokens"):
        explainer.tokens(ids, 1, tokenizer=lambda text: [len(t) for t in text])
    with pytest.raises(ValueError, match="embedding='nope'"):
        explainer.tokens(ids, 1, embedding="nope")
    with pytest.raises(TypeError, match="batch_size"):
        call = (ids, torch.ones_like(ids))
        sp_fx.transform(LengthFirst().eval(), example_inputs=call).tokens(call, 1, batch_size=1)
