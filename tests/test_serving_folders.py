"""Batch jobs: which picture is computed with which, what is kept of it, and folders that another job began."""

import json

import numpy as np
import pytest
import torch

from sp_fx.models.images import fitting
from sp_fx.offline import Batches, begin, pictures, whole
from sp_fx.serving.uploads import decode

Image = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eleven pictures, of which number 5 is cut short, and a file that is none."""
    folder, g = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(11):
        Image.fromarray(g.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(folder / f"{i:02d}.PNG")
    (folder / "05.PNG").write_bytes((folder / "05.PNG").read_bytes()[:300])
    (folder / "readme.txt").write_text("cat")
    return folder


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
