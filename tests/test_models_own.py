"""Models of one's own by `module:function`."""

import pytest
import torch

import sp_fx
from sp_fx.models import NamedModel
from sp_fx.models.named import load_model
from sp_fx.models.weights import weights_hash

SOURCE = """
from torch import nn
import sp_fx

def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)).train()

def grey():
    half = sp_fx.models.Preprocessing(40, 32, "bilinear", (0.5,) * 3, (0.5,) * 3)
    return sp_fx.models.NamedModel("grey", net(), half, ("a", "b", "c", "d", "e"), "its own")

def wrapped():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    size = sp_fx.models.Preprocessing(40, 32, "bilinear", (0.5,) * 3, (0.2,) * 3)
    return sp_fx.models.NamedModel("wrapped", sp_fx.pixel_space(net, (0.5,) * 3, (0.2,) * 3), size, None, "its own")

built = nn.Conv2d(3, 4, 3)

def behind():
    return sp_fx.pixel_space(nn.Sequential(nn.Conv2d(3, 4, 3)), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))

def text():
    return sp_fx.models.TextModel("text", nn.Sequential(nn.Dropout(0.5)).train(), None)

def number():
    return 3

def broken():
    raise KeyError("mine")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "own_networks.py").write_text(SOURCE)
    (tmp_path / "raises_at_import.py").write_text("raise ValueError('mine alone')")
    (tmp_path / "needs_another.py").write_text("import not_there_at_all\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("load", [sp_fx.models.load, load_model])
def test_a_module_takes_pixels_normalised_as_for_imagenet(folder, load):
    named = load("own_networks:net")
    assert isinstance(named, NamedModel) and not named.model.training and named.labels is None
    assert (named.preprocessing.resize, named.preprocessing.crop, named.weights) == (224, 224, "its own")
    x = torch.rand(2, 3, 8, 8) * 2 - 1
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert torch.allclose(named.model(x), named.model.model(((x + 1) / 2 - mean) / std))
    small = sp_fx.models.load("own_networks:net", input_size=64).preprocessing
    assert (small.resize, small.crop) == (64, 64)


def test_a_named_model_stays_as_it_is_with_weights_of_another(folder):
    named = sp_fx.models.load("own_networks:grey")
    assert named.labels == tuple("abcde") and named.preprocessing.crop == 32 and not named.model.training
    torch.save(named.model.state_dict(), folder / "weights.pt")
    again = sp_fx.models.load("own_networks:grey", folder / "weights.pt", 24)
    assert again.weights == "weights.pt" and again.preprocessing.crop == 24
    assert weights_hash(again.model) == weights_hash(named.model)


def test_weights_are_those_behind_the_normalisation(folder):
    named = sp_fx.models.load("own_networks:wrapped")
    torch.save(named.model.model.state_dict(), folder / "raw.pt")
    again = sp_fx.models.load("own_networks:wrapped", folder / "raw.pt")
    assert weights_hash(again.model) == weights_hash(named.model)


def test_a_normalisation_of_its_own_stays(folder):
    named = sp_fx.models.load("own_networks:behind")
    x = torch.rand(1, 3, 8, 8) * 2 - 1
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)))
    assert torch.allclose(named.model(x), named.model.model(((x + 1) / 2 - mean) / std), atol=1e-6)
    assert named.preprocessing.std == pytest.approx((0.4, 0.5, 0.6))


def test_a_module_or_a_text_model(folder):
    assert sp_fx.models.load("own_networks:built").labels is None
    assert not sp_fx.models.load("own_networks:text").model.training
    with pytest.raises(ValueError, match="takes no weights file"):
        sp_fx.models.load("own_networks:text", "w.pt")


@pytest.mark.parametrize("name, error, message", [
    ("own_networks:nett", ValueError, "own_networks has no function 'nett'; it has behind, broken, grey, net"),
    ("own_network:net", ValueError, "there is no module 'own_network' in "),
    ("own_networks:number", TypeError, "own_networks:number returns a torch.nn.Module, or a .*; got int"),
    (":net", ValueError, "':net' is no module:function"),
    (".own_networks:net", ValueError, "is no module:function"),
    ("raises_at_import:net", ValueError, "^mine alone$"),
    ("own_networks:", ValueError, "has no function ''"),
    ("own_networks:broken", KeyError, "mine"),
    ("needs_another:net", ModuleNotFoundError, "not_there_at_all"),
])  # fmt: skip
def test_what_is_no_model(folder, name, error, message):
    with pytest.raises(error, match=message):
        sp_fx.models.load(name)


def test_the_command_takes_it(folder, capsys):
    from sp_fx.cli.commands import main

    assert main(["report", "--model", "own_networks:net"]) == 0 and "1 rewritten" in capsys.readouterr().out
    assert main(["report", "--model", "own_networks:number"]) == 2 and "got int" in capsys.readouterr().err
