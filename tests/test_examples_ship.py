"""The examples that run a package: ONNX Runtime without torch, and a batch job that is killed."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import relative
from test_shipping import graph_file  # noqa: F401

EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not EXAMPLES.exists(), reason="the examples are not beside these tests")]
NO_TORCH = """
import sys, runpy
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "sp_fx"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_onnx_runtime_where_torch_cannot_be_imported(graph_file, tmp_path):  # noqa: F811
    explainer, x, path = graph_file
    np.save(tmp_path / "x.npy", x.numpy())

    def run(package):
        files = [EXAMPLES / "onnx_runtime.py", package, tmp_path / "x.npy", tmp_path / "out.npz"]
        return subprocess.run([sys.executable, "-c", NO_TORCH, *files, "--target", "2"], capture_output=True, text=True)

    done = run(path)
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "out.npz")
    assert relative(torch.from_numpy(found["outputs"]), explainer(x)) <= 1e-5
    assert relative(torch.from_numpy(found["map"]), explainer.pullback(x, 2)) <= 1e-4
    body, weights = path.read_bytes(), explainer.head.bias.detach().numpy().tobytes()
    assert weights in body
    for altered, said in (
        (body.replace(weights, weights[:4] * 5), "was altered after it was written"),
        (re.sub(rb'("maps": \[\[-?)\d', rb"\g<1>9", body, count=1), "does not answer its probe"),
    ):
        (tmp_path / "altered.onnx").write_bytes(altered)
        assert said in run(tmp_path / "altered.onnx").stderr


def pictures(folder, count):
    """Drawn scenes as PNG, of which number 5 is cut short and number 6 is text."""
    from PIL import Image

    from sp_fx import zoo

    folder.mkdir()
    for i, pixels in enumerate(zoo.draw(7, count, size=32).pixels):
        Image.fromarray(((pixels + 1) * 127.5).byte().permute(1, 2, 0).numpy()).save(folder / f"{i:05d}.png")
    (folder / "00005.png").write_bytes((folder / "00005.png").read_bytes()[:200])
    (folder / "00006.png").write_text("cat")
    return folder


@pytest.mark.parametrize("count", [2000])
def test_a_killed_batch_job_goes_on(graph_file, tmp_path, count):  # noqa: F811
    _, _, path = graph_file
    folder = pictures(tmp_path / "pictures", count)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "3", "--standalone"]

    def start(out):
        command = [*torchrun, EXAMPLES / "torchrun_batch.py", path, folder, out]
        with (tmp_path / f"{out.name}.log").open("w") as log:
            return subprocess.Popen(command, start_new_session=True, stderr=log)

    assert start(tmp_path / "calm").wait(300) == 0
    job, out = start(tmp_path / "out"), tmp_path / "out"
    until = time.monotonic() + 120
    while len(list(out.glob("batch_*.npz"))) < 20 and time.monotonic() < until:
        time.sleep(0.02)
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(job.pid)], capture_output=True, text=True, check=True)
    os.kill(int(found.stdout.split()[0]), signal.SIGKILL)  # one of the two workers
    assert 0 < len(list(out.glob("batch_*.npz"))) < count // 8
    assert job.wait(300) == 0
    assert "(exitcode: -9)" in (tmp_path / "out.log").read_text()

    names, errors = [], {}
    for file in sorted((tmp_path / "calm").glob("*")):
        calm, other = np.load(file), np.load(out / file.name)
        assert calm.files == other.files
        assert all(calm[key].tobytes() == other[key].tobytes() for key in calm.files)
        names += other["names"].tolist()
        errors |= {n: e for n, e in zip(other["names"].tolist(), other["errors"].tolist()) if e}
    assert names == [f"{i:05d}.png" for i in range(count)]
    assert errors.keys() == {"00005.png", "00006.png"}
    assert len(list(out.glob("batch_*.npz"))) == count // 8
