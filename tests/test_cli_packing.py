"""`sp-fx compile`: the package that it writes, the stages that it tells of, and what it refuses before it has worked for long."""

import importlib
import io
import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

import sp_fx
from helpers import relative
from sp_fx import zoo
from sp_fx.cli.commands import main
from sp_fx.cli.packing import printable
from sp_fx.models.images import Preprocessing
from sp_fx.packages.classifier import Classifier

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
X = zoo.draw(5, 4).pixels
SMALL = """
import torch
from torch import nn

def net(channels=3, side=16, classes=5):
    print("a model that talks")
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(channels, 4, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes))
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "packed_networks.py").write_text(SMALL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


OWN = ("packed_networks.py:net", "--input-size", "16", "--resize", "16", "--mean", "0.5", "--std", "0.25")


def compiled(*given):
    return main(["compile", *map(str, given)])


def test_a_shipped_network(tmp_path, capsys):
    path = tmp_path / "a.onnx"
    assert compiled("zoo/residual_cnn", "--out", path) == 0
    said = capsys.readouterr()
    assert re.fullmatch(rf"{path}: [\d.]+ MiB; try it: sp-fx explain IMAGE --model {path} --out out \(\d+ s in all\)\n", said.out)
    found, net = Classifier.load(path), zoo.load("residual_cnn")
    explainer = sp_fx.transform(net)
    outputs, maps = found.program(X, 3)
    assert relative(outputs, net(X)) <= 1e-5 and relative(maps, explainer.pullback(X, 3)) <= 1e-4
    assert found.class_names == list(zoo.labels) and found.preprocessing.cropped == (96, 96)
    assert found.preprocessing == sp_fx.models.load("zoo/residual_cnn").preprocessing
    assert found.program.dynamic_batch and found.manifest["model"] == "zoo/residual_cnn"
    assert found.manifest["output_dtype"] == "float32" and found.manifest["input_space"] == "RGB pixels in [-1, 1]"
    (tmp_path / "pictures").mkdir()
    for i, pixels in enumerate(X):
        Image.fromarray(((pixels + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()).save(tmp_path / "pictures" / f"{i}.png")
    assert main(["batch", str(path), str(tmp_path / "pictures"), "--out", str(tmp_path / "out"), "--target", "star"]) == 0
    results = list(sp_fx.offline.results(tmp_path / "out"))
    seen = (X + 1).mul(127.5).round() / 127.5 - 1
    star = explainer.pullback(seen, zoo.labels.index("star"))
    assert relative(torch.stack([torch.from_numpy(r.map) for r in results]), star) <= 1e-3


def test_an_ascent_for_one_batch_size(here, capsys):
    given = ("--method", "ascend", "--steps", "2", "--step-size", "0.5", "--fixed-batch", "--batch", "3", "--out", "a.onnx")
    assert compiled(*OWN, *given) == 0
    said = capsys.readouterr()
    assert "try it: sp-fx batch a.onnx FOLDER --batch 3 --out out" in said.out
    loaded = sp_fx.load("a.onnx")
    assert loaded.method == "ascend" and loaded.ascent.steps == 2 and loaded.ascent.step_size == 0.5 and not loaded.dynamic_batch
    net = sp_fx.pixel_space(importlib.import_module("packed_networks").net(), (0.5,) * 3, (0.25,) * 3).eval()
    x = torch.rand(3, 3, 16, 16) * 2 - 1
    wanted = sp_fx.transform(net).ascend(x, 1, steps=2, step_size=0.5, bounds=(-1.0, 1.0))
    assert relative(loaded(x, 1)[1], wanted) <= 1e-3
    with pytest.raises(ValueError, match="a batch of 3 alone"):
        loaded(x[:2], 1)


def test_names_preprocessing_and_json(here, capsys):
    """All of stdout is the manifest, whatever the model's own code prints; stderr is quiet about stages."""
    (here / "names.txt").write_text("a\nb\nc\nd, and e\nünï\n")
    assert compiled(*OWN, "--class-names", "names.txt", "--resize", "20", "--out", "a.onnx", "--json") == 0
    said = capsys.readouterr()
    manifest = json.loads(said.out)
    assert manifest["class_names"] == ["a", "b", "c", "d, and e", "ünï"] and "probe" not in manifest
    assert manifest["preprocessing"]["resize"] == 20 and manifest["preprocessing"]["mean"] == [0.5] * 3
    assert "a model that talks" in said.err and "make one graph" not in said.err
    found = Classifier.load("a.onnx")
    assert found.target("ünï") == 4 and found.preprocessing == Preprocessing(20, 16, "bilinear", (0.5,) * 3, (0.25,) * 3)


def test_a_network_of_grey_pictures(here):
    given = ("packed_networks.py:net?channels=1", "--input-size", "16", "--mean", "0.13", "--std", "0.31", "--out", "a.onnx")
    assert compiled(*given) == 0
    found = Classifier.load("a.onnx")
    assert found.preprocessing.mean == (0.13,) and found.manifest["input_space"] == "grey pixels in [-1, 1]"
    Image.new("RGB", (30, 20), (200, 100, 50)).save("a.png")
    assert main(["batch", "a.onnx", ".", "--out", "out"]) == 0
    (result,) = sp_fx.offline.results("out")
    assert result.map.shape == (1, 16, 16) and (here / "out" / "page" / "000000.jpg").exists()


class Terminal(io.StringIO):
    def isatty(self):
        return True


STAGES = (
    *("load the model", "transform it, and compare with it", "make one graph of the model and its explanation"),
    r"compile \d+ calls to ONNX, write, load and try it",  # with the seconds that are expected, while it goes on
)


