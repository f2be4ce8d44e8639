"""Programs of texts and sequences: one for every length, from token ids, with tied weights, and with a target of one's own."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sp_fx
from helpers import relative
from test_capture_sizes import Text, tokens


class Waves(nn.Module):
    """A network of sequences [B, 3, T] of any length."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv1d(3, 8, 5, padding=2), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(F.relu(self.conv(x)).mean(-1))


class Fixed(Waves):
    """The same, with a layer over all of the time."""

    def __init__(self):
        super().__init__()
        self.time = nn.Linear(20, 5)

    def forward(self, x):
        return self.head(F.gelu(self.time(F.relu(self.conv(x)))).mean(-1))


class Tied(nn.Module):
    """A language model: its head is the table of its tokens."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.inner, self.head = nn.Embedding(30, 8), nn.Linear(8, 8), nn.Linear(8, 30, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids):
        h = self.words(ids)
        seen = torch.tril(torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool))
        h = h + (h @ h.transpose(1, 2) / 3).masked_fill(~seen, -math.inf).softmax(-1) @ h
        return self.head(h + F.silu(self.inner(h)))


class Pair(nn.Module):
    """Two texts of lengths of their own, and two outputs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.inner, self.head = nn.Embedding(30, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, first, second):
        a, b = (F.gelu(self.inner(self.words(ids))) for ids in (first, second))
        mixed = a + (a @ b.transpose(1, 2)).softmax(-1) @ b
        return self.head(mixed.mean(1)), mixed.sum(1)


