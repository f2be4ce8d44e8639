"""Weights on disk: a safetensors file for each network, and a manifest with their hashes."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import torch
from torch import nn

from .networks import NETWORKS
from .shapes import KINDS

NAMES: tuple[str, ...] = tuple(NETWORKS)
WEIGHTS = Path(__file__).parent / "weights"


def load(name: str, weights: str | PathLike[str] | None = None) -> nn.Module:
    """A trained network in eval mode: float32 [B, 3, 96, 96] in [-1, 1] to logits float32 [B, 10], ordered as `labels`.

    `name` is one of `NAMES`. `weights` names another safetensors file of the same network; its parameter names and
    shapes are checked, and for the packaged file its SHA-256 too.

    Raises ValueError for an unknown name or a file that is damaged or another network's, FileNotFoundError for a missing one.
    """
    if name not in NETWORKS:
        close = difflib.get_close_matches(str(name), NAMES, 1, 0.4)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"no network is called {name!r}; {hint}choices: {', '.join(NAMES)}")
    path = WEIGHTS / f"{name}.safetensors" if weights is None else Path(weights)
    if not path.is_file():
        raise FileNotFoundError(f"no weights for {name!r} at {path}")
    if weights is None:
        _check_hash(name, path)
    network = NETWORKS[name]()
    state = _tensors_in(path)
    _check_state(name, path, state, network.state_dict())
    check_finite(path, state)
    network.load_state_dict(state)
    return network.eval()


def save(name: str, network: nn.Module, folder: Path, **facts: object) -> Path:
    """Write `<name>.safetensors` with `facts` as metadata, and enter its hash and them into the folder's manifest."""
    from safetensors.torch import save as to_bytes

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.safetensors"
    facts = {"network": name, "labels": list(KINDS), **facts, "torch": torch.__version__}
    state = {key: value.contiguous() for key, value in network.state_dict().items()}
    # The format's metadata are strings only.
    path.write_bytes(to_bytes(state, {key: json.dumps(value) for key, value in facts.items()}))
    manifest = folder / "manifest.json"
    entries = json.loads(manifest.read_text()) if manifest.is_file() else {}
    entries[name] = {"file": path.name, "sha256": _sha256(path), "bytes": path.stat().st_size, **facts}
    manifest.write_text(json.dumps(dict(sorted(entries.items())), indent=2) + "\n")
    return path


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _check_hash(name: str, path: Path) -> None:
    manifest = path.parent / "manifest.json"
    if not manifest.is_file():
        raise FileNotFoundError(f"no manifest of weights at {manifest}")
    try:
        entries = json.loads(manifest.read_text())
        expected = {entry: (entries[entry]["sha256"], entries[entry]["bytes"]) for entry in entries}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{manifest} is not a manifest of weights: {error!r}") from error
    if name not in expected:
        raise ValueError(f"{manifest} has no entry for {name!r}; it has: {', '.join(expected)}")
    got = (_sha256(path), path.stat().st_size)
    if got != expected[name]:
        raise ValueError(
            f"{path} is not the packaged file: got {got[1]} bytes with the sha256 {got[0]}, "
            f"expected {expected[name][1]} with {expected[name][0]}"
        )


def _tensors_in(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


def _check_state(name: str, path: Path, got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    missing, extra = sorted(expected.keys() - got.keys()), sorted(got.keys() - expected.keys())
    if missing or extra:
        raise ValueError(
            f"{path} does not hold {name!r}: {len(missing)} parameters missing (first: {missing[:3]}), "
            f"{len(extra)} not expected (first: {extra[:3]}); networks with packaged weights: {', '.join(NAMES)}"
        )
    for key, value in expected.items():
        if got[key].shape != value.shape or got[key].dtype != value.dtype:
            raise ValueError(
                f"{path}: {key!r} is {got[key].dtype} {list(got[key].shape)}, "
                f"expected {value.dtype} {list(value.shape)} for {name!r}"
            )


def check_finite(path: Path, state: Mapping[str, torch.Tensor]) -> None:
    """Raise ValueError if a tensor of the state dict read from `path` has NaN or infinity in it."""
    wrong = [key for key, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if wrong:
        raise ValueError(f"{path} is damaged: {len(wrong)} of its tensors have NaN or infinity in them (first: {wrong[:3]})")
