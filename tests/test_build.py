"""Models that cannot be captured, or not wholly: each an error that says why, or a line in the report; models whose attributes
have an explainer's names."""

import pickle
import warnings

import pytest
import torch
from torch import nn

import sp_fx
from helpers import fill


def net(forward, **parts):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 2)
            for name, part in parts.items():
                self.register_buffer(name, part) if isinstance(part, torch.Tensor) else setattr(self, name, part)

        def forward(self, x):
            return forward(self, x)

    return fill(Net())


def halved(self, x):
    while x.norm() > 1:
        x = x / 2
    return self.head(x.relu())


REFUSED = {
    "a number read out": net(lambda self, x: self.head(x.relu()) * float(x.max())),
    "numpy": net(lambda self, x: self.head(torch.from_numpy(x.detach().numpy() * 2).relu())),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_neither_tracer_takes_is_an_error_that_names_the_line(name, capfd):
    x = torch.rand(3, 4)  # on which the models themselves run
    with pytest.raises(sp_fx.CaptureError, match=r"torch.fx cannot trace Net.*test_build.py:\d+.*With example_inputs"):
        sp_fx.transform(REFUSED[name])
    with pytest.raises(sp_fx.CaptureError, match=r"torch.fx cannot trace Net[\s\S]*torch.export cannot capture Net") as caught:
        sp_fx.transform(REFUSED[name], example_inputs=x)
    assert str(caught.value).count("test_build.py") >= 2
    assert "arg0_1" not in capfd.readouterr().err


PATHS = {
    "control flow on values": net(halved),
    "a loop over the rows' values": net(lambda self, x: self.head(torch.stack([r for r in x if r.sum() > 0]).relu())),
}


@pytest.mark.filterwarnings("ignore:no axis is known")  # a path of three rows does not run at six
@pytest.mark.parametrize("name", PATHS)
def test_a_path_that_the_values_choose(name):
    with pytest.raises(sp_fx.CaptureError, match=r"torch.fx cannot trace Net.*test_build.py:\d+.*With example_inputs"):
        sp_fx.transform(PATHS[name])
    explainer = sp_fx.transform(PATHS[name], example_inputs=torch.rand(3, 4))
    assert "it asks for values at" in str(explainer.report()) and "test_build.py" in str(explainer.report())
    for x in (torch.rand(3, 4), torch.randn(3, 4, generator=torch.Generator().manual_seed(1)), torch.rand(3, 4) * 9):
        assert torch.equal(explainer(x), PATHS[name](x))


def test_a_model_that_fails_on_its_example_is_said_to():
    model = net(lambda self, x: self.head(x.relu()) if float(x.sum()) < 1e9 and x.shape[1] == 3 else self.head(x[:, :2]))
    with pytest.raises(sp_fx.CaptureError, match=r"^Net itself fails on the example_inputs: .*shapes.*test_build.py:\d+"):
        sp_fx.transform(model, example_inputs=torch.randn(3, 4))


CELLS = {
    "LSTM": (nn.LSTM(4, 4, batch_first=True), lambda self, x: self.head(self.cell(x[:, None])[0][:, 0].relu())),
    "GRU": (nn.GRU(4, 4, batch_first=True), lambda self, x: self.head(self.cell(x[:, None])[0][:, 0].relu())),
    "RNN of ReLUs": (nn.RNN(4, 4, nonlinearity="relu"), lambda self, x: self.head(self.cell(x[None])[0][0].relu())),
    "a cell": (nn.GRUCell(4, 4), lambda self, x: self.head(self.cell(x).relu())),
}


@pytest.mark.parametrize("tracer", ["fx", "export"])
@pytest.mark.parametrize("name", CELLS)
def test_recurrent_cells_are_listed(name, tracer):
    """Their gates are products, which keep their derivative by default; a ReLU inside has no rule."""
    cell, forward = CELLS[name]
    model, x = net(forward, cell=cell), torch.randn(3, 4)
    if name != "RNN of ReLUs":
        explainer = sp_fx.transform(model, tracer=tracer, example_inputs=x, strict=True)
        assert [(s.place, s.status, s.reason) for s in explainer.report().sites][:1] == [("cell", "kept", "product rule")]
        return
    with pytest.warns(UserWarning, match=r"NOT REWRITTEN.*recurrent cell"):
        explainer = sp_fx.transform(model, tracer=tracer, example_inputs=x)
    assert [site.place for site in explainer.report().of("NOT REWRITTEN")] == ["cell"]
    assert torch.equal(explainer(x), model(x)) and explainer.pullback(x, 1).norm() > 0
    with pytest.raises(sp_fx.NotRewrittenError, match="recurrent cell"):
        sp_fx.transform(model, tracer=tracer, example_inputs=x, strict=True)


def counts(self, x):
    self.calls.add_(1)
    return self.head(x.relu()) + self.calls


def averages(self, x):
    self.calls = 0.9 * self.calls + 0.1 * x.mean()
    return self.head(x.relu()) + self.calls


@pytest.mark.parametrize("tracer", ["fx", "export"])
@pytest.mark.parametrize("forward", [counts, averages])
def test_buffers_that_the_forward_changes(forward, tracer):
    model, x = net(forward, calls=torch.ones(())), torch.randn(3, 4)
    explainer = sp_fx.transform(model, tracer=tracer, example_inputs=x)
    assert any("calls" in note for note in explainer.report().notes)
    first, again = explainer(x), explainer(x)
    explainer.pullback(x, 1)
    assert model.calls == 1 and torch.equal(first, again)  # the model's state stays, and does not move from call to call
    assert torch.allclose(first, model(x), atol=1e-6) and model.calls != 1


def test_settings_in_buffers():
    def forward(self, x):
        return self.head(x.relu() if self.flag else x)

    model, x = net(forward, flag=torch.tensor(True)), torch.randn(3, 4)
    explainer = sp_fx.transform(model)
    assert torch.equal(explainer(x), model(x)) and [s.kind for s in explainer.report().sites] == ["relu"]

    def writes(self, x):
        self.flag.logical_not_()
        return self.head(x.relu() if self.flag else x)

    model = net(writes, flag=torch.tensor(True))
    with pytest.raises(sp_fx.CaptureError, match="writes over flag and reads it as a constant"):
        sp_fx.transform(model)
    assert model.flag


def test_attributes_that_the_forward_sets():
    def remembers(self, x):
        self.last, self.number = x, self.number + 1
        return self.head(self.last.relu())

    model, x = net(remembers, number=0, last=None), torch.randn(3, 4)
    explainer = sp_fx.transform(model)
    assert model.number == 0 and model.last is None and torch.equal(explainer(x), model(x))


def test_quantised_modules_are_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still what users have
        model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), {nn.Linear})
    with pytest.raises(sp_fx.CaptureError, match="a quantised Linear has no derivative"):
        sp_fx.transform(model, example_inputs=torch.randn(2, 4))


