"""Batch jobs: a folder of pictures explained by one package, whatever engine runs it. Needs Pillow (extra `serve`).

The pictures, by name, are cut into batches once and for all, and the last one is filled up with zeros, since a batch of seven
differs from one of eight in the last bits: so every picture is computed in the same company, however often a job was killed, and
its results are the same to the last bit. `examples/` has the jobs.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..packages.package import load
from .uploads import PictureError, decode

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def pictures(folder: str | os.PathLike[str]) -> list[Path]:
    """Returns the pictures in a folder, sorted by name."""
    return sorted(file for file in Path(folder).iterdir() if file.suffix.lower() in ENDINGS)


class Batches:
    """Explains batch `number` of `files`. It holds no state between calls, so that any worker may be given any batch.

    Attributes:
        provenance: JSON: what explains, down to the package's bytes.
    """

    def __init__(
        self, package: str | os.PathLike[str], files: Sequence[Path], batch: int, *, device: str | None = None, threads: int = 1
    ) -> None:
        """`threads` are those of the CPU, for each call: in sums they decide the last bits, so every run takes as many."""
        torch.set_num_threads(threads)
        self.program, self.files, self.batch = load(package, device=device, threads=threads), files, batch
        manifest: Any = self.program.manifest
        facts = {k: manifest[k] for k in ("model", "method", "rules", "weights_sha256", "versions", "input_space")}
        digest = hashlib.sha256(Path(package).read_bytes()).hexdigest()
        self.provenance = json.dumps({**facts, "package_sha256": digest, "batch": batch, "threads": threads}, sort_keys=True)

    def __len__(self) -> int:
        return -(-len(self.files) // self.batch)

    def __call__(self, number: int) -> dict[str, np.ndarray]:
        """Returns arrays with an entry for each picture of the batch.

        `names`; `errors`, "" where there is none; `logits`; `maps`, float16, each divided by its `scales`, float32, which is its
        greatest magnitude, since pullbacks go below what float16 holds. A picture that cannot be read counts as zeros.
        """
        files = self.files[number * self.batch : (number + 1) * self.batch]
        _, height, width = self.program.shapes[0]
        pixels, errors = np.zeros((self.batch, 3, height, width), np.float32), []
        for sample, file in zip(pixels, files):
            try:
                sample[:] = decode(file.read_bytes(), (height, width), 1 << 26)
                errors.append("")
            except (PictureError, OSError) as error:
                errors.append(str(error)[:300])
        results = self.program(torch.from_numpy(pixels).to(self.program.device))
        logits, maps = (t.float().cpu().numpy()[: len(files)] for t in results)
        scales = np.abs(maps).max((1, 2, 3))
        scaled = (maps / np.where(scales > 0, scales, 1)[:, None, None, None]).astype(np.float16)
        names = np.array([file.name for file in files])
        return {"names": names, "errors": np.array(errors), "logits": logits, "maps": scaled, "scales": scales}


def begin(out: str | os.PathLike[str], batches: Batches) -> Path:
    """Make the folder `out` of a job, or go on in it; `job.json` in it says which job it belongs to. Returns its path.

    Raises:
        ValueError: the folder was begun with other pictures, another package, batch or number of threads.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    names = hashlib.sha256("\n".join(str(file) for file in batches.files).encode()).hexdigest()
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
