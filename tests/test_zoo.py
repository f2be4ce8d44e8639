import json
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

from sp_fx import zoo
from sp_fx.zoo import networks, store

UNSEEN_SEED = 31_337


@pytest.fixture(scope="module")
def scenes():
    return zoo.draw(UNSEEN_SEED, 500)


@pytest.fixture(params=zoo.NAMES)
def name(request):
    return request.param


def test_types_and_ranges(scenes):
    assert scenes.pixels.shape == (500, 3, 96, 96) and scenes.pixels.dtype == torch.float32
    assert scenes.labels.shape == (500,) and scenes.labels.dtype == torch.int64
    assert scenes.masks.shape == (500, 96, 96) and scenes.masks.dtype == torch.bool
    assert scenes.pixels.min() >= -1 and scenes.pixels.max() <= 1
    assert scenes.labels.bincount().tolist() == [50] * 10
    assert len(zoo.KINDS) == len(set(zoo.KINDS)) == 10 and zoo.labels == zoo.KINDS


def test_a_scene_depends_on_its_seed_and_number_alone(scenes):
    few = zoo.draw(UNSEEN_SEED, 7)
    later = zoo.draw(UNSEEN_SEED, 5, start=20)
    for part, where in ((few, slice(0, 7)), (later, slice(20, 25))):
        for got, expected in zip(part, scenes, strict=True):
            assert torch.equal(got, expected[where])
    assert not torch.equal(zoo.draw(UNSEEN_SEED + 1, 7).pixels, few.pixels)


def test_other_kinds_in_the_same_place():
    stars, rings = zoo.draw(3, 6, kinds=["star"]), zoo.draw(3, 6, kinds=["ring"])
    assert stars.labels.tolist() == [zoo.KINDS.index("star")] * 6
    same = (stars.pixels == rings.pixels).all(1).flatten(1).float().mean(1)
    either = (stars.masks | rings.masks).flatten(1).float().mean(1)
    assert (same > 0.6).all() and (same < 1).all() and (either < 0.4).all()


