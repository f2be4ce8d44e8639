"""The command, on models with seeded weights and on pictures drawn here."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from helpers import fill
from sp_fx.cli import main
from sp_fx.models import load_model, weights_hash

DATA = Path(__file__).parents[1].parent / "shared" / "data"
WEIGHTS = DATA / "squeezenet1_0_imagenet.safetensors"


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    torch.save(fill(torchvision.models.squeezenet1_1()).state_dict(), folder / "weights.pt")
    noise = np.random.default_rng(0).integers(0, 255, (120, 160, 4), dtype=np.uint8)
    Image.fromarray(noise[..., :3]).save(folder / "colour.png")
    Image.fromarray(noise[..., 0]).save(folder / "grey.png")
    Image.fromarray(noise).save(folder / "alpha.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 not a picture")
    return folder


def explain(here, out, *more, images=("colour.png",)):
    pictures = [str(here / name) for name in images]
    return main(["explain", *pictures, "--model", "squeezenet1_1", "--weights", str(here / "weights.pt"), "--input-size", "64",
                 "--out", str(out), *more])  # fmt: skip


@pytest.mark.parametrize("method", ["pullback", "double_pullback", "ascend"])
def test_a_picture_and_a_record(here, tmp_path, method):
    assert explain(here, tmp_path, "--method", method, "--steps", "2", images=("colour.png", "grey.png", "alpha.png")) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"{n}.{e}" for n in ("alpha", "colour", "grey") for e in ("json", "png")
    ]
    record = json.loads((tmp_path / "colour.json").read_text())
    assert record["model"] == "squeezenet1_1" and record["method"]["name"] == method
    assert record["preprocessing"] | {"mean": 0, "std": 0} == {
        "resize": 256,
        "crop": 64,
        "interpolation": "bilinear",
        "mean": 0,
        "std": 0,
    }
    assert len(record["prediction"]) == 5 and record["targets"][0]["index"] == record["prediction"][0]["index"]
    assert record["targets"][0]["map_l2"] > 0 and len(record["weights_sha256"]) == 64
    with Image.open(tmp_path / "colour.png") as figure:
        assert figure.width > 800


def test_several_targets(here, tmp_path):
    assert explain(here, tmp_path, "--target", "top3") == 0
    record = json.loads((tmp_path / "colour.json").read_text())
    assert [t["index"] for t in record["targets"]] == [p["index"] for p in record["prediction"][:3]]
    assert explain(here, tmp_path, "--target", "7") == 0
    assert json.loads((tmp_path / "colour.json").read_text())["targets"][0]["index"] == 7


def test_prediction_equals_the_models_own(here):
    named = load_model("squeezenet1_1", here / "weights.pt", 64)
    x = named.preprocessing(here / "colour.png")[None]
    net = torchvision.models.squeezenet1_1()
    net.load_state_dict(torch.load(here / "weights.pt"))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (named.preprocessing.mean, named.preprocessing.std))
    assert torch.allclose(named.model(x), net.eval()(((x + 1) / 2 - mean) / std), atol=1e-4)
    assert weights_hash(named.model) == weights_hash(load_model("squeezenet1_1", here / "weights.pt").model)


def test_broken_pictures_are_named_and_counted(here, tmp_path, capsys):
    assert explain(here, tmp_path, images=("broken.jpg", "colour.png", "missing.png")) == 1
    said = capsys.readouterr().err
    assert "skipped" in said and "broken.jpg" in said and "missing.png" in said and "2 of 3 pictures" in said
    assert (tmp_path / "colour.json").exists()


BAD = {
    "unknown model": (["--model", "squeezenet1"], "the nearest: squeezenet1_"),
    "unknown timm model": (["--model", "timm/resnet5"], "timm has no model 'resnet5'; the nearest: timm/resnet5"),
    "no weights file": (["--weights", "nowhere.pt"], "no weights file at nowhere.pt"),
    "other weights": (["--model", "resnet18"], "do not fit ResNet"),
    "target out of range": (["--target", "1000"], "target 1000 is outside 0 to 999"),
    "no step": (["--method", "ascend", "--step-size", "0"], "step_size is a finite L2 length above 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_requests_that_cannot_be_met(here, tmp_path, capsys, case):
    arguments, message = BAD[case]
    assert explain(here, tmp_path, *arguments) == 2
    assert message in capsys.readouterr().err


def test_weights_that_cannot_be_downloaded(here, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.hub.download_url_to_file", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert main(["explain", str(here / "colour.png"), "--model", "resnet18", "--out", str(tmp_path)]) == 2
    assert "weights of resnet18 could not be downloaded (no network); pass a file with --weights FILE" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--target", "top0"], ["--target", "cat"], ["--steps", "0"], ["--method", "gradient"]])
def test_malformed_arguments(here, tmp_path, arguments):
    with pytest.raises(SystemExit) as stopped:
        explain(here, tmp_path, *arguments)
    assert stopped.value.code == 2


def test_demo(tmp_path, capsys):
    assert main(["demo", "--scenes", "2", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "residual_cnn: one pullback of 2 scenes" in said and said.count("after 10 steps") == 4
    with Image.open(tmp_path / "demo.png") as figure:
        assert min(figure.size) > 500


def test_report(capsys):
    assert main(["report", "--model", "resnet18"]) == 0
    said = capsys.readouterr().out
    assert "18 rewritten, 0 kept, 0 NOT REWRITTEN" in said and "model.layer4.1.relu#2" in said


@pytest.mark.skipif(not DATA.exists(), reason="the photographs are not part of the project")
def test_real_network_on_photographs(tmp_path):
    photos = sorted((DATA / "photos").glob("*.jpg"))
    assert main(["explain", *map(str, photos), "--model", "squeezenet1_0", "--weights", str(WEIGHTS),
                 "--input-size", "227", "--out", str(tmp_path)]) == 0  # fmt: skip
    classes = [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]
    found = [json.loads((tmp_path / f"{p.stem}.json").read_text())["prediction"][0]["index"] for p in photos]
    assert len(list(tmp_path.glob("*.png"))) == 10 and sum(a == b for a, b in zip(found, classes)) == 4
