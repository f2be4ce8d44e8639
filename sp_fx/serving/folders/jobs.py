"""A batch job in this process, in several, or as one of torchrun's: `RANK` and `WORLD_SIZE` say which share is this one's.

Batch k belongs to rank k mod world, and becomes `batch_kkkkkk.npz`, written under another name and renamed when whole. So a job
that was killed goes on: a batch that is there is not run again, and nothing is there by halves.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ...packages.package import read_manifest
from .batches import Batches

RESTARTS = 3  # of each worker that died
PARENT = "SP_FX_PARENT"  # in the environment of a worker: the process id of the command that started it
Done = Callable[[int], None]  # is told how many batches are there


@dataclass(frozen=True)
class Share:
    """Which worker of how many this process is; `ours` where `in_processes` has started it, which then speaks for it."""

    rank: int
    world: int
    ours: bool


def share_of(environment: Mapping[str, str]) -> Share | None:
    """Returns the share that the environment gives this process, as torchrun and `in_processes` do; None where it gives none.

    Raises:
        ValueError: `RANK` and `WORLD_SIZE` are no rank and world.
    """
    rank, world = environment.get("RANK"), environment.get("WORLD_SIZE")
    if rank is None or world is None:
        return None
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise ValueError(f"RANK={rank} and WORLD_SIZE={world} in the environment are no worker of a job: unset both")
    return Share(int(rank), int(world), PARENT in environment)


def own_device(package: str | os.PathLike[str], device: str | None) -> str | None:
    """Returns the device of this worker: of several GPUs that of its `LOCAL_RANK`, where none of them was asked for by number."""
    local, count = os.environ.get("LOCAL_RANK", ""), torch.cuda.device_count()
    if device not in (None, "cuda") or not local.isdecimal() or count < 2 or read_manifest(package)["device"] != "cuda":
        return device
    return f"cuda:{int(local) % count}"


def run_share(batches: Batches, out: Path, rank: int = 0, world: int = 1, done: Done = lambda count: None) -> None:
    """Write the batches of this rank that are not there yet. `done`, of a world of one, hears after each how many are there."""
    parent = os.environ.get(PARENT)
    for number in range(rank, len(batches), world):
        if parent is not None and os.getppid() != int(parent):
            raise SystemExit(1)  # the process that started this one was killed
        batches.write(number, out)
        done(number + 1)


def in_processes(command: Sequence[str], workers: int, tick: Callable[[], None], say: Callable[[str], None]) -> int:
    """Run `command` in so many processes, each with a RANK, and call `tick` once a second; returns 0, or the exit status of a
    worker that failed. One that a signal has killed is started again, three times. Whatever ends this ends the workers."""
    environment = {**os.environ, "WORLD_SIZE": str(workers), PARENT: str(os.getpid())}

    def start(rank: int) -> subprocess.Popen[bytes]:
        with deaf():
            return subprocess.Popen(command, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)})

    running, left, ticked = dict[int, subprocess.Popen[bytes]](), dict.fromkeys(range(workers), RESTARTS), time.monotonic()
    try:
        for rank in range(workers):
            running[rank] = start(rank)
        while running:
            for rank, process in list(running.items()):
                status = process.poll()
                if status == 0:
                    del running[rank]
                elif status is not None and status < 0 and left[rank]:
                    left[rank] -= 1
                    say(f"sp-fx: worker {rank} was killed by {signal_name(-status)}, and is started again")
                    running[rank] = start(rank)
                elif status is not None:
                    how = f"was killed by {signal_name(-status)} once more" if status < 0 else f"ended with status {status}"
                    say(f"sp-fx: worker {rank} {how}; the same command goes on")
                    return status if status > 0 else 1
            if time.monotonic() - ticked > 1:
                tick()
                ticked = time.monotonic()
            time.sleep(0.05)
        return 0
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()


# -- signals


class Terminated(KeyboardInterrupt):
    """SIGTERM has come. Like Ctrl-C it is no error of anything that was going on."""


@contextmanager
def told_to_end() -> Iterator[None]:
    """SIGTERM raises `Terminated` in here, once; what comes while things are put away is ignored."""
    if not in_main_thread():
        yield
        return

    def end(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


@contextmanager
def deaf() -> Iterator[None]:
    """A process that is started in here ignores Ctrl-C, which reaches all processes of a terminal: who started it ends it."""
    if not in_main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)


def in_main_thread() -> bool:
    """Whether this thread may say what signals do."""
    return threading.current_thread() is threading.main_thread()


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time one
        return f"signal {number}"
