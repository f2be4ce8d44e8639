"""Folders that a batch job has begun: by another job, twice at once, on a full disk; and requests that cannot be met."""

import errno
import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from shipped import eleven, packaged
from sp_fx.cli.commands import main
from sp_fx.offline import Batches, begin, pictures, results, whole
from sp_fx.serving.folders import jobs
from sp_fx.serving.folders.report import report
from sp_fx.serving.folders.results import read, written

pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return eleven(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def another(tmp_path_factory):
    """Another package."""
    return packaged(tmp_path_factory.mktemp("another") / "a.onnx", class_names=list("vwxyz"))[2]


def test_a_folder_of_another_job_is_refused(graph_file, folder, tmp_path):
    files = pictures(folder)
    batches = Batches(graph_file[2], files, 4)
    out = begin(tmp_path / "out", batches)
    assert begin(out, Batches(graph_file[2], files, 4)) == out
    record = json.loads((out / "job.json").read_text())
    assert record["pictures"] == 11 and record["batch"] == 4 and record["weights_sha256"] and record["package_sha256"]
    with pytest.raises(ValueError, match=r"differs in batch: give"):
        begin(out, Batches(graph_file[2], files, 8))
    with pytest.raises(ValueError, match=r"differs in pictures, pictures_sha256: give"):
        begin(out, Batches(graph_file[2], files[1:], 4))
    whole(out / "a", b"cat")
    assert {file.name for file in out.iterdir()} == {"job.json", "a"} and (out / "a").read_bytes() == b"cat"


def test_two_jobs_that_begin_at_once(graph_file, folder, tmp_path, monkeypatch):
    """The second has seen no job.json, and finds that of the first when it would write its own."""
    files, link = pictures(folder), os.link
    first, second = Batches(graph_file[2], files, 4), Batches(graph_file[2], files, 8)

    def late(source, target):
        monkeypatch.setattr(os, "link", link)
        begin(tmp_path, first)
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    with pytest.raises(ValueError, match="differs in batch"):
        begin(tmp_path, second)
    assert json.loads((tmp_path / "job.json").read_text())["batch"] == 4 and len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError()))  # a file system without links
    begin(tmp_path / "other", second)
    assert [file.name for file in (tmp_path / "other").iterdir()] == ["job.json"]


