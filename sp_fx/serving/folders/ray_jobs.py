"""A batch job on Ray's actors, on a cluster or this machine: the extra `ray`.

Numbers of batches go to a pool of actors that have each loaded the package; an actor writes a batch to its file, as `jobs` does,
in a folder that all nodes see. Not `ray.data.read_images`: one picture that cannot be read ends its job, and its batches are of
whatever arrives together. Ray restarts actors that die and runs their batches again.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np

from .batches import Batches
from .jobs import told_to_end
from .results import written

BLOCKS = 1000  # that Ray is given to share out; of more batches, each has several


class Explain:
    """An actor: takes rows of numbers, writes their batches, returns the rows, each with what went wrong in `error`, "" where
    nothing did. What it raised would come back inside of three pages of Ray's own calls."""

    def __init__(self, out: Path, provenance: str, arguments: Sequence[Any], options: Mapping[str, Any]) -> None:
        self.out, self.batches = out, Batches(*arguments, **options)
        if self.batches.provenance != provenance:
            raise ValueError("the package is another than when the job began")

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {**rows, "error": np.array([self.error_of(number) for number in rows["number"].tolist()])}

    def error_of(self, number: int) -> str:
        try:
            self.batches.write(number, self.out)
        except Exception as error:  # whatever it is, it ends the job
            return str(error) or type(error).__name__
        return ""


def run(out: Path, batches: Batches, options: Mapping[str, Any], workers: int, done: Callable[[int], None]) -> None:
    """Write those batches that are not there yet, by `workers` actors that each make `Batches` anew with `options`; on a GPU each
    actor gets one. `done` is told how many are there.

    Raises:
        RuntimeError: an actor could not be made, or write a batch.
    """
    with redirect_stdout(sys.stderr):  # Ray prints there what its machines have to say
        import ray
        import ray.data

        for logger in ("ray", "ray.data"):
            logging.getLogger(logger).setLevel(logging.ERROR)
        started = not ray.is_initialized()
        if started:
            few = {"num_cpus": workers * options.get("threads", 1) + 1, "include_dashboard": False}
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **({} if "RAY_ADDRESS" in os.environ else few))
        try:
            with told_to_end():  # again, since Ray has taken the signal for itself
                write_missing(out, batches, options, workers, done)
        except ray.exceptions.RayError as error:
            raise RuntimeError(f"Ray: {str(error).strip().splitlines()[-1]}") from error
        finally:
            if started:
                ray.shutdown()


def write_missing(out: Path, batches: Batches, options: Mapping[str, Any], workers: int, done: Callable[[int], None]) -> None:
    """Do what `run` says, where Ray has been started."""
    import ray.data

    there, root = written(out), Path(options["root"]).absolute()
    missing = [{"number": number} for number in range(len(batches)) if number not in there]
    arguments = (batches.package.absolute(), [root / name for name in batches.names], batches.batch)
    ray.data.DataContext.get_current().enable_progress_bars = False
    numbers = ray.data.from_items(missing, override_num_blocks=min(len(missing), BLOCKS))
    rows = numbers.map_batches(
        Explain,
        fn_constructor_args=(out.absolute(), batches.provenance, arguments, {**options, "root": root}),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=options.get("threads", 1),
        num_gpus=1 if str(options["device"]).startswith("cuda") else 0,
    )
    for count, row in enumerate(rows.iter_rows(), start=len(there) + 1):
        if row["error"]:
            raise RuntimeError(row["error"])
        done(count)
