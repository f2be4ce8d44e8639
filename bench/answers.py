"""What a bench has computed, kept on disk: a run that was cut short goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Answers:
    """Tensors by name, computed once and kept on disk under a digest of all that they depend on (`facts`).

    A call raises TimeoutError where an answer is not there and `deadline` (of `time.monotonic`) is past.
    """

    def __init__(self, folder: Path, facts: dict[str, Any], deadline: float) -> None:
        self.key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
        self.folder, self.deadline, self.done = folder / self.key, deadline, 0
        self.folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, name: str, compute: Callable[..., Tensor], *args: Any) -> Tensor:
        path = self.folder / f"{name}.pt"
        self.done += 1
        if path.exists():
            return torch.load(path, weights_only=True)
        if time.monotonic() > self.deadline:
            raise TimeoutError(f"stopped before {name}: run the same command again to go on")
        started = time.monotonic()
        answer = compute(*args)
        torch.save(answer, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)  # whole or not at all, also where the run is killed
        print(f"{self.done:4} {name:50} {time.monotonic() - started:6.1f} s", file=sys.stderr, flush=True)
        return answer


def digest(*parts: str | Tensor) -> str:
    """Returns the SHA-256, in hex, of texts and tensors."""
    whole = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            whole.update(f"{part.shape}{part.dtype}".encode())
            whole.update(part.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        else:
            whole.update(part.encode())
    return whole.hexdigest()
