"""Batch jobs: which picture is computed with which, what is kept of it, folders that another job began, and what a folder of
pictures may hold."""

import csv
import html
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from shipped import Excitable, eleven, packaged
from sp_fx.cli.commands import main
from sp_fx.models.images import fitting
from sp_fx.offline import Batches, begin, maps, pictures, results
from sp_fx.serving.folders.report import report
from sp_fx.serving.folders.results import written
from sp_fx.serving.uploads import decode

Image = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return eleven(tmp_path_factory.mktemp("pictures"))


def test_every_picture_once_and_its_map(graph_file, folder):
    explainer, _, package = graph_file
    batches = Batches(package, pictures(folder), 4)
    found = [batches(number) for number in range(len(batches))]
    assert [len(f["names"]) for f in found] == [4, 4, 3]
    assert [name for f in found for name in f["names"]] == [f"{i:02d}.PNG" for i in range(11)]
    assert {n: e for f in found for n, e in zip(f["names"], f["errors"]) if e}.keys() == {"05.PNG"}
    x = torch.stack([torch.from_numpy(decode(file.read_bytes(), fitting(16), 1 << 20)) for file in batches.files[:4]])
    assert torch.from_numpy(found[0]["logits"]).allclose(explainer(x), atol=1e-5)
    wanted, maps = explainer.pullback(x), torch.from_numpy(found[0]["maps"].astype(np.float32))
    top = torch.from_numpy(found[0]["scales"]).view(-1, 1, 1, 1)
    assert top.flatten().allclose(wanted.abs().amax((1, 2, 3)), rtol=1e-4)
    assert ((maps * top - wanted).abs() <= top * 5e-4).all()  # half a unit in the last place of float16 just below 1
    assert found[0]["maps"].dtype == np.float16 and np.abs(found[0]["maps"]).max() == 1


def test_the_last_batch_is_filled_up(graph_file, folder):
    """A picture's results are the same to the last bit wherever the list ends behind it in its batch."""
    files = pictures(folder)
    for end in (9, 10, 11):
        ended, first = Batches(graph_file[2], files[:end], 4)(2), Batches(graph_file[2], files[:9], 4)(2)
        assert len(ended["names"]) == end - 8
        assert all(ended[key][:1].tobytes() == first[key][:1].tobytes() for key in ("logits", "maps", "scales"))


# -- what is written, read back


def test_maps_lose_little(graph_file, folder):
    """At most half a unit in the last place of float16 just below 1, of a map's greatest magnitude, however small that is."""
    explainer, _, package = graph_file
    for power in (-35, 0, 35):
        batches = Batches(package, pictures(folder)[:4], 4)
        call = batches.classifier.program.run
        batches.classifier.program.run = lambda *x, run=call, power=power: [run(*x)[0], run(*x)[1] * 10.0**power]
        arrays = batches(0)
        x = torch.stack([batches.preprocessing(file).pixels for file in batches.files])
        exact = explainer.pullback(x).double().numpy() * 10.0**power
        found = maps(arrays)
        assert found.dtype == np.float32 and arrays["maps"].dtype == np.float16
        most = np.abs(exact).max((1, 2, 3))
        assert np.isfinite(found).all() and (arrays["scales"] > 0).all() and (most > 0).all()
        lost = np.abs(found - exact).max((1, 2, 3)) / most
        assert (lost <= 2**-12 + 1e-5).all() and (lost > 1e-6).any()  # 1e-5: that of ONNX Runtime's sums


def test_results_of_a_job_that_is_half_done(graph_file, folder, tmp_path):
    batches = Batches(graph_file[2], pictures(folder), 4)
    with pytest.raises(FileNotFoundError, match="no job was begun in"):
        next(results(tmp_path))
    out = begin(tmp_path / "out", batches)
    assert list(results(out)) == []
    batches.write(2, out)
    batches.write(0, out)
    (out / ".batch_000001.npz.0a1b").write_bytes(b"half a batch")
    found = list(results(str(out)))
    assert [r.name for r in found] == [f"{i:02d}.PNG" for i in (0, 1, 2, 3, 8, 9, 10)] and written(out) == {0, 2}
    x = torch.stack([batches.preprocessing(folder / r.name).pixels for r in found])
    explainer = graph_file[0]
    assert torch.from_numpy(np.stack([r.logits for r in found])).allclose(explainer(x), atol=1e-5)
    assert torch.from_numpy(np.stack([r.map for r in found])).allclose(explainer.pullback(x), atol=1e-3)
    batches.write(1, out)
    broken = list(results(out))[5]
    assert (broken.name, broken.logits, broken.map) == ("05.PNG", None, None) and "truncated" in broken.error
    (out / "batch_000002.npz").write_bytes((out / "batch_000002.npz").read_bytes()[:100])
    with pytest.raises(ValueError, match=r"batch_000002.npz is damaged .*: delete it"):
        list(results(out))


