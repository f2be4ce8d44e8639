"""Captures that are verified: once for each form of call, by one thread, against the model, before any output is returned."""

import array
import importlib.util
import random
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensor

import sp_fx
from helpers import fill, relative
from kinds import PLAIN, assert_clear, explain, net, noise, own_gradient, score

X = noise(4, 6)
# One entry for each forward of a model on numbers, neither a trace nor a run on fake tensors. No list, which a trace puts back.
RUNS = array.array("b")
LOCK = threading.Lock()


class Counted(nn.Module):
    """Counts its forwards on plain tensors, also those of its clones."""

    def forward(self, x):
        if not isinstance(x, torch.fx.Proxy | FakeTensor):
            with LOCK:
                RUNS.append(1)
        return F.relu(x)


class Asking(nn.Module):
    """A normalisation, unless `question(x)` says that somebody is tracing."""

    def __init__(self, question):
        super().__init__()
        self.norm, self.question = nn.LayerNorm(8), question

    def forward(self, x):
        return x if self.question(x) else self.norm(x)


def asked(question):
    return net(lambda m, h: F.relu(m.block(h)), block=Asking(question))


# Questions to which a tracer gets the answer that the model never gets: each tracer's graph is another function.
QUESTIONS = {
    "fx": lambda x: isinstance(x, torch.fx.Proxy),
    "export": lambda x: torch.compiler.is_compiling(),
    "both": lambda x: isinstance(x, torch.fx.Proxy) or torch.compiler.is_compiling(),
}
NORMED = net(lambda m, h: F.relu(m.block(h)), block=Asking(lambda x: False))


@pytest.fixture(autouse=True)
def nothing_counted():
    del RUNS[:]


def counted():
    return net(lambda m, h: m.block(h), block=Counted())


# -- which graph ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["fx", "export"])
@pytest.mark.parametrize("way", ["no example", "an example"])
def test_auto_takes_the_tracer_that_is_right(wrong, way):
    model = asked(QUESTIONS[wrong])
    explainer = explain(model, X, way)
    assert torch.equal(explainer(X), model(X))
    assert relative(explainer.pullback(X, 1), explain(NORMED, X, "no example").pullback(X, 1)) <= 1e-9
    assert ("export" in explainer.report().tracer) == (wrong == "fx")


@pytest.mark.parametrize("first", ["call", "pullback", "ascend", "attribute"])
def test_a_first_call_replaces_a_wrong_graph_before_it_returns(first):
    """Graph and report change together."""
    model = asked(QUESTIONS["fx"])
    explainer, reference = explain(model, X, "no example"), explain(NORMED, X, "no example")
    calls = {
        "call": lambda e: e(X),
        "pullback": lambda e: e.pullback(X, 1),
        "ascend": lambda e: e.ascend(X, 1, steps=2),
        "attribute": lambda e: e.attribute(X, 1),
    }
    assert relative(calls[first](explainer), calls[first](reference)) <= 1e-9
    report = explainer.report()
    assert report.tracer == "torch.export"
    assert {"layer_norm", "relu"} == {site.kind for site in report.of("rewritten")}
    assert torch.equal(explainer(X[:3]), model(X[:3]))  # any batch, as before


@pytest.mark.parametrize("tracer, wrong", [("auto", "both"), ("fx", "fx"), ("export", "export")])
def test_where_no_tracer_is_right_the_error_names_the_module(tracer, wrong):
    with pytest.raises(sp_fx.CaptureError, match="block") as caught:
        sp_fx.transform(asked(QUESTIONS[wrong]), tracer=tracer, example_inputs=X)
    assert_clear(caught.value, example=True)


@pytest.mark.parametrize("tracer, wrong", [("auto", "both"), ("fx", "fx")])
def test_where_no_tracer_is_right_the_first_call_is_an_error(tracer, wrong):
    """And the second, and those of other methods: no map of such a graph is ever returned."""
    explainer = sp_fx.transform(asked(QUESTIONS[wrong]), tracer=tracer)
    for call in (lambda: explainer(X), lambda: explainer.pullback(X, 1), lambda: explainer(X), lambda: explainer.ascend(X, 1)):
        with pytest.raises(sp_fx.CaptureError, match="block"):
            call()


