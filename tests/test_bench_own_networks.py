"""The command of bench/fidelity.py on a network, pictures and labels of one's own."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sp_fx

BENCH = Path(__file__).parents[1] / "bench"
if not BENCH.exists():
    pytest.skip("the benches are not beside these tests", allow_module_level=True)
sys.path.insert(0, str(BENCH))

import fidelity  # noqa: E402
import fidelity_cases as cases  # noqa: E402
from answers import Answers  # noqa: E402
from fidelity_table import MEASURES  # noqa: E402
from methods import methods  # noqa: E402

OF_PICTURES = {name for name, measure in MEASURES.items() if measure.of == "pictures"}

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
    assert set(record["methods"]["pullback"]) - {"passes"} == OF_PICTURES - {
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
    answers = Answers(tmp_path, {}, float("inf"))

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
