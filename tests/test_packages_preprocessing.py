"""What a package records of pictures, and that every way into it makes the same pixels of the same file."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import sp_fx
from helpers import fill, relative
from shipped import Small, packaged, resealed, small
from sp_fx.cli.commands import main
from sp_fx.models.images import Preprocessing
from sp_fx.offline import Batches, pictures
from sp_fx.packages import manifest, package
from sp_fx.packages.classifier import Classifier
from sp_fx.program.program import Program
from sp_fx.serving.requests import Limits
from sp_fx.serving.service import Served

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
Image = pytest.importorskip("PIL.Image")

WAYS = {
    "square": ((3, 64, 64), Preprocessing(73, 64, "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))),
    "rectangular": ((3, 40, 72), Preprocessing((44, 80), (40, 72), "bilinear", (0.5,) * 3, (0.5,) * 3)),
    "grey": ((1, 56, 56), Preprocessing(64, 56, "lanczos", (0.1307,), (0.3081,))),
    "squashed": ((3, 48, 48), Preprocessing((50, 52), 48, "box", (0.0,) * 3, (1.0,) * 3, squash=True)),
}


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    folder, names = tmp_path_factory.mktemp("packages"), list("abcde")
    return {
        name: packaged(folder / f"{name}.onnx", shape, preprocessing=preprocessing, class_names=names)
        for name, (shape, preprocessing) in WAYS.items()
    }


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """JPEGs with gradients, edges and grain: as they are, of odd size, turned by their EXIF, large, and grey."""
    folder, g = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    kinds = {
        "plain": (640, 427, 1),
        "odd": (333, 257, 1),
        "turned": (427, 640, 6),
        "mirrored": (300, 200, 5),
        "large": (3000, 2000, 1),
    }
    for name, (width, height, orientation) in kinds.items():
        y, x = np.mgrid[:height, :width] / height
        scene = np.stack([np.sin(7 * x + y), np.cos(5 * y * x), np.hypot(x - 0.7, y - 0.5) < 0.3], -1) * 90 + 128
        pixels = (scene + g.normal(0, 12, scene.shape)).clip(0, 255).astype(np.uint8)
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(pixels).save(folder / f"{name}.jpg", quality=91, exif=exif)
    Image.open(folder / "plain.jpg").convert("L").save(folder / "grey.jpg")
    return folder


TURNS = {1: lambda x: x, 5: lambda x: x.transpose(1, 0, 2), 6: lambda x: np.rot90(x, -1)}


def by_hand(path, p):
    """The pixels of a JPEG by what the documentation says, apart from pillow's decoder and its filters."""
    file = Image.open(path)
    seen = Image.fromarray(np.ascontiguousarray(TURNS[file.getexif().get(0x0112, 1)](np.asarray(file.convert("RGB")))))
    rows, columns = (p.resize,) * 2 if isinstance(p.resize, int) else p.resize
    height, width = (p.crop,) * 2 if isinstance(p.crop, int) else p.crop
    if not p.squash:  # the smallest size in this proportion that covers the box
        wide = seen.width * rows >= seen.height * columns
        rows, columns = (
            (rows, int(rows * seen.width / seen.height)) if wide else (int(columns * seen.height / seen.width), columns)
        )
    resized = seen.resize((columns, rows), Image.Resampling[p.interpolation.upper()])
    top, left = round((rows - height) / 2), round((columns - width) / 2)
    values = np.asarray(resized if len(p.mean) == 3 else resized.convert("L")).reshape(rows, columns, -1)
    values = values[top : top + height, left : left + width].transpose(2, 0, 1)
    return torch.from_numpy(values.astype(np.float32)) / 255 * 2 - 1


