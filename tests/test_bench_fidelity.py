"""The command of bench/fidelity.py on a network of no size: the same table twice, resumption, refusals."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
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
from fidelity_table import METRICS, OF_PAPER, OF_TEXT, compared, in_short, main  # noqa: E402
from methods import fusion, gradient, methods  # noqa: E402


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
    assert set(rows["pullback"]) - {"passes"} == set(METRICS) - {*OF_TEXT, *OF_PAPER}
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


# -- networks and pictures of one's own

OWN = """
import torch
from torch import nn
import sp_fx

PIXELS = sp_fx.models.Preprocessing(16, 16, "bilinear", (0.5,) * 3, (0.5,) * 3)

def named(*layers):
    from helpers import fill
    return sp_fx.models.NamedModel("mine", fill(nn.Sequential(*layers)), PIXELS, None, "its own")

def fixed():  # one size
    return named(nn.Conv2d(3, 2, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(98, 4))

def flat():  # no spatial layer
    return named(nn.Flatten(), nn.Linear(768, 8), nn.ReLU(), nn.Linear(8, 4))

def single():  # one class
    return named(nn.Conv2d(3, 2, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 1))

class Asks(nn.Module):  # torch.fx cannot follow it
    def __init__(self):
        super().__init__()
        self.body = named(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 4)).model

    def forward(self, x):
        return self.body(x if x.shape[0] > 0 and x.dim() == 4 and all(n > 0 for n in x.shape) else -x)

def asks():
    return sp_fx.models.NamedModel("mine", Asks().eval(), PIXELS, None, "its own")

class Table(nn.Module):
    def forward(self, x):
        return {"logits": x.flatten(1)[:, :4]}

def table():
    return sp_fx.models.NamedModel("mine", Table(), PIXELS, None, "its own")

