"""Packages: what is loaded answers as the explainer does, and what may not be served is refused."""

import errno
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sp_fx
from helpers import NETS, fill, golden, relative
from shipped import Block, rewritten, small
from sp_fx.containers import slotted
from sp_fx.packages import manifest, package, probe

onnxruntime = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")


# -- right


def test_attention_in_onnx(interpreted, tmp_path):
    explainer, x = sp_fx.transform(fill(Block())), torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(0))
    loaded = sp_fx.load(explainer.compile(example_inputs=x).save(tmp_path / "a.onnx"))
    for some in (x, x[:1]):
        outputs, maps = loaded(some, 1)
        assert relative(outputs, explainer(some)) <= 1e-5
        assert relative(maps, explainer.pullback(some, 1)) <= 1e-4


@pytest.mark.parametrize("net", ["tiny_resnet", pytest.param("tiny_pvt", marks=pytest.mark.slow)])
def test_onnx_equals_the_explainer(interpreted, net, tmp_path):
    model, data = golden(net)
    explainer, x, t = sp_fx.transform(model), data["input"], data["target"]
    loaded = sp_fx.load(explainer.compile(example_inputs=x).save(tmp_path / "a.onnx"))
    for n in (1, 2, 5):
        some, classes = x.repeat(2, 1, 1, 1)[:n], t.repeat(2)[:n]
        outputs, maps = loaded(some, classes)
        assert relative(outputs, model(some)) <= 1e-5
        assert relative(maps, explainer.pullback(some, classes)) <= 1e-4
    assert relative(loaded(x)[1], explainer.pullback(x)) <= 1e-4
    nodes = onnx.load(tmp_path / "a.onnx").graph.node
    assert not {n.op_type for n in nodes if "Scatter" in n.op_type or n.domain not in ("", "ai.onnx")}
    if net == "tiny_resnet":  # what interleaves phases has 5 axes and more; a change of layout would have 4
        assert all(len(a.ints) > 4 for n in nodes if n.op_type == "Transpose" for a in n.attribute if a.name == "perm")


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
@pytest.mark.parametrize("net", NETS)
def test_every_golden_network_travels(net, suffix, tmp_path, interpreted):
    model, data = golden(net)
    explainer, x, t = sp_fx.transform(model, rules=sp_fx.Rules.paper()), data["input"], data["target"]
    loaded = sp_fx.load(explainer.compile(example_inputs=x).save(tmp_path / f"a{suffix}"))
    outputs, maps = loaded(x, t)
    assert relative(outputs, data["logits"]) <= 1e-5
    assert relative(maps, data["soft_pullback"]) <= 1e-4


class Attends(nn.Module):
    """Activations [B, L, 8] and a mask of tokens, as a text model from its embedding on."""

    def __init__(self, causal):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.causal = nn.Linear(8, 24), nn.Linear(8, 3), causal

    def forward(self, h, mask):
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.first(h).chunk(3, -1))
        allowed = None if self.causal else mask[:, None, None, :].bool()
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, is_causal=self.causal)
        return self.last(y.transpose(1, 2).flatten(2).mean(1))


@pytest.mark.parametrize("causal", [False, True])
def test_attention_of_a_text_that_is_masked_whole(interpreted, tmp_path, causal):
    """Whole numbers of the probe are the example's: a mask of zeros, which hides all of a text, is no probe. Where one comes, the
    package answers as the program does, without NaN."""
    h, mask = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0)), torch.ones(3, 5, dtype=torch.long)
    mask[1, 3:] = 0
    explainer = sp_fx.transform(Attends(causal).eval(), tracer="export", example_inputs=(h, mask))
    program = explainer.compile("pullback", example_inputs=(h, mask), inductor=False)
    packaged = sp_fx.load(program.save(tmp_path / "text.onnx"))
    assert packaged.manifest["probe"]["integers"] == [None, mask[:2].tolist()]
    hidden = mask.clone()
    hidden[2] = 0
    for given in (mask, hidden):
        (y, maps), (want, wanted) = packaged((h, given), 1), program((h, given), 1)
        assert y.isfinite().all() and relative(y, want) <= 1e-5 and relative(maps[0], wanted[0]) <= 1e-4


