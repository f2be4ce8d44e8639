"""What a batch job has written, read back. Needs numpy alone."""

from __future__ import annotations

import os
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

BATCH = re.compile(r"batch_(\d{6,})\.npz")


@dataclass(frozen=True)
class Result:
    """One picture of a job: its `name`, relative to the job's folder; the `error` that it could not be explained for, or "" and
    then its `logits` float32 [classes] and its `map` float32 [channels, height, width], None where there is an error."""

    name: str
    error: str
    logits: np.ndarray | None
    map: np.ndarray | None


def maps(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns the maps of one batch as float32 [B, channels, height, width]. On disk they are float16 between -1 and 1, each to
    be multiplied by its scale, its greatest magnitude: at most 2.5e-4 of that is lost. `arrays` is what `numpy.load` gives of a
    file `batch_*.npz`."""
    return arrays["maps"].astype(np.float32) * arrays["scales"].astype(np.float32)[:, None, None, None]


def results(out: str | os.PathLike[str]) -> Iterator[Result]:
    """Yields the pictures of the job in the folder `out`, in order, as far as the job has come: `for r in results("out"): ...`.

    Raises:
        FileNotFoundError: no job was begun there.
        ValueError: a batch's file is damaged.
    """
    out = Path(out)
    if not (out / "job.json").is_file():
        raise FileNotFoundError(f"no job was begun in {out}: there is no job.json")
    for number in sorted(written(out)):
        arrays = read(batch_file(out, number), "names", "errors", "logits", "maps", "scales")
        for name, error, logits, map in zip(arrays["names"].tolist(), arrays["errors"].tolist(), arrays["logits"], maps(arrays)):
            yield Result(name, error, None, None) if error else Result(name, "", logits, map)


# -- files


def batch_file(out: Path, number: int) -> Path:
    """Returns the file of batch `number` in the folder of a job."""
    return out / f"batch_{number:06d}.npz"


def written(out: Path) -> set[int]:
    """Returns the numbers of the batches that are there, by one look at the folder: a hundred thousand take a tenth of a second,
    which is why nobody looks after every batch."""
    with os.scandir(out) as entries:
        return {int(found[1]) for entry in entries if (found := BATCH.fullmatch(entry.name))}


def read(file: Path, *keys: str) -> dict[str, np.ndarray]:
    """Returns these arrays of a batch's file, and leaves the others on the disk; ValueError where it is damaged."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return {key: arrays[key] for key in keys}
    except (ValueError, KeyError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{file} is damaged ({error}): delete it, and the same command makes it again") from error
