"""Temperatures that fit any network: scales measured once, their invariances, and calibration sets that say nothing."""

import pickle

import numpy as np
import pytest
import torch
from torch import nn

import sp_fx
from helpers import fill, golden, relative

SAMPLES = torch.randn(40, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def network(norm=False, pool=True, dtype=torch.float64):
    layers = [nn.Conv2d(3, 6, 3), *([nn.BatchNorm2d(6)] if norm else []), nn.ReLU(), *([nn.MaxPool2d(3, 2, 1)] if pool else [])]
    model = nn.Sequential(*layers, nn.Conv2d(6, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4))
    return fill(model).to(dtype)


def pre_activations(model, x):
    """What goes into each gate of a sequential model, by its own modules."""
    inputs_of = {}
    for i, layer in enumerate(model):
        if isinstance(layer, nn.ReLU | nn.MaxPool2d):
            inputs_of[str(i)] = x.detach().numpy()
        x = layer(x)
    return inputs_of


def test_the_scale_is_the_deviation_over_the_whole_set():
    model = network()
    explainer = sp_fx.transform(model)
    x = SAMPLES.double()
    expected = {place: float(np.std(z)) for place, z in pre_activations(model, x).items()}
    for batches in (x, [x[:7], x[7:8], x[8:8], x[8:]], (b for b in x.split(9))):
        rules = explainer.calibrate(batches).report().rules
        assert dict(rules.scale) == pytest.approx(expected, rel=1e-10)  # float64 sums in another order


def test_large_offsets_do_not_cancel():
    """In float32 a mean of 1e4 deviations leaves nothing of squares that are subtracted."""
    model = nn.Sequential(nn.Identity(), nn.ReLU(), nn.Linear(8, 2))
    x = 1e4 + torch.randn(1000, 8)
    scale = sp_fx.transform(model).calibrate(x.split(10)).report().rules.scale["1"]
    assert scale == pytest.approx(float(np.std(x.double().numpy())), rel=1e-4)  # the inputs' own rounding is 1e-3 of their spread


def test_temperatures_are_plain_numbers_of_the_graph():
    explainer = sp_fx.transform(network(), rules=sp_fx.Rules(relu=0.5, max_pool=0.25, scale="absolute"))
    x = SAMPLES.double()
    new = explainer.calibrate(x)
    by_hand = {site.place: site.temperature * site.scale for site in new.report().of("rewritten")}
    nodes = [n for n in new.graph.nodes if getattr(n.target, "__name__", "") == "dual_path" and n.args[0] in ("relu", "max_pool")]
    assert [n.kwargs["tau"] for n in nodes] == list(by_hand.values()) and all("scale" not in n.kwargs for n in nodes)
    absolute = sp_fx.transform(network(), rules=sp_fx.Rules(scale="absolute", overrides=by_hand))
    assert torch.equal(new.pullback(x, 1), absolute.pullback(x, 1))
    assert torch.equal(new(x), explainer(x))


@pytest.mark.parametrize("scale", ["absolute", "sample"])
def test_the_old_explainer_stays_as_it_is(scale):
    model, data = golden("tiny_vgg")
    explainer = sp_fx.transform(model, rules=sp_fx.Rules(scale=scale))
    before, report, code = explainer.pullback(data["input"], 1), str(explainer.report()), explainer.code
    new = explainer.calibrate(3 * data["input"])
    assert torch.equal(explainer.pullback(data["input"], 1), before)
    assert str(explainer.report()) == report and explainer.code == code
    assert not torch.equal(new.pullback(data["input"], 1), before)
    again = new.calibrate(3 * data["input"])
    assert torch.equal(again.pullback(data["input"], 1), new.pullback(data["input"], 1))  # of the rules, not of the last scale


def test_the_rules_carry_the_scales():
    model, data = golden("tiny_resnet")
    new = sp_fx.transform(model).calibrate(data["input"])
    rules = new.report().rules
    assert pickle.loads(pickle.dumps(rules)) == rules
    assert eval(str(rules), {"Rules": sp_fx.Rules}) == rules
    assert torch.equal(sp_fx.transform(model, rules=rules).pullback(data["input"], 1), new.pullback(data["input"], 1))
    restored = pickle.loads(pickle.dumps(new))
    assert torch.equal(restored.pullback(data["input"], 1), new.pullback(data["input"], 1)) and restored.report().rules == rules
    once_more = restored.calibrate(data["input"])  # a pickled graph is traced anew: its nodes are found all the same
    assert dict(once_more.report().rules.scale) == dict(rules.scale)
    header = str(new.report()).splitlines()[0]
    assert f"measured at {len(rules.scale)} gates" in header and len(header) < 120


def test_scales_of_another_model():
    rules = sp_fx.transform(network(pool=True)).calibrate(SAMPLES.double()).report().rules
    with pytest.raises(ValueError, match=r"scales were measured at 2, where this model has no gate"):
        sp_fx.transform(nn.Sequential(nn.Identity(), nn.ReLU(), nn.Identity(), nn.Identity(), nn.ReLU()), rules=rules)
    with pytest.raises(ValueError, match=r"no scale was measured for the relu gate at '1'"):
        sp_fx.transform(network(), rules=sp_fx.Rules(scale={"2": 1.0}))


@pytest.mark.parametrize("scale", [{"1": 0.0}, {"1": float("nan")}, {"1": True}, {"1": "large"}, "batch"])
def test_bad_scales(scale):
    with pytest.raises(ValueError, match="scale"):
        sp_fx.Rules(scale=scale)


# -- invariance


def rescaled(model, c, norm):
    """The same function: the first layer c times as large, the next layer's weights divided by c."""
    model = pickle.loads(pickle.dumps(model))
    convs = [m for m in model if isinstance(m, nn.Conv2d)]
    with torch.no_grad():
        for p in (model[1] if norm else convs[0]).parameters():
            p.mul_(c)
        convs[1].weight.div_(c)
    return model


WAYS = [(False, "default"), (True, "default"), (False, "calibrated"), (True, "calibrated"), (True, "by its norms")]


@pytest.mark.parametrize("norm, how", WAYS, ids=[f"{'batch norm' if norm else 'conv'}, {how}" for norm, how in WAYS])
@pytest.mark.parametrize("pool", [False, True], ids=["relu", "relu and max pool"])
@pytest.mark.parametrize("c", [1e-3, 0.1, 20.0, 1e4])
def test_a_network_written_at_another_scale_has_the_same_map(norm, pool, c, how):
    model = network(norm, pool, torch.float32)
    other, x = rescaled(model, c, norm), SAMPLES[:8]
    assert relative(other(x), model(x)) <= 1e-4  # or it is another function

    def map(model, rules=None):
        explainer = sp_fx.transform(model, rules=rules)
        if how != "default":
            explainer = explainer.calibrate(SAMPLES if how == "calibrated" else None)
        return explainer.pullback(x, 1)

    assert relative(map(other), map(model)) <= 1e-4
    absolute = sp_fx.Rules(scale="absolute")
    at_one, at_c = (sp_fx.transform(m, rules=absolute).pullback(x, 1) for m in (model, other))
    assert relative(at_c, at_one) > 1e-2  # what the scale is for


# -- without data


def normed_network(dtype=torch.float64):
    """A gate behind a BatchNorm, one behind another gate, one behind a BatchNorm and a dropout, one behind a convolution."""
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(6, 5, 3),
                          nn.BatchNorm2d(5), nn.Dropout(), nn.LeakyReLU(0.1), nn.Conv2d(5, 4, 1), nn.ReLU(),
                          nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))  # fmt: skip
    return fill(model).to(dtype)