@torch.library.custom_op("sp_fx_tests::folds", mutates_args=())
def folds(x: torch.Tensor) -> torch.Tensor:
    return x.abs()


folds.register_fake(torch.empty_like)


def test_custom_ops_stay_listed_by_either_tracer():
    model = net(lambda self, x: self.head(torch.ops.sp_fx_tests.folds(x).relu()))
    for tracer in ("auto", "export"):
        with pytest.warns(UserWarning, match="folds is opaque"):
            explainer = sp_fx.transform(model, tracer=tracer, example_inputs=torch.randn(3, 4))
        assert [s.op for s in explainer.report().of("NOT REWRITTEN")] == ["folds"]


RANKS = {
    "table rows": ((4, 6), nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))),
    "series": ((2, 3, 20), nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU(), nn.MaxPool1d(3, 2, 1), nn.Flatten(), nn.Linear(36, 3))),
    "volumes": ((2, 1, 6, 6, 6), nn.Sequential(nn.Conv3d(1, 2, 3), nn.BatchNorm3d(2), nn.ReLU(), nn.MaxPool3d(2), nn.Flatten(),
                                               nn.Linear(16, 3))),
    "sets": ((2, 7, 4, 6), nn.Sequential(nn.Linear(6, 3), nn.GELU(), nn.LayerNorm(3), nn.Flatten(), nn.Linear(84, 3))),
    "one number each": ((5, 1), nn.Sequential(nn.Linear(1, 4), nn.SiLU(), nn.Linear(4, 3))),
}  # fmt: skip


@pytest.mark.parametrize("name", RANKS)
def test_every_rank_through_both_tracers(name):
    shape, model = RANKS[name]
    model, x = fill(model), torch.randn(shape, generator=torch.Generator().manual_seed(0))
    by_fx, by_export = (sp_fx.transform(model, tracer=t, example_inputs=x) for t in ("fx", "export"))
    assert by_export.report().sites == by_fx.report().sites and torch.equal(by_export(x), model(x))
    found = by_export.pullback(x, 1)
    assert found.shape == x.shape and torch.equal(found, by_fx.pullback(x, 1)) and found.norm() > 0
    assert by_export.ascend(x[:1], 1, steps=2).shape == x[:1].shape


def test_children_with_an_explainers_names():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.graph, self.meta, self.split = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2)
            self.report, self.graph_ = nn.Parameter(torch.rand(4)), nn.Identity()

        def forward(self, x):
            return self.split(self.meta(self.graph_(self.graph(x) * self.report)))

    model, x = Net(), torch.randn(3, 4)
    explainer = sp_fx.transform(model)
    assert torch.equal(explainer(x), model(x)) and explainer.get_submodule("graph__").weight.shape == (4, 4)
    assert any("the model's graph is called graph__ here" in note for note in explainer.report().notes)
    assert explainer.pullback(x, 1, wrt="meta_").shape == (3, 4)
    assert {name for name, _ in model.named_children()} == {"graph", "meta", "split", "graph_"}


@pytest.mark.parametrize("name", ["_report", "_splits", "_splitting", "_origin", "_tracer_cls", "_code"])
def test_children_with_an_explainers_private_names(name):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module(name, nn.Linear(4, 4))
            self.act, self.head = nn.ReLU(), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.act(getattr(self, name)(x)))

    model, x = Net(), torch.randn(3, 4)
    plain = nn.Sequential(getattr(model, name), model.act, model.head)  # the same layers, by names that are nobody's
    explainer = sp_fx.transform(model)
    assert torch.equal(explainer(x), model(x))
    assert torch.equal(explainer.pullback(x, 1), sp_fx.transform(plain).pullback(x, 1))
    assert explainer.get_submodule(f"{name}_") is not None and list(dict(model.named_children())) == [name, "act", "head"]
    again = pickle.loads(pickle.dumps(explainer))
    assert torch.equal(again.pullback(x, 1), explainer.pullback(x, 1))
