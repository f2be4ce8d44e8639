"""Networks that others publish: that pictures become what their own preprocessing makes of them, and weights what they were."""

import json
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file

import sp_fx
from helpers import fill
from sp_fx.models.published import hub
from sp_fx.models.published.processors import asked
from sp_fx.models.published.torchvision_models import torchvision_model

transformers = pytest.importorskip("transformers")
VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
SQUARE = {"size": {"height": 32, "width": 32}}
NAMES = {0: "cat", 1: "dog", 2: "fish, blue"}
SIZES = [(75, 53), (41, 90), (64, 64), (33, 32), (21, 30)]


@pytest.fixture(autouse=True)
def quiet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with hub.quiet():
        yield


def picture(width, height, seed=0):
    """Waves and an edge: what is not a detail of one pixel survives every way to resize."""
    noise = np.random.default_rng(seed).integers(0, 256, (7, 7, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
    image.paste((250, 10, 90), (0, 0, width // 3, height // 4))
    return image


def folder(config, processor=None, dtype=None, name="it"):
    """A network with seeded weights and a picture processor as a folder of Hugging Face's; the network."""
    net = fill(transformers.AutoModelForImageClassification.from_config(config))
    (net.to(dtype) if dtype else net).save_pretrained(name)
    if processor is not None:
        processor.save_pretrained(name)
    return net.float()


def normalised(named, image):
    """What reaches the network behind `named`, as the processors of transformers have it."""
    x = named.preprocessing.pixels(image)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (named.preprocessing.mean, named.preprocessing.std))
    return ((x + 1) / 2 - mean) / std


def small(kind, **changed):
    """The image processor of a kind, with small pictures."""
    return getattr(transformers, kind)(**changed)


PROCESSORS = {
    "ViT": ("ViTImageProcessor", SQUARE),
    "ViT, wide": ("ViTImageProcessor", {"size": {"height": 24, "width": 40}}),
    "ViT, ImageNet's mean": ("ViTImageProcessor", {**SQUARE, "image_mean": [0.485, 0.456, 0.406],
                                                   "image_std": [0.229, 0.224, 0.225]}),
    "ViT, not normalised": ("ViTImageProcessor", {**SQUARE, "do_normalize": False}),
    "ViT, not scaled": ("ViTImageProcessor", {**SQUARE, "do_rescale": False, "image_mean": [120.0] * 3, "image_std": [60.0] * 3}),
    "ViT, neither": ("ViTImageProcessor", {**SQUARE, "do_rescale": False, "do_normalize": False}),
    "ViT, lanczos": ("ViTImageProcessor", {**SQUARE, "resample": 1}),
    "ConvNext, cropped": ("ConvNextImageProcessor", {"size": {"shortest_edge": 32}, "crop_pct": 0.875}),
    "ConvNext, squashed": ("ConvNextImageProcessor", {"size": {"shortest_edge": 384}}),
    "BiT": ("BitImageProcessor", {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}),
    "DeiT": ("DeiTImageProcessor", {"size": {"height": 40, "width": 40}, "crop_size": {"height": 32, "width": 32}}),
    "BEiT": ("BeitImageProcessor", SQUARE),
    "CLIP": ("CLIPImageProcessor", {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}),
    "SigLIP": ("SiglipImageProcessor", SQUARE),
    "EfficientNet": ("EfficientNetImageProcessor", SQUARE),
    "LeViT": ("LevitImageProcessor", {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}),
    "MobileNet": ("MobileNetV2ImageProcessor", {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}),
    "MobileViT": ("MobileViTImageProcessor", {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}),
    "MobileViT, padded": ("MobileViTImageProcessor", {"size": {"shortest_edge": 28}, "crop_size": {"height": 32, "width": 32}}),
    "PVT": ("PvtImageProcessor", SQUARE),
    "PoolFormer": ("PoolFormerImageProcessor", {"size": {"shortest_edge": 32}, "crop_pct": 0.9,
                                                "crop_size": {"height": 32, "width": 32}}),
    "SegFormer": ("SegformerImageProcessor", SQUARE),
}  # fmt: skip


@pytest.mark.parametrize("case", PROCESSORS)
def test_pictures_become_what_their_processor_makes_of_them(case):
    kind, options = PROCESSORS[case]
    processor = small(f"{kind}Pil", **options)
    preprocessing, bgr = asked(processor)
    assert bgr == (kind == "MobileViTImageProcessor")
    for number, size in enumerate(SIZES):
        image = picture(*size, seed=number)
        want = processor(image, return_tensors="pt")["pixel_values"][0]
        x = preprocessing.pixels(image)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
        found = ((x + 1) / 2 - mean) / std
        want = want.flip(0) if bgr else want
        # Where an odd number of pixels is cut off, transformers begins a pixel earlier than torchvision.
        cut = "crop_size" in options or "crop_pct" in options
        shifts = [(y, x) for y in (0, 1) for x in (0, 1)] if cut else [(0, 0)]
        height, width = found.shape[1:]
        off = min(
            (255 * std * (found[:, : height - y, : width - x] - want[:, y:, x:]).abs() for y, x in shifts), key=lambda d: d.mean()
        )
        assert off.mean() < 0.05 and off.max() <= 1.01, (size, off.mean(), off.max())


def test_what_no_preprocessing_makes_is_said():
    with pytest.raises(ValueError, match=r"its Siglip2ImageProcessor\w* makes pixel_values \[1, 256, 768\].* of one"):
        asked(transformers.Siglip2ImageProcessor())
    with pytest.raises(ValueError, match="makes 96 x 64 of one and other sizes of others"):
        asked(small("TextNetImageProcessorPil", size={"shortest_edge": 64}))
    with pytest.warns(UserWarning, match="DonutImageProcessorPil does more to pictures than resize, crop and normalise"):
        asked(small("DonutImageProcessorPil", size={"height": 64, "width": 48}))


NETWORKS = {
    "vit": ({**VIT}, "ViT"),
    "dinov2": ({**VIT}, "BiT"),
    "beit": ({**VIT}, "BEiT"),
    "swin": ({"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}, "ViT"),
    "convnext": ({"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}, "ConvNext, cropped"),
    "resnet": ({"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}, "ConvNext, cropped"),
    "mobilenet_v2": ({"depth_multiplier": 0.35, "image_size": 32}, "MobileNet"),
    "mobilevit": ({"image_size": 32, "hidden_sizes": [16, 16, 16], "neck_hidden_sizes": [4, 4, 8, 8, 8, 8, 16],
                   "num_attention_heads": 2}, "MobileViT"),
    "segformer": ({"num_encoder_blocks": 2, "depths": [1, 1], "hidden_sizes": [8, 16], "sr_ratios": [2, 1], "patch_sizes": [7, 3],
                   "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]}, "SegFormer"),
}  # fmt: skip


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_folder_of_hugging_faces(kind):
    options, processor = NETWORKS[kind]
    config = transformers.AutoConfig.for_model(kind, **options, id2label=NAMES, label2id={v: k for k, v in NAMES.items()})
    made = small(f"{PROCESSORS[processor][0]}Pil", **PROCESSORS[processor][1])
    net = folder(config, made)
    named = sp_fx.models.load("hf/./it")
    assert named.labels == ("cat", "dog", "fish, blue") and named.weights == "published" and not named.model.training
    image = picture(64, 64)
    with torch.no_grad():
        want = net(**made(image, return_tensors="pt")).logits
        found = named.model(named.preprocessing.pixels(image)[None])
    assert (found - want).abs().max() < 0.02 * want.abs().max()  # half a step of eight bits in some pixels


def vit(classes=3, **more):
    return transformers.ViTConfig(**VIT, num_labels=classes, **more)


def test_classes_that_do_not_exclude_each_other():
    """As the repository's configuration says."""
    for kind, several in (("multi_label_classification", True), ("single_label_classification", False), (None, False)):
        folder(vit(problem_type=kind), transformers.ViTImageProcessorPil(**SQUARE))
        assert sp_fx.models.load("hf/./it").multi_label is several


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_becomes_float32(dtype):
    net = folder(vit(), transformers.ViTImageProcessorPil(**SQUARE), dtype)
    named = sp_fx.models.load("hf/./it")
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        assert torch.allclose(named.model(x), net(x).logits, atol=1e-5) and named.model(x).dtype == torch.float32
    assert named.labels is None  # LABEL_0 and so on are no names


@pytest.mark.parametrize("kind", ["vit", "swin", "convnext"])
def test_weights_as_the_hub_and_as_memory_names_them(kind):
    """In files their names are those of the first version of transformers that had the network."""
    make = transformers.AutoModelForImageClassification
    config = transformers.AutoConfig.for_model(kind, **NETWORKS[kind][0], id2label=NAMES)
    folder(config, transformers.ViTImageProcessorPil(**SQUARE))
    for classes in (3, 5):
        other = transformers.AutoConfig.for_model(kind, **NETWORKS[kind][0], num_labels=classes)
        net = fill(make.from_config(other), seed=1)
        net.save_pretrained("other")
        torch.save(net.state_dict(), "state.pt")
        torch.save({"state_dict": net.state_dict(), "epoch": 1}, "checkpoint.ckpt")
        x = torch.rand(2, 3, 32, 32) * 2 - 1
        for file in ("other/model.safetensors", "state.pt", "checkpoint.ckpt"):
            named = sp_fx.models.load("hf/./it", weights=file)
            with torch.no_grad():
                mean, std = (torch.tensor(v).view(3, 1, 1) for v in (named.preprocessing.mean, named.preprocessing.std))
                assert torch.allclose(named.model(x), net(((x + 1) / 2 - mean) / std).logits, atol=1e-5), file
            assert named.labels == (("cat", "dog", "fish, blue") if classes == 3 else None)
    torch.save({"a.weight": torch.zeros(2)}, "alien.pt")
    with pytest.raises(ValueError, match=r"alien.pt do not fit .*: 1 tensors, of which .* missing .*1 that it does not have"):
        sp_fx.models.load("hf/./it", weights="alien.pt")
    with pytest.raises(ValueError, match=r"5 classes.*|of another shape"):
        sp_fx.models.load("hf/./it", weights="state.pt", num_classes=3)


def test_a_network_of_grey_pictures():
    net = folder(vit(num_channels=1), transformers.ViTImageProcessorPil(**SQUARE, image_mean=[0.13], image_std=[0.3]))
    named = sp_fx.models.load("hf/./it")
    assert named.preprocessing.mean == (0.13,) and named.preprocessing.std == (0.3,)
    image = picture(64, 64)
    x = named.preprocessing.pixels(image)[None]
    grey = torch.from_numpy(np.array(image.resize((32, 32), Image.Resampling.BILINEAR).convert("L"))).float() / 255
    assert torch.allclose(named.model(x), net((grey[None, None] - 0.13) / 0.3).logits, atol=1e-3)


def test_a_folder_without_a_processor_is_said_to_have_none():
    folder(vit())
    with pytest.warns(UserWarning, match=r"hf/./it says nothing of its pictures .*: 32 pixels, mean and std 0.5 are taken"):
        named = sp_fx.models.load("hf/./it")
    assert named.preprocessing.crop == 32 and named.preprocessing.mean == (0.5, 0.5, 0.5)


def broken_folders():
    transformers.ViTModel(vit()).save_pretrained("headless")
    transformers.ViTImageProcessorPil(**SQUARE).save_pretrained("headless")
    vit().save_pretrained("weightless")
    bert = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16, vocab_size=20
    )
    bert.save_pretrained("text")
    for name, content in (("remote", {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C"}}), ("other", {"hidden": 3})):
        Path(name).mkdir()
        (Path(name) / "config.json").write_text(json.dumps(content))
    Path("empty").mkdir()


BROKEN = {
    "headless": "hf/./headless has no trained classifier: classifier.bias, classifier.weight would be random",
    "weightless": "hf/./weightless cannot be loaded: Error no file named model.safetensors",
    "text": "hf/./text is a bert, which transformers has no image classifier of",
    "remote": "hf/./remote needs code of its repository, which is not run here: name a function that loads it",
    "other": "Unrecognized model in ./other",
    "empty": "hf/./empty: the folder has no config.json",
    "gone": "hf/./gone: there is no folder ./gone",
}


def test_folders_that_have_no_classifier(monkeypatch):
    broken_folders()
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asks the user"))
    for name, message in BROKEN.items():
        with pytest.raises(ValueError, match=message):
            sp_fx.models.load(f"hf/./{name}")
    folder(vit(), transformers.ViTImageProcessorPil(**SQUARE))
    with pytest.raises(ValueError, match=r"hf/./it has 3 classes, and num_classes=7 was asked for"):
        sp_fx.models.load("hf/./it", num_classes=7)
    with pytest.raises(IsADirectoryError, match=r"it is a folder, and no network; one of Hugging Face's is named hf/it"):
        sp_fx.models.load("it")


# -- torchvision and timm


def behind(named, x):
    """The output of the network of `named` for pixels that are normalised already."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (named.preprocessing.mean, named.preprocessing.std))
    return named.model((x * std + mean) * 2 - 1)


@pytest.mark.parametrize("name, side", [
    ("googlenet", 64), ("inception_v3", 96), ("mnasnet0_5", 32), ("squeezenet1_1", 48), ("densenet121", 32),
    ("shufflenet_v2_x0_5", 32), ("timm/resnet10t", 32), ("timm/mobilenetv3_small_050", 32), ("timm/pvt_v2_b0", 32),
])  # fmt: skip
def test_five_classes_of_ones_own(name, side):
    """Of GoogLeNet and Inception as they are fine-tuned: from the published ones, whose input is transformed, with heads that
    only train or without."""
    options = {"init_weights": False, "transform_input": True} if name in ("googlenet", "inception_v3") else {}
    if name.startswith("timm/"):
        net = fill(pytest.importorskip("timm").create_model(name[5:], num_classes=5))
    else:
        net = fill(torchvision.models.get_model(name, num_classes=5, **options))
    torch.save(net.state_dict(), "five.pt")
    save_file({"module." + key: value.clone() for key, value in net.state_dict().items()}, "five.safetensors")
    files = ["five.pt", "five.safetensors"]
    if options:
        torch.save({key: value for key, value in net.state_dict().items() if "aux" not in key.lower()}, "no_heads.pt")
        files.append("no_heads.pt")
    x = torch.randn(2, 3, side, side)
    with torch.no_grad():
        want = net(x)
        for file in files:
            named = sp_fx.models.load(name, weights=file, input_size=side)
            assert named.labels is None and named.weights == file
            assert ("transform_input=True, which its weights do not say" in named.assumed) == bool(options)
            assert torch.allclose(behind(named, x), want, rtol=1e-3, atol=1e-3 * want.abs().max()), file


def older_vit(key):
    return key.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2.")


def older_densenet(key):
    for what in ("norm1", "norm2", "conv1", "conv2"):
        key = key.replace(f".{what}.", f".{what[:-1]}.{what[-1]}.") if "denselayer" in key else key
    return key


@pytest.mark.parametrize("name, older", [("vit_b_32", older_vit), ("densenet121", older_densenet)])
def test_torchvisions_own_files_have_older_names(name, older, monkeypatch):
    if name == "vit_b_32":  # a small one under its name
        make = torchvision.models.get_model
        monkeypatch.setattr("torchvision.models.get_model", lambda name, weights=None, **options: (
            torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, **options) if name == "vit_b_32"
            else make(name, weights=weights, **options)))  # fmt: skip
    net = fill(torchvision.models.get_model(name))
    state = {older(key): value for key, value in net.state_dict().items() if "num_batches" not in key}
    assert state.keys() != net.state_dict().keys()
    torch.save(state, "published.pth")
    named = sp_fx.models.load(name, weights="published.pth")
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(behind(named, x), net(x), rtol=1e-3, atol=1e-3)
    assert len(named.labels) == 1000
    torch.save({**state, "more": torch.zeros(1)}, "more.pth")
    with pytest.raises(ValueError, match=r"more.pth do not fit"):
        sp_fx.models.load(name, weights="more.pth")


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b1", "inception_v3", "vit_b_16", "swin_t"])
def test_pictures_become_what_torchvisions_transforms_make_of_them(name):
    entry = torchvision.models.get_model_weights(name).DEFAULT
    with torch.device("meta"):
        prepared = torchvision_model(name, False).preprocessing
    for size in ((333, 257), (201, 300)):
        image = picture(*size)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (prepared.mean, prepared.std))
        found = ((prepared.pixels(image) + 1) / 2 - mean) / std
        assert torch.allclose(found, entry.transforms(antialias=True)(image), atol=1e-5)


# -- what cannot be reached


@pytest.fixture
def nowhere(monkeypatch):
    def refused(*_, **__):
        raise OSError("no network here")

    monkeypatch.setattr("urllib.request.urlopen", refused)
    for place in ("socket.socket.connect", "torch.hub.download_url_to_file"):
        monkeypatch.setattr(place, refused)


@pytest.mark.parametrize("name", ["hf/google/vit-base-patch16-224", "timm/resnet10t", "resnet18", "googlenet"])
def test_a_hub_that_cannot_be_reached(name, nowhere, monkeypatch, tmp_path, capsys):
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    began = time.perf_counter()
    with pytest.raises(
        RuntimeError, match=rf"the weights of {name} could not be downloaded \(https://\S+ cannot be reached: no net"
    ):
        sp_fx.models.load(name)
    assert time.perf_counter() - began < 10 and capsys.readouterr() == ("", "")


def test_an_address_that_never_answers(monkeypatch):
    """A look-up of a name may hang for longer than any time limit of a connection."""
    hanging, asked_often = threading.Event(), []
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: (asked_often.append(1), hanging.wait(30), open(__file__))[-1])
    monkeypatch.setattr(
        "threading.Thread.join", lambda self, timeout=None, join=threading.Thread.join: join(self, timeout and 0.1)
    )
    assert hub.unreachable("https://nowhere.example") == "no answer within seven seconds" and len(asked_often) == 1
    hanging.set()


@pytest.mark.parametrize("name", ["hf/me/mine", "timm/resnet10t"])
def test_what_was_downloaded_before_is_there_without_a_network(name, nowhere, monkeypatch, tmp_path):
    """In a cache as the hub's client keeps it."""
    source = tmp_path / "source"
    if name.startswith("hf/"):
        net = folder(vit(), transformers.ViTImageProcessorPil(**SQUARE), name=source)
        repository, x = "me/mine", torch.rand(1, 3, 32, 32)
    else:
        timm = pytest.importorskip("timm")
        source.mkdir()
        net, repository, x = fill(timm.create_model("resnet10t")), "timm/resnet10t.c3_in1k", torch.rand(1, 3, 64, 64)
        save_file(net.state_dict(), source / "model.safetensors")
        (source / "config.json").write_text(json.dumps({"architecture": "resnet10t", "pretrained_cfg": {"num_classes": 1000}}))
    cache = tmp_path / "cache" / f"models--{repository.replace('/', '--')}"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("a" * 40)
    (cache / "snapshots").mkdir()
    source.rename(cache / "snapshots" / ("a" * 40))
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        named = sp_fx.models.load(name)
    assert named.weights == "published" and not constants.HF_HUB_OFFLINE
    with torch.no_grad():
        found, want = behind(named, x), net(x)
        assert torch.allclose(found, getattr(want, "logits", want), rtol=1e-3, atol=1e-3)
