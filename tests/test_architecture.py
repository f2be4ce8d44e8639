"""The package as others meet it: what an import costs, what depends on what, what the wheel holds."""

import ast
import os
import subprocess
import sys
import zipfile
from graphlib import TopologicalSorter
from importlib.metadata import distribution
from pathlib import Path

import pytest
import torch
from PIL import Image

import sp_fx

README = Path(__file__).parents[1] / "README.md"
ROOT = Path(sp_fx.__file__).parent


def imports(path):
    """Modules that a file imports when it is imported."""
    tree = ast.parse(path.read_text())
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            yield ("." * node.level + (node.module or ""), [a.name for a in node.names])
        elif isinstance(node, ast.Import):
            yield from ((a.name, []) for a in node.names)


def test_imports_form_a_dag():
    graph = {}
    for path in ROOT.glob("*.py"):
        inner = [m[1:] for m, _ in imports(path) if m.startswith(".") and m != "."]
        graph[path.stem] = {m.split(".")[0] for m in inner if path.stem != "__init__"}
    assert {"capture", "rewrite", "explainer"} <= set(TopologicalSorter(graph).static_order())


def test_kernels_know_nothing_of_the_package_and_one_module_knows_them():
    users = {p.stem for p in ROOT.rglob("*.py") for m, _ in imports(p) if m.split(".")[0] == "sp_fx_kernels"}
    assert users <= {"dual"}
    import importlib.util

    spec = importlib.util.find_spec("sp_fx_kernels")
    allowed = {"__future__", "torch", "triton", *sys.stdlib_module_names}
    for folder in spec.submodule_search_locations:
        for path in Path(folder).glob("*.py"):
            assert {m.split(".")[0] for m, _ in imports(path) if not m.startswith(".")} <= allowed


def test_import_is_light():
    code = "import sys, torch; before = set(sys.modules); import sp_fx; print(*(set(sys.modules) - before))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    found = {name.split(".")[0] for name in found.split()}
    assert "sp_fx" in found
    assert not {"torchvision", "timm", "matplotlib", "triton", "PIL", "safetensors", "captum", "sp_fx_kernels"} & found


@pytest.mark.skipif(not README.exists(), reason="the README is not beside these tests")
def test_the_readmes_lines_run(tmp_path, monkeypatch):
    """As they stand, but for the weights, which would be downloaded; the photograph is drawn here."""
    monkeypatch.chdir(tmp_path)
    noise = torch.randint(0, 256, (300, 400, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(noise.numpy()).save("photo.jpg")
    code = README.read_text().split("```python")[1].split("```")[0].replace('weights="DEFAULT"', "weights=None")
    scope = {}
    exec(code, scope)
    x = scope["x"]
    assert x.shape == (1, 3, 224, 224) and -1 <= x.min() < -0.5 and 0.5 < x.max() <= 1
    assert scope["map"].shape == scope["change"].shape == x.shape and scope["maps"].shape == (1, 3, 3, 224, 224)
    assert Path("map.png").stat().st_size > 10_000


def test_the_public_names():
    assert all(hasattr(sp_fx, name) for name in sp_fx.__all__)
    assert sp_fx.__version__ == distribution("sp-fx").version


def test_the_wheel_holds_the_packages_and_nothing_else():
    wheel = os.environ.get("SP_FX_WHEEL")
    if not wheel:
        pytest.skip("SP_FX_WHEEL names no wheel; .ci/run builds one")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"sp_fx", "sp_fx_kernels"}
    assert {"sp_fx/py.typed", "sp_fx_kernels/py.typed", "sp_fx/zoo/weights/manifest.json"} <= set(names)
    assert any(name.endswith("LICENSE") for name in names)
    assert Path(sp_fx.__file__).is_relative_to(sys.prefix)  # the tests run against the wheel, not the checkout