def test_masks_hold_one_object_inside_the_picture(scenes):
    share = scenes.masks.flatten(1).float().mean(1)
    assert 0.01 < share.min() and share.max() < 0.3
    border = torch.ones(96, 96, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    assert not (scenes.masks & border).any()


def test_the_object_stands_out_from_what_is_round_it(scenes):
    masks = scenes.masks[:, None].float()
    near = torch.nn.functional.max_pool2d(masks, 9, 1, 4) - masks

    def mean(weights):
        return (scenes.pixels * weights).sum((2, 3)) / weights.sum((2, 3))

    assert (mean(masks) - mean(near)).norm(dim=1).quantile(0.05) > 0.2


@pytest.mark.parametrize("part", ["picture", "object"])
def test_colour_does_not_tell_the_kind(part):
    seen = zoo.draw(1, 1500)
    weights = seen.masks[:, None].float() if part == "object" else torch.ones(1500, 1, 96, 96)
    total = weights.sum((2, 3))
    mean = (seen.pixels * weights).sum((2, 3)) / total
    spread = ((seen.pixels - mean[..., None, None]) ** 2 * weights).sum((2, 3)).div(total).sqrt()
    features = torch.cat([mean, spread, mean**2, torch.ones(1500, 1)], 1)
    answers = nn.functional.one_hot(seen.labels).float()
    fit = torch.linalg.lstsq(features[:1000], answers[:1000]).solution
    right = ((features[1000:] @ fit).argmax(1) == seen.labels[1000:]).float().mean()
    assert right < 0.2


@pytest.mark.parametrize("size", [32, 96, 128])
def test_any_size(size):
    assert zoo.draw(0, 2, size=size).masks.shape == (2, size, size)


def test_draw_refuses_what_it_cannot_draw():
    with pytest.raises(ValueError, match="unicorn"):
        zoo.draw(0, 1, kinds=["unicorn"])
    with pytest.raises(ValueError, match="count >= 0"):
        zoo.draw(0, -1)


def test_accuracy_on_unseen_scenes(name, scenes):
    with torch.no_grad():
        answers = zoo.load(name)(scenes.pixels).argmax(1)
    assert (answers == scenes.labels).float().mean() >= 0.95


def test_loaded_network_is_ready(name):
    network = zoo.load(name)
    assert not any(module.training for module in network.modules())
    assert all(value.dtype in (torch.float32, torch.int64) for value in network.state_dict().values())
    assert sum(value.numel() for value in network.parameters()) <= 490_000
    assert (store.WEIGHTS / f"{name}.safetensors").stat().st_size <= 2_000_000
    assert network(torch.zeros(2, 3, 96, 96)).shape == (2, 10)


def test_manifest_tells_the_truth(name):
    entry = json.loads((store.WEIGHTS / "manifest.json").read_text())[name]
    assert entry["labels"] == list(zoo.KINDS) and entry["accuracy"] >= 0.95 and entry["seed"] != UNSEEN_SEED
    assert entry["bytes"] == (store.WEIGHTS / entry["file"]).stat().st_size


def test_symbolic_trace_agrees_bitwise(name, scenes):
    network = zoo.load(name)
    traced = torch.fx.symbolic_trace(network)
    with torch.no_grad():
        assert torch.equal(traced(scenes.pixels[:4]), network(scenes.pixels[:4]))
        assert traced(scenes.pixels[:3]).shape == (3, 10)


def test_residual_cnn_is_what_it_claims():
    traced = torch.fx.symbolic_trace(zoo.load("residual_cnn"))
    called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    modules = dict(traced.named_modules())
    gates = {target for target in called if isinstance(modules[target], nn.ReLU)}
    assert all(modules[gate].inplace for gate in gates)
    assert sum(called.count(gate) == 2 for gate in gates) == len(gates) - 1 >= 4
    pools = [module for module in modules.values() if isinstance(module, nn.MaxPool2d)]
    assert [(pool.kernel_size, pool.stride, pool.padding) for pool in pools] == [(3, 2, 1)]
    assert any(isinstance(module, nn.BatchNorm2d) for module in modules.values())


def test_residual_cnn_has_unit_scale_gates(scenes):
    network, spreads = zoo.load("residual_cnn"), []
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda _, inputs, output: spreads.append(output.std().item()))
    with torch.no_grad():
        network(scenes.pixels[:50])
    assert all(0.1 < spread < 5 for spread in spreads)


def test_pyramid_transformer_is_what_it_claims():
    traced = torch.fx.symbolic_trace(zoo.load("pyramid_transformer"))
    functions = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    modules = list(traced.modules())
    assert functions.count(nn.functional.scaled_dot_product_attention) == 6
    assert sum(isinstance(module, nn.GELU) for module in modules) == 6
    assert any(isinstance(module, nn.LayerNorm) for module in modules)
    convolutions = [module for module in modules if isinstance(module, nn.Conv2d)]
    assert any(conv.kernel_size > conv.stride and conv.groups == 1 for conv in convolutions)
    assert sum(conv.groups == conv.in_channels for conv in convolutions) == 6


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"did you mean 'residual_cnn'.*pyramid_transformer"):
        zoo.load("residual-cnn")
    with pytest.raises(ValueError, match="choices: residual_cnn, pyramid_transformer"):
        zoo.load("zzz")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors"):
        zoo.load("residual_cnn", weights=tmp_path / "gone.safetensors")


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """A copy of the packaged weights that a test may spoil."""
    folder = shutil.copytree(store.WEIGHTS, tmp_path / "weights")
    monkeypatch.setattr(store, "WEIGHTS", folder)
    return folder


def test_changed_bytes_are_noticed(packaged):
    path = packaged / "residual_cnn.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"sha256.*expected"):
        zoo.load("residual_cnn")
    zoo.load("residual_cnn", weights=path)