def test_batches_beyond_a_million_stay_in_order(graph_file, tmp_path):
    batches = Batches(graph_file[2], [tmp_path / "a.png"], 1)
    begin(tmp_path, batches)
    arrays = batches(0)
    for number in (999_999, 1_000_000, 2):
        np.savez(tmp_path / f"batch_{number:06d}.npz", **{**arrays, "names": np.array([str(number)])})
    assert [r.name for r in results(tmp_path)] == ["2", "999999", "1000000"]


def test_the_reason_does_not_hang_on_where_the_folder_is(graph_file, folder, tmp_path, monkeypatch):
    """Nor is it ever empty, which would mean that there is none."""
    monkeypatch.chdir(folder)
    for file in (Path("gone.png"), folder / "gone.png"):
        assert Batches(graph_file[2], [file], 1)(0)["errors"].tolist() == ["No such file or directory"]
    monkeypatch.setattr("sp_fx.models.images.read_rgb", lambda path: (_ for _ in ()).throw(ValueError()))
    assert Batches(graph_file[2], [folder / "00.PNG"], 1)(0)["errors"].tolist() == ["ValueError"]


@pytest.fixture(scope="module")
def excitable(tmp_path_factory):
    return packaged(tmp_path_factory.mktemp("excitable") / "a.onnx", net=Excitable())[2]