def net():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 4))
    from helpers import fill
    pixels = sp_fx.models.Preprocessing(16, 16, "bilinear", (0.5,) * 3, (0.5,) * 3)
    return sp_fx.models.NamedModel("mine", fill(model), pixels, ("ape", "bee", "cat", "dog"), "its own")
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder with a network and twelve pictures in three folders; the command on them."""
    (tmp_path / "a_network_of_ones_own.py").write_text(OWN)
    draw = torch.Generator().manual_seed(0)
    for k in range(12):
        path = tmp_path / "pictures" / f"n{k % 3}" / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (20, 24, 3), generator=draw, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(path)
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()

    def run(*options, work="work", model="net"):
        common = ["--model", f"a_network_of_ones_own:{model}", "--images", "pictures", "--out", "out", "--work", work]
        status = fidelity.main([*common, "--methods", "pullback", "gradient", *options])
        path = tmp_path / "out" / f"fidelity_a_network_of_ones_own_{model}_pictures.json"
        return status, path.read_text() if path.exists() else None

    yield run
    torch.set_num_threads(threads)


def test_pictures_of_ones_own(own, tmp_path):
    status, text = own()
    record = json.loads(text)
    assert status == 0 and record["samples"].startswith("12 pictures of pictures; no mosaics") and own(work="again")[1] == text
    assert set(record["methods"]["pullback"]) - {"passes"} == set(METRICS) - {
        *OF_TEXT,
        *OF_PAPER,
        "mask mass",
        "pointing game",
        "focus",
    }  # one class is predicted: no mosaics
    assert {"mean", "low", "high", "median", "of"} == set(record["methods"]["pullback"]["insertion"])
    pairs = {(c["ours"], c["other"]) for c in record["comparisons"]}
    assert pairs == {("pullback", "gradient"), ("pullback", "equal shares"), ("occlusion", "equal shares")}
    assert json.loads(own("--samples", "10")[1])["counts"]["logit"] == 10


def test_labels(own, tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(
        fidelity, "write", lambda record, *_: seen.extend([record["samples"], "focus" in record["methods"]["gradient"]])
    )
    found = []
    monkeypatch.setattr(fidelity, "methods", lambda model, x, layer: found.append(x) or methods(model, x, layer=layer))
    lines = [f"n{k % 3}/{k}.png, {('ape', 'bee', '2', 'dog')[k % 4]}" for k in range(11)]
    (tmp_path / "labels.txt").write_text("\n".join(lines))
    case = cases.of_pictures(sp_fx.models.load("a_network_of_ones_own:net"), Path("pictures"), Path("labels.txt"), Path(), None)
    assert case.target.tolist() == [int(p.stem) % 4 for p in sorted(Path("pictures").rglob("*.png")) if p.stem != "11"]
    right = int((cases.predicted(case.model, case.pixels) == case.target).sum())
    assert case.samples == f"11 pictures of pictures, 1 without a label left out, labelled; {right} predicted right"
    assert own("--labels", "labels.txt")[0] == 0 and seen == [case.samples, True] and len(found[0]) == 11
    for wrong, message in (("0.png", "expected the name of a picture and its class"), ("0.png elk", "no class is called 'elk'"),
                           ("x.png 1", "no picture .* that labels.txt has a class of"), ("0.png 9", "class 9")):  # fmt: skip
        (tmp_path / "labels.txt").write_text(wrong)
        assert own("--labels", "labels.txt")[0] == 2
        assert re.search(message, capsys.readouterr().err)
    assert own("--weights", "w.pt")[0] == 2 and "no weights file at w.pt" in capsys.readouterr().err
    assert (
        own("--texts", "labels.txt")[0] == 2
        and "--texts does not go with a_network_of_ones_own:net, a network for pictures" in capsys.readouterr().err
    )
    with pytest.raises(SystemExit):
        fidelity.main(["--ablations"])
    with pytest.raises(SystemExit):
        fidelity.main(["--networks", "zoo/residual_cnn", "resnet18", "--weights", "w.pt"])


def test_mosaics_need_three_classes_and_can_be_left_out():
    x, target = torch.randn(4, 3, 8, 8), torch.tensor([0, 0, 1, 1])
    pictures, classes, tiles = cases.of_two(x, target)
    assert pictures.shape == (4, 3, 16, 16) and classes.tolist() == [0, 0, 1, 1] and tiles.sum(1).tolist() == [2] * 4
    assert cases.of_two(x, torch.zeros(4)) is None and cases.of_two(x, target, count=0) is None
    assert len(cases.of_two(x, target, count=7)[1]) == 7


@pytest.mark.parametrize("model, without", [("fixed", "focus"), ("flat", "focus"), ("single", "random logit"), ("asks", "none")])
def test_a_network_is_judged_as_far_as_it_can_be(own, model, without):
    status, text = own(model=model)
    record = json.loads(text)
    assert status == 0 and without not in record["methods"]["pullback"]
    assert {"infidelity, small", "max-sensitivity 0.02", "insertion"} <= set(record["methods"]["pullback"])


def test_other_pictures_and_structures_have_answers_of_their_own(own, tmp_path):
    first = json.loads(own()[1])["methods"]
    for path in Path("pictures").rglob("*.png"):
        Image.fromarray(255 - np.array(Image.open(path))).save(path)
    second = json.loads(own()[1])["methods"]
    assert first != second and json.loads(own(work="fresh")[1])["methods"] == second


def test_an_answer_is_whole_or_not_there(tmp_path):
    answers = fidelity.Answers(tmp_path, {}, float("inf"))

    def killed():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answers("one", killed)
    assert not list(answers.folder.iterdir())
    assert answers("one", lambda: torch.ones(2)).tolist() == [1, 1] and [p.name for p in answers.folder.iterdir()] == ["one.pt"]


@pytest.mark.parametrize("options, message", [
    (["--model", "a_network_of_ones_own:table", "--images", "pictures"], "network that returns scores .B, classes., got dict"),
    (["--model", "squeezenet1_0", "--samples", "3"], "--samples does not go with squeezenet1_0"),
    (["--model", "zoo/residual_cnn", "--texts", "no.txt", "--labels", "x"], "--labels, --texts does not go with zoo/residual"),
    (["--model", "a_network_of_ones_own:net", "--images", "pictures", "--passes", "0"], "no method of mine is left"),
    (["--model", "a_network_of_ones_own:net", "--images", "broken"], "broken.0.png: it is not a picture"),
    (["--model", "a_network_of_ones_own:net", "--images", "nowhere"], "no folder of pictures at nowhere"),
], ids=str)  # fmt: skip
def test_what_does_not_go_together(own, options, message, tmp_path, capsys):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "0.png").write_text("no picture")
    assert fidelity.main([*options, "--out", "out", "--work", "work"]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("options", [["--samples", "0"], ["--mosaics", "-1"]])
def test_counts_that_are_none(options):
    with pytest.raises(SystemExit):
        fidelity.main(options)


def test_a_bare_name_of_two_pictures_is_refused(own, tmp_path, capsys):
    (tmp_path / "labels.txt").write_text("\n".join(f"{k}.png {k % 4}" for k in range(12)) + "\nnot_there.png 1\n")
    assert own("--labels", "labels.txt")[0] == 0
    assert "1 lines of labels.txt are of pictures that are not there" in capsys.readouterr().err
    Image.open("pictures/n0/0.png").save("pictures/n1/0.png")
    assert own("--labels", "labels.txt")[0] == 2
    assert "'0.png' is the name of several pictures; write its folder, as in 'n1/0.png'" in capsys.readouterr().err


def test_names_before_a_tab_may_have_blanks(tmp_path):
    (tmp_path / "labels.txt").write_text("my cat 0.png\t1\nb.png,2\nc.png 3\n")
    assert cases.labelled(tmp_path / "labels.txt", None) == {"my cat 0.png": 1, "b.png": 2, "c.png": 3}


class ReLUsOfManyKinds(nn.Module):
    def __init__(self, last):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)
        self.last = last

    def forward(self, x):
        x = torch.relu_(self.a(x)).relu()
        x = nn.functional.relu(x - 0.1).mean((2, 3))
        return self.b(self.last(x - 0.01))


def test_peers_that_hook_modules_see_every_relu_or_are_left_out():
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    modules = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    )
    assert "DeepLift" in methods(fill(modules), x)[0]
    model = fill(ReLUsOfManyKinds(lambda x: x.relu_()))
    chosen, left = methods(model, x)
    target = torch.tensor([0, 2])
    completeness = chosen["DeepLift"].run(x, target).flatten(1).sum(1)
    with torch.no_grad():
        change = (model(x) - model(0 * x)).gather(1, target[:, None])[:, 0]
    assert torch.allclose(completeness, change, atol=1e-5)
    chosen, left = methods(fill(ReLUsOfManyKinds(lambda x: x.clamp(min=0))), x)
    assert "DeepLift" not in chosen and left["DeepLift"] == "sees modules alone, and 1 of 4 ReLUs are none"


def test_fusion_grad_by_hand():
    """The mean over draws of weights and inputs, each parameter times its own draw; the model itself stays as it was."""
    model = fill(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)))
    kept = [p.clone() for p in model.parameters()]
    x, target = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 2])
    torch.manual_seed(5)
    got = fusion(model, gradient, weights=0.3, inputs=0.2, n=3, m=2)(x, target)
    torch.manual_seed(5)
    total = torch.zeros_like(x)
    for _ in range(3):
        noisy = kept[0] * (1 + 0.3 * torch.randn_like(kept[0]))
        torch.randn_like(kept[1])
        for _ in range(2):
            torch.randn_like(x)
            total += noisy[target].view_as(x)  # a linear model's gradient does not see its input
    assert torch.allclose(got, total / 6, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(kept, model.parameters()))
