"""A batch job on Ray's actors, on a cluster or this machine: the extra `ray`.

Numbers of batches go to a pool of actors that have each loaded the package; an actor writes a batch to its file, as `jobs` does,
in a folder that all nodes see. Not `ray.data.read_images`: one picture that cannot be read ends its job, and its batches are of
whatever arrives together. Ray restarts actors that die and runs their batches again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .batches import Batches, batch_file


class Explain:
    """An actor: takes rows of numbers, writes their batches, returns the rows."""

    def __init__(self, out: Path, arguments: Sequence[Any], options: Mapping[str, Any]) -> None:
        self.out, self.batches = out, Batches(*arguments, **options)

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        for number in rows["number"].tolist():
            self.batches.write(number, self.out)
        return rows


def run(
    out: Path, count: int, arguments: Sequence[Any], options: Mapping[str, Any], workers: int, done: Callable[[int], None]
) -> None:
    """Write those of `count` batches that are not there yet, by `workers` actors that each make `Batches(*arguments, **options)`.
    For a package of a GPU each actor gets one."""
    import ray
    import ray.data

    threads = options.get("threads", 1)
    if not ray.is_initialized():
        local = {} if "RAY_ADDRESS" in os.environ else {"num_cpus": workers * threads + 1, "include_dashboard": False}
        ray.init(log_to_driver=False, **local)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    missing = [{"number": number} for number in range(count) if not batch_file(out, number).exists()]
    if not missing:
        return
    gpus = 1 if str(options.get("device") or "cpu").startswith("cuda") else 0
    numbers = ray.data.from_items(missing, override_num_blocks=len(missing))  # a block a batch, so that none waits for others
    written = numbers.map_batches(
        Explain,
        fn_constructor_args=(out, arguments, options),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=threads,
        num_gpus=gpus,
    )
    there = count - len(missing)
    for _ in written.iter_rows():
        there += 1
        done(there)
