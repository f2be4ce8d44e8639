"""The first minutes by commands alone, as the README and docs/using.md write them, without network; the training is shorter."""

import csv
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image
from torchvision.transforms import functional as T

from sp_fx.cli.commands import main

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
pytestmark = pytest.mark.skipif(not README.exists(), reason="the README is not beside these tests")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: (_ for _ in ()).throw(OSError("no network here")))


def commands(page, heading):
    """The commands of the first block of bash below a heading, each a list of words; `a && b` are two."""
    block = page.read_text().split(f"\n{heading}\n")[1].split("```bash\n")[1].split("```")[0].replace("\\\n", " ")
    words = [shlex.split(part, comments=True) for line in block.splitlines() for part in line.split("&&")]
    return [each for each in words if each]


def globbed(words):
    """The words as a shell passes them: patterns that fit files are these files."""
    return [str(path) for word in words for path in (sorted(Path().glob(word)) if re.search(r"[*?]", word) else [word])]


def test_a_network_of_ones_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    done = []
    for words in commands(README, "## Your own model in ten lines"):
        if words[0] == "cd":
            monkeypatch.chdir(words[1])
        elif words[0] == "python":
            monkeypatch.setattr(sys, "argv", [*words[1:], "--steps", "20"])
            runpy.run_path(str(ROOT / words[1]), run_name="__main__")
        else:
            assert words[0] == "sp-fx" and main(globbed(words[1:])) == 0, capsys.readouterr().err
            done.append(words[1])
    assert done == ["explain", "compile", "batch"] and len(list(Path("out").glob("*.png"))) == 10
    record = json.loads(Path("out/00.json").read_text())
    assert [target["label"] for target in record["targets"]] == [seen["label"] for seen in record["prediction"][:3]]
    net = torchvision.models.resnet18(num_classes=5)
    net.load_state_dict(torch.load("mine.pth"))
    image = Image.open("photos/00.png").resize((64, 64), Image.Resampling.BILINEAR)
    x = T.pil_to_tensor(image)[None] / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    expected = net.eval()((x - mean) / std).softmax(1)[0]
    assert record["prediction"][0]["probability"] == pytest.approx(expected.max().item(), abs=1e-4)
    with Path("all/results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 50 and float(rows[0]["confidence"]) == pytest.approx(expected.max().item(), abs=1e-4)
    assert rows[0]["label"] == record["prediction"][0]["label"] and Path("all/index.html").stat().st_size > 20_000


def test_photographs_by_a_network_that_a_package_carries(tmp_path, monkeypatch):
    pytest.importorskip("efficientnet_lite_pytorch")
    skimage = pytest.importorskip("skimage")
    monkeypatch.chdir(tmp_path)
    (words,) = commands(ROOT / "docs" / "using.md", "### Networks by name")
    assert "$PHOTOS" in words[2]
    given = [word.replace("$PHOTOS", f"{skimage.__path__[0]}/data") for word in words[1:]]
    assert main(given) == 0
    seen = {path.stem: json.loads(path.read_text())["prediction"][0]["label"] for path in Path("out").glob("*.json")}
    assert seen == {"chelsea": "tiger cat", "coffee": "espresso", "rocket": "missile"}
