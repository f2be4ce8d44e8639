"""Batches of a job: a folder of pictures explained by one package, whatever engine runs it. Needs Pillow (extra `serve`).

The pictures, by name, are cut into batches once and for all, and the last one is filled up with zeros, since a batch of seven
differs from one of eight in the last bits: so every picture is computed in the same company, however often a job was killed, and
its results are the same to the last bit.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...models.images import pictures_in
from ...packages.classifier import Classifier
from ...packages.errors import names_file
from ...targets import primary
from .results import batch_file, written

PAGE = "page"  # the folder, in that of a job, with the pictures of its page


def pictures(folder: str | os.PathLike[str]) -> list[Path]:
    """Returns the pictures in a folder, and in the folders in it, sorted by name, without those that a job has written for its
    page: jobs may have their folders among the pictures. NotADirectoryError where there is no folder."""
    root = Path(folder)

    @cache
    def in_a_page(folder: Path) -> bool:
        return folder != root and (is_page(folder) or in_a_page(folder.parent))

    return [file for file in pictures_in(root) if not in_a_page(file.parent)]


def is_page(folder: Path) -> bool:
    """Whether it is the `PAGE` of a job."""
    try:
        return folder.name == PAGE and "package_sha256" in json.loads((folder.parent / "job.json").read_text())
    except (OSError, ValueError, TypeError):
        return False


class Batches:
    """Explains batch `number` of `files`. It holds no state between calls, so that any worker may be given any batch.

    Attributes:
        package, classifier, preprocessing: the package's file, the package, and what a picture becomes for it.
        names: of the pictures, relative to `root`.
        target: the class that is explained, -1 for the predicted one of each picture.
        provenance: JSON: what explains, down to the package's bytes.
    """

    def __init__(
        self,
        package: str | os.PathLike[str],
        files: Sequence[str | os.PathLike[str]],
        batch: int,
        *,
        root: str | os.PathLike[str] | None = None,
        target: str | int | None = None,
        device: str | None = None,
        threads: int = 1,
    ) -> None:
        """`threads` are those of the CPU, for each call: in sums they decide the last bits, so every run takes as many. `target`
        is a class's number or name; None is the predicted one.

        Raises:
            ValueError: a package that takes no pictures, or batches of another size alone; a target that no class is called.
            IndexError: a target that no class has.
        """
        if batch < 1 or threads < 1:
            raise ValueError(f"a batch has a picture at least, and a worker a thread; got {batch} and {threads}")
        torch.set_num_threads(threads)
        self.classifier = Classifier.load(package, device=device, threads=threads)
        self.preprocessing = self.classifier.for_pictures()
        program, manifest = self.classifier.program, self.classifier.manifest
        if not program.dynamic_batch and batch != program.batch:
            raise ValueError(f"this package takes batches of {program.batch} alone: --batch {program.batch}; got {batch}")
        self.package, self.files, self.batch = Path(package), [Path(file) for file in files], batch
        self.target = self.classifier.target(None if target is None else str(target))
        self.names = [file.name if root is None else file.relative_to(root).as_posix() for file in self.files]
        facts = {k: manifest[k] for k in ("model", "method", "rules", "weights_sha256", "versions", "input_space")}
        with self.package.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        facts |= {
            "preprocessing": asdict(self.preprocessing),
            "package_sha256": digest,
            "batch": batch,
            "threads": threads,
            "target": None if self.target < 0 else self.target,
        }
        self.provenance = json.dumps(facts, sort_keys=True)

    def __len__(self) -> int:
        return -(-len(self.files) // self.batch)

    def __call__(self, number: int) -> dict[str, np.ndarray]:
        """Returns arrays with an entry for each picture of the batch.

        `names`; `errors`, "" where there is none; `logits`; `maps`, float16, each divided by its `scales`, float32, which is its
        greatest magnitude, since pullbacks go below what float16 holds: `results.maps` multiplies them again. A picture that
        cannot be read counts as zeros; one whose logits or map are not finite has an error too, its logits, and a map of zeros.
        """
        files, names = self.files[self._part(number)], self.names[self._part(number)]
        program = self.classifier.program
        pixels, errors = torch.zeros(self.batch, *self.classifier.shape), []
        for sample, file in zip(pixels, files):
            try:
                sample[:] = self.preprocessing(file).pixels
                errors.append("")
            except (OSError, ValueError) as error:
                errors.append(reason(error))
        outputs, found = program(pixels.to(program.device), torch.full((self.batch,), self.target))
        logits, maps = (t.float().cpu().numpy()[: len(files)] for t in (primary(outputs), found))
        faults = ("the model's output", np.isfinite(logits).all(1)), ("the map", np.isfinite(maps).all((1, 2, 3)))
        for what, finite in faults:
            for i in np.flatnonzero(~finite):
                errors[i] = errors[i] or f"{what} is not finite for this picture"
        maps = np.where(faults[1][1][:, None, None, None], maps, 0)
        scales = np.abs(maps).max((1, 2, 3))
        scaled = (maps / np.where(scales > 0, scales, 1)[:, None, None, None]).astype(np.float16)
        return {"names": np.array(names), "errors": np.array(errors), "logits": logits, "maps": scaled, "scales": scales}

    def files_of(self, number: int) -> list[Path]:
        """Returns the pictures of batch `number`."""
        return self.files[self._part(number)]

    def names_of(self, number: int) -> list[str]:
        """Returns the names of the pictures of batch `number`."""
        return self.names[self._part(number)]

    def write(self, number: int, out: Path) -> None:
        """Compute batch `number` into its file in `out`, with `provenance`, unless it is there."""
        file = batch_file(out, number)
        if not file.exists():
            content = io.BytesIO()
            arrays: dict[str, Any] = {**self(number), "provenance": np.array(self.provenance)}
            np.savez(content, **arrays)
            try:
                write_atomically(file, content.getvalue())
            except FileNotFoundError:
                if not file.exists():  # else another run of this job has ended meanwhile, and swept the drafts away
                    raise

    def _part(self, number: int) -> slice:
        return slice(number * self.batch, (number + 1) * self.batch)


def reason(error: Exception) -> str:
    """Returns why a picture could not be read, never "". Not where: one run has absolute paths, and another has not."""
    said = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return said[:300]


def begin(out: str | os.PathLike[str], batches: Batches) -> Path:
    """Make the folder `out` of a job, or go on in it; `job.json` in it says which job it belongs to. Returns its path.

    Raises:
        ValueError: the folder was begun with other pictures, another package, target, batch or number of threads.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    names = hashlib.sha256("\n".join(batches.names).encode(errors="surrogateescape")).hexdigest()
    job = {**json.loads(batches.provenance), "pictures": len(batches.files), "pictures_sha256": names}
    record = out / "job.json"
    if not record.exists():
        with drafted(record, (json.dumps(job, indent=1) + "\n").encode()) as draft:
            try:
                os.link(draft, record)  # of two jobs that begin here at once, the second finds the first
            except FileExistsError:
                pass
            except OSError:  # a file system without links
                draft.replace(record)
    try:
        begun = dict(json.loads(record.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{record} is not that of a job: give this one a folder of its own") from error
    if differences := sorted(key for key in job.keys() | begun.keys() if job.get(key) != begun.get(key)):
        raise ValueError(f"{out} was begun by a job that differs in {', '.join(differences)}: give this one a folder of its own")
    return out


def forget_changed(out: Path, batches: Batches) -> int:
    """Remove those batches of a job that are older than one of their pictures, as `make` does, and what the page has of them;
    returns how many. A picture is as old as its content, or its place here, whichever is younger."""
    forgotten = 0
    for number in sorted(written(out)):
        file, first = batch_file(out, number), number * batches.batch
        if any(age(picture) > file.stat().st_mtime for picture in batches.files_of(number)):
            for i in range(first, first + len(batches.files_of(number))):
                for shown in (out / PAGE).glob(f"{i:06d}*"):
                    shown.unlink(missing_ok=True)
            file.unlink(missing_ok=True)
            forgotten += 1
    return forgotten


def age(picture: Path) -> float:
    """Returns when a picture was last changed or put where it is, in seconds since 1970; 0 where there is none."""
    try:
        status = picture.stat()
    except OSError:
        return 0.0
    return max(status.st_mtime, status.st_ctime)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that, whenever the process dies, it is there in full or not at all."""
    with drafted(path, content) as draft:
        draft.replace(path)


@contextmanager
def drafted(path: Path, content: bytes) -> Iterator[Path]:
    """Gives the path of a hidden file beside `path` with this content, which is on the disk; and removes what is left of it."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")  # no process id: another machine's may be the same
    try:
        with names_file(path):
            with draft.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            yield draft
    finally:
        draft.unlink(missing_ok=True)


def sweep(out: Path) -> None:
    """Remove the drafts of batches that killed workers have left. Only where every batch is there."""
    for draft in out.glob(".batch_*.npz.*"):
        draft.unlink(missing_ok=True)