def test_onnx_takes_means_without_loss(interpreted, tmp_path):
    """The scale of a pooling is a mean of squares over 400,000 numbers a sample: added up in a row, as ONNX Runtime does over
    several axes at once, it is 1e-5 off. With a head of ones the map hangs on that scale alone."""

    class Stem(nn.Module):
        def forward(self, x):
            return F.max_pool2d(x * 100, 3, 2, 1).flatten(1).mean(1, keepdim=True)

    x = torch.rand(2, 64, 80, 80, generator=torch.Generator().manual_seed(0)) ** 4
    explainer = sp_fx.transform(Stem().eval())
    loaded = sp_fx.load(explainer.compile(example_inputs=x).save(tmp_path / "a.onnx"))
    exact = sp_fx.transform(Stem().eval()).pullback(x.double(), 0)
    assert relative(loaded(x, 0)[1].double(), exact) <= 2e-6


def test_onnx_takes_a_mean_of_a_mean(interpreted, tmp_path):
    class Twice(nn.Module):
        def forward(self, x):
            rows = F.gelu(x).mean((2, 3))
            return rows * rows.mean(1, keepdim=True) + x.mean(3).mean((1, 2), keepdim=True)[..., 0]

    x = torch.randn(2, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    explainer = sp_fx.transform(Twice().eval())
    outputs, maps = sp_fx.load(explainer.compile(example_inputs=x).save(tmp_path / "a.onnx"))(x, 1)
    assert relative(outputs, explainer(x)) <= 1e-5 and relative(maps, explainer.pullback(x, 1)) <= 1e-5


METHODS = [
    ("double_pullback", {"step": 1.5}),
    ("ascend", {"steps": 3, "bounds": (-1.0, 1.0), "radius": 2.0}),
    ("ascend", {"steps": 3, "bounds": (-1.0, 1.0), "clip": "last"}),
    ("ascend", {"steps": 2, "step_size": 0.5, "unrolled": True}),
]


@pytest.mark.parametrize("suffix", [".onnx", pytest.param(".pt2", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "method, arguments", [METHODS[0], METHODS[1], *(pytest.param(*pair, marks=pytest.mark.slow) for pair in METHODS[2:])]
)
def test_every_method_travels(interpreted, method, arguments, suffix, tmp_path):
    explainer, x, made = small(method=method, **arguments)
    loaded = sp_fx.load(made.save(tmp_path / f"a{suffix}"))
    wanted = getattr(explainer, method)(x, **{k: v for k, v in arguments.items() if k != "unrolled"})
    outputs, maps = loaded(x)
    assert relative(outputs, explainer(x)) <= 1e-5
    assert relative(maps, wanted) <= (1e-4 if method == "double_pullback" else 1e-3)  # normalised steps amplify rounding


def test_pt2_equals_the_explainer_at_any_batch(pt2):
    explainer, x, path = pt2
    loaded = sp_fx.load(path)
    for n in (1, 2, 3, 7):
        some = x.repeat(3, 1, 1, 1)[:n]
        outputs, maps = loaded(some, torch.arange(n) % 5)
        assert relative(outputs, explainer(some)) <= 1e-5
        assert relative(maps, explainer.pullback(some, torch.arange(n) % 5)) <= 1e-4
    with torch.inference_mode():
        assert relative(loaded(x, -1)[1], explainer.pullback(x)) <= 1e-4


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.mix = nn.Embedding(7, 5), nn.Linear(5, 4)

    def forward(self, x, ids):
        h = F.gelu(x + self.embed(ids))
        return {"logits": self.mix(h), "hidden": h}


def test_several_inputs_and_outputs_travel(interpreted, tmp_path):
    explainer = sp_fx.transform(fill(Odd()))
    x, ids = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 3, 6])
    loaded = sp_fx.load(explainer.compile(example_inputs=(x, ids)).save(tmp_path / "a.onnx"))
    outputs, maps = loaded((x, ids), 2)
    assert outputs.keys() == {"logits", "hidden"} and maps[1] is None
    assert relative(maps[0], explainer.pullback((x, ids), 2)[0]) <= 1e-5


def test_a_direction_and_a_fixed_batch_travel(interpreted, tmp_path):
    explainer, x, made = small(target="direction", dynamic_batch=False)
    loaded = sp_fx.load(made.save(tmp_path / "a.onnx"))
    u = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    assert relative(loaded(x, u)[1], explainer.pullback(x, u)) <= 1e-5
    with pytest.raises(ValueError, match="a batch of 3 alone"):
        loaded(x[:2], u[:2])


def test_the_manifest_says_what_was_packaged(pt2, graph_file):
    packaged = package.read_manifest(pt2[2])
    assert packaged["method"] == "pullback" and packaged["rules"] == "Rules()" and packaged["model"] == "Small"
    assert packaged["class_names"] == list("abcde") and packaged["input_space"] == "pixels in [-1, 1]"
    assert packaged["versions"]["torch"] == torch.__version__ and packaged["machine"]["architecture"]
    assert packaged["weights_sha256"] == package.read_manifest(graph_file[2])["weights_sha256"]
    properties = {p.key: p.value for p in onnx.load(graph_file[2]).metadata_props}
    assert json.loads(properties["sp_fx"]) == package.read_manifest(graph_file[2])
    onnx.checker.check_model(str(graph_file[2]))


def test_the_probe_is_its_formula():
    def one(i):
        x = 2654435769 * (i + 1) % 2**32
        x ^= x >> 15
        x = x * 2246822519 % 2**32
        return (x >> 8) / 2**23 - 1

    assert probe.weyl(1000).tolist() == [one(i) for i in range(1000)]
    many = probe.weyl(200_000)
    assert abs(many.mean()) < 0.01 and abs(many.std() - 3**-0.5) < 0.01


def test_a_sketch_keeps_distances():
    g = np.random.default_rng(0)
    a, b = torch.from_numpy(g.standard_normal(30_000)), torch.from_numpy(g.standard_normal(30_000))
    # 256 sums estimate a squared distance to about sqrt(2 / 256)
    assert np.linalg.norm(probe.sketch(a) - probe.sketch(b)) == pytest.approx(float((a - b).norm()), rel=0.2)


# -- what is refused


def test_pt2_for_another_machine_is_refused(pt2, tmp_path):
    path, to = pt2[2], tmp_path / "a.pt2"
    with pytest.raises(sp_fx.PackageError, match=r"made for cpu, and 'cuda' was asked for"):
        sp_fx.load(path, device="cuda")
    for change, message in (
        (lambda m, _: m["versions"].update(torch="99.1.0"), r"compiled by torch 99.1.0, and this is torch"),
        (lambda m, _: m["machine"].update(architecture="riscv64"), r"compiled for Linux riscv64.*this machine is"),
        (lambda m, _: m["machine"].update(capability="AVX1024"), r"AVX1024"),
        (lambda m, _: m.update(device="cuda", machine={"system": "Linux", "architecture": "x", "capability": "sm_90"}), "cuda"),
        (lambda m, _: m.update(format=1), "format 1.*reads 2"),
        (lambda m, _: m["probe"].update(outputs=[[0.0] * 10]), "does not answer its probe.*the outputs differ by"),
        (lambda m, _: m["probe"]["maps"][0].reverse(), "does not answer its probe.*the maps differ by"),
    ):
        with pytest.raises(sp_fx.PackageError, match=message):
            sp_fx.load(rewritten(path, to, change))
    with pytest.raises(sp_fx.PackageError, match="its manifest has another digest"):
        sp_fx.load(rewritten(path, to, lambda m, _: m.update(class_names=["another"]), seal=dict))


def test_a_truncated_or_altered_pt2_is_refused(pt2, tmp_path):
    path, to = pt2[2], tmp_path / "a.pt2"
    whole = path.read_bytes()
    for kept in (0, 100, len(whole) // 2, len(whole) - 1):
        to.write_bytes(whole[:kept])
        with pytest.raises(sp_fx.PackageError, match="not a whole package"):
            sp_fx.load(to)
    to.write_bytes(whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1 :])
    with pytest.raises(sp_fx.PackageError, match=r"whole package|altered"):
        sp_fx.load(to)

    def swap(manifest, members):
        name = next(n for n in members if n.endswith(".so"))
        members[name] = members[name][:-4] + b"\0\1\2\3"

    with pytest.raises(sp_fx.PackageError, match="altered after it was written"):
        sp_fx.load(rewritten(path, to, swap))


def test_a_truncated_or_altered_onnx_is_refused(graph_file, tmp_path):
    whole, to = graph_file[2].read_bytes(), tmp_path / "a.onnx"
    for kept in (0, 100, len(whole) // 2, len(whole) - 1):
        to.write_bytes(whole[:kept])
        with pytest.raises(sp_fx.PackageError, match="not a whole package"):
            sp_fx.load(to)
    for place in (10, len(whole) // 3):
        to.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(sp_fx.PackageError, match="altered after it was written"):
            sp_fx.load(to)
    start = whole.rindex(b'"maps": [[') + 10
    digit = b"9" if whole[start : start + 1] == b"7" else b"7"
    to.write_bytes(whole[:start] + digit + whole[start + 1 :])
    with pytest.raises(sp_fx.PackageError, match="its manifest has another digest"):
        sp_fx.load(to)
    between = onnx.ModelProto(producer_name="another").SerializeToString()
    place = whole.rindex(b"\x0a\x05sp_fx\x12") - 4  # the tag, and a length of three bytes
    to.write_bytes(whole[:place] + between + whole[place:])
    with pytest.raises(sp_fx.PackageError, match="does not follow its graph"):
        sp_fx.load(to)
    with pytest.raises(sp_fx.PackageError, match=r"runs on the CPU here, got device='cuda'"):
        sp_fx.load(graph_file[2], device="cuda")


def test_what_is_no_package(tmp_path, graph_file):
    with pytest.raises(FileNotFoundError, match="no package at"):
        sp_fx.load(tmp_path / "a.pt2")
    (tmp_path / "a.txt").write_text("cat")
    with pytest.raises(sp_fx.PackageError, match=r"\*.pt2 or \*.onnx"):
        sp_fx.load(tmp_path / "a.txt")
    shutil.copy(tmp_path / "a.txt", tmp_path / "a.pt2")
    with pytest.raises(sp_fx.PackageError, match="not a whole package"):
        sp_fx.load(tmp_path / "a.pt2")


def test_requests_that_cannot_be_met(interpreted, tmp_path, graph_file):
    _, _, made = small()
    with pytest.raises(ValueError, match=r"\*.pt2.*or \*.onnx.*got 'a.zip'"):
        made.save(tmp_path / "a.zip")
    with pytest.raises(ValueError, match="2 class names for an output of 5 classes"):
        made.save(tmp_path / "a.onnx", class_names=["a", "b"])
    with pytest.raises(ValueError, match="loaded from a package"):
        sp_fx.load(graph_file[2]).save(tmp_path / "b.onnx")


class Unheard(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.odd = nn.Linear(6, 6), OddOp()
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(F.relu(self.odd(self.first(x))))


class OddOp(nn.Module):
    def forward(self, x):
        return torch.special.i0e(x)


class Alone(nn.Module):
    """Two calls in the model's own forward, of which the adjoint of the second is what ONNX refuses."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = F.relu(x)
        return self.head(torch.special.i1e(x))


@pytest.mark.parametrize(
    "model, place", [(Unheard, r"odd \(OddOp\)"), (Alone, r"the model itself \(test_packages_package\.py:\d+\)")]
)
def test_an_op_that_onnx_has_not_is_named_with_its_layer(interpreted, model, place, tmp_path):
    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    made = sp_fx.transform(fill(model())).compile(example_inputs=x)
    with pytest.raises(sp_fx.PackageError, match=rf"ONNX does not take this program: [\w.]*i[01]e[\w.]* in {place}: "):
        made.save(tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


def test_nodes_of_one_graph_know_their_layer(interpreted):
    """Forward and adjoint alike; what only the adjoint has is where the value comes from that it takes from the way in: the
    gate's erf at the convolution, the pooling's exp at the call of the gate."""
    _, _, made = small()
    layers = {}
    for node in made.graph.graph.nodes:
        if node.op == "call_function" and node.target != torch.ops.aten.sym_size.int:
            layers.setdefault(str(node.target), set()).add(node.meta["custom"]["layer"])
    assert layers["aten.convolution.default"] == {"conv (Conv2d)"}
    assert layers["aten.addmm.default"] == layers["aten.mm.default"] == {"head (Linear)"}
    assert layers["aten.erf.default"] == {"conv (Conv2d)"}
    assert layers["aten.exp.default"] == layers["aten.relu.default"] and "the model itself" in str(layers["aten.relu.default"])


def test_a_package_needs_no_model_code(pt2, tmp_path):
    """In another process, which has neither this file's classes nor autograd in the calls, and imports no tracer."""
    _, x, path = pt2
    torch.save(x, tmp_path / "x.pt")
    code = (
        "import sys, torch, sp_fx\n"
        f"loaded = sp_fx.load({str(path)!r}); x = torch.load({str(tmp_path / 'x.pt')!r})\n"
        "y, m = loaded(x)\n"
        "assert not m.requires_grad and not {'sp_fx.program.compiling', 'sp_fx.program.graphs.graph'} & set(sys.modules)\n"
        "print(tuple(m.shape))"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.stdout.strip() == str(tuple(x.shape)), process.stderr


def test_a_network_that_magnifies_rounding_is_not_packaged(tmp_path, monkeypatch):
    """The engine's other order of sums, here made by hand; nothing is left of the file."""
    *_, program = small()
    load_graph = package.onnx.load_graph

    def otherwise(path, device, threads):
        manifest, run = load_graph(path, device, threads)
        return manifest, lambda *tensors: [1.01 * result for result in run(*tensors)]

    monkeypatch.setattr(package.onnx, "load_graph", otherwise)
    with pytest.raises(sp_fx.PackageError, match=r"/a\.onnx does not answer its probe.*the network magnifies rounding that far"):
        program.save(tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    *_, program = small()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(package.onnx, "write", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/a\.onnx'"):
        program.save(tmp_path / "a.onnx")


def test_outputs_of_a_class_that_is_not_installed_come_as_a_dictionary():
    outputs = pytest.importorskip("transformers.modeling_outputs")
    skeleton = slotted(outputs.SequenceClassifierOutput(logits=torch.zeros(2, 3), hidden_states=(torch.zeros(2),)))[0]
    spec, plain = manifest.encoded_skeleton(skeleton), manifest.encoded_skeleton(manifest.plainly(skeleton))
    assert type(manifest.decoded_skeleton(spec, plain)) is outputs.SequenceClassifierOutput
    elsewhere = spec.replace("SequenceClassifierOutput", "NotInstalled")
    found = manifest.decoded_skeleton(elsewhere, plain)
    assert type(found) is dict and list(found) == ["logits", "hidden_states"]
    assert [slot.index for slot in (found["logits"], *found["hidden_states"])] == [0, 1]
    with pytest.raises(NotImplementedError):  # of a package of before, which has no other
        manifest.decoded_skeleton(elsewhere, None)