@pytest.mark.parametrize("terminal", [True, False])
def test_the_stages(here, monkeypatch, terminal):
    """On a terminal each stage's line is written over until it is done; elsewhere each has a line, and one for its seconds."""
    said = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr("sys.stderr", said)
    assert compiled(*OWN, "--out", "a.onnx") == 0
    text = said.getvalue()
    if terminal:
        shown = [line.split("\r")[-1] for line in text.removesuffix("\n").split("\n")]
        wanted = [rf"sp-fx: {stage}: [\d.]+ s\x1b\[K" for stage in STAGES]
        assert "\r" in text
    else:
        shown = text.splitlines()
        wanted = [line for stage in STAGES for line in (rf"sp-fx: {stage}( \(about 2 s\))? \.\.\.", r"sp-fx:     [\d.]+ s")]
        assert "\r" not in text and "\x1b" not in text and text.count("(about 2 s)") == 1
    assert len(shown) == len(wanted) and all(re.fullmatch(a, b) for a, b in zip(wanted, shown)), text


def test_machine_code_says_how_long_it_will_take(here, monkeypatch, capsys):
    """Twelve seconds and more, from the number of calls; what compiles is replaced, since this is about what is said."""
    monkeypatch.setattr("sp_fx.program.program._save", lambda program, path, **facts: path.write_bytes(b"x") and path)
    assert compiled(*OWN, "--out", "a.pt2") == 0
    found = re.search(r"compile (\d+) calls to machine code, write, load and try it \(about (\d+) s\)", capsys.readouterr().err)
    assert found and int(found[2]) == round(12 + 0.045 * int(found[1]))


BAD = {
    "a wrong folder": (["--out", "nowhere/a.onnx"], "there is no folder nowhere to write a.onnx into"),
    "a folder of that name": (["--out", "folder.onnx"], "folder.onnx is a folder, and a package is a file"),
    "steps of no ascent": (["--out", "a.onnx", "--steps", "3"], "are of --method ascend; got --method pullback"),
    "a step of no ascent": (["--out", "a.onnx", "--step-size", "0"], "are of --method ascend; got --method pullback"),
    "a step of nothing": (["--out", "a.onnx", "--method", "ascend", "--step-size", "0"], "step_size is a finite length above 0"),
    "other names than classes": (["--out", "a.onnx", "--class-names", "two.txt"], "2 class names, and the model has 5 classes"),
}


@pytest.mark.parametrize("case", BAD)
def test_requests_that_cannot_be_met(here, capsys, case):
    arguments, message = BAD[case]
    (here / "folder.onnx").mkdir()
    (here / "two.txt").write_text("a\nb\n")
    assert compiled(*OWN, *arguments) == 2
    assert message in capsys.readouterr().err
    assert not [file for file in here.iterdir() if file.is_file() and ".onnx" in file.name]


def test_another_ending_is_refused_by_the_parser(capsys):
    with pytest.raises(SystemExit):
        compiled("zoo/residual_cnn", "--out", "a.zip")
    assert "a package is called *.onnx or *.pt2, got 'a.zip'" in capsys.readouterr().err


def test_what_is_printable():
    assert printable("ünï 😀.png") == "ünï 😀.png"
    assert printable("a\nb\x1b[2J\udcff") == r"a\nb\x1b[2J\udcff"


def test_a_network_of_several_outputs(here, capsys):
    """Its class scores are what is explained, by every command; what has none is refused before it is compiled."""
    Path("more_nets.py").write_text(
        "from torch import nn\n"
        "from packed_networks import net\n"
        "class Outputs(nn.Module):\n"
        "    def __init__(self, make):\n"
        "        super().__init__()\n"
        "        self.net, self.make = net(), make\n"
        "    def forward(self, x):\n"
        "        return self.make(self.net(x))\n"
        "def two(): return Outputs(lambda y: {'logits': y, 'twice': 2 * y})\n"
        "def maps(): return Outputs(lambda y: y[..., None, None].expand(-1, -1, 2, 2) * 1.0)\n"
    )
    given = OWN[1:]
    assert compiled("more_nets.py:maps", *given, "--out", "maps.onnx") == 2
    assert "expected class scores [B, classes] of the model, got [4, 5, 2, 2]" in capsys.readouterr().err
    assert compiled("more_nets.py:two", *given, "--out", "two.onnx") == compiled(*OWN, "--out", "one.onnx") == 0
    Path("photos").mkdir()
    Image.new("RGB", (30, 20), (200, 100, 50)).save("photos/a.png")
    found = {}
    for name in ("one", "two"):
        assert main(["explain", "photos", "--model", f"{name}.onnx", "--out", f"of {name}"]) == 0
        assert main(["batch", f"{name}.onnx", "photos", "--out", f"all of {name}"]) == 0
        found[name] = json.loads(Path(f"of {name}/a.json").read_text())["prediction"]
        (result,) = sp_fx.offline.results(f"all of {name}")
        assert result.logits.shape == (5,)
    assert found["one"] == found["two"]


def test_what_torch_export_saves_is_no_package(here, capsys):
    exported = torch.export.export(torch.nn.Sequential(torch.nn.Linear(3, 2)), (torch.ones(1, 3),))
    torch.export.save(exported, "it.pt2")
    Image.new("RGB", (30, 20)).save("a.png")
    assert main(["explain", "a.png", "--model", "it.pt2", "--out", "out"]) == 2
    assert "it has no manifest, as what torch.export.save writes has none; sp-fx compile MODEL" in capsys.readouterr().err
