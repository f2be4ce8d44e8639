"""The commands, on models with seeded weights and on pictures drawn here."""

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import sp_fx
from command import SCENES, explain, explain_scenes, explained, record, write_inputs
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
    published = {"resize": 64, "crop": 64, "interpolation": "bilinear"}
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
    """Whether nothing answers, or the download breaks off: one line."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    assert main(["explain", str(here / "colour.png"), "--model", "resnet18", "--out", str(tmp_path)]) == 2
    reason = "https://download.pytorch.org/models/resnet18-f37072fd.pth cannot be reached: no network"
    said = f"sp-fx: the weights of resnet18 could not be downloaded ({reason}); pass a file with --weights FILE\n"
    assert capsys.readouterr() == ("", said)
    monkeypatch.setattr("sp_fx.models.published.hub.unreachable", lambda address: None)
    monkeypatch.setattr("torch.hub.download_url_to_file", lambda *_, **__: (_ for _ in ()).throw(OSError("it broke off")))
    assert main(["explain", str(here / "colour.png"), "--model", "resnet18", "--out", str(tmp_path)]) == 2
    assert "weights of resnet18 could not be downloaded (it broke off); pass a file" in capsys.readouterr().err


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


OF_ONES_OWN = {
    "no model": (["--model", "resnet5"], "torchvision has no classification model 'resnet5'; the nearest: resnet50, resnet152"),
    "no function": (["--model", "own_nets:nett"], "own_nets has no function 'nett'; it has "),
    "no argument": (["--model", "own_nets:net?depth=3"], "takes no argument 'depth'; it takes num_classes, channels"),
    "a near argument": (["--model", "own_nets:net?num_clases=3"], "did you mean num_classes? it takes num_classes, channels"),
    "no file": (["--model", "nowhere.py:net"], "nowhere.py:net: there is no file nowhere.py"),
    "no module": (["--model", "nowhere:net"], "nowhere:net: there is no module 'nowhere' in "),
    "four channels": (["--model", "own_nets:four_channels"], "its first convolution reads 4 channels, and pictures have 3, or 1"),
    "no convolution": (["--model", "own_nets:flat"], "does not take pictures as [1, 3, 32, 32]: "),
    "another size": (
        ["--model", "own_nets:vit", "--input-size", "48"],
        "does not take pictures as [1, 3, 48, 48]: Wrong image h",
    ),
    "two tensors": (["--model", "own_nets:two_tensors"], "the model returns a tuple with the tensors out[0], out[1]"),
    "one axis": (["--model", "own_nets:one_axis"], "expected class scores ["),
    "a folder": (["--model", "more"], "more is a folder, and no network; one of Hugging Face's is named hf/more"),
    "a folder of weights": (["--weights", "more"], "more is a folder, and weights are a file"),
    "a folder as a module": (["--model", "more/it.pt"], "no model file at more/it.pt"),
    "no package": (["--model", "gone.onnx"], "gone.onnx"),
    "names of others": (["--class-names", "three.txt"], "there are 3 class names, and the model has 4 classes"),
    "no names": (["--class-names", "gone.txt"], "no file of class names at gone.txt"),
    "a mean alone": (["--mean", "0.5"], "who says the mean says the std too, since they go together; got mean=[0.5], std=None"),
    "two means": (["--mean", "0.5,0.4", "--std", "1"], "expected one mean for all channels or one for each of 3, got 2"),
    "a mean of bytes": (
        ["--mean", "124,116,104", "--std", "58"],
        "a mean is one of pixels from 0 to 1, got [124.0, 116.0, 104.0]",
    ),
    "no deviation": (["--mean", "0.5", "--std", "0"], "a std is above 0 for each channel, got [0.0, 0.0, 0.0]"),
    "three pixels": (["--pixels", "0,1,2"], "--pixels takes two numbers, what the network takes for black and white; got 3"),
    "pixels reversed": (["--pixels", "1,-1"], "pixels are (low, high), such as (0, 255) or (-1, 1), with low below high"),
    "too small": (["--resize", "20"], "a picture resized to 20 does not cover the crop of 32: resize is at least that"),
    "num_classes of a file": (["--model", "mine.pt", "--num-classes", "3"], "has the classes that it has"),
    "num_classes published": (["--model", "resnet18", "--num-classes", "3"], "num_classes=3 needs weights of such a network"),
    "a mean of the zoo": (
        ["--model", "zoo/residual_cnn", "--pixels", "0,1"],
        "take pixels as they are: no num_classes, mean or std",
    ),
    "a negative class": (["--target=-1"], "a class is a number from 0 on, or a name; got -1"),
    "a class too many": (["--target", "4"], "target 4 is outside 0 to 3, the classes of the model"),
    "an unnamed class": (["--target", "cat"], "the names of this model's classes are not known: pass a number in place of 'cat'"),
    "text": (["--model", "all_minilm_l6_v2"], "all_minilm_l6_v2 is a network for text"),
}


@pytest.mark.parametrize("case", OF_ONES_OWN)
def test_requests_of_ones_own_that_cannot_be_met(own_folder, tmp_path, case, capsys, monkeypatch):
    given, message = OF_ONES_OWN[case]
    (tmp_path / "three.txt").write_text("cat\ndog\nfish")
    given = [str(tmp_path / each) if each == "three.txt" else each for each in given]
    assert main(["explain", "high.jpg", "--model", "own_nets:net", "--input-size", "32", "--out", str(tmp_path), *given]) == 2
    told = capsys.readouterr()
    assert told.out == "" and message in told.err
    said = [line for line in told.err.splitlines() if "assumed" not in line]
    assert len(said) == 1 and said[0].startswith("sp-fx: ")


def test_overrides_that_fit_nothing_name_the_nearest(own_folder, tmp_path, capsys):
    (tmp_path / "deep_nets.py").write_text(
        "from torch import nn\n"
        "def net():\n"
        "    blocks = [nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()) for _ in range(12)]\n"
        "    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
    )
    given = ["--temperature", "model.20.1=0.5", "--pixels=0,1", "--resize", "32"]
    assert explained(tmp_path, *given, model=f"{tmp_path}/deep_nets.py:net") == 2
    told = capsys.readouterr().err
    assert "'model.20.1' fits no gate of this model" in told and told.count("\n") == 1
    shown = [int(place.split(".")[1]) for place in told.split(" are at: ")[1].split(", ")]
    assert len(shown) == 5 and shown == sorted(shown) and set(shown) <= set(range(12)), told


def test_a_module_that_is_missing_is_no_matter_of_extras(tmp_path, monkeypatch, capsys):
    (tmp_path / "needs_more.py").write_text("import not_there_at_all\n")
    (tmp_path / "needs_timm.py").write_text("raise ModuleNotFoundError(\"No module named 'timm'\", name='timm')\n")
    for file, hint in (("needs_more", False), ("needs_timm", True)):
        assert main(["report", "--model", f"{tmp_path}/{file}.py:net"]) == 2
        assert ("this command needs an extra" in capsys.readouterr().err) is hint
        assert file not in sys.modules  # a file that has failed is read anew