def masks(ids):
    mask = torch.ones_like(ids)
    mask[0, ids.shape[1] // 2 + 1 :] = 0
    return mask


def compiled(model, method, example, **options):
    return sp_fx.transform(model, example_inputs=example).compile(method, example_inputs=example, **options)


@pytest.mark.parametrize("inductor", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_shares_of_tokens_for_every_length(inductor):
    model, ids = Text().eval().double(), tokens(2, 9)
    example = {"ids": ids, "mask": masks(ids)}
    explainer = sp_fx.transform(model, example_inputs=example)
    program = explainer.compile("tokens", example_inputs=example, inductor=inductor)
    assert program.shapes == [("length",), ("length",)] and program.names == ["ids", "mask"] and program.lengths == ["length"]
    assert program.arguments == {"embedding": "words"} and program.explained == [0]
    for batch, length in ((1, 1), (1, 2), (3, 5), (2, 9), (4, 31), (1, 64)):
        ids = tokens(batch, length)
        call = {"mask": masks(ids), "ids": ids}
        outputs, shares = program(call, 2)
        assert relative(outputs, model(**call)) <= 1e-12 and shares.shape == (batch, length)
        assert relative(shares, explainer.tokens(call, 2).shares) <= 1e-10
        assert not shares[call["mask"] == 0].any()
        assert torch.equal(program((ids, call["mask"]), [2] * batch)[1], shares)
    ids = tokens(1, 65)
    with pytest.raises(ValueError, match="length 1 to 64; got"):
        program({"ids": ids, "mask": torch.ones_like(ids)})
    with pytest.raises(ValueError, match="sizes of one name are one number"):
        program({"ids": tokens(1, 5), "mask": torch.ones(1, 6, dtype=torch.long)})
    with pytest.raises(ValueError, match="batch axis was forgotten"):
        program((tokens(1, 5)[0], torch.ones(5, dtype=torch.long)))
    with pytest.raises(TypeError, match="takes the inputs ids, mask; got ids"):
        program({"ids": tokens(1, 5)})


def test_padding_has_no_share_and_changes_none():
    ids = tokens(2, 6)
    program = compiled(Text().eval(), "tokens", (ids, masks(ids)), inductor=False)
    alone = program((ids[:1], torch.ones(1, 6, dtype=torch.long)), 1)[1]
    padded = program((F.pad(ids[:1], (0, 7)), F.pad(torch.ones(1, 6, dtype=torch.long), (0, 7))), 1)[1]
    assert relative(padded[:, :6], alone) <= 1e-6 and not padded[:, 6:].any()


def test_sequences_of_any_length(interpreted):
    model, x = Waves().eval().double(), torch.randn(2, 3, 20, dtype=torch.float64)
    explainer = sp_fx.transform(model)
    program = explainer.compile(example_inputs=x)
    assert program.shapes == [(3, "length")]
    for size in ((1, 3, 7), (5, 3, 44)):
        x = torch.randn(size, dtype=torch.float64)
        outputs, maps = program(x, 1)
        assert relative(outputs, model(x)) <= 1e-12 and relative(maps, explainer.pullback(x, 1)) <= 1e-12
    ascent = explainer.compile("ascend", example_inputs=x, steps=3, step_size=1.0)
    assert relative(ascent(x[..., :9], 1)[1], explainer.ascend(x[..., :9], 1, steps=3, step_size=1.0)) <= 1e-9


def test_lengths_that_are_fixed(interpreted):
    x = torch.randn(2, 3, 20)
    assert compiled(Fixed().eval(), "pullback", x).shapes == [(3, 20)]
    assert compiled(Waves().eval(), "pullback", x, dynamic_lengths=False).shapes == [(3, 20)]
    assert compiled(nn.Sequential(nn.Linear(6, 3), nn.ReLU()).eval(), "pullback", torch.randn(2, 6)).shapes == [(6,)]


def test_two_lengths_and_a_chosen_output():
    model, first, second = Pair().eval(), tokens(2, 7), tokens(2, 7)
    explainer = sp_fx.transform(model, example_inputs=(first, second))
    with pytest.raises(TypeError, match=r"Choose it by target="):
        explainer.compile("tokens", example_inputs=(first, second))
    program = explainer.compile("tokens", example_inputs=(first, second), target=lambda out: out[1], inductor=False)
    assert program.shapes == [("length",), ("length_2",)] and program.output_shape == (8,)
    first, second = tokens(3, 4), tokens(3, 11)
    outputs, shares = program((first, second), [1, 2, 7])
    expected = explainer.tokens((first, second), lambda out: out[1][torch.arange(3), torch.tensor([1, 2, 7])])
    assert relative(outputs[0], model(first, second)[0].detach()) <= 1e-5 and relative(shares, expected.shares) <= 1e-5
    with pytest.raises(IndexError, match="-1 to 7"):
        program((first, second), 8)


def test_tied_weights_and_the_next_token():
    model, ids = Tied().eval().double(), tokens(2, 7)
    explainer = sp_fx.transform(model, example_inputs=ids)
    program = explainer.compile("tokens", example_inputs=ids, target=lambda out: out[:, -1], inductor=False)
    assert program.output_shape == (30,)
    for ids in (tokens(1, 3), tokens(3, 19)):
        outputs, shares = program(ids, 4)
        assert relative(outputs, model(ids)) <= 1e-12
        assert relative(shares, explainer.tokens(ids, sp_fx.targets.token(-1, 4)).shares) <= 1e-12
    assert sum(t.numel() for t in program.graph.buffers()) < 2 * sum(p.numel() for p in model.parameters()) + 100


def test_scores_of_ones_own():
    """One number for each sample: a target that brings a constant along, and no class to name."""
    model, ids, other = Text().eval(), tokens(2, 7), torch.tensor([1.0, -2.0, 0.5])
    score = sp_fx.targets.similarity(other)
    explainer = sp_fx.transform(model, example_inputs=ids)
    program = explainer.compile("tokens", example_inputs=ids, target=score, inductor=False)
    ids = tokens(3, 12)
    shares = program(ids)[1]
    assert relative(shares, explainer.tokens(ids, score).shares) <= 1e-5
    assert relative(program(ids, torch.tensor([2.0, 2.0, 2.0]))[1], 2 * shares) <= 1e-5
    with pytest.raises(TypeError, match=r"takes scores from the output.*int64"):
        explainer.compile("tokens", example_inputs=ids, target=lambda out: out.argmax(1))
    with pytest.raises(TypeError, match="the method 'tokens' explains"):
        explainer.compile(example_inputs=ids)


def test_classes_of_chosen_scores(interpreted):
    x = torch.randn(2, 3, 20)
    explainer = sp_fx.transform(Waves().eval())
    options = {"example_inputs": x, "target": lambda out: out.flip(1)}
    assert relative(explainer.compile(**options)(x, 1)[1], explainer.pullback(x, 2)) <= 1e-5
    with pytest.raises(ValueError, match="unrolled=True"):
        explainer.compile("ascend", **options)
    steps = {"steps": 2, "step_size": 1.0}
    program = explainer.compile("ascend", **options, **steps, unrolled=True)
    assert relative(program(x, 1)[1], explainer.ascend(x, 2, **steps)) <= 1e-4


def test_a_package_for_every_length(tmp_path):
    onnx = pytest.importorskip("onnx")
    ids = tokens(2, 9)
    example = {"ids": ids, "mask": masks(ids)}
    program = compiled(Text().eval(), "tokens", example, inductor=False)
    path = program.save(tmp_path / "text.onnx", class_names=["a", "b", "c"])
    package = sp_fx.load(path)
    assert (
        package.shapes == program.shapes and package.names == ["ids", "mask"] and package.signature.bounds == {"length": (1, 64)}
    )
    sizes = {i.name: [d.dim_param for d in i.type.tensor_type.shape.dim] for i in onnx.load(path).graph.input}
    assert sizes == {"ids": ["batch", "length"], "mask": ["batch", "length"], "target": ["batch"]}
    assert [o.name for o in onnx.load(path).graph.output] == ["output_0", "shares"]
    for batch, length in ((1, 1), (3, 5), (1, 40)):
        call = {"ids": tokens(batch, length), "mask": masks(tokens(batch, length))}
        assert relative(package(call, 1)[1], program(call, 1)[1]) <= 1e-5
    with pytest.raises(ValueError, match="length 1 to 64"):
        package((tokens(1, 70), torch.ones(1, 70, dtype=torch.long)))


@pytest.mark.slow
def test_machine_code_for_every_length(tmp_path):
    ids = tokens(2, 9)
    program = compiled(Text().eval(), "tokens", (ids, masks(ids)), inductor=False)
    package = sp_fx.load(program.save(tmp_path / "text.pt2"))
    for batch, length in ((1, 3), (3, 5), (1, 40)):
        call = (tokens(batch, length), masks(tokens(batch, length)))
        assert relative(package(call, 1)[1], program(call, 1)[1]) <= 1e-5


class OneMapping(Text):
    def forward(self, batch):
        return super().forward(batch["ids"], batch["mask"])


def test_a_mapping_that_is_one_argument():
    ids = tokens(2, 9)
    example = {"mask": masks(ids), "ids": ids}
    explainer = sp_fx.transform(OneMapping().eval(), example_inputs=example)
    program = explainer.compile("tokens", example_inputs=example, inductor=False)
    call = {"ids": tokens(3, 5), "mask": masks(tokens(3, 5))}
    assert relative(program(call, 1)[1], explainer.tokens(call, 1).shares) <= 1e-5


def test_llama_in_onnx_runtime(tmp_path):
    """Sentences of 3 to 60 tokens by one transform, one program and one file; padding changes nothing."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("onnxruntime")
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    torch.manual_seed(0)
    model = transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(vocab_size=30, num_labels=3, pad_token_id=0, **sizes)
    )

    def call(batch, length):
        ids = tokens(batch, length)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    explainer = sp_fx.transform(model.eval(), example_inputs=call(2, 9))
    program = explainer.compile("tokens", example_inputs=call(2, 9), inductor=False)
    package = sp_fx.load(program.save(tmp_path / "llama.onnx"))
    for batch, length in ((1, 3), (3, 17), (1, 60)):
        expected = explainer.tokens(call(batch, length), 1).shares
        assert relative(program(call(batch, length), 1)[1], expected) <= 1e-5
        assert relative(package(call(batch, length), 1)[1], expected) <= 1e-5
    padded = {name: F.pad(t, (0, 5)) for name, t in call(2, 12).items()}
    alone = package(call(2, 12), 1)[1]
    assert relative(package(padded, 1)[1][:, :12], alone) <= 1e-6 and not package(padded, 1)[1][:, 12:].any()


class CutsItsMask(Text):
    """Takes a mask that is longer than its ids, as models with a cache do; a shorter one it does not."""

    def forward(self, ids, mask):
        return super().forward(ids, mask[:, : ids.shape[1]])


def test_ids_and_a_mask_that_may_be_longer_have_one_length():
    ids = tokens(2, 9)
    program = compiled(CutsItsMask().eval(), "tokens", (ids, masks(ids)), inductor=False)
    assert program.shapes == [("length",), ("length",)]


class Windowed(nn.Module):
    """Each number and the one before: up to 40 numbers, by a table; from 12 on the path is another one."""

    def __init__(self, at, multiple):
        super().__init__()
        torch.manual_seed(0)
        self.at, self.multiple = at, multiple
        self.head, self.table = nn.Linear(3, 2), nn.Parameter(torch.randn(40))

    def forward(self, x):
        if self.multiple:
            return self.head(F.gelu(x).unflatten(-1, (-1, 4)).mean((-1, -2)))
        places = torch.arange(x.shape[-1]).clamp(max=self.at)
        return self.head((F.gelu(x) * self.table[: x.shape[-1]] * (places < self.at)).mean(-1))


@pytest.mark.parametrize("size", [8, 16])
def test_lengths_up_to_the_most_that_a_table_has(size):
    x = torch.randn(2, 3, size)
    model = Windowed(12, multiple=False).eval()
    explainer = sp_fx.transform(model, example_inputs=x)
    program = explainer.compile(example_inputs=x, inductor=False)
    assert program.shapes == [(3, "length")]
    for length in (1, 2, 11, 12, 13, 40):
        x = torch.randn(1, 3, length)
        assert relative(program(x, 1)[1], explainer.pullback(x, 1)) <= 1e-5
    with pytest.raises((ValueError, RuntimeError)):
        program(torch.randn(1, 3, 41), 1)


def test_multiples_are_a_length_that_is_fixed_or_right():
    x = torch.randn(2, 3, 16)
    explainer = sp_fx.transform(Windowed(12, multiple=True).eval(), example_inputs=x)
    program = explainer.compile(example_inputs=x, inductor=False)
    for length in (4, 8, 24):
        if program.lengths:
            x = torch.randn(1, 3, length)
            assert relative(program(x, 1)[1], explainer.pullback(x, 1)) <= 1e-5
    if program.lengths:
        with pytest.raises((ValueError, RuntimeError)):
            program(torch.randn(1, 3, 7), 1)


class Branches(nn.Module):
    """Another function from a length on, as `above` says."""

    def __init__(self, above):
        super().__init__()
        torch.manual_seed(0)
        self.above, self.head = above, nn.Linear(3, 2)

    def forward(self, x):
        h = self.head(F.gelu(x).mean(-1))
        return h if self.above(x.shape[-1]) else 3 * h


@pytest.mark.parametrize(
    "above, example, bounds",
    [
        (lambda n: n > 1, 12, (2, None)),
        (lambda n: n > 8, 12, (9, None)),
        (lambda n: n >= 6, 12, (6, None)),
        (lambda n: n <= 3000, 12, (1, 3000)),
        (lambda n: n <= 70_000, 12, (1, 70_000)),
        (lambda n: n != 20, 12, (1, 19)),
    ],
)
def test_another_function_from_a_length_on(above, example, bounds):
    x = torch.randn(2, 3, example)
    explainer = sp_fx.transform(Branches(above).eval(), example_inputs=x, tracer="export")
    program = explainer.compile(example_inputs=x, inductor=False)
    assert program.lengths == ["length"]
    least, most = program.signature.bounds["length"]
    assert bounds[0] <= least <= bounds[0] + 1 and most == bounds[1]
    for length in {least, least + 1, 12, min(most or 5000, 5000)}:
        x = torch.randn(1, 3, length)
        assert relative(program(x, 1)[0], Branches(above).eval()(x).detach()) <= 1e-5
    with pytest.raises(ValueError, match="length"):
        program(torch.randn(1, 3, bounds[0] - 1 if bounds[0] > 1 else most + 1), 1)


def test_positions_that_a_table_lacks_are_refused():
    class Positions(Text):
        def forward(self, ids, mask):
            return super().forward(ids, mask, torch.arange(ids.shape[1])[None] + 2)

    ids = tokens(2, 9)
    explainer = sp_fx.transform(Positions().eval(), example_inputs=(ids, masks(ids)))
    program = explainer.compile("tokens", example_inputs=(ids, masks(ids)), inductor=False)
    assert program.signature.bounds == {"length": (1, 62)}
    longest = tokens(1, 62), masks(tokens(1, 62))
    assert relative(program(longest, 1)[1], explainer.tokens(longest, 1).shares) <= 1e-5


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("convention", ["ones", "padding", "added"])
def test_masks_of_every_convention(convention, padded):
    """1 where a token is real; True where it is not, as PyTorch has it; and what is added to scores."""

    class Masked(Text):
        def forward(self, ids, padding_mask):
            if convention == "ones":
                return super().forward(ids, padding_mask)
            return super().forward(ids, (~padding_mask if convention == "padding" else padding_mask == 0).long())

    def mask_of(real):
        added = torch.zeros(real.shape).masked_fill(real == 0, -1e9)
        return {"ones": real, "padding": real == 0, "added": added}[convention]

    ids = tokens(2, 9)
    real = masks(ids) if padded else torch.ones_like(ids)
    plain = sp_fx.Rules(**dict.fromkeys(sp_fx.gates.rules.KINDS))
    explainer = sp_fx.transform(Masked().eval(), rules=plain, example_inputs=(ids, mask_of(real)))
    program = explainer.compile("tokens", example_inputs=(ids, mask_of(real)), inductor=False)
    for words, own in ((ids, real), (tokens(3, 6), masks(tokens(3, 6)))):
        found = explainer.tokens((words, mask_of(own)), 1)
        assert torch.equal(found.real, own.bool())
        reference = sp_fx.transform(Text().eval(), rules=plain, example_inputs=(words, own)).tokens((words, own), 1).shares
        assert relative(found.shares, reference) <= 1e-5 and relative(program((words, mask_of(own)), 1)[1], reference) <= 1e-5


def test_targets_of_tokens():
    model, ids = Tied().eval(), tokens(2, 7)
    explainer = sp_fx.transform(model, example_inputs=ids)
    for target in (sp_fx.targets.token(-1, 4), sp_fx.targets.token(2, 4), sp_fx.targets.token(-1)):
        program = explainer.compile("tokens", example_inputs=ids, target=target, inductor=False)
        other = tokens(3, 5)
        assert relative(program(other)[1], explainer.tokens(other, target).shares) <= 1e-5
    with pytest.raises(TypeError, match="target='direction'"):
        explainer.compile("tokens", example_inputs=ids, target=sp_fx.targets.margin(1))
    with pytest.raises(ValueError, match="one row for each of the 2 samples"):
        explainer.compile("tokens", example_inputs=ids, target=lambda out: out.flatten())


def test_dtypes_and_nested_tensors_are_named():
    ids = tokens(2, 6)
    program = compiled(Text().eval(), "tokens", ids, inductor=False)
    with pytest.raises(ValueError, match="the dtypes are to be those"):
        program(ids.int())
    nested = torch.nested.nested_tensor([ids[0], ids[1, :3]])
    with pytest.raises(TypeError, match="to_padded_tensor"):
        sp_fx.transform(Text().eval(), example_inputs=ids).compile("tokens", example_inputs=nested)
    with pytest.raises(TypeError, match="to_padded_tensor"):
        sp_fx.transform(Text().eval(), example_inputs=ids).tokens(nested)


def test_an_explainer_captures_a_path_of_other_sizes():
    """What no export can tell apart: a length of 1 from larger ones."""
    model = Branches(lambda n: n > 1).eval()
    explainer = sp_fx.transform(model, example_inputs=torch.randn(2, 3, 12), tracer="export")
    for length in (5, 1, 7):
        x = torch.randn(2, 3, length)
        assert relative(explainer(x), model(x).detach()) <= 1e-6
        alone = sp_fx.transform(model, example_inputs=x, tracer="export").pullback(x, 1)
        assert relative(explainer.pullback(x, 1), alone) <= 1e-6
