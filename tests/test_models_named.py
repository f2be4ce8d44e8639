"""Models by name: their classes, and that they are the library's own networks on pixels in [-1, 1]."""

import pytest
import torch
import torchvision

from command import write_inputs
from sp_fx.models.classes import class_index
from sp_fx.models.named import load_model
from sp_fx.models.options import Options
from sp_fx.models.weights import weights_hash


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("pictures"))


def test_class_names():
    labels = ("tench, Tinca tinca", "crane", "crane", "cardigan", "Cardigan", "hen-of-the-woods, hen of the woods")
    assert class_index("Tinca tinca", labels) == class_index("TENCH", labels) == class_index("tench, Tinca tinca", labels) == 0
    assert class_index("cardigan", labels) == 3 and class_index("Cardigan", labels) == 4
    with pytest.raises(ValueError, match=r"several classes are called 'crane': pass one of the indices 1 \(crane\), 2 \(crane\)"):
        class_index("crane", labels)
    with pytest.raises(ValueError, match="several classes are called 'CARDIGAN'"):
        class_index("CARDIGAN", labels)
    with pytest.raises(ValueError, match="no class is called 'tensh'; the nearest: tench"):
        class_index("tensh", labels)
    with pytest.raises(ValueError, match="no class is called 'xxxx'; it has 6, such as tench, Tinca tinca"):
        class_index("xxxx", labels)
    with pytest.raises(ValueError, match="not known: pass a number in place of 'tench'"):
        class_index("tench", None)


def test_timm_models_know_their_classes():
    named = load_model("timm/resnet18", trained=False)
    assert class_index("tench", named.labels) == 0 and class_index("English springer", named.labels) == 217
    assert (named.preprocessing.resize, named.preprocessing.crop) == (235, 224)  # 224 / 0.95, rounded down as timm does


def test_prediction_equals_the_models_own(here):
    named = load_model("squeezenet1_1", Options(here / "weights.pt", 64))
    x = named.preprocessing(here / "colour.png").pixels[None]
    net = torchvision.models.squeezenet1_1()
    net.load_state_dict(torch.load(here / "weights.pt"))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (named.preprocessing.mean, named.preprocessing.std))
    assert torch.allclose(named.model(x), net.eval()(((x + 1) / 2 - mean) / std), atol=1e-4)
    assert weights_hash(named.model) == weights_hash(load_model("squeezenet1_1", Options(here / "weights.pt")).model)