def test_a_lost_gradient_is_a_difference():
    """The forward is right and the gradient is not: under plain derivatives it is compared too, unless `verify="forward"`."""

    def hooked(m, h):  # torch.export has no hooks on tensors
        h = m.block(h)
        if h.requires_grad:
            h.register_hook(lambda g: -2 * g)
        return F.relu(h)

    model = net(hooked, block=nn.Linear(8, 8))
    sp_fx.transform(model, tracer="export", example_inputs=X, verify="forward")
    try:
        plain = sp_fx.transform(model, tracer="export", example_inputs=X, rules=sp_fx.Rules(**PLAIN))
    except sp_fx.CaptureError as error:
        assert "gradient" in str(error)
    else:  # or it was kept
        assert relative(plain.pullback(X, 1), own_gradient(model, X)) <= 1e-9


# -- verify=... ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verify, forwards", [(True, 1), ("forward", 1), (False, 0)])
@pytest.mark.parametrize("example", [True, False])
def test_how_often_the_model_runs(verify, forwards, example):
    """Once on numbers, or not at all; at transform with an example, at the first call without."""
    model = counted()
    explainer = sp_fx.transform(model, verify=verify, **({"example_inputs": X} if example else {}))
    assert len(RUNS) == (forwards if example else 0)
    explainer.pullback(X, 1)
    explainer.pullback(X, 1)
    explainer(X)
    assert len(RUNS) == forwards


def test_each_form_once():
    """Another dtype, rank or structure of the arguments is another form; another size is not."""

    class Takes(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = counted()

        def forward(self, x, mask=None):
            y = self.net(x)
            return y if mask is None else y * mask

    explainer = sp_fx.transform(Takes())
    for forwards, call in enumerate(
        (
            lambda: (explainer(X), explainer(X[:2]), explainer.pullback(noise(7, 6), 1)),
            lambda: (explainer(noise(2, 5, 6)), explainer(noise(3, 2, 6))),
        ),
        start=1,
    ):
        call()
        assert len(RUNS) == forwards


def test_bad_values_of_verify():
    with pytest.raises(ValueError, match=r"verify.*True.*forward.*False"):
        sp_fx.transform(counted(), verify="backward")


def test_without_verification_a_wrong_graph_stays_wrong():
    """`verify=False` is the caller's own risk: nothing else compares."""
    explainer = sp_fx.transform(asked(QUESTIONS["fx"]), verify=False, example_inputs=X)
    assert explainer.report().tracer == "torch.fx" and explainer(X).shape == (4, 3)


@pytest.mark.parametrize("example", [True, False])
def test_the_report_says_what_was_not_compared(example):
    """No note says that all was; `verify=False` and "forward" are there from the first report to the last."""
    said = {True: "", "forward": "verify='forward': no gradient was compared", False: "verify=False: the graph was not compared"}
    for verify, note in said.items():
        explainer = sp_fx.transform(counted(), verify=verify, **({"example_inputs": X} if example else {}))
        before = explainer.report().notes
        explainer.pullback(X, 1)
        assert [n[: len(note)] for n in explainer.report().notes] == [note] * bool(note)
        assert any("not verified yet" in n for n in before) == (verify is not False and not example)
        assert any("not measured yet" in n for n in before) == (not example)


def test_inputs_without_a_gradient_are_said_to_prove_nothing():
    """All ReLUs are shut, so that both gradients are 0 whatever the backward is."""
    model = net(lambda m, h: F.relu(h - 100))
    explainer = sp_fx.transform(model, example_inputs=X)
    assert any("own gradient is 0 on these inputs" in note for note in explainer.report().notes)


@pytest.mark.parametrize("tracer", ["auto", "fx", "export"])
def test_a_model_that_fails_on_the_example_is_said_to(tracer):
    model = net(lambda m, h: F.relu(h).view(7, 7))
    with pytest.raises(sp_fx.CaptureError, match=r"Net itself fails on the example_inputs: .*test_verification.py:\d+"):
        sp_fx.transform(model, tracer=tracer, example_inputs=X)


def test_verification_leaves_the_model_as_it_was():
    """Neither gradients, nor modes, nor buffers, nor draws."""

    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls.add_(1)
            return F.dropout(x, 0.5, self.training)

    model = net(lambda m, h: F.relu(m.block(h)), block=Counts()).train()
    rng = torch.get_rng_state()
    for way in ("an example", "no example"):
        explain(model, X, way).pullback(X, 1)
    assert model.training and model.block.training and model.block.calls == 0
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), rng)


# -- where it is skipped -------------------------------------------------------------------------------------------------------


def noted(explainer):
    return any("verif" in note for note in explainer.report().notes)


def by_vmap(explainer):
    grad = torch.func.grad(lambda s: explainer(s[None])[0, 1])
    return torch.func.vmap(grad)(X)


