"""The harness of the benches: who is timed, who is not, and against what."""

import subprocess
import sys

import torch

from sp_fx import cli
from sp_fx.cli import timing


def fails():
    raise ValueError("no such layer\nand a second line")


def test_rows_and_ratios():
    def way(seconds):
        def run():
            torch.zeros(1)
            timing.time.sleep(seconds)

        return run

    ways = [
        (timing.FORWARD, lambda: way(0.01)),
        (timing.PROGRAM, lambda: way(0.02)),
        ("long", lambda: way(0.5)),
        ("broken", fails),
    ]
    rows = {row.way: row for row in timing.measure(iter(ways), torch.device("cpu"), turns=3)}
    assert rows["broken"].error == "ValueError: no such layer" and rows["broken"].turns == 0
    assert rows["long"].turns == 1 and rows[timing.PROGRAM].turns == 3  # fifty times the forward: one turn
    assert rows[timing.FORWARD].x_forward == 1 and 1 < rows[timing.PROGRAM].x_forward < 4  # 2, and what sleeping is late by
    assert rows[timing.PROGRAM].low_s <= rows[timing.PROGRAM].median_s <= rows[timing.PROGRAM].high_s
    printed = timing.format_table(list(rows.values()))
    assert len(printed.splitlines()) == 5 and "no such layer" in printed


def test_peak_memory_is_what_was_held():
    """In a process of its own: what other tests' threads take or give back meanwhile is not this one's."""
    code = "import torch; from sp_fx.cli import timing; print(timing.peak(lambda: torch.ones(2**24), torch.device('cpu')))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    # 64 MiB, and what else the process touches; where the kernel does not say what is resident, nothing is claimed
    assert found == "None" or 56 * 2**20 <= int(found) <= 112 * 2**20


def test_no_gpu_is_said(capsys):
    if not torch.cuda.is_available():
        assert cli.main(["bench", "--model", "zoo/residual_cnn", "--device", "cuda"]) == 2
        assert "torch.cuda.is_available() is False" in capsys.readouterr().err
