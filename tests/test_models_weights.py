"""Weights as people save them, and files that are none; nothing of a pickle runs unless it is trusted."""

import argparse
import os
import pickle
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import sp_fx
from helpers import fill
from sp_fx.models.weights import classes_of, fitted, load_weights, pickled_objects

SOURCE = """
from torch import nn

class Small(nn.Module):
    def __init__(self, num_classes=4):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        self.fc = nn.Linear(6, num_classes)

    def forward(self, x):
        return self.fc(self.body(x).mean((2, 3)))
"""


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A network of a file that this folder alone has."""
    (tmp_path / "small_networks.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "small_networks", raising=False)
    import small_networks

    yield fill(small_networks.Small())
    sys.modules.pop("small_networks", None)


def same(net, other):
    return all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), other.state_dict().values(), strict=True))


def before(prefix, state):
    return {prefix + key: value for key, value in state.items()}


FORMS = {
    "a state dict": lambda net, s: s,
    "DataParallel": lambda net, s: nn.DataParallel(net).state_dict(),
    "torch.compile": lambda net, s: before("_orig_mod.", s),
    "both": lambda net, s: before("module._orig_mod.", s),
    "Lightning": lambda net, s: {"epoch": 3, "state_dict": before("model.", s), "hyper_parameters": {"lr": 0.1},
                                 "optimizer_states": [torch.optim.Adam(net.parameters()).state_dict()]},
    "Lightning with a loss": lambda net, s: {"state_dict": {**before("model.", s), "criterion.weight": torch.ones(4)}},
    "a training loop's": lambda net, s: {"epoch": 3, "model_state_dict": s, "loss": torch.tensor(0.5),
                                         "optimizer_state_dict": torch.optim.SGD(net.parameters(), momentum=0.9).state_dict()},
    "the ImageNet example's": lambda net, s: {"epoch": 3, "arch": "small", "state_dict": before("module.", s), "best_acc1": 0.5},
    "an average of weights": lambda net, s: torch.optim.swa_utils.AveragedModel(net).state_dict(),
    "EMA": lambda net, s: {"ema_state_dict": before("module.", s), "step": 7},
    "DeepSpeed": lambda net, s: {"module": s, "global_steps": 7},
    "a name of one's own": lambda net, s: {"my_weights": s, "epoch": 3},
    "an entry in an entry": lambda net, s: {"state_dict": {"net": s}},
    "numbers beside it": lambda net, s: {**s, "epoch": 3, "comment": "best"},
    "no counts": lambda net, s: {key: value for key, value in s.items() if "num_batches" not in key},
    "parameters": lambda net, s: {**s, "fc.weight": nn.Parameter(s["fc.weight"])},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["weights.pt", "model.ckpt", "model_best.pth.tar", "my weights, größer.bin"])
def test_as_they_are_saved(small, tmp_path, form, name):
    torch.save(FORMS[form](small, small.state_dict()), tmp_path / name)
    net = fill(type(small)(), seed=1)
    net.body[1].num_batches_tracked.fill_(0)
    load_weights(net, tmp_path / name)
    assert same(net, small)


@pytest.mark.parametrize("old", [True, False])
def test_of_every_format_and_precision(small, tmp_path, old):
    torch.save(small.state_dict(), tmp_path / "w.pth", _use_new_zipfile_serialization=not old)
    save_file(small.state_dict(), tmp_path / "w.safetensors")
    for name in ("w.pth", "w.safetensors"):
        net = type(small)()
        load_weights(net, tmp_path / name)
        assert same(net, small)
    for dtype in (torch.bfloat16, torch.float16):
        half = {k: v.to(dtype) if v.is_floating_point() else v for k, v in small.state_dict().items()}
        torch.save(half, tmp_path / "h.pt", _use_new_zipfile_serialization=not old)
        save_file(half, tmp_path / "h.safetensors")
        for name in ("h.pt", "h.safetensors"):
            net = type(small)()
            load_weights(net, tmp_path / name)
            assert torch.equal(net.fc.weight, half["fc.weight"].float()) and net.fc.weight.dtype == torch.float32


def test_a_module_pickled_by_every_means(small, tmp_path):
    """By today's torch.save, the one before, and pickle itself; of a state dict too."""
    torch.save(small, tmp_path / "new.pt")
    torch.save(small, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.save({"model": small, "epoch": 3}, tmp_path / "checkpoint.pt")
    torch.save(nn.DataParallel(small), tmp_path / "parallel.pt")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(small))
    for name in ("new.pt", "old.pt", "checkpoint.pt", "parallel.pt", "plain.pkl"):
        with pytest.raises(ValueError, match=r"holds pickled objects \(.*small_networks.Small.*--trust-pickle"):
            sp_fx.models.load(tmp_path / name)
        named = sp_fx.models.load(tmp_path / name, trust_pickle=True)
        assert type(named.model.model) is type(small) and same(named.model.model, small) and not named.model.training
        net = type(small)()
        load_weights(net, tmp_path / name, trust_pickle=True)
        assert same(net, small)
    (tmp_path / "state.pkl").write_bytes(pickle.dumps(small.state_dict()))
    with pytest.raises(ValueError, match=r"holds pickled objects \(torch.storage._load_from_bytes\)"):
        load_weights(small, tmp_path / "state.pkl")
    load_weights(net := type(small)(), tmp_path / "state.pkl", trust_pickle=True)
    assert same(net, small)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_pickled_module_of_another_precision_takes_float32(small, tmp_path, dtype):
    torch.save(small.to(dtype), tmp_path / "half.pt")
    named = sp_fx.models.load("half.pt", trust_pickle=True)
    assert named.model(torch.zeros(1, 3, 9, 9)).dtype == torch.float32


