"""The examples that run a package: ONNX Runtime without torch, C++, and batch jobs that are killed."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import sp_fx
from helpers import relative
from shipped import batches_in, check_equal, draw, processes, resealed, rewritten, start, until
from sp_fx.cli.commands import main

pytest.importorskip("onnx")
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


def test_onnx_runtime_where_torch_cannot_be_imported(graph_file, tmp_path):
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
    other = resealed(path, tmp_path / "other.onnx", lambda m: m["probe"]["maps"][0].reverse())
    for altered, said in (
        (body.replace(weights, weights[:4] * 5), "was altered after it was written"),
        (re.sub(rb'("maps": \[\[-?)\d', rb"\g<1>9", body, count=1), "was altered after it was written"),
        (other.read_bytes(), "does not answer its probe"),
    ):
        (tmp_path / "altered.onnx").write_bytes(altered)
        assert said in run(tmp_path / "altered.onnx").stderr


@pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("g++")), reason="needs cmake and g++")
def test_cpp(pt2, tmp_path):
    explainer, x, path = pt2
    command = ["cmake", "-S", EXAMPLES / "cpp", "-B", tmp_path / "build", f"-DTORCH={torch.__path__[0]}"]
    subprocess.run(command, check=True)
    subprocess.run(["cmake", "--build", tmp_path / "build"], check=True)
    x.numpy().tofile(tmp_path / "x.bin")
    given, outputs, map = (tmp_path / f"{name}.bin" for name in ("x", "outputs", "map"))

    def run(package, *target):
        command = [tmp_path / "build" / "explain", package, given, outputs, map, *target]
        return subprocess.run(command, capture_output=True, text=True)

    for target in ([], ["2"]):
        done = run(path, *target)
        assert done.returncode == 0, done.stderr
        aim = int(target[0]) if target else None
        assert relative(torch.from_numpy(np.fromfile(outputs, np.float32)).view(len(x), 5), explainer(x)) <= 1e-5
        found = torch.from_numpy(np.fromfile(map, np.float32)).view(x.shape)
        assert relative(found, explainer.pullback(x, aim)) <= 1e-4
        assert torch.equal(found, sp_fx.load(path)(x, aim)[1])  # the same machine code
    for change, said in (
        (lambda m, _: m["versions"].update(torch="99.1.0"), "compiled by torch"),
        (lambda m, _: m["probe"].update(outputs=[[0.0] * 10]), "does not answer its probe: relative L2 distance of its outputs"),
        (lambda m, _: m["probe"]["maps"][0].reverse(), "does not answer its probe: relative L2 distance of its map"),
        (lambda m, _: m.update(looped=True), "unroll an ascent"),
    ):
        done = run(rewritten(path, tmp_path / "other.pt2", change))
        assert done.returncode == 1 and said in done.stderr
    given.write_bytes(given.read_bytes()[:-4])
    assert "not a multiple of a sample's 3072" in run(path).stderr
    given.write_bytes(b"")
    assert run(path).returncode == 1 and run(tmp_path / "none.pt2").returncode == 1


@pytest.fixture
def job(graph_file, tmp_path):
    """A calm run over pictures, and the command of another with its folder: `job(count, *options)`."""

    def begun(count, *options):
        folder, calm, out = draw(tmp_path / "pictures", count), tmp_path / "calm", tmp_path / "out"
        assert main(["batch", str(graph_file[2]), str(folder), "--out", str(calm)]) == 1
        return calm, out, ["-m", "sp_fx", "batch", graph_file[2], folder, "--out", out, *options]

    before = torch.get_num_threads()
    yield begun
    torch.set_num_threads(before)


TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "3", "--standalone"]


@pytest.mark.parametrize("count", [2000])
def test_a_killed_batch_job_under_torchrun_goes_on(job, tmp_path, count):
    """One of two workers is killed, then the job as a whole, which is started again."""
    calm, out, command = job(count)
    command, log = [sys.executable, *TORCHRUN, *command], tmp_path / "log"
    running = start(command, log)
    until(lambda: batches_in(out) >= 20)
    os.kill(processes(str(out), "RANK=0\0")[0], signal.SIGKILL)
    until(lambda: "(exitcode: -9)" in log.read_text())
    there = batches_in(out)
    until(lambda: batches_in(out) > there)
    assert batches_in(out) < count // 8
    kill_all(running, str(out))
    assert batches_in(out) < count // 8
    assert start(command, log).wait(300) == 0
    check_equal(calm, out, count)


@pytest.mark.parametrize("options", [[], ["--workers", "2"]])
@pytest.mark.parametrize("count", [2000])
def test_a_killed_batch_job_goes_on(job, tmp_path, count, options):
    calm, out, command = job(count, *options)
    command, log = [sys.executable, *command], tmp_path / "log"
    running = start(command, log)
    until(lambda: batches_in(out) >= 20)
    if options:
        os.kill(processes(str(out), "RANK=1\0")[0], signal.SIGKILL)
        until(lambda: "worker 1 was killed by SIGKILL, and is started again" in log.read_text())
        there = batches_in(out)
        until(lambda: batches_in(out) > there)
    kill_all(running, str(out))
    assert batches_in(out) < count // 8
    assert start(command, log).wait(300) == 1  # two pictures could not be read
    check_equal(calm, out, count)


@pytest.mark.parametrize("count", [400, 2000])
def test_a_killed_batch_job_on_ray_goes_on(job, tmp_path, count):
    pytest.importorskip("ray.data")
    calm, out, command = job(count, "--ray", "--workers", "2", "--json")
    command, log, mark = [sys.executable, *command], tmp_path / "log", f"SP_FX_MARK={out}"
    more = {"env": {**os.environ, "SP_FX_MARK": str(out), "RAY_memory_monitor_refresh_ms": "0"}}
    running = start(command, log, **more)
    until(lambda: batches_in(out) >= 5)
    os.kill(processes(mark, "MapWorker")[0], signal.SIGKILL)
    until(lambda: batches_in(out) >= count // 8 // 2)
    kill_all(running, mark)
    assert count // 8 // 2 <= batches_in(out) < count // 8
    assert start(command, log, **more).wait(300) == 1
    check_equal(calm, out, count)
    assert json.loads(log.read_text().splitlines()[-1])["pictures"] == count


def kill_all(running, mark):
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    for process in processes(mark, "sp_fx"):  # torchrun's workers are in groups of their own
        os.kill(process, signal.SIGKILL)
    until(lambda: not processes(mark))
