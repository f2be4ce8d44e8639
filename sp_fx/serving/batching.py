"""Dynamic batching: single samples from many threads, run together. One worker, a bounded queue."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

LOOK = 0.001  # seconds between two looks at what is expected


Run = Callable[[list[Any]], Sequence[Any]]


class Full(RuntimeError):
    """The queue has no room for these samples."""


class Closed(RuntimeError):
    """The batcher takes no more samples."""


class Batcher:
    """Runs `run(samples)`, which returns one answer a sample, on at most `size` samples at a time.

    A batch starts when it is full, when no more samples are to be `expected` than it has, or `wait` seconds after its first one
    came, which for samples that came while another batch ran is mostly at once. So one client is answered without waiting, and
    of many that ask again and again most share a batch. At most `room` samples wait. A sample whose
    future was cancelled before its batch started is dropped. Where a batch of several fails, its samples are run one by one, so
    that one that cannot be run does not fail its neighbours.
    """

    def __init__(self, run: Run, size: int, wait: float, room: int, expected: Callable[[], float] = lambda: math.inf) -> None:
        self.run, self.size, self.wait, self.room, self.expected = run, size, wait, room, expected
        self.queue: queue.SimpleQueue[tuple[Any, Future, float] | None] = queue.SimpleQueue()
        self.waiting, self.lock, self.closed = 0, threading.Lock(), False
        self.batches: Counter[int] = Counter()  # how many of each size ran
        self.seconds = 0.0
        self.worker = threading.Thread(target=self._work, name="batcher", daemon=True)
        self.worker.start()

    def submit(self, samples: Sequence[Any]) -> list[Future]:
        """Put all of `samples` in the queue, or none.

        Raises:
            Full, Closed: there is no room; the batcher is closing.
        """
        with self.lock:
            if self.closed:
                raise Closed("the service is stopping")
            if self.waiting + len(samples) > self.room:
                raise Full(f"{self.waiting} samples wait, and {len(samples)} more are above the limit of {self.room}")
            self.waiting += len(samples)
            futures: list[Future] = [Future() for _ in samples]
            for sample, future in zip(samples, futures):
                self.queue.put((sample, future, time.monotonic()))
        return futures

    def close(self, timeout: float | None = None) -> None:
        """Take no more, run what waits, and stop."""
        with self.lock:
            if not self.closed:
                self.closed = True
                self.queue.put(None)
        self.worker.join(timeout)

    def _work(self) -> None:
        last = False
        while not last:
            first = self.queue.get()
            if first is None:
                return
            taken, until = [first], first[2] + self.wait
            while len(taken) < self.size:
                left = until - time.monotonic() if self.expected() > len(taken) else 0.0
                try:
                    found = self.queue.get(timeout=min(left, LOOK)) if left > 0 else self.queue.get_nowait()
                except queue.Empty:
                    if left > LOOK:
                        continue
                    break
                if found is None:
                    last = True
                    break
                taken.append(found)
            with self.lock:
                self.waiting -= len(taken)
            batch = [(sample, future) for sample, future, _ in taken if future.set_running_or_notify_cancel()]
            if batch:
                self._answer(batch)

    def _answer(self, batch: list[tuple[Any, Future]]) -> None:
        started = time.perf_counter()
        try:
            answers = list(self.run([sample for sample, _ in batch]))
            if len(answers) != len(batch):
                raise RuntimeError(f"{len(answers)} answers to {len(batch)} samples")
        except Exception as error:
            if len(batch) == 1:
                batch[0][1].set_exception(error)
                return
            for one in batch:
                self._answer([one])
            return
        self.seconds += time.perf_counter() - started
        self.batches[len(batch)] += 1
        for (_, future), answer in zip(batch, answers):
            future.set_result(answer)
