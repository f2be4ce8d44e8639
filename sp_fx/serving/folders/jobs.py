"""A batch job in this process, in several, or as one of torchrun's: `RANK` and `WORLD_SIZE` say which share is this one's.

Batch k belongs to rank k mod world, and becomes `batch_kkkkkk.npz`, written under another name and renamed when whole. So a job
that was killed goes on: a batch that is there is not run again, and nothing is there by halves.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from .batches import Batches, batch_file

RESTARTS = 3  # of each worker that died
Done = Callable[[int], None]  # is told how many batches are there


def rank_and_world() -> tuple[int, int] | None:
    """Returns which worker of how many this process is, where torchrun or `in_processes` has started it."""
    if "RANK" not in os.environ:
        return None
    return int(os.environ["RANK"]), int(os.environ.get("WORLD_SIZE", 1))


def run_share(batches: Batches, out: Path, rank: int = 0, world: int = 1, done: Done = lambda count: None) -> None:
    """Write the batches of this rank that are not there yet."""
    parent = os.environ.get("SP_FX_PARENT")
    for number in range(rank, len(batches), world):
        if parent is not None and os.getppid() != int(parent):
            raise SystemExit(1)  # the process that started this one was killed
        batches.write(number, out)
        done(written(batches, out) if world > 1 else number + 1)


def written(batches: Batches, out: Path) -> int:
    """Returns how many batches are there."""
    return sum(batch_file(out, number).exists() for number in range(len(batches)))


def in_processes(command: Sequence[str], workers: int, tick: Callable[[], None], say: Callable[[str], None]) -> int:
    """Run `command` in so many processes, each with a RANK, and call `tick` meanwhile; returns 0, or the exit status of a worker
    that failed. One that a signal has killed is started again, three times."""
    environment = {**os.environ, "WORLD_SIZE": str(workers), "SP_FX_PARENT": str(os.getpid())}

    def start(rank: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)})

    running, left = {rank: start(rank) for rank in range(workers)}, dict.fromkeys(range(workers), RESTARTS)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the workers are ended too
    try:
        while running:
            for rank, process in list(running.items()):
                status = process.poll()
                if status == 0:
                    del running[rank]
                elif status is not None and status < 0 and left[rank]:
                    left[rank] -= 1
                    say(f"sp-fx: worker {rank} was killed by {signal.Signals(-status).name}, and is started again")
                    running[rank] = start(rank)
                elif status is not None:
                    return status if status > 0 else 1
            tick()
            time.sleep(0.1)
        return 0
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
        signal.signal(signal.SIGTERM, before)
