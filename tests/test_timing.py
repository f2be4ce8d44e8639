"""The harness of the benches: who is timed, who is not, and against what."""

import torch

from sp_fx import cli, timing


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
    printed = timing.table(list(rows.values()))
    assert len(printed.splitlines()) == 5 and "no such layer" in printed


def test_peak_memory_is_what_is_held_at_once():
    def run():
        for _ in range(3):
            torch.ones(2**24)  # 64 MiB, which glibc maps and unmaps: it may keep up to 32 MiB of what is freed

    found = timing.peak(run, torch.device("cpu"))
    assert found is None or 56 * 2**20 <= found <= 112 * 2**20  # pages, and what else the process touches


def test_no_gpu_is_said(capsys):
    if not torch.cuda.is_available():
        assert cli.main(["bench", "--model", "zoo/residual_cnn", "--device", "cuda"]) == 2
        assert "torch.cuda.is_available() is False" in capsys.readouterr().err