def settled(model, x):
    """With the statistics of `x` in its norms."""
    norms = [m for m in model if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:  # in the order of the forward pass
        z = model[: list(model).index(norm)](x).detach()
        norm.running_mean.copy_(z.mean((0, 2, 3)))
        norm.running_var.copy_(z.var((0, 2, 3), correction=0))
    return model


def test_the_statistics_of_norms_serve_without_data():
    """On the data that they are of they give what measuring gives: exactly, since eps is taken into account."""
    x = SAMPLES.double()
    model = settled(normed_network(), x)
    explainer = sp_fx.transform(model)
    new, by_data = explainer.calibrate(), explainer.calibrate(x)
    scale, expected = dict(new.report().rules.scale), by_data.report().rules.scale
    assert scale == {"2": pytest.approx(expected["2"], rel=1e-10), "3": "sample", "7": pytest.approx(expected["7"], rel=1e-10),
                     "9": "sample"}  # fmt: skip
    lines = {line.split()[0]: line for line in str(new.report()).splitlines()}
    assert f"1.0 x {scale['2']:.4g}" in lines["2"] and "1.0 x scale" in lines["3"] and "1.0 x scale" in lines["9"]
    assert "measured at 2 of 4 gates" in str(new.report()).splitlines()[0]
    # The same as one whose scales are given: numbers there, each sample's own elsewhere.
    again = sp_fx.transform(model, rules=new.report().rules)
    assert torch.equal(again.pullback(x, 1), new.pullback(x, 1)) and str(again.report()) == str(new.report())
    assert torch.equal(pickle.loads(pickle.dumps(new)).calibrate().pullback(x, 1), new.pullback(x, 1))
    assert relative(new.pullback(x, 1), explainer.pullback(x, 1)) > 1e-4  # not the per-sample scale under another name
    assert eval(str(again.report().rules), {"Rules": sp_fx.Rules}) == again.report().rules


def test_gates_without_a_norm_keep_the_scale_they_had():
    x = SAMPLES.double()
    model = normed_network()
    with torch.no_grad():  # beta and gamma by hand: mean of gamma^2 v / (v + eps), and the variance of beta
        gamma, beta, v = torch.tensor([1.0, 2, 3, 4, 5, 6]), torch.tensor([0.0, 1, 0, -1, 0, 0]), torch.tensor([1.0] * 5 + [1e-5])
        for name, value in (("weight", gamma), ("bias", beta), ("running_var", v)):
            getattr(model[1], name).copy_(value)
    within = (1 + 4 + 9 + 16 + 25) / 6 / (1 + 1e-5) + 36 / 6 * 1e-5 / 2e-5
    by_hand = (within + 2 / 6) ** 0.5
    for scale in ("absolute", "sample"):
        scales = sp_fx.transform(model, rules=sp_fx.Rules(scale=scale)).calibrate().report().rules.scale
        assert (scales["3"], scales["9"]) == (scale, scale)
        assert scales["2"] == pytest.approx(by_hand, rel=1e-6)  # v is float32 above
    by_data = sp_fx.transform(model).calibrate(x)
    assert by_data.calibrate().report().rules.scale["9"] == by_data.report().rules.scale["9"]
    plain = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, affine=False), nn.ReLU())
    assert sp_fx.transform(plain).calibrate().report().rules.scale["2"] == pytest.approx(1, abs=1e-5)  # eps of 1e-5


