"""The progress bar, where there is a terminal."""

import pytest

from command import SCENES, explain_scenes, write_inputs
from sp_fx.cli.progress import Progress


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("pictures"))


def test_a_bar_on_a_terminal_and_none_elsewhere(here, tmp_path, capsys, monkeypatch):
    assert explain_scenes(here, tmp_path, images=SCENES[:2]) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert explain_scenes(here, tmp_path, "--batch-size", "1", images=[*SCENES[:2], "broken.jpg"]) == 1
    shown = capsys.readouterr().err
    assert "] 0/3" in shown and "] 1/3, " in shown and " s left" in shown and f"[{'#' * 20:30}] 2/3" in shown
    assert "\r\033[Ksp-fx: skipped" in shown and shown.endswith("1 of 3 pictures could not be explained\n")
    capsys.readouterr()
    Progress(1).advance(1)
    assert capsys.readouterr().err == ""  # one picture needs no bar
