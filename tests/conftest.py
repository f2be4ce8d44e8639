"""A seed for every test, fixtures of the kernel tests, of packages and of the command, one thread for each of several workers."""

import os
import sys

import pytest
import torch

pytest.register_assert_rewrite("kinds")  # its comparisons say what they compared

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Of the tests by kind, those by export run in the slow form: an export takes ten times as long as a symbolic trace."""
    for item in items:
        by_export = "callspec" in vars(item) and "export" in item.callspec.params.values()
        if item.path.name.startswith("test_kinds") and by_export:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def seeded():
    """What a test draws without a seed of its own does not depend on the tests before it, which the workers share out."""
    torch.manual_seed(0)


@pytest.fixture
def device():
    """Where kernels run: on CPU under Triton's interpreter, else on the GPU."""
    import triton

    return "cpu" if triton.knobs.runtime.interpret else "cuda"


@pytest.fixture
def poisoned():
    """Uninitialised memory is NaN, so that an element that no program writes shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def interpreted(monkeypatch):
    """Programs are made, and not compiled."""
    from shipped import as_graph

    as_graph(monkeypatch)


def packaged(path, **facts):
    from shipped import as_graph, small

    with pytest.MonkeyPatch.context() as patch:
        as_graph(patch)
        explainer, x, made = small()
        return explainer, x, made.save(path, **facts)


@pytest.fixture(scope="module")
def pt2(tmp_path_factory):
    path = tmp_path_factory.mktemp("pt2") / "small.pt2"
    return packaged(path, class_names=list("abcde"), input_space="pixels in [-1, 1]")


@pytest.fixture(scope="module")
def graph_file(tmp_path_factory):
    return packaged(tmp_path_factory.mktemp("onnx") / "small.onnx")


@pytest.fixture(scope="module")
def own_files(tmp_path_factory):
    """Pictures and networks of one's own: written once, and not changed."""
    from command import write_own

    return write_own(tmp_path_factory.mktemp("own"))


@pytest.fixture
def own_folder(own_files, monkeypatch):
    """The folder of these, in which the test works; what it imports is forgotten."""
    monkeypatch.chdir(own_files)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield own_files
    for name in ("own_nets", "beside_own"):
        sys.modules.pop(name, None)
