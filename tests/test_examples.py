"""The examples that run a package: ONNX Runtime without torch, C++, and batch jobs that are killed."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import sp_fx
from helpers import relative
from shipped import rewritten
from sp_fx.packages import manifest
from sp_fx.packages import onnx as package_onnx

onnx = pytest.importorskip("onnx")
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
    other = package_onnx.manifest_in(body, path)
    other["probe"]["maps"][0].reverse()
    tail = onnx.ModelProto()
    tail.metadata_props.add(key="sp_fx", value=json.dumps(manifest.sealed(other)))
    for altered, said in (
        (body.replace(weights, weights[:4] * 5), "was altered after it was written"),
        (re.sub(rb'("maps": \[\[-?)\d', rb"\g<1>9", body, count=1), "was altered after it was written"),
        (body[: other["digest"]["bytes"]] + tail.SerializeToString(), "does not answer its probe"),
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
def test_a_killed_batch_job_goes_on(graph_file, tmp_path, count):
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
    for file in sorted((tmp_path / "calm").glob("batch_*.npz")):
        calm, other = np.load(file), np.load(out / file.name)
        assert calm.files == other.files
        assert all(calm[key].tobytes() == other[key].tobytes() for key in calm.files)
        names += other["names"].tolist()
        errors |= {n: e for n, e in zip(other["names"].tolist(), other["errors"].tolist()) if e}
    assert names == [f"{i:05d}.png" for i in range(count)]
    assert errors.keys() == {"00005.png", "00006.png"}
    assert len(list(out.glob("batch_*.npz"))) == count // 8


def ray_actors(mark):
    """Process ids of the actors of the job that was started with SP_FX_MARK=`mark`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            named = b"MapWorker" in (folder / "cmdline").read_bytes()
            if named and f"SP_FX_MARK={mark}".encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:  # it has ended
            continue
    return found


@pytest.mark.parametrize("count", [400, 2000])
def test_a_ray_job_goes_on(graph_file, tmp_path, count):
    """One of two actors is killed, then the job as a whole, which is started again."""
    pytest.importorskip("ray.data")
    from pyarrow import parquet

    folder = pictures(tmp_path / "pictures", count)

    def start(out):
        command = [sys.executable, EXAMPLES / "ray_batch.py", graph_file[2], folder, out]
        with (tmp_path / f"{out.name}.log").open("a") as log:
            mark = {**os.environ, "SP_FX_MARK": str(out), "RAY_memory_monitor_refresh_ms": "0"}
            return subprocess.Popen(command, start_new_session=True, stdout=log, stderr=log, env=mark)

    def until(done, seconds=200):
        end = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < end
            time.sleep(0.05)

    assert start(tmp_path / "calm").wait(500) == 0
    out = tmp_path / "out"
    written = lambda: len(list(out.glob("maps/*.parquet")))  # noqa: E731
    job = start(out)
    until(lambda: written() >= 5)
    os.kill(ray_actors(out)[0], signal.SIGKILL)
    until(lambda: written() >= count // 8 // 2)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    until(lambda: not ray_actors(out))
    before = written()
    assert count // 8 // 2 <= before < count // 8
    assert start(out).wait(500) == 0

    order = [("id", "ascending"), ("name", "ascending")]
    calm, other = (parquet.read_table(folder / "maps").sort_by(order) for folder in (tmp_path / "calm", out))
    assert other["name"].to_pylist() == [f"{i:05d}.png" for i in range(count)]
    assert other["id"].to_pylist() == [i // 8 for i in range(count)]
    assert calm.combine_chunks().equals(other.combine_chunks())
    errors = {n: e for n, e in zip(other["name"].to_pylist(), other["error"].to_pylist()) if e}
    assert errors.keys() == {"00005.png", "00006.png"}
    assert written() <= count // 8 + 1 and json.loads(other["provenance"][0].as_py())["batch"] == 8