def test_the_same_job_twice_at_once(graph_file, folder, tmp_path):
    """The other has written this batch meanwhile, ended, and swept this one's draft away."""
    batches = Batches(graph_file[2], pictures(folder), 4, root=folder)
    begin(tmp_path, batches)
    for number in (0, 1):
        batches.write(number, tmp_path)
    (tmp_path / ".batch_000000.npz.killed").write_bytes(b"a killed worker's")
    late, replace = Batches(graph_file[2], pictures(folder), 4, root=folder), Path.replace

    def after_the_other(draft, target):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "replace", replace)
            batches.write(2, tmp_path)
            report(batches, tmp_path, 0)
        return replace(draft, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", after_the_other)
        late.write(2, tmp_path)
    assert written(tmp_path) == {0, 1, 2} and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("content", ["", "[1]", "7", "cat", "{"])
def test_a_job_json_of_somebody_else(graph_file, folder, tmp_path, content):
    (tmp_path / "job.json").write_text(content)
    with pytest.raises(ValueError, match=r"job.json is not that of a job: give"):
        begin(tmp_path, Batches(graph_file[2], pictures(folder), 4))


def test_batches_of_another_job_are_found_out(graph_file, another, folder, tmp_path):
    """Somebody has deleted the job.json that said so."""
    files = pictures(folder)
    other, batches = (Batches(package, files, 8, root=folder) for package in (another, graph_file[2]))
    begin(tmp_path, batches)
    batches.write(0, tmp_path)
    other.write(1, tmp_path)
    with pytest.raises(ValueError, match=r"batch_000001.npz is of another job: delete it"):
        report(batches, tmp_path, 0)


def test_a_changed_package_is_another_job(graph_file, another, folder, tmp_path, capsys):
    package = shutil.copy(graph_file[2], tmp_path / "a.onnx")
    given = ["batch", str(package), str(folder), "--out", str(tmp_path / "out"), "--page", "0"]
    assert main(given) == 1
    shutil.copy(another, package)
    assert main(given) == 2
    assert "differs in package_sha256: give" in capsys.readouterr().err


def test_a_full_disk(graph_file, folder, tmp_path, capsys, monkeypatch):
    """It is said which file, nothing is there by halves, and the same command goes on."""
    given, out, sync = ["batch", str(graph_file[2]), str(folder), "--out", str(tmp_path / "out")], tmp_path / "out", os.fsync
    calls = []

    def full(file):
        calls.append(file)
        if len(calls) > 2:  # after job.json and a batch
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(file)

    monkeypatch.setattr(os, "fsync", full)
    assert main(given) == 2
    assert f"No space left on device: '{out / 'batch_000001.npz'}'" in capsys.readouterr().err
    assert {file.name for file in out.iterdir()} == {"job.json", "batch_000000.npz"}
    monkeypatch.setattr(os, "fsync", sync)
    assert main(given) == 1 and (out / "results.csv").exists()


@pytest.mark.parametrize("out", ["/proc/nowhere", "{}/a_file"])
def test_folders_that_cannot_be_written(graph_file, folder, tmp_path, out, capsys):
    (tmp_path / "a_file").write_text("cat")
    assert main(["batch", str(graph_file[2]), str(folder), "--out", out.format(tmp_path)]) == 2
    assert out.format(tmp_path).split("/")[-1] in capsys.readouterr().err


# -- requests


BAD = {
    "a target beyond the classes": (["--target", "5"], "target 5 is outside 0 to 4"),
    "a name where there are none": (["--target", "cat"], "'cat'"),
    "a page below none": (["--page=-1"], "--page is a number of pictures, 0 for no page; got -1"),
}


@pytest.mark.parametrize("case", BAD)
def test_requests_that_cannot_be_met(graph_file, folder, tmp_path, case, capsys):
    arguments, message = BAD[case]
    assert main(["batch", str(graph_file[2]), str(folder), "--out", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_no_page(graph_file, folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["batch", str(graph_file[2]), str(folder), "--out", str(out), "--page", "0", "--target", "3"]) == 1
    assert capsys.readouterr().out == f"10 pictures explained: {out / 'results.csv'}\n"
    assert {file.name for file in out.iterdir()} == {"job.json", "results.csv", "batch_000000.npz", "batch_000001.npz"}
    x = Batches(graph_file[2], pictures(folder), 8).preprocessing(folder / "00.PNG").pixels[None]
    assert torch.from_numpy(next(results(out)).map).allclose(graph_file[0].pullback(x, 3)[0], atol=1e-3)


def test_more_workers_than_batches(graph_file, folder, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("sp_fx.serving.folders.jobs.in_processes", lambda command, workers, *_: asked.append(workers) or 7)
    given = ["batch", str(graph_file[2]), str(folder), "--out", str(tmp_path / "out"), "--workers", "5"]
    assert main(given) == 7 and asked == [2]
    Batches(graph_file[2], pictures(folder), 8, root=folder).write(1, tmp_path / "out")
    assert main(given) == 7 and asked == [2, 1]


def test_a_package_for_batches_of_one_size(tmp_path, folder):
    package = packaged(tmp_path / "a.onnx", dynamic_batch=False, batch=4)[2]
    with pytest.raises(ValueError, match=r"takes batches of 4 alone: --batch 4; got 8"):
        Batches(package, pictures(folder), 8)
    assert len(Batches(package, pictures(folder), 4)(2)["names"]) == 3


def test_many_batches_cost_no_look_each(graph_file, folder, tmp_path, monkeypatch):
    """The folder is listed once for all of them: looking after each batch took minutes of a hundred thousand."""
    batches = Batches(graph_file[2], pictures(folder), 1)
    looks, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda *path: looks.append(path) or scandir(*path))
    seen = []
    begin(tmp_path, batches)
    jobs.run_share(batches, tmp_path, done=seen.append)
    assert seen == list(range(1, 12)) and not looks


def test_the_report_reads_no_more_maps_than_it_shows(graph_file, folder, tmp_path, monkeypatch):
    batches = Batches(graph_file[2], pictures(folder), 2, root=folder)
    begin(tmp_path, batches)
    for number in range(len(batches)):
        batches.write(number, tmp_path)
    keys = []
    monkeypatch.setattr("sp_fx.serving.folders.report.read", lambda file, *some: keys.append(some) or read(file, *some))
    assert report(batches, tmp_path, 3).shown == 3
    assert ["maps" in some for some in keys] == [True, True, False, False, False, False]


def test_pictures_that_have_changed_since(graph_file, folder, tmp_path, capsys):
    """As `make` does it: the batches of those that are younger than their results are made again, and what the page has."""
    root, out = tmp_path / "pictures", tmp_path / "out"
    shutil.copytree(folder, root)
    whole_file = pictures(root)[9].read_bytes()
    pictures(root)[9].write_bytes(whole_file[:50])
    command = ["batch", str(graph_file[2]), str(root), "--out", str(out), "--batch", "2"]
    assert main(command) == 1
    before, shown = {r.name: r for r in results(out)}, {file.name: file.read_bytes() for file in (out / "page").iterdir()}
    assert before[pictures(root)[9].name].error
    old = {number: (out / f"batch_{number:06d}.npz").stat().st_mtime_ns for number in range(6)}
    time.sleep(0.05)
    pictures(root)[9].write_bytes(whole_file)  # mended
    swapped = pictures(root)[0]
    elsewhere = tmp_path / "red.png"  # an old file that is moved here
    Image.new("RGB", (30, 30), "red").save(elsewhere)
    os.utime(elsewhere, (1, 1))
    elsewhere.replace(swapped)
    capsys.readouterr()
    main(command)
    assert "6 batches, of which 4 are there; the pictures of 2 have changed, and they are made again" in capsys.readouterr().err
    now = {number: (out / f"batch_{number:06d}.npz").stat().st_mtime_ns for number in range(6)}
    assert {number for number in now if now[number] != old[number]} == {0, 4}
    after = {r.name: r for r in results(out)}
    assert not after[pictures(root)[9].name].error and (after[swapped.name].map != before[swapped.name].map).any()
    again = {file.name: file.read_bytes() for file in (out / "page").iterdir()}
    changed = {name for name in again if again[name] != shown.get(name)}
    assert changed == {f"{number:06d}{ending}" for number in (0, 9) for ending in (".jpg", ".png", "_times_input.png")}
    fresh = tmp_path / "fresh"
    main([*command[:3], "--out", str(fresh), "--batch", "2"])
    assert all((a.map == b.map).all() for a, b in zip(results(out), results(fresh)) if a.map is not None)