def by_inference_mode(explainer):
    with torch.inference_mode():  # which the methods leave, and a plain call does not
        explainer(X)


def by_compile(explainer):
    leaf = X.clone().requires_grad_()
    run = torch.compile(explainer, backend="eager")
    return torch.autograd.grad(score(run(leaf)).sum(), leaf)[0]


def by_export(explainer):
    run = torch.export.export(explainer, (X,)).module()
    leaf = X.clone().requires_grad_()
    run(leaf)
    return None  # an exported program has no soft way back of its own


@pytest.mark.parametrize("first", [by_vmap, by_inference_mode, by_compile, by_export], ids=lambda f: f.__name__)
def test_it_is_skipped_where_it_cannot_run_and_a_note_says_so(first):
    model = counted()
    explainer = explain(model, X, "no example")
    maps = first(explainer)
    assert len(RUNS) == 0 and noted(explainer)
    expected = explain(net(lambda m, h: F.relu(h)), X, "no example").pullback(X, 1)
    assert maps is None or relative(maps, expected) <= 1e-9
    assert relative(explainer.pullback(X, 1), expected) <= 1e-9  # the first eager call does it
    assert len(RUNS) == 1 and not noted(explainer)


# -- threads -------------------------------------------------------------------------------------------------------------------


def together(work, count=8):
    """The results of `work(k)` in as many threads at once, errors among them."""
    results, barrier = [None] * count, threading.Barrier(count)

    def run(k):
        barrier.wait()
        try:
            results[k] = work(k)
        except Exception as error:  # to be looked at by the test, not lost in the thread
            results[k] = error

    threads = [threading.Thread(target=run, args=(k,)) for k in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def test_one_of_many_threads_verifies():
    explainer = explain(counted(), X, "no example")
    results = together(lambda k: explainer.pullback(X, 1))
    assert len(RUNS) == 1
    expected = explain(net(lambda m, h: F.relu(h)), X, "no example").pullback(X, 1)
    assert all(isinstance(maps, torch.Tensor) and torch.equal(maps, expected) for maps in results), results


def test_no_thread_gets_a_wrong_output():
    """Eight at once call an explainer whose symbolic trace is another function."""
    model = asked(QUESTIONS["fx"])
    explainer, reference = explain(model, X, "no example"), explain(NORMED, X, "no example").pullback(X, 1)
    results = together(lambda k: (explainer(X).detach(), explainer.pullback(X, 1)))
    for result in results:
        assert isinstance(result, tuple), result
        assert torch.equal(result[0], model(X)) and relative(result[1], reference) <= 1e-9


def test_threads_where_no_tracer_is_right_all_get_the_error():
    explainer = explain(asked(QUESTIONS["both"]), X, "no example")
    assert all(isinstance(result, sp_fx.CaptureError) for result in together(lambda k: explainer(X), 4))


def test_threads_that_draw():
    """`F.dropout` without `training`: compared under one seed, and the first call draws as the model would have."""
    model = net(lambda m, h: F.relu(F.dropout(h, 0.5)))
    explainer = explain(model, X, "no example")
    torch.manual_seed(3)
    expected, after = model(X), torch.get_rng_state()
    torch.manual_seed(3)
    assert torch.equal(explainer(X), expected) and torch.equal(torch.get_rng_state(), after)
    assert explainer.report().tracer == "torch.fx"
    fresh = explain(model, X, "no example")
    results = together(lambda k: fresh(X))
    assert all(isinstance(y, torch.Tensor) and y.isfinite().all() for y in results)


def test_gates_of_a_fresh_network_are_measured_once():
    """The report after many first calls at once is that of one."""
    model = fill(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))).double()
    alone = explain(model, X, "no example")
    alone.pullback(X, 1)
    explainer = explain(model, X, "no example")
    together(lambda k: explainer.pullback(X[: 1 + k % 4], 1))
    assert str(explainer.report()) == str(alone.report())


