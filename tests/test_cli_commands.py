"""The commands, on models with seeded weights and on pictures drawn here."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import sp_fx
from command import SCENES, explain, explain_scenes, record, write_inputs
from sp_fx import zoo
from sp_fx.cli.commands import main

DATA = Path(__file__).parents[1].parent / "shared" / "data"
WEIGHTS = DATA / "squeezenet1_0_imagenet.safetensors"


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("pictures"))


@pytest.mark.parametrize("method", ["pullback", "double_pullback", "ascend"])
def test_a_picture_and_a_record(here, tmp_path, method):
    assert explain(here, tmp_path, "--method", method, "--steps", "2", images=("colour.png", "grey.png", "alpha.png")) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"{n}.{e}" for n in ("alpha", "colour", "grey") for e in ("json", "png")
    ]
    found = record(tmp_path, "colour")
    assert found["image"] == "colour.png" and found["figure"] == "colour.png" and found["size"] == [160, 120]
    assert found["model"] == "squeezenet1_1" and [m["name"] for m in found["method"]] == [method]
    published = {"resize": 73, "crop": 64, "interpolation": "bilinear"}
    assert found["preprocessing"] == published | {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "squash": False}
    assert len(found["prediction"]) == 5 and found["targets"][0]["index"] == found["prediction"][0]["index"]
    assert found["targets"][0]["maps"][method]["l2"] > 0
    assert found["weights"] == "weights.pt" and len(found["weights_sha256"]) == 64
    assert found["rules"]["relu"] == sp_fx.Rules().relu and found["rules"]["scale"] == "sample" and len(found["rules"]) > 15
    assert found["versions"] == {"sp_fx": sp_fx.__version__, "torch": torch.__version__} and found["device"] == "cpu"
    assert record(tmp_path, "alpha")["conversions"] == ["transparency over white"] and record(tmp_path, "grey")["mode"] == "L"
    with Image.open(tmp_path / "colour.png") as figure:
        assert figure.width > 500 and json.loads(figure.text["Comment"]) == found


@pytest.mark.parametrize("model", zoo.NAMES)
def test_zoo_models_offline(here, tmp_path, model, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: (_ for _ in ()).throw(OSError("no network here")))
    assert explain_scenes(here, tmp_path, "--format", "jpg", model=f"zoo/{model}") == 0
    found = [record(tmp_path, f"scene_{i}") for i in range(10)]
    assert sum(f["prediction"][0]["label"] == zoo.labels[i] for i, f in enumerate(found)) >= 9
    x = (zoo.draw(5, 10).pixels + 1).mul(127.5).round() / 127.5 - 1  # as the files have it
    with torch.no_grad():
        expected = zoo.load(model)(x).softmax(1).amax(1)
    # A batch of eight and a batch of two add up in another order than one of ten.
    assert [f["prediction"][0]["probability"] for f in found] == pytest.approx(expected.tolist(), abs=1e-4)


def test_methods_side_by_side_and_batches_do_not_matter(here, tmp_path):
    some = SCENES[:3]
    given = ["--method", "pullback,ascend", "--method", "double_pullback", "--target", "star", "--steps", "3"]
    assert explain_scenes(here, tmp_path / "a", *given, "--batch-size", "2", images=some) == 0
    assert explain_scenes(here, tmp_path / "b", *given, images=some) == 0
    for name in ("scene_0", "scene_1", "scene_2"):
        found, other = record(tmp_path / "a", name), record(tmp_path / "b", name)
        # The default step: 20 * sqrt(27648 / 150528), in full in the record.
        ascent = {"name": "ascend", "steps": 3, "step_size": pytest.approx(8.5714286), "bounds": [-1.0, 1.0]}
        assert found["method"] == [{"name": "pullback"}, ascent, {"name": "double_pullback"}]
        (star,) = found["targets"]
        assert star["label"] == "star" and star["maps"]["ascend"]["probability_after"] > star["probability"]
        for method, said in star["maps"].items():
            assert said["l2"] == pytest.approx(other["targets"][0]["maps"][method]["l2"], rel=1e-3)
    with Image.open(tmp_path / "a" / "scene_0.png") as wide:
        assert wide.width > 3 * wide.height


def test_rules_from_the_command_line(here, tmp_path):
    maps = {}
    for name, given in {"default": [], "warm": ["--temperature", "relu=3", "--temperature", "max_pool=2"],
                        "frozen": ["--rules", "frozen"]}.items():  # fmt: skip
        assert explain_scenes(here, tmp_path, *given, images=SCENES[:1]) == 0
        maps[name] = record(tmp_path, "scene_0")["targets"][0]["maps"]["pullback"]["l2"]
        if name == "warm":
            rules = record(tmp_path, "scene_0")["rules"]
            assert (rules["relu"], rules["max_pool"]) == (3.0, 2.0) and rules["gelu"] == vars(sp_fx.Rules().gelu)
    assert len(set(maps.values())) == 3
    x = (zoo.draw(5, 1).pixels + 1).mul(127.5).round() / 127.5 - 1
    gradient = torch.autograd.functional.jacobian(lambda x: zoo.load("residual_cnn")(x).amax(1).sum(), x)
    assert maps["frozen"] == pytest.approx(gradient.norm().item(), rel=1e-3)


def test_equal_file_names_do_not_overwrite(here, tmp_path):
    assert explain(here, tmp_path, images=("colour.png", "other/colour.png", "colour.png")) == 0
    assert sorted(p.stem for p in tmp_path.glob("*.json")) == ["colour", "colour_2", "colour_3"]


def test_maps_times_the_input_are_one_more_column(here, tmp_path):
    widths = []
    for more in ((), ("--times-input",)):
        assert explain(here, tmp_path / str(len(more)), "--method", "pullback,ascend", "--steps", "2", *more) == 0
        with Image.open(next((tmp_path / str(len(more))).glob("*.png"))) as figure:
            widths.append(figure.width)
    assert widths[1] / widths[0] == pytest.approx(7 / 5, rel=0.02)


def test_several_targets(here, tmp_path):
    assert explain(here, tmp_path, "--target", "top3") == 0
    found = record(tmp_path, "colour")
    assert [t["index"] for t in found["targets"]] == [p["index"] for p in found["prediction"][:3]]
    assert explain(here, tmp_path, "--target", "7, tench,top1", "--target", "English Springer") == 0
    assert [t["index"] for t in record(tmp_path, "colour")["targets"]] == [7, 0, found["prediction"][0]["index"], 217]


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
    "unknown zoo model": (["--model", "zoo/residual"], "no network is called 'residual'; did you mean 'residual_cnn'?"),
    "unknown class": (["--target", "tensh"], "no class is called 'tensh'; the nearest: tench"),
    "an ambiguous class": (["--target", "CARDIGAN"], "several classes are called 'CARDIGAN': pass one of the indices 264"),
    "top0": (["--target", "top0"], "topN is the N likeliest classes, N at least 1, got 'top0'"),
    "a norm's temperature": (["--temperature", "layer_norm=1"], "a normalisation has no temperature"),
    "no temperature": (["--temperature", "relu=0"], "expected a finite temperature above 0"),
    "an unknown kind": (["--temperature", "rely=1"], "'rely' fits no gate of this model; a kind of gate is called 'relu'"),
    "no step": (["--method", "ascend", "--step-size", "0"], "step_size is a finite length above 0"),
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


def test_damaged_weights(here, tmp_path, capsys):
    state = torch.load(here / "weights.pt")
    state["features.0.weight"][0, 0, 0, 0] = float("nan")
    torch.save(state, tmp_path / "nan.pt")
    (tmp_path / "cut.pt").write_bytes((here / "weights.pt").read_bytes()[:5000])
    (tmp_path / "text.safetensors").write_text("not weights")
    for name, message in {
        "nan.pt": "nan.pt is damaged: 1 of its tensors have NaN or infinity in them (first: ['features.0.weight'])",
        "cut.pt": "cut.pt is no whole file of weights",
        "text.safetensors": "text.safetensors is not a whole safetensors file",
    }.items():
        assert explain(here, tmp_path, "--weights", str(tmp_path / name)) == 2
        assert message in capsys.readouterr().err
    other = zoo.store.WEIGHTS / "pyramid_transformer.safetensors"
    assert explain_scenes(here, tmp_path, "--weights", str(other)) == 2
    assert "does not hold 'residual_cnn'" in capsys.readouterr().err


def test_demo(tmp_path, capsys):
    assert main(["demo", "--scenes", "2", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "residual_cnn, 2 scenes: plain gradient" in said and said.count("after 10 steps") == 4
    with Image.open(tmp_path / "demo.png") as figure:
        assert min(figure.size) > 500


def test_the_command_refuses_what_is_no_package(tmp_path, capsys):
    assert main(["serve", str(tmp_path / "a.onnx")]) == 2
    assert "no package at" in capsys.readouterr().err


def test_report(capsys):
    assert main(["report", "--model", "resnet18"]) == 0
    said = capsys.readouterr().out
    assert "19 rewritten, 0 kept, 0 NOT REWRITTEN" in said and "model.layer4.1.relu#2" in said


@pytest.mark.skipif(not DATA.exists(), reason="the photographs are not part of the project")
def test_real_network_on_photographs(tmp_path):
    photos = sorted((DATA / "photos").glob("*.jpg"))
    assert main(["explain", *map(str, photos), "--model", "squeezenet1_0", "--weights", str(WEIGHTS),
                 "--input-size", "227", "--out", str(tmp_path)]) == 0  # fmt: skip
    classes = [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]
    found = [record(tmp_path, p.stem)["prediction"][0]["index"] for p in photos]
    assert len(list(tmp_path.glob("*.png"))) == 10 and sum(a == b for a, b in zip(found, classes)) == 4