def test_numbers_that_are_not_finite_are_errors_of_their_picture(excitable, tmp_path, capsys):
    for name, grey in (("bright", 255), ("dark", 40), ("middle", 120)):
        Image.fromarray(np.full((16, 16, 3), grey, np.uint8)).save(tmp_path / f"{name}.png")
    assert main(["batch", str(excitable), str(tmp_path), "--out", str(tmp_path / "out"), "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    reason = "the model's output is not finite for this picture"
    assert said["errors"] == [{"name": "bright.png", "error": reason}] and said["shown"] == 2
    rows = list(csv.reader((tmp_path / "out" / "results.csv").open(newline="")))
    assert rows[1] == ["bright.png", "", "", "", reason] and [row[4] for row in rows[2:]] == ["", ""]
    assert reason in html.unescape((tmp_path / "out" / "index.html").read_text())
    bright, *others = results(tmp_path / "out")
    assert bright.map is None and all(np.isfinite(r.map).all() for r in others)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_map_that_is_not_finite(graph_file, folder, value, tmp_path):
    batches = Batches(graph_file[2], pictures(folder)[:3], 4)
    run = batches.classifier.program.run

    def broken(*x):
        logits, found = run(*x)
        found = found.clone()
        found[1, 0, 3, 3] = value
        return [logits, found]

    batches.classifier.program.run = broken
    arrays = batches(0)
    assert arrays["errors"].tolist() == ["", "the map is not finite for this picture", ""]
    assert np.isfinite(arrays["maps"]).all() and np.isfinite(arrays["scales"]).all() and arrays["maps"][0].any()
    out = begin(tmp_path / "out", batches)
    batches.write(0, out)
    assert report(batches, out, 10).shown == 2


# -- folders of pictures


HOSTILE = (
    "a b",
    "q\"uo'te",
    "com,ma",
    "new\nline",
    "re\rturn",
    "ünï😀",
    "bad\udcff",
    "=cmd()",
    "esc\x1b[31m",
    "per%20#?",
    "-dash",
)


def test_names_and_things_that_a_folder_may_hold(graph_file, folder, tmp_path, capsys, monkeypatch):
    root = tmp_path / "pictures"
    (root / "sub dir" / "page").mkdir(parents=True)
    (root / "directory.png").mkdir()
    for name in (*HOSTILE, "sub dir/x", "sub dir/page/y"):
        shutil.copy(folder / "00.PNG", root / f"{name}.png")
    os.mkfifo(root / "fifo.png")
    (root / "link.png").symlink_to("nowhere")
    (root / "loop.png").symlink_to("loop.png")
    (root / "memory.png").symlink_to("/proc/self/mem")  # a file that can be opened and not be read
    (root / "empty.png").write_bytes(b"")
    (root / ".hidden.png").write_bytes(b"")
    bad = {"memory.png", "empty.png", "fifo.png", "link.png", "loop.png"}
    names = {f"{name}.png" for name in (*HOSTILE, "sub dir/x", "sub dir/page/y")} | bad
    out = tmp_path / "out"
    assert main(["batch", str(graph_file[2]), str(root), "--out", str(out), "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert (
        said["pictures"] == len(names) and {e["name"] for e in said["errors"]} == bad and all(e["error"] for e in said["errors"])
    )
    table = (out / "results.csv").open(newline="", errors="surrogateescape")
    rows = list(csv.DictReader(table))
    assert {row["name"] for row in rows} == names and [row["name"] for row in rows] == [r.name for r in results(out)]
    monkeypatch.chdir(root)  # the same job, from elsewhere, by workers, and all is there
    assert main(["batch", str(graph_file[2]), ".", "--out", "../out", "--workers", "3", "--page", "2"]) == 1
    said = capsys.readouterr()
    assert said.err.splitlines()[0] == f"sp-fx: {len(names)} pictures in 3 batches, of which 3 are there"
    assert "5 of 18 pictures could not be explained" in said.err and "shows 2 of them" in said.out
    assert "the other 11 are in" in (out / "index.html").read_text()


def test_what_is_printed_of_names_is_one_line(graph_file, tmp_path, capsys):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x\n\x1b[2J\udcff.png").write_bytes(b"")
    assert main(["batch", str(graph_file[2]), str(tmp_path / "a"), "--out", str(tmp_path / "o\udcff")]) == 1
    said = capsys.readouterr()
    assert r"sp-fx: x\n\x1b[2J\udcff.png: it is not" in said.err and r"o\udcff/results.csv" in said.out


def test_a_job_inside_its_folder_of_pictures(graph_file, folder, tmp_path, capsys):
    """Its page's pictures are none of the next run, of this job or of another; those of a folder that is only called so are."""
    root, same = shutil.copytree(folder, tmp_path / "pictures"), shutil.copytree(folder, tmp_path / "same")
    shutil.copytree(folder, root / "page")
    runs = [(root, root / "out"), (root, root / "out"), (root, root / "deep" / "er"), (same, same), (same, same)]
    for pictured, out in runs:
        assert main(["batch", str(graph_file[2]), str(pictured), "--out", str(out), "--json", "--page", "4"]) == 1
        assert json.loads(capsys.readouterr().out)["pictures"] == (22 if pictured == root else 11)
    assert len(list((same / "page").glob("*.jpg"))) == 4
    assert len(pictures(same / "page")) == 12  # whoever names the folder itself means it


def test_a_picture_that_goes_while_the_job_runs(graph_file, folder, tmp_path, capsys):
    """Before its batch it is an error; after it, it is explained, and not on the page. The next run is another job."""
    root, out = shutil.copytree(folder, tmp_path / "pictures"), tmp_path / "out"
    files = pictures(root)
    batches = Batches(graph_file[2], files, 4, root=root)
    begin(out, batches)
    batches.write(0, out)
    files[1].unlink()
    files[9].unlink()
    batches.write(1, out)
    batches.write(2, out)
    summary = report(batches, out, 100)
    assert summary.errors[1:] == [("09.PNG", "No such file or directory")] and summary.pictures == 11
    assert summary.shown == 8 and "9 pictures were explained. This page shows 8 of them" in (out / "index.html").read_text()
    assert main(["batch", str(graph_file[2]), str(root), "--out", str(out), "--batch", "4"]) == 2
    assert "differs in pictures, pictures_sha256: give" in capsys.readouterr().err
