"""What a newcomer gets wrong in the first minutes: the message says what was got, and what to do."""

import gc

import pytest
import torch
import torchvision
from torch import nn

import sp_fx
from helpers import fill, relative
from sp_fx import zoo

PLAIN = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
NETS = {
    "batch norms": (lambda: fill(torchvision.models.resnet18(num_classes=5)), (3, 64, 64)),
    "convolutions that take one sample too": (lambda: fill(PLAIN), (3, 20, 20)),
    "attention": (lambda: zoo.load("pyramid_transformer"), (3, 96, 96)),
    "flattened": (lambda: fill(nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.ReLU(), nn.Linear(8, 5))), (3, 4, 4)),
    "a sequence": (lambda: fill(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu")).eval(), None),
}
CALLS = {
    "pullback": lambda e, x: e.pullback(x, 1),
    "ascend": lambda e, x: e.ascend(x, 1),
    "the explainer itself": lambda e, x: e(x),
    "compile": lambda e, x: e.compile("pullback", example_inputs=x, inductor=False),
}
FORGOTTEN = "the batch axis was forgotten: got {}, where the model takes {}; pass x\\[None\\], a batch of one"


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", [name for name, (_, shape) in NETS.items() if shape])
@pytest.mark.parametrize("ran", [False, True])
def test_a_forgotten_batch_axis(name, call, ran):
    make, shape = NETS[name]
    explainer, x = sp_fx.transform(make()), torch.randn(1, *shape)
    if ran:
        explainer.pullback(x)
    sizes = (str(list(s)).replace("[", "\\[").replace("]", "\\]") for s in (shape, (1, *shape)))
    before = {k: v.clone() for k, v in explainer.state_dict().items()}
    with pytest.raises(ValueError, match=FORGOTTEN.format(*sizes)):
        CALLS[call](explainer, x[0])
    assert all(torch.equal(v, before[k]) for k, v in explainer.state_dict().items())
    assert explainer.pullback(x).shape == x.shape  # and goes on


def test_a_forgotten_batch_axis_of_the_example():
    with pytest.raises(sp_fx.CaptureError, match=r"axis was forgotten: got .3, 64, 64., where the model takes .1, 3, 64, 64."):
        sp_fx.transform(fill(torchvision.models.resnet18()), example_inputs=torch.randn(3, 64, 64))


def test_other_errors_of_a_forward_stay_what_they_are():
    """One channel too few, and a batch axis would not help; hooks of the user's do not run once more for the question."""
    explainer = sp_fx.transform(fill(PLAIN))
    seen = []
    explainer.get_submodule("1").register_forward_hook(lambda *_: seen.append(1))
    for x in (torch.randn(1, 2, 20, 20), torch.randn(2, 20, 20)):
        with pytest.raises(RuntimeError, match="channels"):
            explainer.pullback(x, 1)
    assert not seen


def test_what_was_tried_is_not_kept():
    explainer, x = sp_fx.transform(fill(PLAIN)), torch.randn(1, 3, 20, 20)
    explainer.pullback(x)
    gc.collect()
    count = sum(isinstance(o, torch.Tensor) for o in gc.get_objects())
    for _ in range(3):
        with pytest.raises(ValueError, match="batch axis was forgotten"):
            explainer.pullback(x[0], 1)
    assert sum(isinstance(o, torch.Tensor) for o in gc.get_objects()) == count


def test_a_picture_s_path_in_place_of_its_pixels():
    with pytest.raises(TypeError, match=r"got str; sp_fx.read_picture.path, size. makes one of a picture file"):
        sp_fx.transform(fill(PLAIN)).pullback("photo.jpg")


def test_a_named_model_or_its_name_in_place_of_the_module():
    with pytest.raises(TypeError, match=r"got NamedModel; pass its .model"):
        sp_fx.transform(sp_fx.models.load("zoo/residual_cnn"))
    with pytest.raises(TypeError, match=r"got str; sp_fx.models.load.name..model is one by name"):
        sp_fx.transform("resnet50")


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(12))

    def forward(self, x):
        for layer in self.layer:
            x = layer(x)
        return x


@pytest.mark.parametrize(
    "pattern, near", [("layer.1.2", "layer.1.1"), ("layers.9.1", "layer.9.1"), ("layer.11.1#2", "layer.11.1")]
)
def test_an_unknown_override_names_the_nearest_places_in_natural_order(pattern, near):
    with pytest.raises(ValueError) as raised:
        sp_fx.transform(fill(Deep()), rules=sp_fx.Rules(overrides={pattern: 0.5}))
    told, _, listed = str(raised.value).rpartition("the nearest of its 12 gates are at: ")
    places = listed.split(", ")
    assert f"the override {pattern!r} fits no gate of this model" in told and len(places) == 5 and near in places
    assert places == sorted(places, key=lambda place: int(place.split(".")[1]))


def test_classes_that_look_like_a_one_hot_row():
    """Zeros and one 1 in a row are classes where the model has more of them than the row."""
    explainer, x = sp_fx.transform(fill(PLAIN)), torch.randn(2, 3, 20, 20)
    rows = torch.tensor([[0, 1, 0], [1, 0, 0]])
    for method in (explainer.pullback, lambda x, t: explainer.ascend(x, t, steps=1)):
        found = method(x, rows)
        for k, column in enumerate(rows.unbind(1)):
            assert relative(found[:, k], method(x, column)) < 1e-6


def test_a_program_that_is_not_compiled_equals_the_explainer(tmp_path):
    explainer, x = sp_fx.transform(fill(PLAIN)), torch.randn(2, 3, 20, 20)
    program = explainer.compile("pullback", example_inputs=x, inductor=False)
    for batch in (x, x[:1], torch.cat([x, x, x])):
        logits, map = program(batch, 1)
        assert relative(logits, explainer(batch)) < 1e-6 and relative(map, explainer.pullback(batch, 1)) < 1e-5


def test_a_state_dict_in_place_of_the_network():
    with pytest.raises(TypeError, match=r"got OrderedDict; a state dict is loaded into the network that it is of, net"):
        sp_fx.transform(fill(PLAIN).state_dict())


def test_a_program_that_is_given_one_sample():
    x = torch.randn(2, 3, 20, 20)
    program = sp_fx.transform(fill(PLAIN)).compile(example_inputs=x, inductor=False)
    with pytest.raises(ValueError, match=r"got .* on cpu: the batch axis was forgotten: pass x\[None\], a batch of one"):
        program(x[0])
    with pytest.raises(ValueError, match="compile another for these"):
        program(x[:, :2])


def test_a_report_explains_places_inside_of_a_wrapper():
    net = nn.Sequential()
    for name in ("low", "high"):
        net.add_module(name, nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU())))
    report = sp_fx.transform(sp_fx.pixel_space(fill(net), (0.5,) * 3, (0.25,) * 3)).report()
    for place in ("model.high.0.1", "high.0.1", "high.0", "high"):
        (sentence,) = report.explain(place).splitlines()
        assert "at model.high.0.1 " in sentence, place
    with pytest.raises(ValueError, match="no gating call"):
        report.explain("igh.0")