def test_no_norm_at_all_is_an_error():
    with pytest.raises(ValueError, match=r"no gate of this model is fed by a BatchNorm .*: calibrate\(batches\) measures"):
        sp_fx.transform(network()).calibrate()


def test_an_exported_graph_has_the_same_scales():
    model = normed_network(torch.float32)
    by_fx, by_export = (sp_fx.transform(model, tracer=t, example_inputs=SAMPLES[:2]).calibrate() for t in ("fx", "export"))
    assert dict(by_fx.report().rules.scale) == dict(by_export.report().rules.scale)


# -- bad sets


def test_bad_calibration_sets():
    explainer = sp_fx.transform(network(dtype=torch.float32))
    for empty in ([], SAMPLES[:0], iter(()), [SAMPLES[:0]]):
        with pytest.raises(ValueError, match="empty: expected at least one batch"):
            explainer.calibrate(empty)
    with pytest.raises(ValueError, match="constant"):
        explainer.calibrate([torch.zeros(4, 3, 16, 16), torch.ones(2, 3, 16, 16)])
    with pytest.raises(ValueError, match=r"cannot take batch 1 of the calibration set, of shape \[2, 4, 16, 16\]: .*channels"):
        explainer.calibrate([SAMPLES, torch.randn(2, 4, 16, 16)])
    with pytest.raises(TypeError, match=r"batch 0 .* a list: of \(inputs, labels\), take the inputs"):
        explainer.calibrate([[SAMPLES, torch.zeros(40)]])
    with pytest.raises(TypeError, match="batch 0 of the calibration set is str"):
        explainer.calibrate(["images"])
    with pytest.raises(ValueError, match="pre-activation of 1 is not finite"):
        explainer.calibrate(SAMPLES * 1e38)


def test_gates_that_are_never_active_are_listed():
    model = fill(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU()))
    with torch.no_grad():
        model[0].bias.fill_(-1e3)
        model[2].bias.fill_(0.5)
    with pytest.warns(UserWarning) as caught:
        new = sp_fx.transform(model).calibrate(torch.randn(9, 4))
    messages = {str(w.message) for w in caught}
    over = "over the calibration set, and stay hard: 3"
    assert messages == {f"gates that are constant {over}", "gates that are never active on the calibration set: 1"}
    assert all(site.scale > 0 for site in new.report().of("rewritten") if site.kind)