def test_missing_manifest_or_entry(packaged):
    for damaged in ("{", "[]", '{"residual_cnn": {}}'):
        (packaged / "manifest.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"manifest|no entry"):
            zoo.load("residual_cnn")
    (packaged / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="no entry for 'residual_cnn'"):
        zoo.load("residual_cnn")
    (packaged / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match="manifest"):
        zoo.load("residual_cnn")


def test_weights_of_the_other_network(packaged):
    with pytest.raises(ValueError, match=r"does not hold 'residual_cnn'.*missing"):
        zoo.load("residual_cnn", weights=packaged / "pyramid_transformer.safetensors")


def test_truncated_and_empty_files(packaged):
    path = packaged / "residual_cnn.safetensors"
    for content in (path.read_bytes()[:1000], b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="sha256"):
            zoo.load("residual_cnn")
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            zoo.load("residual_cnn", weights=path)


def test_swapped_files_are_noticed(packaged):
    one, other = (packaged / f"{name}.safetensors" for name in zoo.NAMES)
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    for name in zoo.NAMES:
        with pytest.raises(ValueError, match=r"not the packaged file: got \d+ bytes .* expected \d+ with"):
            zoo.load(name)


def test_numbers_that_are_none(tmp_path):
    network = networks.ResidualCNN()
    with torch.no_grad():
        network.head.bias[3] = float("inf")
    with pytest.raises(ValueError, match=r"damaged: 1 of its tensors have NaN or infinity in them \(first: \['head.bias'\]\)"):
        zoo.load("residual_cnn", weights=store.save("residual_cnn", network, tmp_path))


def test_wrong_shape(tmp_path):
    network = networks.ResidualCNN()
    network.head = nn.Linear(96, 11)
    path = store.save("residual_cnn", network, tmp_path)
    with pytest.raises(ValueError, match=r"'head\.weight' is torch.float32 \[11, 96\], expected torch.float32 \[10, 96\]"):
        zoo.load("residual_cnn", weights=path)


def test_save_then_load(tmp_path, name):
    network = networks.NETWORKS[name]().eval()
    path = store.save(name, network, tmp_path, seed=5)
    assert json.loads((tmp_path / "manifest.json").read_text())[name]["seed"] == 5
    again = zoo.load(name, weights=path)
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), again.state_dict().values(), strict=True))


def test_import_is_light():
    code = "import sys, torch, numpy; before = set(sys.modules); import sp_fx.zoo; print(*(set(sys.modules) - before))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"safetensors", "PIL", "timm", "torchvision", "matplotlib", "scipy"}
    assert heavy.isdisjoint(module.split(".")[0] for module in result.stdout.split())


@pytest.mark.parametrize("name", ["residual_cnn", pytest.param("pyramid_transformer", marks=pytest.mark.slow)])
def test_training_repeats_itself_bitwise(name, monkeypatch):
    from sp_fx.zoo import train

    monkeypatch.setattr(train, "BATCH", 8)  # a step on 64 pictures takes as long as fifty tests

    def run():
        return train.train(name, seed=4, epochs=2, scenes=8, rate=1e-3, push=2.0, report=lambda line: None).state_dict()

    first, second, untrained = run(), run(), networks.NETWORKS[name]().state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not any(torch.equal(first[key], untrained[key]) for key in first if key.endswith("weight") and first[key].dim() > 1)


def test_loading_is_quick():
    """Less than torch's own import, with matplotlib, scipy and torchvision left alone; measured a tenth of it."""
    code = (
        "import sys, time; start = time.perf_counter(); import torch, numpy; "
        "ready, before = time.perf_counter(), set(sys.modules); "
        "from sp_fx import zoo; [zoo.load(name) for name in zoo.NAMES]; "
        "print(ready - start, time.perf_counter() - ready, *(set(sys.modules) - before))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    of_torch, seconds, *modules = result.stdout.split()
    assert float(seconds) < float(of_torch)
    assert {"PIL", "timm", "torchvision", "matplotlib", "scipy"}.isdisjoint(module.split(".")[0] for module in modules)
