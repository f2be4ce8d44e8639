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
    """The pictures in a folder, by name."""
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
        told = {k: manifest[k] for k in ("model", "method", "rules", "weights_sha256", "versions", "input_space")}
        digest = hashlib.sha256(Path(package).read_bytes()).hexdigest()
        self.provenance = json.dumps({**told, "package_sha256": digest, "batch": batch, "threads": threads}, sort_keys=True)

    def __len__(self) -> int:
        return -(-len(self.files) // self.batch)

    def __call__(self, number: int) -> dict[str, np.ndarray]:
        """`names`; `errors`, "" where there is none; `logits`; `maps`, float16, each divided by its `scales`, float32, which is
        its greatest magnitude, since pullbacks go below what float16 holds. A picture that cannot be read counts as zeros."""
        files = self.files[number * self.batch : (number + 1) * self.batch]
        _, height, width = self.program.shapes[0]
        pixels, errors = np.zeros((self.batch, 3, height, width), np.float32), []
        for place, file in zip(pixels, files):
            try:
                place[:] = decode(file.read_bytes(), (height, width), 1 << 26)
                errors.append("")
            except (PictureError, OSError) as error:
                errors.append(str(error)[:300])
        found = self.program(torch.from_numpy(pixels).to(self.program.device))
        logits, maps = (t.float().cpu().numpy()[: len(files)] for t in found)
        scales = np.abs(maps).max((1, 2, 3))
        small = (maps / np.where(scales > 0, scales, 1)[:, None, None, None]).astype(np.float16)
        names = np.array([file.name for file in files])
        return {"names": names, "errors": np.array(errors), "logits": logits, "maps": small, "scales": scales}


def begin(out: str | os.PathLike[str], batches: Batches) -> Path:
    """Make the folder `out`, or go on in it.

    Raises:
        ValueError: what is there comes from other pictures, another package or other settings.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    names = hashlib.sha256("\n".join(str(file) for file in batches.files).encode()).hexdigest()
    wanted = {**json.loads(batches.provenance), "pictures": len(batches.files), "pictures_sha256": names}
    record = out / "job.json"
    if not record.exists():
        whole(record, (json.dumps(wanted, indent=1) + "\n").encode())
    held = json.loads(record.read_text())
    if other := sorted(key for key in wanted.keys() | held.keys() if wanted.get(key) != held.get(key)):
        raise ValueError(f"{out} was begun by a job that differs in {', '.join(other)}: give this one a folder of its own")
    return out


def whole(path: Path, content: bytes) -> None:
    """Write a file that is never there by halves."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with draft.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