class Writes:
    """Unpickling it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("save", ["new", "old", "pickle", "pickle 2"])
def test_nothing_of_a_pickle_runs_unless_it_is_trusted(tmp_path, small, save):
    mark, path = tmp_path / "it ran", tmp_path / "evil.pt"
    evil = {"state_dict": small.state_dict(), "more": Writes(mark)}
    if save.startswith("pickle"):
        path.write_bytes(pickle.dumps(evil, protocol=2 if save == "pickle 2" else 5))
    else:
        torch.save(evil, path, _use_new_zipfile_serialization=save == "new")
    for ask in (lambda: sp_fx.models.load(path), lambda: load_weights(small, path)):
        with pytest.raises(ValueError, match=r"holds pickled objects \(.*posix.mkdir.*\), and loading them runs code"):
            ask()
    assert not mark.exists()
    assert "posix.mkdir" in pickled_objects(path) and not mark.exists()
    load_weights(small, path, trust_pickle=True)
    assert mark.is_dir()


def test_classes_that_are_not_here(small, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    torch.save(small, tmp_path / "elsewhere" / "it.pt")
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(tmp_path)])
    sys.modules.pop("small_networks")
    with pytest.raises(ValueError, match=r"cannot be unpickled here: No module named 'small_networks'. .* work in the folder"):
        sp_fx.models.load("it.pt", trust_pickle=True)
    (tmp_path / "small_networks.py").rename(tmp_path / "elsewhere" / "small_networks.py")
    monkeypatch.chdir(tmp_path)  # the file beside it is found from anywhere
    assert same(sp_fx.models.load("elsewhere/it.pt", trust_pickle=True).model.model, small)


def test_a_class_of_the_script_that_made_the_file(small, tmp_path, monkeypatch):
    class Here(nn.Identity):
        pass

    Here.__module__, Here.__qualname__ = "__main__", "Here"
    monkeypatch.setattr(sys.modules["__main__"], "Here", Here, raising=False)
    torch.save(Here(), tmp_path / "it.pt")
    monkeypatch.delattr(sys.modules["__main__"], "Here")
    with pytest.raises(
        ValueError, match=r"Can't get attribute 'Here' on .*__main__.*one of the script.*--model script.py:function"
    ):
        sp_fx.models.load("it.pt", trust_pickle=True)


def damaged(tmp_path, small):
    torch.save(small.state_dict(), tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    save_file(small.state_dict(), tmp_path / "whole.safetensors")
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:-9])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "page.pt").write_text("<!DOCTYPE html><html>Sign in to continue</html>")
    (tmp_path / "lfs.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1f\nsize 9\n")
    (tmp_path / "zip.pt").write_bytes(b"PK\x05\x06" + bytes(18))
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({}, tmp_path / "none.pt")
    torch.save({"lr": 0.1, "epoch": 3}, tmp_path / "numbers.pt")
    torch.save({"student": small.state_dict(), "teacher": small.state_dict()}, tmp_path / "two.pt")
    torch.save({**small.state_dict(), "fc.bias": torch.tensor([0, 1, float("nan"), 2])}, tmp_path / "nan.pt")
    torch.save({"epoch": 1, "args": argparse.Namespace(lr=1), "state_dict": small.state_dict()}, tmp_path / "namespace.pt")
    torch.jit.trace(small, torch.zeros(1, 3, 9, 9)).save(tmp_path / "script.pt")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "model.safetensors").write_bytes(b"")


DAMAGED = {
    "cut.pt": "cut.pt is no whole file of weights: .*zip archive",
    "cut.safetensors": "cut.safetensors is not a whole safetensors file: ",
    "empty.pt": "empty.pt is no whole file of weights: it is empty",
    "page.pt": "page.pt is no whole file of weights: torch.save has not written it so",
    "lfs.safetensors": "lfs.safetensors is a pointer of Git LFS to a file that is not here: `git lfs pull` fetches it",
    "zip.pt": "zip.pt is no whole file of weights: ",
    "list.pt": "list.pt holds no state dict, a mapping from names to tensors: got list",
    "none.pt": "none.pt holds no state dict.*: got an empty dictionary",
    "numbers.pt": "numbers.pt holds no state dict.*: got the entries lr, epoch",
    "two.pt": "two.pt holds no state dict.*: got the entries student, teacher",
    "nan.pt": r"nan.pt is damaged: 1 of its tensors have NaN or infinity in them \(first: \['fc.bias'\]\)",
    "namespace.pt": r"namespace.pt holds pickled objects \(argparse.Namespace\).*--trust-pickle",
    "script.pt": "script.pt is a TorchScript archive, which has no Python source to trace: save the model's state dict",
    "folder": "folder is a folder, and weights are a file; files of weights in it: model.safetensors",
    "gone.pt": "no weights file at gone.pt",
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_files_that_are_none(small, tmp_path):
    damaged(tmp_path, small)
    kept = {key: value.clone() for key, value in small.state_dict().items()}
    for name, message in DAMAGED.items():
        with pytest.raises((ValueError, OSError), match=message) as refused:
            sp_fx.models.load("small_networks:Small", weights=name)
        assert "\n" not in str(refused.value) and "\x1b" not in str(refused.value), name
        with pytest.raises((ValueError, OSError)):
            load_weights(small, tmp_path / name)
        assert all(torch.equal(kept[key], value) for key, value in small.state_dict().items()), name


def test_damaged_and_trusted(small, tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pkl").write_bytes(b"")
    for name in ("text.pt", "empty.pkl"):
        with pytest.raises(ValueError, match=r"is no whole file of a model or weights: (torch.save has not|it is empty)"):
            sp_fx.models.load(name, trust_pickle=True)


def test_random_damage_never_escapes(small, tmp_path):
    """Flipped bytes give weights or one of the errors, nothing else, and run nothing."""
    rng = torch.Generator().manual_seed(0)
    for old in (False, True):
        torch.save(small.state_dict(), tmp_path / "w.pt", _use_new_zipfile_serialization=not old)
        whole = (tmp_path / "w.pt").read_bytes()
        for _ in range(40):
            hurt = bytearray(whole)
            for place in torch.randint(len(whole), (4,), generator=rng).tolist():
                hurt[place] = int(torch.randint(256, (), generator=rng))
            (tmp_path / "w.pt").write_bytes(hurt)
            try:
                load_weights(type(small)(), tmp_path / "w.pt")
            except ValueError as error:
                assert "\n" not in str(error)


def test_weights_of_another_network(small, tmp_path):
    five = fill(type(small)(5))
    torch.save(five.state_dict(), "five.pt")
    shapes = (
        r"2 of another shape \(fc.weight \[5, 6\] where it has \[4, 6\], .*They are of a network with 5 classes: --num-classes 5"
    )
    with pytest.raises(ValueError, match=rf"do not fit Small: 9 tensors, of which {shapes}"):
        sp_fx.models.load("small_networks:Small", weights="five.pt")
    for name, more in (("small_networks:Small", {"num_classes": 5}), ("small_networks:Small?num_classes=5", {})):
        assert same(sp_fx.models.load(name, weights="five.pt", **more).model.model, five)
    headed = {key.replace("fc.", "fc.1."): value for key, value in small.state_dict().items()}
    torch.save(headed, "headed.pt")
    names = (
        r"2 missing \(fc.weight, fc.bias\); 2 that it does not have \(fc.1.weight, fc.1.bias\).*another head, name the function"
    )
    with pytest.raises(ValueError, match=rf"do not fit Small: 9 tensors, of which {names}"):
        sp_fx.models.load("small_networks:Small", weights="headed.pt")


def test_the_number_of_classes(small):
    for classes in (1, 2, 7):
        assert classes_of(type(small)(classes).state_dict(), small) == classes
    assert classes_of(small.state_dict(), small) is None
    wide = {key: torch.zeros(9, *value.shape[1:]) if value.dim() == 4 else value for key, value in small.state_dict().items()}
    assert classes_of({**wide, "fc.weight": torch.zeros(5, 7), "fc.bias": torch.zeros(5)}, small) is None
    older = {key: value for key, value in type(small)(5).state_dict().items() if not key.endswith("num_batches_tracked")}
    assert classes_of(older, small) == 5 and classes_of({**older, "more": torch.ones(1)}, small) is None


WRAPPED = {
    "any name": lambda s: before("student.", s),
    "four wrappers": lambda s: before("model._orig_mod.module.net.", s),
    "compiled, in Lightning, with a loss": lambda s: {**before("net._orig_mod.", s), "criterion.weight": torch.ones(4)},
    "a compiled part": lambda s: {key.replace("body.", "body._orig_mod."): value for key, value in s.items()},
    "another head": lambda s: {**{k: v for k, v in before("a.b.", s).items() if "fc" not in k}, "a.b.head.weight": torch.ones(4)},
}


@pytest.mark.parametrize("case", WRAPPED)
def test_what_wrappers_put_before_and_into_names(small, case):
    state = small.state_dict()
    found = fitted(WRAPPED[case](state), small)
    wanted = state.keys() - {"fc.weight", "fc.bias"} | {"head.weight"} if case == "another head" else state.keys()
    assert found.keys() == wanted and all(torch.equal(found[key], state[key]) for key in found.keys() & state.keys())


def test_weights_that_are_there_twice(small, tmp_path):
    state = small.state_dict()
    torch.save({**before("student.", state), **before("teacher.", state)}, "two.pth")
    with pytest.raises(ValueError, match=r"there several times, as student. and teacher.: save those of one part alone"):
        sp_fx.models.load("small_networks:Small", weights="two.pth")
    other = fill(type(small)(), seed=5).state_dict()
    torch.save({"state_dict": state, "state_dict_ema": other}, "ema.pth")
    with pytest.warns(UserWarning, match=r"weights as 'state_dict' and as 'state_dict_ema': 'state_dict' are taken"):
        assert same(sp_fx.models.load("small_networks:Small", weights="ema.pth").model.model, small)


def test_weights_of_quantised_networks(small):
    state = small.state_dict()
    whole = {k: (v.clamp(-1, 1) * 127).to(torch.int8) if v.dim() > 1 else v for k, v in state.items()}
    torch.save(whole, "whole.pth")
    with pytest.raises(ValueError, match=r"2 of the weights in .* are whole numbers.*body.0.weight is int8 where it has float32"):
        sp_fx.models.load("small_networks:Small", weights="whole.pth")
    quantised = {k: torch.quantize_per_tensor(v, 0.1, 0, torch.qint8) if v.dim() > 1 else v for k, v in state.items()}
    torch.save(quantised, "quantised.pth")
    with pytest.raises(ValueError, match=r"quantised: save those of the network before that") as raised:
        sp_fx.models.load("small_networks:Small", weights="quantised.pth")
    assert len(str(raised.value)) < 200


def test_weights_of_another_network_that_torchvision_has(tmp_path, monkeypatch):
    import torchvision

    monkeypatch.setattr("torchvision.models.list_models", lambda module: ["alexnet", "resnet18", "squeezenet1_1"])  # for time
    state = before("model.", torchvision.models.squeezenet1_1(num_classes=7).state_dict())
    torch.save({"state_dict": state}, tmp_path / "w.ckpt")
    with pytest.raises(ValueError, match=r"do not fit ResNet.*They fit torchvision's squeezenet1_1 with 7 classes: --model sq"):
        sp_fx.models.load("resnet18", weights=tmp_path / "w.ckpt")


def test_several_modules_in_one_file(small):
    torch.save({"model": small, "ema": small}, "two.pt")
    with pytest.raises(ValueError, match=r"two.pt holds several modules, model, ema: torch.save the one that is meant"):
        sp_fx.models.load("two.pt", trust_pickle=True)


@pytest.mark.parametrize("name", ["regnet_y_400mf"])
def test_a_state_dict_in_place_of_a_model_names_the_architecture(tmp_path, name):
    """RegNet counts with tensors while it is made."""
    import torchvision

    state = before("module.", torchvision.models.get_model(name, num_classes=5).state_dict())
    torch.save({"state_dict": state}, tmp_path / "w.pth")
    with pytest.raises(
        ValueError, match=rf"w.pth holds weights alone.*torchvision's {name} with 5 classes: --model {name} --weights"
    ):
        sp_fx.models.load(tmp_path / "w.pth")


def test_a_state_dict_of_a_network_of_ones_own(small, tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.models.list_models", lambda module: ["alexnet", "squeezenet1_0"])  # not all, for time
    torch.save(small.state_dict(), tmp_path / "w.pth.tar")
    with pytest.raises(
        ValueError, match=r"w.pth.tar holds weights alone.*name it: --model module:function --weights .*w.pth.tar"
    ):
        sp_fx.models.load(tmp_path / "w.pth.tar")


def test_what_holds_no_model(tmp_path):
    for content, kind in (([1], "list"), ({"a": 1}, "dict"), (torch.ones(2), "Tensor")):
        torch.save(content, tmp_path / "it.pt")
        with pytest.raises(ValueError, match=f"it.pt holds no model: got {kind}, where a torch.nn.Module was expected"):
            sp_fx.models.load(tmp_path / "it.pt")
    with pytest.raises(FileNotFoundError, match=r"no model file at gone.pt"):
        sp_fx.models.load("gone.pt")