@pytest.mark.parametrize("kind", WAYS)
def test_the_manifest_says_what_becomes_of_a_picture(packages, kind):
    """Through JSON and back: sides as (height, width) too."""
    shape, preprocessing = WAYS[kind]
    path = packages[kind][2]
    found = Classifier.load(path)
    assert found.preprocessing == preprocessing and found.preprocessing.cropped == shape[1:]
    said = package.read_manifest(path)
    assert json.loads(json.dumps(said["preprocessing"])) == said["preprocessing"] and said["format"] == 5
    assert said["input_space"] == ("grey" if kind == "grey" else "RGB") + " pixels in [-1, 1]"
    assert said["output_dtype"] == "float32" and said["target_dtype"] == "int64"


@pytest.mark.parametrize("kind", WAYS)
@pytest.mark.parametrize("picture", ["plain", "odd", "turned", "mirrored", "large", "grey"])
def test_one_file_is_the_same_pixels_on_every_way(packages, photographs, tmp_path, monkeypatch, kind, picture):
    """Called, by `read_picture`, in a batch job, as an upload, and from the command line: what the program itself is given."""
    explainer, _, path = packages[kind]
    file, given, call = photographs / f"{picture}.jpg", [], Program.__call__
    monkeypatch.setattr(Program, "__call__", lambda self, x, *more: given.append(x.clone()) or call(self, x, *more))
    wanted = by_hand(file, WAYS[kind][1])
    assert wanted.shape == WAYS[kind][0] and wanted.std() > 0.1

    classifier = Classifier.load(path)
    assert torch.equal(classifier.preprocessing(file).pixels, wanted)
    assert torch.equal(sp_fx.read_picture(file, classifier.preprocessing), wanted[None])

    given.clear()
    batch = Batches(path, [file], 1)(0)
    assert torch.equal(given[-1], wanted[None])  # before it, the probe

    served = Served(classifier.program, "small", Limits())
    ((upload,), _) = served.reader.instances("image/jpeg", file.read_bytes(), {})
    served.batcher.close(5)
    assert upload.dtype == np.float32 and torch.equal(torch.from_numpy(upload), wanted)
    ((logits, map),) = served.run([(upload, -1)])

    given.clear()
    assert main(["explain", str(file), "--model", str(path), "--out", str(tmp_path)]) == 0
    assert all(torch.equal(x, wanted[None]) for x in given[-2:])
    said = json.loads((tmp_path / f"{picture}.json").read_text())

    expected = explainer(wanted[None]).detach()
    best = int(expected.argmax())
    for found in (batch["logits"], logits[None]):
        assert relative(torch.from_numpy(found), expected) <= 1e-5
    assert relative(torch.from_numpy(map), explainer.pullback(wanted[None])[0]) <= 1e-4
    assert served.prediction(logits)["class"] == said["prediction"][0]["index"] == best
    assert said["prediction"][0]["label"] == "abcde"[best]
    assert said["prediction"][0]["probability"] == pytest.approx(expected.softmax(1).max().item(), rel=1e-5)


def test_a_preprocessing_of_another_shape_is_refused(interpreted, tmp_path):
    _, _, made = small()
    square = Preprocessing(20, 16, "bilinear", (0.5,) * 3, (0.5,) * 3)
    for other, shape in (
        (replace(square, crop=(16, 20)), [3, 16, 20]),
        (replace(square, mean=(0.5,), std=(0.5,)), [1, 16, 16]),
    ):
        with pytest.raises(ValueError) as refused:
            made.save(tmp_path / "a.onnx", preprocessing=other)
        assert str(shape) in str(refused.value) and "[3, 16, 16]" in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_a_manifest_whose_preprocessing_does_not_fit_is_refused(packages, tmp_path):
    to = resealed(packages["square"][2], tmp_path / "a.onnx", lambda m: m["preprocessing"].update(crop=32))
    with pytest.raises(ValueError, match=r"makes pictures of \[3, 32, 32\], and the package takes \[3, 64, 64\]"):
        Classifier.load(to)


def before(format):
    """What makes a manifest one of an earlier format, as the versions wrote it that wrote those."""

    def change(made):
        made["format"] = format
        del made["preprocessing"]
        made["output_dtype"] = made.pop("target_dtype")
        if format == 2 and made["ascent"]:
            del made["ascent"]["norm"], made["ascent"]["relative"]

    return change


