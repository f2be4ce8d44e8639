"""The command of bench/fidelity.py on a network of no size: the same table twice, resumption, refusals."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import sp_fx
from helpers import fill
from sp_fx import zoo

BENCH = Path(__file__).parents[1] / "bench"
if not BENCH.exists():
    pytest.skip("the benches are not beside these tests", allow_module_level=True)
sys.path.insert(0, str(BENCH))

import faithfulness as ask  # noqa: E402
import fidelity  # noqa: E402
import fidelity_cases as cases  # noqa: E402
from fidelity_table import MEASURES, compared, in_pairs, in_short, main  # noqa: E402

OF_PICTURES = {name for name, measure in MEASURES.items() if measure.of == "pictures"}


def tiny(name, data, samples, seed=cases.SEED, mosaics=None):
    model = fill(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3), nn.ReLU(),
                               nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)))  # fmt: skip
    x = torch.randn(samples or 12, 3, 16, 16, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)
    masks = torch.zeros(len(x), 16, 16, dtype=torch.bool)
    masks[:, 4:12, 4:12] = True
    mosaics = (cases.mosaic(x[:8].view(2, 4, 3, 16, 16)), torch.tensor([0, 1]), torch.tensor([[True, True, False, False]] * 2))
    counts = cases.Counts(removals=6, cells=4, curves=10, sensitivity=10, draws=1, logit=10, mosaics=2, randomised=3, dear=10,
                          stable_too=("SmoothGrad-50",))  # fmt: skip
    target = cases.predicted(model, x)
    return cases.Case(name, model, x, target, masks, mosaics, None, "twelve of noise", counts, seed)


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.setattr(fidelity, "load_case", tiny)
    # At 0.02 no gate of so small a network flips, and changes are rounding.
    monkeypatch.setattr(fidelity, "RADII", {"max-sensitivity 0.02": 0.5, "max-sensitivity 0.1": 1.0})
    threads = torch.get_num_threads()

    def run(*options, work="work"):
        options = ["--networks", "zoo/tiny", "--out", str(tmp_path / "out"), "--work", str(tmp_path / work), *options]
        status = fidelity.main(options)
        path = tmp_path / "out" / "fidelity_tiny.json"
        return status, json.loads(path.read_text()) if path.exists() else None

    yield run
    torch.set_num_threads(threads)


def test_two_runs_write_the_same_table_with_its_provenance(run, tmp_path, capsys):
    status, first = run()
    text = (tmp_path / "out" / "fidelity_tiny.json").read_text()
    assert status == 0 and (tmp_path / "out" / "fidelity_tiny.png").stat().st_size > 10_000
    assert "| pullback | 1 |" in capsys.readouterr().out
    assert run(work="another")[0] == 0 and (tmp_path / "out" / "fidelity_tiny.json").read_text() == text
    assert {"rules", "seed", "versions", "weights_sha256", "threads", "counts", "command"} <= set(first)
    rows = first["methods"]
    assert set(rows["pullback"]) - {"passes"} == OF_PICTURES
    occlusion = first["controls"]["occlusion"]
    assert occlusion["passes"] == 16 and "faithfulness estimate" not in occlusion and "max-sensitivity 0.1" not in occlusion
    assert rows["FusionGrad-25"]["passes"] == 25 and {"gradient ascent", "FusionPullback-25"} <= set(rows)
    found = rows["pullback"]["infidelity, small"]
    assert found["low"] <= found["mean"] <= found["high"]
    same = [rows[name]["infidelity, small"] for name in ("gradient", "InputXGradient")]
    assert same[0] == pytest.approx(same[1])  # one question, two ways to answer
    assert first["controls"]["equal shares"]["mask mass"]["mean"] == 0.25
    assert set(first["controls"]["equal shares"]) - {"passes"} == set(fidelity.KNOWING_NOTHING)
    assert "random logit" not in rows["SmoothGrad-50"] and "max-sensitivity 0.1" in rows["SmoothGrad-50"]
    assert {c["verdict"] for c in first["comparisons"]} <= {"better", "worse", "no difference shown"}
    assert all(c["holm"] >= c["p"] for c in first["comparisons"])


def test_a_run_that_was_cut_short_goes_on(run, capsys):
    assert run("--minutes", "0")[0] == 3
    assert "run the same command again to go on" in capsys.readouterr().err
    assert run()[0] == 0
    assert "maps" in capsys.readouterr().err
    assert run()[0] == 0
    assert "maps" not in capsys.readouterr().err  # all answers were there


def test_some_methods(run, capsys):
    status, record = run("--methods", "pullback", "gradient")
    assert status == 0 and list(record["methods"]) == ["pullback", "gradient"]
    assert run("--methods", "pulback")[0] == 2
    assert "no method of zoo/tiny is called pulback; they are: pullback; double pullback" in capsys.readouterr().err


def test_another_seed_and_cheap_methods(run, tmp_path):
    assert run()[0] == 0
    first = (tmp_path / "out" / "fidelity_tiny.json").read_text()
    assert run("--seed", "3", "--passes", "2")[0] == 0
    other = json.loads((tmp_path / "out" / "fidelity_tiny_seed3.json").read_text())
    assert (tmp_path / "out" / "fidelity_tiny.json").read_text() == first
    assert other["seed"] == 3 and max(row["passes"] for row in other["methods"].values()) == 2
    assert other["methods"]["pullback"]["infidelity, small"] != json.loads(first)["methods"]["pullback"]["infidelity, small"]


def test_samples_that_no_default_was_chosen_on(run, monkeypatch):
    monkeypatch.setattr(fidelity, "load_case", lambda *args: dataclasses.replace(tiny(*args), fresh=2))
    _, record = run("--methods", "pullback", "gradient")
    assert record["fresh"].startswith("those from number 2 on")
    measured = {c["measure"] for c in record["comparisons"]}
    assert {c["measure"] for c in record["comparisons_fresh"]} == measured - {"max-sensitivity 0.02", "max-sensitivity 0.1"}
    assert record["comparisons"][0]["mean"] != record["comparisons_fresh"][0]["mean"]  # of 10 samples; stability has 8 of them


def test_the_tables_of_the_pages(run, tmp_path):
    run()
    page = tmp_path / "evidence.md"
    page.write_text("before\n<!-- fidelity: tiny -->\nold\n<!-- end -->\nafter\n")
    options = ["--results", str(tmp_path / "out"), "--pages", str(page)]
    assert main(options) == 0
    text = page.read_text()
    assert text.startswith("before\n<!-- fidelity: tiny -->\n|  | passes |") and text.endswith("<!-- end -->\nafter\n")
    row = next(line for line in text.splitlines() if line.startswith("| SmoothGrad-50 |"))
    found = json.loads((tmp_path / "out" / "fidelity_tiny.json").read_text())["methods"]["SmoothGrad-50"]["infidelity, small"]
    assert f"{found['mean']:.3g}" in row and f"[{found['low']:.2g}, {found['high']:.2g}]" in row
    assert main(options) == 0 and page.read_text() == text
    assert text.count("| equal shares | 0 | ") == 2  # the level to beat, unranked
    plot = tmp_path / "out" / "fidelity_tiny.png"
    drawn = plot.read_bytes()
    plot.unlink()
    assert main([*options, "--plots"]) == 0 and plot.read_bytes() == drawn and b"weights_sha256" in drawn
    page.write_text("nothing to fill")
    assert main(options) == 2


def test_the_short_table_has_the_best_peer_of_each_measure():
    """Lower infidelity is better and higher correlation; other pullbacks are no peers; what has no value is a dash."""
    values = {"pullback": (0.2, 0.9), "ascent": (0.01, 1), "pullback, paper's rules": (0.01, 1),
              "gradient": (0.05, 0.1), "IG-50": (0.3, 0.8), "DeepLift": (0.1, 0.7)}  # fmt: skip
    measures = ("infidelity, small", "faithfulness correlation")
    rows = {method: {m: {"mean": v} for m, v in zip(measures, both)} for method, both in values.items()}
    lines = in_short({"tiny": {"methods": rows, "controls": {"equal shares": {measures[0]: {"mean": 0.4}}}}}).splitlines()
    assert lines[0].startswith("| network | map | Infid. small ↓ | Infid. published ↓ | Faith. corr. ↑ |")
    assert [line.removesuffix("| - | - |") for line in lines[2:]] == [
        "| tiny | pullback | 0.2 | - | **0.9** ",
        "|  | plain gradient | **0.05** | - | 0.1 ",
        "|  | best peer | 0.1 DeepLift | - | 0.8 IG-50 ",
        "|  | equal shares | 0.4 | - | - ",
    ]


def test_pairs_say_what_is_worse_and_what_shows_no_difference():
    """Ratios where less is better, else differences; the samples that nothing was chosen on have a row of their own."""
    low, high = "infidelity, small", "faithfulness correlation"
    one = [
        {
            "measure": low,
            "ours": "pullback",
            "other": "gradient",
            "mean": -1.0,
            "ratio": 0.254,
            "holm": 0.0041,
            "verdict": "better",
        },
        {"measure": high, "ours": "pullback", "other": "gradient", "mean": -0.2, "holm": 0.02, "verdict": "worse"},
        {"measure": low, "ours": "ascent", "other": "gradient", "mean": 9.0, "ratio": 9.0, "holm": 0.5, "verdict": "worse"},
    ]
    fresh = [{**one[0], "ratio": 0.3, "holm": 0.6, "verdict": "no difference shown"}]
    tiny = {"samples": "9 scenes", "comparisons": one, "fresh": "those from 3 on", "comparisons_fresh": fresh}
    bare = {"samples": "1 scene", "comparisons": one[2:]}
    assert in_pairs({"tiny_seed7": tiny, "bare": bare}, "gradient").splitlines()[2:] == [
        "| tiny | 9 scenes | 0.25 \N{MULTIPLICATION SIGN}, p 0.004 | *-0.20, p 0.02* |",
        "| tiny | 9 scenes: those from 3 on | (0.30 \N{MULTIPLICATION SIGN}, p 0.6) | - |",
    ]


@pytest.mark.parametrize("name", ["README.md", "docs/evidence.md"])
def test_the_repository_s_pages_are_those_of_its_results(name, tmp_path):
    page, results = BENCH.parent / name, BENCH / "results"
    copy = tmp_path / "copy.md"
    copy.write_text(page.read_text())
    assert main(["--results", str(results), "--pages", str(copy)]) == 0
    assert copy.read_text() == page.read_text(), "run python bench/fidelity_table.py"


@pytest.mark.parametrize("name", zoo.NAMES)
def test_maps_change_as_layers_are_randomised(name):
    """From the output down: below 0.3 once the top half is random, and no layer that was left alone differs."""
    case = cases.load_case(f"zoo/{name}", BENCH, 6)
    changed = case.with_random_top(0.5, fidelity.draw(5))
    layers = (nn.Conv2d, nn.Linear)
    weighty, others = ([m.weight for m in model.modules() if isinstance(m, layers)] for model in (case.model, changed))
    same = list(map(torch.equal, weighty, others))
    assert same == [True] * (len(same) - round(0.5 * len(same))) + [False] * round(0.5 * len(same))
    for method in ("pullback", "ascend"):
        maps, others = (getattr(sp_fx.transform(m), method)(case.pixels, case.target).flatten(1) for m in (case.model, changed))
        assert ask.spearman(maps, others).mean() < 0.3


def test_too_few_samples(run, capsys):
    assert run("--samples", "9")[0] == 2
    assert "9 samples of zoo/tiny: an interval needs at least 10" in capsys.readouterr().err


def test_comparisons_by_hand():
    """A method that is better by one on every one of 12 samples."""
    base = torch.arange(12.0, dtype=torch.float64)
    others = ("pullback", "gradient", "SmoothGrad-50", "pullback, paper's rules")
    results = {name: {"infidelity, small": base + 5} for name in others}
    results["pullback"] = {"infidelity, small": base + 4}
    found = [c for c in compared({**results, "ascent": {}, "double pullback": {}, "integrated pullback-10": {}})]
    assert [c["other"] for c in found] == ["gradient", "SmoothGrad-50", "pullback, paper's rules"]
    assert all(c["mean"] == -1 and c["low"] == c["high"] == -1 and c["verdict"] == "better" for c in found)
    assert all(c["p"] == pytest.approx(2 / 4096) and c["holm"] == pytest.approx(6 / 4096) for c in found)
