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
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...models.images import pictures_in
from ...packages.classifier import Classifier


def pictures(folder: str | os.PathLike[str]) -> list[Path]:
    """Returns the pictures in a folder, and in the folders in it, sorted by name; NotADirectoryError where there is none."""
    return pictures_in(folder)


class Batches:
    """Explains batch `number` of `files`. It holds no state between calls, so that any worker may be given any batch.

    Attributes:
        classifier, preprocessing: the package, and what a picture becomes for it.
        names: of the pictures, relative to `root`.
        target: the class that is explained, -1 for the predicted one of each picture.
        provenance: JSON: what explains, down to the package's bytes.
    """

    def __init__(
        self,
        package: str | os.PathLike[str],
        files: Sequence[Path],
        batch: int,
        *,
        root: str | os.PathLike[str] | None = None,
        target: str | int | None = None,
        device: str | None = None,
        threads: int = 1,
    ) -> None:
        """`threads` are those of the CPU, for each call: in sums they decide the last bits, so every run takes as many. `target`
        is a class's number or name; None is the predicted one. A package that takes no pictures is a ValueError."""
        torch.set_num_threads(threads)
        self.classifier = Classifier.load(package, device=device, threads=threads)
        self.preprocessing = self.classifier.for_pictures()
        self.files, self.batch, self.target = files, batch, self.classifier.target(None if target is None else str(target))
        self.names = [file.name if root is None else file.relative_to(root).as_posix() for file in files]
        manifest = self.classifier.manifest
        facts = {k: manifest[k] for k in ("model", "method", "rules", "weights_sha256", "versions", "input_space")}
        facts |= {
            "preprocessing": asdict(self.preprocessing),
            "package_sha256": hashlib.sha256(Path(package).read_bytes()).hexdigest(),
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
        cannot be read counts as zeros.
        """
        files = self.files[number * self.batch : (number + 1) * self.batch]
        names = self.names[number * self.batch : (number + 1) * self.batch]
        program = self.classifier.program
        pixels, errors = torch.zeros(self.batch, *program.shapes[0]), []
        for sample, file in zip(pixels, files):
            try:
                sample[:] = self.preprocessing(file).pixels
                errors.append("")
            except (OSError, ValueError) as error:
                errors.append(str(error)[:300])
        aim = torch.full((self.batch,), self.target)
        results = program(pixels.to(program.device), aim)
        logits, maps = (t.float().cpu().numpy()[: len(files)] for t in results)
        scales = np.abs(maps).max((1, 2, 3))
        scaled = (maps / np.where(scales > 0, scales, 1)[:, None, None, None]).astype(np.float16)
        return {"names": np.array(names), "errors": np.array(errors), "logits": logits, "maps": scaled, "scales": scales}

    def write(self, number: int, out: Path) -> None:
        """Compute batch `number` into its file in `out`, with `provenance`, unless it is there."""
        file = batch_file(out, number)
        if not file.exists():
            content = io.BytesIO()
            arrays: dict[str, Any] = {**self(number), "provenance": np.array(self.provenance)}
            np.savez(content, **arrays)
            write_atomically(file, content.getvalue())


def batch_file(out: Path, number: int) -> Path:
    """Returns the file of batch `number` in the folder of a job."""
    return out / f"batch_{number:06d}.npz"


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
        write_atomically(record, (json.dumps(job, indent=1) + "\n").encode())
    begun = json.loads(record.read_text())
    if differences := sorted(key for key in job.keys() | begun.keys() if job.get(key) != begun.get(key)):
        raise ValueError(f"{out} was begun by a job that differs in {', '.join(differences)}: give this one a folder of its own")
    return out


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that, whenever the process dies, it is there in full or not at all."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with draft.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
