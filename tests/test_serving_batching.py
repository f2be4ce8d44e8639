"""The batcher alone: who shares a batch, who waits, and whose failure is whose."""

import threading
import time

import pytest

from sp_fx.serving.batching import Batcher, Closed, Full


def test_one_bad_sample_fails_alone():
    def run(samples):
        if "bad" in samples:
            raise ValueError("bad")
        return [s.upper() for s in samples]

    batcher = Batcher(run, 8, 0.05, 100)
    futures = batcher.submit(["a", "bad", "c"])
    assert futures[0].result(5) == "A" and futures[2].result(5) == "C"
    with pytest.raises(ValueError, match="bad"):
        futures[1].result(5)
    batcher.close(5)
    with pytest.raises(Closed):
        batcher.submit(["a"])


def test_the_wrong_number_of_answers_fails_the_batch_and_not_the_worker():
    batcher = Batcher(lambda samples: [] if "bad" in samples else samples, 8, 0.05, 100)
    with pytest.raises(RuntimeError, match="0 answers to 1 samples"):
        batcher.submit(["bad"])[0].result(5)
    assert batcher.submit(["good"])[0].result(5) == "good"
    batcher.close(5)


def test_what_came_while_a_batch_ran_waits_no_longer():
    leave = threading.Event()
    batcher = Batcher(lambda samples: leave.wait(20) and samples, 2, 2.0, 100)
    first = batcher.submit([0, 1])  # full, so it runs
    while batcher.waiting:
        time.sleep(0.001)
    late = batcher.submit([2])
    time.sleep(2.1)
    started = time.monotonic()
    leave.set()
    assert [f.result(5) for f in first + late] == [0, 1, 2] and time.monotonic() - started < 1.5
    batcher.close(5)


def test_a_batch_waits_only_for_what_is_expected():
    coming = [1]
    batcher = Batcher(lambda samples: samples, 8, 20.0, 100, lambda: coming[0])
    assert batcher.submit([0])[0].result(5) == 0  # nobody else is there
    coming[0] = 3
    first = batcher.submit([1])
    time.sleep(0.05)
    assert not first[0].done()
    rest = batcher.submit([2, 3])
    assert [f.result(5) for f in first + rest] == [1, 2, 3]
    late = batcher.submit([4])
    time.sleep(0.05)
    assert not late[0].done()
    coming[0] = 1  # the others have gone
    assert late[0].result(5) == 4
    batcher.close(5)
    assert batcher.batches == {1: 2, 3: 1}


def test_the_queue_is_bounded():
    leave = threading.Event()
    batcher = Batcher(lambda samples: leave.wait(5) and samples, 1, 0, 2)
    first = batcher.submit([0])
    while batcher.waiting:
        time.sleep(0.001)
    rest = batcher.submit([1, 2])
    with pytest.raises(Full, match="2 samples wait"):
        batcher.submit([3])
    leave.set()
    assert [f.result(5) for f in first + rest] == [0, 1, 2]
    batcher.close(5)
    assert batcher.batches == {1: 3}