class Hooked(nn.Module):
    """A reversal of gradients by a hook on an activation, which no export sees; and an output that is large."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x, time):
        h = torch.relu(self.inner(x))
        if h.requires_grad:
            h.register_hook(lambda g: -g)
        return {"logits": self.outer(h), "time": time.double() * 1e9}


def test_a_large_output_hides_nothing():
    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    with pytest.raises(sp_fx.CaptureError, match="another gradient than the model"):
        sp_fx.transform(fill(Hooked()), example_inputs=(x, torch.tensor([[1.7], [1.8]])), tracer="export")


@pytest.mark.parametrize("coarse", [False, True])
def test_a_coarse_output_lends_its_bar_to_no_other(coarse):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 3)

        def forward(self, x):
            y = torch.relu(self.inner(x)) * (1.001 if torch.compiler.is_compiling() else 1.0)
            return (y, y.detach().bfloat16()) if coarse else y

    with pytest.raises(sp_fx.CaptureError, match="computes other outputs than the model"):
        sp_fx.transform(fill(Net()), example_inputs=torch.ones(2, 6), tracer="export")


def test_the_random_numbers_of_others_are_their_own():
    """A model that draws nothing is verified without a seed: what another thread draws meanwhile does not repeat itself."""
    drawn, model = [], fill(nn.Sequential(nn.Linear(6, 6), nn.ReLU()))
    stop = threading.Event()

    def draws():
        while not stop.is_set():
            drawn.append((float(torch.rand((), dtype=torch.float64)), random.random()))

    thread = threading.Thread(target=draws)
    thread.start()
    try:
        for _ in range(4):
            sp_fx.transform(model)(torch.randn(2, 6))
    finally:
        stop.set()
        thread.join()
    assert len({a for a, _ in drawn}) == len(drawn) and len({b for _, b in drawn}) == len(drawn)


SEEN = []  # of this file, which no model names


def test_what_others_keep_in_the_file_stays():
    count, stop = 0, threading.Event()
    model = fill(nn.Sequential(*[OfThisFile() for _ in range(10)]))

    def appends():
        nonlocal count
        while not stop.is_set():
            SEEN.append(count)
            count += 1

    thread = threading.Thread(target=appends)
    thread.start()
    try:
        for _ in range(3):
            sp_fx.transform(model)(torch.randn(2, 6))
    finally:
        stop.set()
        thread.join()
    assert list(range(count)) == SEEN


class OfThisFile(nn.Linear):
    def __init__(self):
        super().__init__(6, 6)

    def forward(self, x):
        return torch.relu(super().forward(x))


@pytest.mark.parametrize("order", [(1.0, 2.0, 3.0, 1.0), (2.0, 1.0, 3.0, 2.0)])
def test_the_first_call_decides_for_no_other(order):
    """A number that a trace fixes: each has a capture of its own, and the first leaves that of the default as it is."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 3)

        def forward(self, x, scale=1.0):
            return torch.relu(self.inner(x)) * scale

    model, x = fill(Net()), torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    explainer = sp_fx.transform(model)
    for scale in order:
        assert torch.equal(explainer(x, scale=scale), model(x, scale=scale)) and torch.equal(explainer(x[:2]), model(x[:2]))
        one = explainer.pullback(x, 1, forward_kwargs={"scale": scale})
        assert relative(one, scale * explainer.pullback(x, 1)) <= 1e-6
    assert explainer.report().tracer == "torch.fx"


def test_a_part_that_was_cut_before_the_comparison_says_so():
    explainer = sp_fx.transform(NORMED)
    stem, tail = explainer.split("inner")
    for part in (stem, tail):
        assert any("not verified" in note and "split" in note for note in part.report().notes)
    explainer(X)
    assert not any("not verified" in note for part in explainer.split("inner") for note in part.report().notes)


# -- lines ---------------------------------------------------------------------------------------------------------------------


def test_the_line_of_a_model_in_a_folder_called_torch(tmp_path):
    """As those of `torch.hub` are, in ~/.cache/torch/hub."""
    (tmp_path / "torch").mkdir()
    file = tmp_path / "torch" / "of_a_hub.py"
    file.write_text(
        "import torch\n\n\nclass Hub(torch.nn.Linear):\n    def forward(self, x):\n        h = super().forward(x)\n"
        "        if h.sum() > 0:\n            return h\n        return h.relu()\n"
    )
    spec = importlib.util.spec_from_file_location("of_a_hub", file)
    hub = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hub)
    with pytest.raises(sp_fx.CaptureError, match=r"of_a_hub\.py:7, in forward"):
        sp_fx.transform(fill(hub.Hub(6, 3)))


def test_an_error_is_the_models_own_where_the_model_raises_it_too():
    """The model is run with gradients, as its user runs it: its hook can be registered there."""
    model = net(lambda m, h: F.relu(hooked(h)))
    assert torch.equal(sp_fx.transform(model, example_inputs=X, verify="forward")(X), model(X))


def hooked(h):
    h.register_hook(lambda g: g)
    return h