@pytest.mark.parametrize("format", [2, 3])
def test_a_package_of_an_earlier_format_answers(packages, photographs, tmp_path, format):
    _, x, path = packages["square"]
    old = resealed(path, tmp_path / "old.onnx", before(format))
    loaded, now = sp_fx.load(old), sp_fx.load(path)
    for target in (None, 2):
        assert all(torch.equal(a, b) for a, b in zip(loaded(x, target), now(x, target)))
    assert loaded.signature.target_dtype == torch.int64 and loaded.signature.output_dtype is None
    classifier = Classifier.load(old)
    assert classifier.label(1) == "b"
    assert classifier.preprocessing == Preprocessing(64, 64, "bilinear", (0.5,) * 3, (0.5,) * 3)  # it just covers the input
    assert Batches(old, pictures(photographs), 2)(0)["logits"].shape == (2, 5)
    assert main(["explain", str(photographs / "odd.jpg"), "--model", str(old), "--out", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("format", [2, 3])
def test_an_ascent_of_an_earlier_format_answers(interpreted, tmp_path, format):
    explainer, x, made = small(method="ascend", steps=2, bounds=(-1.0, 1.0))
    old = resealed(made.save(tmp_path / "now.onnx"), tmp_path / "old.onnx", before(format))
    assert relative(sp_fx.load(old)(x, 1)[1], explainer.ascend(x, 1, steps=2, bounds=(-1.0, 1.0))) <= 1e-3


def test_other_formats_are_refused(packages, tmp_path):
    for format in (1, 6, None):
        to = resealed(packages["square"][2], tmp_path / "a.onnx", lambda m, format=format: m.update(format=format))
        with pytest.raises(sp_fx.PackageError, match=rf"format {format}.* reads 2 and 3 and 4 and 5"):
            sp_fx.load(to)


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(torch.relu(self.first(x)))


@pytest.mark.parametrize("target", ["class", "direction"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_dtypes_of_outputs_and_targets(interpreted, dtype, target):
    """The output's own, whatever the target is: class numbers, or a direction, which is of the output's dtype."""
    net, x = fill(Linear()).to(dtype), torch.randn(3, 6, dtype=dtype)
    made = sp_fx.transform(net).compile(example_inputs=x, target=target)
    said = json.loads(json.dumps(manifest.describe(made, ".onnx")))
    assert said["output_dtype"] == str(net(x).dtype).removeprefix("torch.") == str(dtype).removeprefix("torch.")
    assert said["target_dtype"] == ("int64" if target == "class" else said["output_dtype"])
    read = manifest.program_from(said, made.run, None).signature
    assert read.output_dtype == dtype and read.target_dtype == (torch.int64 if target == "class" else dtype)


def test_pictures_are_float32(interpreted):
    made = sp_fx.transform(fill(Small()).double()).compile(example_inputs=torch.zeros(2, 3, 16, 16, dtype=torch.float64))
    with pytest.raises(ValueError, match="expected a package of one float32 input"):
        Classifier(manifest.program_from(manifest.describe(made, ".onnx"), made.run, None))


class Named(Small):
    def forward(self, x):
        return {"logits": super().forward(x)}


def test_one_output_in_a_container(tmp_path):
    explainer, _, path = packaged(tmp_path / "a.onnx", net=Named())
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / "a.png")
    found = Batches(path, [tmp_path / "a.png"], 2)(0)
    assert relative(torch.from_numpy(found["logits"]), explainer(-torch.ones(1, 3, 16, 16))["logits"]) <= 1e-5


def test_packages_that_take_no_pictures(tmp_path):
    path = packaged(tmp_path / "two.onnx", shape=(2, 8, 8))[2]
    classifier = Classifier.load(path)
    assert classifier.preprocessing is None
    for refused in (classifier.for_pictures, lambda: Batches(path, [], 2)):
        with pytest.raises(ValueError, match=r"takes \[2, 8, 8\], which are no pictures of 3 channels or 1"):
            refused()
