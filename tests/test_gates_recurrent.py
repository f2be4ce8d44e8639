"""LSTM and GRU: the values of PyTorch's op, and the way back through the loop over steps with constants for gates, against loops
that are written here, in float64."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import rnn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import sp_fx
from helpers import relative
from sp_fx.gates.modules.recurrent import recurrent
from sp_fx.program.program import ProgramError

FROZEN = sp_fx.Rules(product="frozen")


def constant(t):
    return t.detach()


def one_layer(cell, xs, state, w, backwards=False):
    """The outputs of one direction, a list of [B, H], and the last state; `w` has w_ih, w_hh, b_ih, b_hh and w_hr."""
    order = range(len(xs) - 1, -1, -1) if backwards else range(len(xs))
    outputs = [None] * len(xs)
    for t in order:
        a = xs[t] @ w["ih"].T + w.get("b_ih", 0)
        b = state[0] @ w["hh"].T + w.get("b_hh", 0)
        if cell == "LSTM":
            i, f, g, o = (a + b).chunk(4, -1)
            c = constant(torch.sigmoid(f)) * state[1] + constant(torch.sigmoid(i)) * torch.tanh(g)
            h = constant(torch.sigmoid(o)) * torch.tanh(c)
            state = (h @ w["hr"].T if "hr" in w else h, c)
        else:
            (ar, az, an), (br, bz, bn) = a.chunk(3, -1), b.chunk(3, -1)
            z = constant(torch.sigmoid(az + bz))
            n = torch.tanh(an + constant(torch.sigmoid(ar + br)) * bn)
            state = ((1 - z) * n + z * state[0],)
        outputs[t] = state[0]
    return outputs, state


def by_hand(module, x, state=None, layers_too=False):
    """The outputs of a whole module on x [T, B, F], [T, B, H], with gates that are constants; of each layer, if asked."""
    cell, directions = type(module).__name__, 2 if module.bidirectional else 1
    width = module.proj_size or module.hidden_size
    xs, layers = list(x), []
    for layer in range(module.num_layers):
        parts = []
        for d in range(directions):
            suffix = f"l{layer}" + ("_reverse" if d else "")
            names = {"ih": "weight_ih", "hh": "weight_hh", "b_ih": "bias_ih", "b_hh": "bias_hh", "hr": "weight_hr"}
            w = {k: getattr(module, f"{n}_{suffix}") for k, n in names.items() if hasattr(module, f"{n}_{suffix}")}
            at = layer * directions + d
            sizes = [width, module.hidden_size] if cell == "LSTM" else [width]
            start = [x.new_zeros(x.shape[1], n) for n in sizes] if state is None else [s[at] for s in state]
            parts.append(one_layer(cell, xs, tuple(start), w, backwards=d == 1)[0])
        xs = [torch.cat(both, -1) for both in zip(*parts)]
        layers.append(torch.stack(xs))
    return layers if layers_too else layers[-1]


class Net(nn.Module):
    def __init__(self, cell, **options):
        super().__init__()
        torch.manual_seed(0)
        self.cell = cell(4, 5, **options)
        width = (options.get("proj_size") or 5) * (2 if options.get("bidirectional") else 1)
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        outputs, _ = self.cell(x)
        return self.head(outputs.mean(0 if not self.cell.batch_first else 1))


OPTIONS = [{}, {"num_layers": 2}, {"bidirectional": True}, {"num_layers": 2, "bidirectional": True, "bias": False}]
KINDS = [(cell, options) for cell in (nn.LSTM, nn.GRU) for options in OPTIONS]
KINDS.append((nn.LSTM, {"proj_size": 3, "num_layers": 2, "bidirectional": True}))


def explained(model, tracer, *example, rules=FROZEN):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # axis 0 of [T, B, F] is none of the batch
        return sp_fx.transform(model, tracer=tracer, rules=rules, example_inputs=example)


@pytest.mark.parametrize("tracer", ["fx", "export"])
@pytest.mark.parametrize("batch_first, length", [(False, 6), (True, 1)])
@pytest.mark.parametrize("cell, options", KINDS)
def test_the_way_back_is_the_loop_with_constant_gates(cell, options, batch_first, length, tracer):
    model = Net(cell, batch_first=batch_first, **options).double().eval()
    x = torch.randn(2, length, 4, dtype=torch.float64) if batch_first else torch.randn(length, 2, 4, dtype=torch.float64)
    explainer = explained(model, tracer, x)
    assert torch.equal(explainer(x), model(x))
    (site,) = explainer.report().of("rewritten")
    assert (site.kind, site.temperature) == ("product", "frozen")
    leaf = x.clone().requires_grad_()
    outputs = by_hand(model.cell, leaf.transpose(0, 1) if batch_first else leaf)
    assert relative(outputs.detach(), model.cell(x)[0].transpose(0, 1) if batch_first else model.cell(x)[0]) <= 1e-12
    y = model.head(outputs.mean(0))
    wanted = torch.autograd.grad(y[:, 1].sum(), leaf)[0]
    target = lambda out: out[:, 1].sum().expand(len(x))  # noqa: E731  # one number, whatever axis 0 is
    assert relative(explainer.pullback(x, target) / len(x), wanted) <= 1e-10


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU])
def test_by_default_they_keep_their_derivative(cell):
    model, x = Net(cell, batch_first=True).double().eval(), torch.randn(2, 6, 4, dtype=torch.float64)
    with pytest.warns(UserWarning, match="plain gradient"):
        explainer = sp_fx.transform(model)
    assert [(s.kind, s.status, s.reason) for s in explainer.report().sites] == [("product", "kept", "product rule")]
    leaf = x.clone().requires_grad_()
    wanted = torch.autograd.grad(model(leaf)[:, 1].sum(), leaf)[0]
    assert relative(explainer.pullback(x, 1), wanted) <= 1e-12
    assert relative(sp_fx.transform(model, rules=FROZEN).pullback(x, 1), wanted) > 0.01


@pytest.mark.parametrize("tracer", ["fx", "export"])
@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU])
def test_states_are_explained_too(cell, tracer):
    class Stateful(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.cell = cell(4, 5, batch_first=True)

        def forward(self, x, h):
            hidden = h.transpose(0, 1)
            outputs, state = self.cell(x, (hidden, hidden * 2) if cell is nn.LSTM else hidden)
            last = state[0] + state[1] if cell is nn.LSTM else state
            return outputs[:, -1] + last[0]

    model = Stateful().double().eval()
    x, h = torch.randn(2, 6, 4, dtype=torch.float64), torch.randn(2, 1, 5, dtype=torch.float64)
    explainer = explained(model, tracer, x, h)
    assert torch.equal(explainer(x, h), model(x, h))
    found = explainer.pullback((x, h), 1)
    leaves = [x.clone().requires_grad_(), h.clone().requires_grad_()]
    hidden = leaves[1][:, 0]
    start = (hidden, hidden * 2) if cell is nn.LSTM else (hidden,)
    names = {"ih": "weight_ih_l0", "hh": "weight_hh_l0", "b_ih": "bias_ih_l0", "b_hh": "bias_hh_l0"}
    w = {k: getattr(model.cell, name) for k, name in names.items()}
    outputs, state = one_layer(cell.__name__, list(leaves[0].transpose(0, 1)), start, w)
    y = outputs[-1] + (state[0] + state[1] if cell is nn.LSTM else state[0])
    for got, wanted in zip(found, torch.autograd.grad(y[:, 1].sum(), leaves)):
        assert relative(got, wanted) <= 1e-10


@pytest.mark.parametrize("tracer", ["fx", "export"])
@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell])
def test_cells(cell, tracer):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.cell, self.head = cell(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            state = self.cell(x)
            state = self.cell(x * 2, state)
            return self.head(state[0] if cell is nn.LSTMCell else state)

    model, x = Twice().double().eval(), torch.randn(3, 4, dtype=torch.float64)
    explainer = explained(model, tracer, x)
    assert torch.equal(explainer(x), model(x)) and len(explainer.report().of("rewritten")) == 2
    leaf = x.clone().requires_grad_()
    names = {"ih": "weight_ih", "hh": "weight_hh", "b_ih": "bias_ih", "b_hh": "bias_hh"}
    w = {k: getattr(model.cell, name) for k, name in names.items()}
    zero = x.new_zeros(3, 5)
    start = (zero, zero) if cell is nn.LSTMCell else (zero,)
    _, state = one_layer(cell.__name__.removesuffix("Cell"), [leaf, leaf * 2], start, w)
    wanted = torch.autograd.grad(model.head(state[0])[:, 1].sum(), leaf)[0]
    assert relative(explainer.pullback(x, 1), wanted) <= 1e-10


@pytest.mark.parametrize("enforced", [True, False])
@pytest.mark.parametrize("cell, options", [(nn.LSTM, {}), (nn.GRU, {"bidirectional": True}), (nn.LSTM, {"num_layers": 2})])
def test_packed_sequences(cell, options, enforced):
    """Each sample is as if it were alone, of its own length."""
    torch.manual_seed(0)
    module = cell(4, 5, batch_first=True, **options).double()
    x, lengths = torch.randn(3, 6, 4, dtype=torch.float64), torch.tensor([6, 4, 2] if enforced else [2, 6, 4])

    def packed(x):
        return pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=enforced)

    leaf = x.clone().requires_grad_()
    inputs = packed(leaf)
    exact = module(inputs)
    outputs, state = recurrent(exact, inputs, None, list(module.parameters()), stateful=cell is nn.LSTM, layers=module.num_layers,
                               bidirectional=module.bidirectional, batch_first=True)  # fmt: skip
    padded, _ = pad_packed_sequence(outputs, batch_first=True)
    assert torch.equal(padded, pad_packed_sequence(exact[0], batch_first=True)[0])
    h = state[0] if cell is nn.LSTM else state
    assert torch.equal(h, exact[1][0] if cell is nn.LSTM else exact[1])
    (found,) = torch.autograd.grad(padded.sum() + h[0].square().sum(), leaf)
    for i, length in enumerate(lengths.tolist()):
        own = x[i : i + 1, :length].clone().requires_grad_()
        parts = by_hand(module, own.transpose(0, 1), layers_too=True)
        first = parts[0][-1][..., :5]  # the last state of the first layer, forwards
        wanted = torch.autograd.grad(parts[-1].sum() + first.square().sum(), own)[0]
        assert relative(found[i, :length], wanted[0]) <= 1e-10 and not found[i, length:].any()


def test_a_packed_sequence_is_an_argument():
    class OfPacked(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.cell, self.head = nn.GRU(4, 5, batch_first=True), nn.Linear(5, 3)

        def forward(self, packed):
            return self.head(self.cell(packed)[1][0])

    model = OfPacked().double().eval()
    x = torch.randn(3, 6, 4, dtype=torch.float64)
    packed = pack_padded_sequence(x, torch.tensor([6, 4, 2]), batch_first=True)
    explainer = explained(model, "fx", packed)
    assert torch.equal(explainer(packed), model(packed))
    assert [s.kind for s in explainer.report().of("rewritten")] == ["product"]


def test_one_sequence_without_a_batch():
    module = nn.LSTM(4, 5).double()
    x = torch.randn(6, 4, dtype=torch.float64)
    exact = module(x)
    leaf = x.clone().requires_grad_()
    found, (h, c) = recurrent(module(leaf), leaf, None, list(module.parameters()), stateful=True)
    assert torch.equal(found, exact[0]) and h.shape == c.shape == (1, 5)
    other = x[:, None].clone().requires_grad_()
    wanted = torch.autograd.grad(by_hand(module, other).square().sum(), other)[0][:, 0]
    assert relative(torch.autograd.grad(found.square().sum(), leaf)[0], wanted) <= 1e-10


def test_it_is_checked_copied_and_pickled():
    model, x = Net(nn.LSTM, batch_first=True, num_layers=2).eval(), torch.randn(2, 6, 4)
    explainer = explained(model, "fx", x)
    assert sp_fx.check(explainer, x).ok
    (line,) = [line for line in sp_fx.check(explainer, x).lines if line.name == "affine identity"]
    assert line.verdict == "ok"
    assert torch.equal(pickle.loads(pickle.dumps(explainer)).pullback(x, 1), explainer.pullback(x, 1))


def test_a_program_unrolls_a_few_steps():
    model, x = Net(nn.GRU, batch_first=True).eval(), torch.randn(2, 3, 4)
    explainer = explained(model, "fx", x)
    program = explainer.compile("pullback", example_inputs=x, inductor=False)
    assert relative(program(x, 1)[1], explainer.pullback(x, 1)) <= 1e-5
    for rules in (FROZEN, sp_fx.Rules()):
        with pytest.raises(ProgramError, match=r"cell runs 65 steps, .* at most 64"):
            explained(model, "fx", x, rules=rules).compile("pullback", example_inputs=torch.randn(2, 65, 4), inductor=False)


def test_elman_networks_have_no_gate_or_a_relu():
    x = torch.randn(2, 6, 4)
    kept = explained(Net(nn.RNN, batch_first=True).eval(), "fx", x).report().sites
    assert [(s.status, s.reason) for s in kept] == [("kept", "smooth, no gate")]
    model = Net(nn.RNN, batch_first=True, nonlinearity="relu").eval()
    explainer = explained(model, "fx", x)
    assert [s.status for s in explainer.report().sites] == ["NOT REWRITTEN"] and sp_fx.check(explainer, x).ok


class Packs(nn.Module):
    """Sequences of several lengths, packed and padded again in the forward."""

    def __init__(self, kind, bidirectional):
        super().__init__()
        torch.manual_seed(0)
        self.loop = kind(4, 3, batch_first=True, bidirectional=bidirectional)
        self.head = nn.Linear(6 if bidirectional else 3, 2)

    def forward(self, x, lengths):
        packed = rnn.pack_padded_sequence(x, lengths=lengths.cpu(), batch_first=True, enforce_sorted=False)
        outputs, _ = rnn.pad_packed_sequence(self.loop(packed)[0], True, total_length=x.shape[1])
        return self.head(outputs.sum(1))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("rules", [sp_fx.Rules(), sp_fx.Rules(product="frozen")])
def test_sequences_that_the_forward_packs(kind, bidirectional, rules):
    """Each as if it were alone, and not padded; to be pickled and copied."""
    model = Packs(kind, bidirectional).eval().double()
    x, lengths = torch.randn(4, 6, 4, dtype=torch.float64), torch.tensor([2, 6, 1, 4])
    explainer = sp_fx.transform(model, rules=rules, example_inputs=(x, lengths))
    assert torch.equal(explainer(x, lengths), model(x, lengths))
    maps = explainer.pullback((x, lengths), 1)[0]
    for copied in (pickle.loads(pickle.dumps(explainer)), copy.deepcopy(explainer)):
        assert torch.equal(copied.pullback((x, lengths), 1)[0], maps)
    for sample, length in enumerate(lengths.tolist()):
        alone = x[sample : sample + 1, :length]
        assert not maps[sample, length:].any()
        assert relative(maps[sample, :length], explainer.pullback((alone, lengths[sample : sample + 1]), 1)[0][0]) <= 1e-12
        plain = nn.Sequential(model.loop, Sums(), model.head)
        expected = sp_fx.transform(plain, rules=rules, example_inputs=alone).pullback(alone, 1)[0]
        assert relative(maps[sample, :length], expected) <= 1e-12
    with pytest.raises(RuntimeError, match="packs sequences by the values of their lengths"):
        explainer.compile(example_inputs=(x, lengths))


class Sums(nn.Module):
    def forward(self, found):
        return found[0].sum(1)