def test_one_element_a_sample():
    """Its own deviation is 0, and the gate hard; over a set it has one."""
    model = nn.Sequential(nn.Linear(4, 1), nn.ReLU(), nn.Linear(1, 2))
    x = torch.randn(50, 4)
    explainer = sp_fx.transform(fill(model), rules=sp_fx.Rules(relu=1.0, scale="sample"))
    with torch.no_grad():
        expected = float(np.std(model[0](x).numpy()))
    assert explainer.calibrate(x).report().rules.scale["1"] == pytest.approx(expected, rel=1e-5)
    closed = x[model[0](x)[:, 0] < 0]
    assert not explainer.pullback(closed, 1).any() and explainer.calibrate(x).pullback(closed, 1).any()


def test_several_inputs_and_keywords():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = fill(nn.Linear(4, 3))

        def forward(self, x, ids, shift):
            return torch.relu(self.body(x * shift + ids[:, None])) * 2

    x, ids, shift = torch.randn(6, 4), torch.arange(6), torch.rand(4)
    explainer = sp_fx.transform(Two())
    with torch.no_grad():
        expected = float(np.std(Two().body(x * shift + ids[:, None]).numpy()))
    for batches in ([(x, ids)], [(x[:3], ids[:3]), (x[3:], ids[3:])]):
        scale = explainer.calibrate(batches, forward_kwargs={"shift": shift}).report().rules.scale["relu"]
        assert scale == pytest.approx(expected, rel=1e-5)
    with pytest.raises(TypeError, match="batch 0 of the calibration set is a tuple of 6 inputs; the model takes 3"):
        explainer.calibrate([x.split(1)])


def test_token_ids_and_mappings():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.layer = nn.Embedding(9, 4), fill(nn.Linear(4, 3))

        def forward(self, ids, scale):
            return torch.relu(self.layer(self.embed(ids) * scale)).mean(1)

    model, ids, scale = Tokens(), torch.randint(9, (6, 5)), torch.rand(6, 1, 1)
    explainer = sp_fx.transform(model)
    with torch.no_grad():
        expected = float(np.std(model.layer(model.embed(ids) * scale).numpy()))
    for batches in ([(ids, scale)], [{"ids": ids, "scale": scale}], [{"scale": scale[:3], "ids": ids[:3]}, (ids[3:], scale[3:])]):
        assert explainer.calibrate(batches).report().rules.scale["relu"] == pytest.approx(expected, rel=1e-5)
    assert explainer.calibrate(ids, forward_kwargs={"scale": scale}).report().rules.scale["relu"] == pytest.approx(
        expected, rel=1e-5
    )


def test_measured_rules_fit_a_cut_and_an_exported_model():
    model = network(dtype=torch.float32)
    cut = sp_fx.transform(model, output="2")
    rules = cut.calibrate(SAMPLES).report().rules
    again = sp_fx.transform(model, output="2", rules=rules)
    assert torch.equal(again.pullback(SAMPLES, (0, 1, 1)), cut.calibrate(SAMPLES).pullback(SAMPLES, (0, 1, 1)))
    with pytest.raises(ValueError, match="no scale was measured"):
        sp_fx.transform(model, rules=rules)

    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = fill(nn.Linear(4, 4))

        def forward(self, x):
            x = torch.relu(self.layer(x))
            return torch.relu(self.layer(x)) if x.shape[1] == 4 else x

    x = torch.randn(5, 4)
    report = sp_fx.transform(Branching(), example_inputs=x).calibrate(x).report()
    assert report.tracer == "torch.export"
    assert sp_fx.transform(Branching(), rules=report.rules, example_inputs=x).report().sites == report.sites


# -- the report


def test_a_report_shows_temperatures_against_scales():
    model = network(dtype=torch.float32)
    with torch.no_grad():
        model[0].weight.mul_(100)
        model[3].weight.mul_(1e-5), model[3].bias.mul_(1e-5)
    explainer = sp_fx.transform(model, rules=sp_fx.Rules(relu=0.6, max_pool=0.3, scale="absolute"))
    assert "absolute temperatures suppose pre-activations of unit scale: report(inputs) compares" in str(explainer.report())
    report = explainer.report(SAMPLES)
    deviations = [np.std(z) for z in pre_activations(model, SAMPLES).values()]
    assert [s.spread for s in report.of("rewritten") if s.kind] == pytest.approx(deviations, rel=1e-5)
    first, pool, second = (line for line in str(report).splitlines() if line.split()[1] in ("relu", "max_pool2d"))
    assert first.split()[3:5] == ["0.6", f"{deviations[0]:.4g}"] and first.endswith("effectively hard")
    assert pool.endswith("effectively hard") and second.endswith("effectively open")
    assert "2 gates are effectively hard" in str(report) and "1 gates are effectively open" in str(report)
    assert "effectively" not in str(explainer.calibrate(SAMPLES).report(SAMPLES))
    assert explainer.report().sites[0].spread is None
