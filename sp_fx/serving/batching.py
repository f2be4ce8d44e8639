"""Dynamic batching: single samples that many threads submit are run together, by one worker behind a bounded queue."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

POLL = 0.001  # seconds between two looks at how many samples are expected

Run = Callable[[list[Any]], Sequence[Any]]


class Full(RuntimeError):
    """The queue of a batcher has no room for the samples that were submitted."""


class Closed(RuntimeError):
    """The batcher is closing and takes no more samples."""


class Batcher:
    """Runs `run(samples)`, which returns one answer a sample, on at most `size` samples at a time.

    A batch starts when it is full, when `expected()` says that no more samples are coming than it has, or `wait` seconds after
    its first one came, which for samples that came while another batch ran is mostly at once. So a single client is answered
    without waiting, and of many that ask again and again most share a batch. At most `room` samples wait. A sample whose future
    was cancelled before its batch started is dropped. Where a batch of several fails, its samples are run one by one, so that one
    that cannot be run does not fail its neighbours.

    Attributes:
        batches: how many batches of each size ran.
        seconds: how long they ran in all.
        waiting: how many samples wait.
    """

    def __init__(self, run: Run, size: int, wait: float, room: int, expected: Callable[[], float] = lambda: math.inf) -> None:
        self.run, self.size, self.wait, self.room, self.expected = run, size, wait, room, expected
        self.queue: queue.SimpleQueue[tuple[Any, Future, float] | None] = queue.SimpleQueue()
        self.waiting, self.lock, self.closed = 0, threading.Lock(), False
        self.batches: Counter[int] = Counter()
        self.seconds = 0.0
        self.worker = threading.Thread(target=self._work, name="batcher", daemon=True)
        self.worker.start()

    def submit(self, samples: Sequence[Any]) -> list[Future]:
        """Put all of `samples` in the queue, or none; returns a future of each one's answer.

        Raises:
            Full: there is no room for all of them.
            Closed: the batcher is closing.
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
        """Take no more samples, run those that wait, and stop; `timeout` is how long to wait for that, in seconds."""
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
            entries, until = [first], first[2] + self.wait
            while len(entries) < self.size:
                left = until - time.monotonic() if self.expected() > len(entries) else 0.0
                try:
                    entry = self.queue.get(timeout=min(left, POLL)) if left > 0 else self.queue.get_nowait()
                except queue.Empty:
                    if left > POLL:
                        continue
                    break
                if entry is None:  # close() was called
                    last = True
                    break
                entries.append(entry)
            with self.lock:
                self.waiting -= len(entries)
            batch = [(sample, future) for sample, future, _ in entries if future.set_running_or_notify_cancel()]
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
            for pair in batch:
                self._answer([pair])
            return
        self.seconds += time.perf_counter() - started
        self.batches[len(batch)] += 1
        for (_, future), answer in zip(batch, answers):
            future.set_result(answer)
