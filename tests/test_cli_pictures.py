"""`sp-fx explain`: pictures as people name them, what becomes of the files that lie there, JSON, and readers that go."""

import errno
import io
import json
import signal
import subprocess
import sys

import pytest
from PIL import Image

from command import PICTURES, explained
from sp_fx.cli.commands import main


def test_folders_patterns_and_files(own_folder, tmp_path):
    """A folder in which the results are, too: the figures are not its pictures."""
    for images, stems in ((["more"], ["a", "b", "c [1]"]), (["more/*.png", "high.jpg"], ["a", "high"]),
                          (["more/**/*.*"], ["a", "b", "c [1]"]), (["more/deep/c [1].bmp"], ["c [1]"])):  # fmt: skip
        out = tmp_path / "-".join(stems)
        assert explained(out, model="own_nets:net", images=images) == 0
        assert sorted(p.stem for p in out.glob("*.json")) == stems
    pictures = tmp_path / "photos"
    pictures.mkdir()
    Image.open("high.jpg").save(pictures / "high.jpg")
    for _ in range(2):
        assert explained(pictures / "results", model="own_nets:net", images=[str(pictures)]) == 0
        assert sorted(p.name for p in (pictures / "results").iterdir()) == ["high.json", "high.png"]


@pytest.mark.parametrize("format", ["png", "jpg"])
def test_nothing_of_the_users_is_overwritten(own_folder, tmp_path, format):
    """Neither the picture nor what lies beside it; what an earlier run has written is."""
    path = tmp_path / f"photo.{format}"
    Image.open("high.jpg").save(path)
    Image.open("high.jpg").save(tmp_path / "other.png")
    (tmp_path / "other.json").write_text('{"labels": ["a cat"], "versions": "2"}')
    Image.open("high.jpg").save(tmp_path / "other.jpg")
    theirs = {file: file.read_bytes() for file in tmp_path.iterdir()}
    for _ in range(2):
        given = [str(path), str(tmp_path / "other.jpg")]
        assert explained(tmp_path, "--format", format, model="own_nets:net", images=given) == 0
        found = {file.name for file in tmp_path.iterdir()} - {file.name for file in theirs}
        assert found == {"other_2.json", f"other_2.{format}", "photo_2.json", f"photo_2.{format}"}
        assert all(file.read_bytes() == content for file, content in theirs.items())
    # The figures as pictures: they stay what they are, though the run before has written them.
    figure = tmp_path / f"photo_2.{format}"
    whole = figure.read_bytes()
    assert explained(tmp_path, "--format", format, model="own_nets:net", images=[str(figure)]) == 0
    assert figure.read_bytes() == whole and (tmp_path / f"photo_2_2.{format}").exists()


def test_a_picture_called_as_the_path_of_another(own_folder, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.png", "a_path.png"):
        Image.open("high.jpg").save(tmp_path / "in" / name)
    assert explained(tmp_path / "out", "--path", "--steps", "1", model="own_nets:net", images=[str(tmp_path / "in")]) == 0
    records = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")}
    assert {name: record["image"] for name, record in records.items()} == {"a": "a.png", "a_path_2": "a_path.png"}
    files = [file for each in records.values() for file in (each["figure"], each["paths"][0]["strip"])]
    assert len(set(files)) == 4 and all((tmp_path / "out" / file).exists() for file in files)


def test_a_name_that_is_nearly_too_long(own_folder, tmp_path):
    name = "ä" * 120 + ".png"
    Image.open("high.jpg").save(tmp_path / name)
    assert explained(tmp_path / "out", "--path", "--steps", "1", model="own_nets:net", images=[str(tmp_path / name)]) == 0
    (record,) = (tmp_path / "out").glob("*.json")
    assert json.loads(record.read_text())["image"] == name and record.stem == "ä" * 100


def test_pictures_that_there_are_not(own_folder, tmp_path, capsys):
    for image, message in {
        "empty": "there is no picture in the folder empty",
        "none*.png": "no file fits the pattern none*.png",
        "more/*.gif": "no file fits the pattern more/*.gif",
    }.items():
        assert explained(tmp_path, model="own_nets:net", images=[image]) == 2
        assert capsys.readouterr() == ("", f"sp-fx: {message}\n")
    assert (
        explained(tmp_path, "--json", "--pixels=0,1", model="own_nets:net", images=["gone.png", "own_nets.py", "high.jpg"]) == 1
    )
    told = capsys.readouterr()
    assert len(told.out.splitlines()) == 1 and json.loads(told.out)["image"] == "high.jpg"
    assert "skipped gone.png: " in told.err and "skipped own_nets.py: it is not a picture in any format that is read" in told.err
    assert told.err.endswith("2 of 3 pictures could not be explained\n")


def test_json_lines_and_nothing_else(own_folder, tmp_path, capsys):
    assert explained(tmp_path, "--json", model="own_nets:noisy") == 0
    told = capsys.readouterr()
    records = [json.loads(line) for line in told.out.splitlines()]
    assert [r["image"] for r in records] == PICTURES and "building it" in told.err
    assert records == [json.loads((tmp_path / f"{stem}.json").read_text()) for stem in ("wide picture ä", "high")]
    assert main(["report", "--model", "own_nets:noisy", "--json"]) == 0
    assert "sites" in json.loads(capsys.readouterr().out)


class Gone(io.StringIO):
    """A pipe whose reader has left after the first line."""

    def write(self, text):
        if self.tell():
            raise BrokenPipeError(32, "Broken pipe")
        return super().write(text.rstrip())


def test_a_reader_that_goes(own_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout", Gone())
    assert explained(tmp_path, "--json", "--pixels", "0,1", "--resize", "32", "--batch-size", "1", model="own_nets:net") == 141
    assert capsys.readouterr().err == ""


def test_stopped_by_hand(own_folder, tmp_path):
    """As the shell does it: one line, and the status of an interrupt."""
    command = [sys.executable, "-m", "sp_fx", "explain", *["high.jpg"] * 400, "--model", "own_nets:net", "--pixels=0,1",
               "--input-size", "32", "--squash", "--out", str(tmp_path), "--json", "--batch-size", "1"]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert json.loads(running.stdout.readline())["image"] == "high.jpg"  # while it runs, not when it ends
        running.send_signal(signal.SIGINT)
        running.stdout.close()
        said = running.stderr.read()
    assert running.returncode in (130, 141) and said in ("sp-fx: stopped\n", "")


def test_a_full_disk_is_named(own_folder, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("sp_fx.cli.explaining.save", full)
    assert explained(tmp_path, model="own_nets:net", images=["high.jpg"]) == 2
    assert f"No space left on device: '{tmp_path / 'high'}'" in capsys.readouterr().err
    assert explained(own_folder / "high.jpg", model="own_nets:net") == 2
    assert "high.jpg is a file, and --out is a folder" in capsys.readouterr().err
