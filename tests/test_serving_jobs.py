"""Batch jobs in several processes: killed and started again, told to end, and what the environment says of shares."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from shipped import batches_in, check_equal, draw, processes, start, until
from sp_fx.cli.commands import main
from sp_fx.serving.folders import jobs

pytest.importorskip("PIL.Image")
pytest.importorskip("onnxruntime")


@pytest.fixture(autouse=True)
def threads():
    """A job takes one thread, and a test gives the others back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Forty pictures that take so long to read that a job can be killed between them."""
    return draw(tmp_path_factory.mktemp("job") / "pictures", 40, side=1800)


def test_a_killed_job_goes_on(graph_file, folder, tmp_path):
    """One of two workers is killed, and started again; then the job as a whole is killed, and the same command goes on."""
    calm, out, log = tmp_path / "calm", tmp_path / "out", tmp_path / "log"
    given = [str(graph_file[2]), str(folder), "--batch", "2"]
    assert main(["batch", *given, "--out", str(calm)]) == 1
    command = [sys.executable, "-m", "sp_fx", "batch", *given, "--out", out, "--workers", "2"]
    running = start(command, log)
    until(lambda: batches_in(out) >= 1)
    os.kill(processes(str(out), "RANK=0\0")[0], signal.SIGKILL)
    until(lambda: "worker 0 was killed by SIGKILL, and is started again" in log.read_text())
    until(lambda: (out / "batch_000019.npz").exists())  # the other is done, so that what follows is of the new worker
    there = batches_in(out)
    until(lambda: batches_in(out) > there)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    until(lambda: not processes(str(out)))
    assert batches_in(out) < 20
    assert start(command, log).wait(60) == 1  # two pictures could not be read
    check_equal(calm, out, 40)
    assert "20 batches, of which 1" in log.read_text() and "2 of 40 pictures could not be explained" in log.read_text()


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_job_that_is_told_to_end_says_so_and_leaves_nobody(graph_file, folder, tmp_path, number, status):
    out, log = tmp_path / "out", tmp_path / "log"
    command = [sys.executable, "-m", "sp_fx", "batch", graph_file[2], folder, "--out", out, "--batch", "2", "--workers", "2"]
    running = start(command, log)
    until(lambda: batches_in(out) >= 1)
    os.killpg(running.pid, number) if number == signal.SIGINT else running.send_signal(number)  # Ctrl-C reaches the workers too
    assert running.wait(30) == status
    assert not processes(str(out))
    *_, last = log.read_text().splitlines()
    assert last == f"sp-fx: stopped after {batches_in(out)} of 20 batches; the same command goes on"
    assert "Traceback" not in log.read_text() and not (out / "results.csv").exists() and not list(out.glob(".b*"))


def test_a_worker_that_is_told_to_end_while_it_writes(graph_file, tmp_path):
    """It leaves no half of a batch, and ends by the signal, so that who has started it starts another."""
    out = tmp_path / "out"
    given = ["batch", str(graph_file[2]), str(draw(tmp_path / "pictures", 9)), "--out", str(out), "--batch", "8"]
    assert main(given) == 1
    (out / "batch_000001.npz").unlink()
    kill = "import os, signal, sys; os.fsync = lambda _: os.kill(os.getpid(), signal.SIGTERM)"
    code = f"{kill}; from sp_fx.cli.commands import main; sys.exit(main({given!r}))"
    ended = subprocess.run(python(code), env={**os.environ, "RANK": "0", "WORLD_SIZE": "1"}, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGTERM and "Traceback" not in ended.stderr
    assert not list(out.glob(".b*")) and not (out / "batch_000001.npz").exists()


def test_one_process_that_is_told_to_end(graph_file, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jobs.Batches, "write", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert main(["batch", str(graph_file[2]), str(folder), "--out", str(tmp_path / "out")]) == 143
    assert "stopped after 0 of 5 batches" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def python(code):
    return [sys.executable, "-c", code]


def test_a_worker_that_fails_ends_the_others(tmp_path):
    said = []
    code = "import os, sys, time; sys.exit(3) if os.environ['RANK'] == '1' else time.sleep(60)"
    assert jobs.in_processes(python(code), 2, lambda: None, said.append) == 3
    assert said == ["sp-fx: worker 1 ended with status 3; the same command goes on"]


def test_a_worker_that_always_dies_is_started_three_times(tmp_path):
    code = f"import os; open({str(tmp_path / 'log')!r}, 'a').write('x'); os.kill(os.getpid(), 9)"
    said = []
    assert jobs.in_processes(python(code), 1, lambda: None, said.append) == 1
    assert (tmp_path / "log").read_text() == "xxxx"
    assert len(said) == 4 and said[-1] == "sp-fx: worker 0 was killed by SIGKILL once more; the same command goes on"


def test_a_worker_whose_command_was_killed_ends(monkeypatch):
    class Written:
        def __len__(self):
            return 2

        def write(self, number, out):
            pytest.fail("it goes on")

    monkeypatch.setenv(jobs.PARENT, "1")
    with pytest.raises(SystemExit):
        jobs.run_share(Written(), None)


def test_shares_of_the_environment():
    assert jobs.share_of({}) is None and jobs.share_of({"RANK": "1"}) is None and jobs.share_of({"WORLD_SIZE": "2"}) is None
    assert jobs.share_of({"RANK": "1", "WORLD_SIZE": "2"}) == jobs.Share(1, 2, ours=False)
    assert jobs.share_of({"RANK": "1", "WORLD_SIZE": "2", jobs.PARENT: "7"}).ours
    for rank, world in (("2", "2"), ("-1", "2"), ("a", "2"), ("0", "")):
        with pytest.raises(ValueError, match=f"RANK={rank} and WORLD_SIZE={world} .* unset both"):
            jobs.share_of({"RANK": rank, "WORLD_SIZE": world})


def test_a_rank_that_was_left_in_a_shell_is_told(graph_file, folder, tmp_path, monkeypatch, capsys):
    """Each worker of a world does its share, says which, and the last one writes the table and the page."""
    given = ["batch", str(graph_file[2]), str(folder), "--out", str(tmp_path / "out")]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    for more, flag in (["--workers", "2"], "--workers"), (["--ray"], "--ray"):
        if flag == "--workers" or jobs_with_ray():
            assert main([*given, *more]) == 2
            assert f"unset RANK, or leave {flag} out" in capsys.readouterr().err
    assert main(given) == 0
    first = capsys.readouterr()
    assert "worker 1 of 2 (2 of 5 batches) by RANK and WORLD_SIZE in the environment; unset RANK for all" in first.err
    assert "2 of 5 batches are there, and the last worker writes the page" in first.err and not first.out
    assert batches_in(tmp_path / "out") == 2 and not (tmp_path / "out" / "results.csv").exists()
    monkeypatch.setenv("RANK", "0")
    assert main([*given, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pictures"] == 40 and (tmp_path / "out" / "index.html").exists()


def jobs_with_ray():
    import importlib.util

    return importlib.util.find_spec("ray") is not None


@pytest.mark.parametrize(
    "local, asked, made_for, count, wanted",
    [
        ("1", None, "cuda", 2, "cuda:1"),
        ("5", "cuda", "cuda", 4, "cuda:1"),
        ("1", "cuda:0", "cuda", 2, "cuda:0"),
        ("1", None, "cpu", 2, None),
        ("1", None, "cuda", 1, None),
        ("", None, "cuda", 2, None),
    ],
)
def test_each_worker_takes_a_gpu_of_its_own(monkeypatch, local, asked, made_for, count, wanted):
    monkeypatch.setenv("LOCAL_RANK", local)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    monkeypatch.setattr(jobs, "read_manifest", lambda path: {"device": made_for})
    assert jobs.own_device("x.pt2", asked) == wanted
