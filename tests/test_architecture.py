"""The package as others meet it: what an import costs, what depends on what, what the wheel holds."""

import ast
import os
import subprocess
import sys
import types
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


ORDER = """
containers version targets zoo gates capture analysis rewrite measured methods texts program
explainer build checks models figures bridges viewer packages serving plot offline cli __main__
""".split()  # lowest first: a file imports from its own folder and from those before it
FILES = sorted(p for p in ROOT.rglob("*.py"))


def imports(path):
    """The modules that a file imports, wherever in it: at its head, in a function, under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield ("." * node.level + (node.module or ""), [a.name for a in node.names])
        elif isinstance(node, ast.Import):
            yield from ((a.name, []) for a in node.names)


def imported_files(path):
    """The files of the package that a file imports from."""
    for module, names in imports(path):
        if module.startswith("."):
            level = len(module) - len(module.lstrip("."))
            base = path.parents[level - 1].joinpath(*filter(None, module.lstrip(".").split(".")))
        elif module.split(".")[0] == "sp_fx":
            base = ROOT.parent.joinpath(*module.split("."))
        else:
            continue
        for name in names or [""]:
            target = next(f for f in (base / f"{name}.py", base / name / "__init__.py", base.with_suffix(".py"), base /
            "__init__.py")
                          if f.is_file())  # fmt: skip
            yield target


def room(path):
    """The folder of the package that a file is in, or the file's own name at the top."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def test_files_import_each_other_in_no_circle():
    graph = {path: set(imported_files(path)) for path in FILES}
    assert {ROOT / "capture/symbolic.py", ROOT / "rewrite/rewrite.py"} <= set(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("path", [p for p in FILES if room(p) != "__init__"], ids=lambda p: str(p.relative_to(ROOT)))
def test_files_import_downwards_only(path):
    above = {room(f) for f in imported_files(path) if ORDER.index(room(f)) > ORDER.index(room(path))}
    assert not above, f"{path.relative_to(ROOT)} imports from {', '.join(sorted(above))}, which stand above it"


def test_rooms_are_small():
    folders = {path.parent for path in FILES}
    for folder in folders:
        modules = [p.name for p in folder.glob("*.py") if p.name != "__init__.py"]
        assert len(modules) <= 8, f"{folder}: {modules}"
    for path in FILES:
        text = path.read_text()
        assert len(text.splitlines()) <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                methods = [n.name for n in node.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("__")]
                assert len(methods) <= 15, f"{path}: {node.name} has {len(methods)} methods"


def test_the_top_has_public_names_and_folders_only():
    """A folder has the name of no public function, which importing it would replace; what else is there has an underscore."""
    names = {name for name in vars(sp_fx) if not name.startswith("_")}
    assert names <= {*sp_fx.__all__, *ORDER}
    functions = {name for name in sp_fx.__all__ if not isinstance(getattr(sp_fx, name), types.ModuleType)}
    assert not functions & {path.stem for path in ROOT.iterdir()}


def test_kernels_know_nothing_of_the_package_and_one_module_knows_them():
    users = {p.stem for p in FILES for m, _ in imports(p) if m.split(".")[0] == "sp_fx_kernels"}
    assert users == {"kernels"}
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
    """As they stand; the weights and the picture of the commands before them are drawn here."""
    import torchvision

    monkeypatch.chdir(tmp_path)
    noise = torch.randint(0, 256, (96, 96, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Path("photos").mkdir()
    Image.fromarray(noise.numpy()).save("photos/00.png")
    torch.save(torchvision.models.resnet18(num_classes=5).state_dict(), "mine.pth")
    scope = {}
    exec(README.read_text().split("```python")[1].split("```")[0], scope)
    x = scope["x"]
    assert x.shape == (1, 3, 64, 64) and -1 <= x.min() < -0.4 and 0.4 < x.max() <= 1
    assert scope["map"].shape == scope["change"].shape == x.shape and scope["maps"].shape == (1, 3, 3, 64, 64)
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
