"""What a batch job has written, read back. Needs numpy alone."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Result:
    """One picture of a job: its `name`, relative to the job's folder; the `error` that it could not be read by, or "" and then
    its `logits` float32 [classes] and its `map` float32 [channels, height, width], None where there is an error."""

    name: str
    error: str
    logits: np.ndarray | None
    map: np.ndarray | None


def maps(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns the maps of one batch as float32 [B, channels, height, width]. On disk they are float16 between -1 and 1, each to
    be multiplied by its scale, its greatest magnitude: at most 2.4e-4 of that is lost. `arrays` is what `numpy.load` gives of a
    file `batch_*.npz`."""
    return arrays["maps"].astype(np.float32) * arrays["scales"].astype(np.float32)[:, None, None, None]


def results(out: str | os.PathLike[str]) -> Iterator[Result]:
    """Yields the pictures of the job in the folder `out`, in order, as far as the job has come: `for r in results("out"): ...`.

    Raises:
        FileNotFoundError: no job was begun there.
    """
    out = Path(out)
    if not (out / "job.json").is_file():
        raise FileNotFoundError(f"no job was begun in {out}: there is no job.json")
    for file in sorted(out.glob("batch_*.npz")):
        with np.load(file, allow_pickle=False) as arrays:
            rows = zip(arrays["names"].tolist(), arrays["errors"].tolist(), arrays["logits"], maps(arrays))
            for name, error, logits, map in rows:
                yield Result(name, error, None, None) if error else Result(name, "", logits, map)
