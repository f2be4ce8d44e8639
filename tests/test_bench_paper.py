"""The paper's evaluation against Quantus, whose settings it is, with the same random choices; and its command in small."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import sp_fx
from helpers import fill

BENCH = Path(__file__).parents[1] / "bench"
if not BENCH.exists():
    pytest.skip("the benches are not beside these tests", allow_module_level=True)
sys.path.insert(0, str(BENCH))

import faithfulness as ask  # noqa: E402
import fidelity  # noqa: E402
import fidelity_cases as cases  # noqa: E402
import paper  # noqa: E402
from methods import Method  # noqa: E402

N, SIDE, F = 4, 12, 3 * 12 * 12


@pytest.fixture(scope="module")
def case():
    model = fill(nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(5, 4, 3), nn.ReLU(),
                               nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)))  # fmt: skip
    x = torch.randn(N, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3)).clamp(-1, 1)
    return cases.Case("tiny", model, x, cases.predicted(model, x), None, None, None, "four of noise")


@pytest.fixture(scope="module")
def maps(case):
    return sp_fx.transform(case.model).pullback(case.pixels, case.target)


def asked_quantus(metric, case, maps, **more):
    return metric(
        model=case.model, x_batch=case.pixels.numpy(), y_batch=case.target.numpy(), a_batch=maps.numpy(), device="cpu", **more
    )


def explained_by(explainer):
    """The explainer as Quantus calls one."""
    return lambda model, inputs, targets, **_: explainer.pullback(torch.tensor(inputs), torch.tensor(targets)).numpy()


def kinds(**changed):
    import quantus

    common = {"disable_warnings": True, "display_progressbar": False, "return_aggregate": False}
    return {name: getattr(quantus, name)(**common, **options) for name, options in changed.items()}


def test_faithfulness_correlation_is_quantus(case, maps, monkeypatch):
    sets, calls = paper.subsets(F), iter(range(10_000))
    monkeypatch.setattr(np.random, "choice", lambda *_, **__: sets[next(calls) // N].numpy())
    metric = kinds(FaithfulnessCorrelation={"nr_runs": 100, "subset_size": F // 12})["FaithfulnessCorrelation"]
    theirs = asked_quantus(metric, case, maps)
    ours = ask.pearson(paper.sums_of(maps.flatten(1), sets), paper.blackened(case, sets))
    assert ours.tolist() == pytest.approx(theirs, abs=2e-4)
    assert sets.shape == (100, F // 12) and all(len(s.unique()) == F // 12 for s in sets)


def test_faithfulness_estimate_is_quantus(case, maps):
    metric = kinds(FaithfulnessEstimate={"features_in_step": F // 48})["FaithfulnessEstimate"]
    assert paper.estimate(case, maps).tolist() == pytest.approx(asked_quantus(metric, case, maps), abs=2e-4)


def test_monotonicity_is_quantus(case, maps, monkeypatch):
    draw = torch.Generator().manual_seed(13)
    greys, calls = torch.stack([torch.rand(12, 10, generator=draw) for _ in range(N)]), iter(range(10_000))
    monkeypatch.setattr(np.random, "uniform", lambda *_, **__: greys.flatten(1)[:, next(calls)].numpy())
    metric = kinds(MonotonicityCorrelation={"nr_samples": 10, "features_in_step": F // 12})["MonotonicityCorrelation"]
    assert paper.monotonicity(case, maps).tolist() == pytest.approx(asked_quantus(metric, case, maps), abs=1e-6)


def test_infidelity_is_quantus_with_the_best_scale(case, maps, monkeypatch):
    """Quantus's own is a parabola in the scale of the map; the paper's code takes its least value."""
    blocks = ask.grid(SIDE, SIDE, 4)
    greys = ask.grey_pictures(case.pixels.shape[1:], blocks)
    assert greys.shape == (5, 3, SIDE, SIDE) and -1 <= greys.min() < -0.8 and 0.8 < greys.max() <= 1
    assert all(len(picture[:, blocks == k].unique()) == 1 for picture in greys for k in range(16))
    values = [float(picture[0][blocks == k][0]) for picture in greys for k in range(16)]

    def theirs(scale):
        calls = iter(values)
        monkeypatch.setattr(np.random, "uniform", lambda *_, **__: np.full(N, next(calls)))
        options = {"perturb_baseline": "uniform", "n_perturb_samples": 5, "perturb_patch_sizes": [SIDE // 4]}
        return np.array(asked_quantus(kinds(Infidelity=options)["Infidelity"], case, scale * maps))

    unit = 1 / float(maps.abs().max())
    at = [-unit, unit, 2 * unit]
    square, linear, none = np.polyfit([-1, 1, 2], np.stack([theirs(scale) for scale in at]), 2)
    found = ask.Overwriting(blocks, greys, ask.overwritten(case.score, case.pixels, case.target, blocks, greys))
    ours = ask.infidelity_published(lambda instead: maps * (case.pixels - instead), found)
    assert ours.tolist() == pytest.approx((none - linear**2 / (4 * square)).tolist(), rel=5e-3)  # float32


def test_sensitivity_is_quantus(case, maps, monkeypatch):
    draw = torch.Generator().manual_seed(4)
    noise = [0.02 * (2 * torch.rand(case.pixels.shape, generator=draw) - 1) for _ in range(10)]
    calls = iter(noise)
    monkeypatch.setattr(np.random, "uniform", lambda *_, **__: next(calls).flatten(1).numpy())
    explainer = sp_fx.transform(case.model)
    metric = kinds(MaxSensitivity={"nr_samples": 10, "lower_bound": 0.02})["MaxSensitivity"]
    theirs = asked_quantus(metric, case, maps, explain_func=explained_by(explainer))
    ours = ask.max_sensitivity(explainer.pullback, case.pixels, case.target, maps, 10, 0.02, 4)
    assert ours.tolist() == pytest.approx(np.asarray(theirs).tolist(), rel=1e-3)


def test_random_logit_is_quantus(case, maps, monkeypatch):
    other = (case.target + 2) % 5
    below = other - (other > case.target).long()  # its number among the classes that are left
    monkeypatch.setattr(np.random, "randint", lambda *_, **__: below.numpy())
    explainer = sp_fx.transform(case.model)
    import quantus

    pearson = quantus.similarity_func.correlation_pearson
    metric = kinds(RandomLogit={"num_classes": 5, "similarity_func": pearson, "normalise": False})["RandomLogit"]
    theirs = asked_quantus(metric, case, maps, explain_func=explained_by(explainer))
    ours = ask.pearson(explainer.pullback(case.pixels, other).flatten(1), maps.flatten(1))
    assert ours.tolist() == pytest.approx(np.asarray(theirs).tolist(), abs=1e-5)


def test_groups_are_every_feature_once_in_order():
    values = torch.randn(3, 48, generator=torch.Generator().manual_seed(0))
    groups = paper.in_order(values, 12)
    assert groups.shape == (3, 12, 4) and all(len(g.unique()) == 48 for g in groups.flatten(1))
    ends = values.gather(1, groups.flatten(1)).view(3, 12, 4)
    assert bool((ends[:, 1:].amin(2) >= ends[:, :-1].amax(2)).all())


def test_explainers_and_ablations(case):
    chosen, left = paper.paper_methods(case.model, case.pixels)
    assert not left and set(chosen) >= {"soft pullback", "pullback ascent", "gradient ascent", "FusionGrad", "SmoothGrad",
                                        "gradient", "GradientShap", "IntegratedGradients", "Saliency", "DeepLift",
                                        "InputXGradient", "Deconvolution", "GuidedGradCam"}  # fmt: skip
    x, target = case.pixels, case.target
    for name in ("gradient", "Saliency", "DeepLift"):  # Quantus sums the channels of Captum's
        got = chosen[name].run(x, target)
        assert got.shape == x.shape and torch.equal(got[:, :1].expand_as(got), got)
    single = x.detach().requires_grad_()
    slope = torch.autograd.grad(case.model(single).gather(1, target[:, None]).sum(), single)[0]
    assert torch.allclose(chosen["gradient"].run(x, target)[:, 0], slope.sum(1), atol=1e-6)
    assert torch.allclose(chosen["Saliency"].run(x, target)[:, 0], slope.abs().sum(1), atol=1e-6)
    assert torch.allclose(
        chosen["DeepLift"].run(x, target)[:, 0].sum((1, 2)), case.score(x, target) - case.score(0 * x, target), atol=1e-5
    )
    several = paper.ablations(case.model, x)
    assert {"soft pullback, relu 0.3", "pullback ascent, relu 0.3", "soft pullback, max_pool 0.01", "pullback ascent, steps 10",
            "pullback ascent, step_size 40"} <= set(several)  # fmt: skip
    assert not any("gelu" in name or "attention" in name for name in several)
    explainer = sp_fx.transform(case.model, rules=sp_fx.Rules.paper())
    length = 40 * (F / 150_528) ** 0.5
    expected = explainer.ascend(x, target, steps=5, step_size=length, bounds=(-1.0, 1.0))
    assert torch.allclose(
        several["pullback ascent, step_size 40"].run(x, target), expected, atol=1e-3 * float(expected.abs().max())
    )


def test_the_command_in_small(monkeypatch, tmp_path, capsys):
    threads = torch.get_num_threads()
    monkeypatch.setattr(paper, "RUNS", 8)
    options = ["--paper", "--networks", "zoo/residual_cnn", "--samples", "10", "--mosaics", "2", "--methods", "soft pullback",
               "gradient", "gradient ascent", "pullback ascent"]  # fmt: skip
    texts = []
    for work in ("a", "b"):
        assert fidelity.main([*options, "--work", str(tmp_path / work), "--out", str(tmp_path / work)]) == 0
        texts.append((tmp_path / work / "fidelity_paper_residual_cnn.json").read_text())
    assert texts[0] == texts[1]
    record = json.loads(texts[0])
    assert record["evaluation"] == "paper" and set(record["methods"]) == {
        "soft pullback",
        "gradient",
        "gradient ascent",
        "pullback ascent",
    }
    assert set(record["methods"]["gradient"]) - {"passes"} == set(fidelity.METRICS) & {
        m for m in fidelity.METRICS if m.endswith("paper")
    }
    assert "| soft pullback | 1 |" in capsys.readouterr().out
    torch.set_num_threads(threads)


def test_a_share_and_a_slope_are_taken_as_they_are(case):
    constant = Method(lambda x, target: torch.ones_like(x), 1)
    results = paper.paper_measured(case, {"one": constant}, lambda m: m.run, (case.target + 1) % 5, lambda name, f, *a: f(*a))
    assert results["one"]["max-sensitivity, paper"].tolist() == [0] * N
    assert bool(results["one"]["faithfulness correlation, paper"].isnan().all())  # equal sums have no correlation
