"""Files of weights: read without running what is in them, and loaded into a network or refused with the reason."""

from __future__ import annotations

import hashlib
import os
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import zoo

# Wrappers and training loops put the weights under one of these, and one of these before every name.
ENTRIES = ("state_dict", "model_state_dict", "model", "net", "ema_state_dict", "state_dict_ema", "model_ema", "weights")
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.", "backbone.", "encoder.")


def load_weights(net: nn.Module, path: Path, trust_pickle: bool = False) -> None:
    """Load the weights at `path` (.safetensors, or what `torch.save` has written) into `net`, which stays as it is where they do
    not fit.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: they do not fit, or have values that are not finite; the message names them.
    """
    load_state(net, fitted(read_state(path, trust_pickle), net), path)


def load_state(net: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Load `state`, read at `path`; errors as of `load_weights`."""
    check_fit(net, state, path)
    zoo.store.check_finite(path, state)
    net.load_state_dict(state)


def read_state(path: Path, trust_pickle: bool = False) -> dict[str, Tensor]:
    """Returns the state dict at `path`. A checkpoint that has it under a name such as "state_dict" is searched for it.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no file there.
        ValueError: it cannot be read, or would have to be unpickled (see `read_file`), or has no weights in it.
    """
    content = read_file(path, trust_pickle)
    state = state_in(content)
    if state is None:
        what = f"keys {', '.join(map(str, list(content)[:5]))}" if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(f"{path} holds no state dict, a mapping from names to tensors: got {what}")
    return state


def read_file(path: Path, trust_pickle: bool = False) -> Any:
    """Returns what is in a file of weights: tensors in containers or, where the pickle is trusted, whatever it is.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no file there.
        ValueError: it is damaged or of another kind, or it holds pickled objects, which run their maker's code when they are
            loaded, and `trust_pickle` is False.
    """
    if path.is_dir():
        files = sorted(p.name for p in path.iterdir() if p.suffix in (".safetensors", ".pt", ".pth", ".bin", ".ckpt"))
        inside = f"; files of weights in it: {', '.join(files[:5])}" if files else ""
        raise IsADirectoryError(f"{path} is a folder, and weights are a file{inside}")
    if not path.is_file():
        raise FileNotFoundError(f"no weights file at {path}")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{path} is not a whole safetensors file: {_line(error)}") from error
    if is_torchscript(path):
        raise ValueError(
            f"{path} is a TorchScript archive, which has no Python source to trace: save the model's state dict, "
            "torch.save(model.state_dict(), ...), and name the function that makes the model, --model module:function"
        )
    if trust_pickle:
        return unpickled(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and torch each have their own; all mean the same to the user
        if objects := pickled_objects(path):
            raise ValueError(
                f"{path} holds pickled objects ({', '.join(objects[:3])}{', ...' if len(objects) > 3 else ''}), and loading them "
                "runs code of whoever made the file. If you trust its maker: --trust-pickle (trust_pickle=True). Better: save "
                "weights alone, torch.save(model.state_dict(), 'weights.pth')"
            ) from None
        raise ValueError(f"{path} is no whole file of weights: {_line(error)}") from error


def unpickled(path: Path) -> Any:
    """Returns what is pickled in the file, whose classes may be those of modules in the working folder; errors as `read_file`."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except (AttributeError, ModuleNotFoundError) as error:
        raise ValueError(
            f"{path} cannot be unpickled here: {_line(error)}. The classes of what is in it have to be importable: work in the "
            "folder of their files, or install their package"
        ) from error
    except Exception as error:
        raise ValueError(f"{path} is no whole file of weights: {_line(error)}") from error


def is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("constants.pkl") for name in archive.namelist())


def pickled_objects(path: Path) -> list[str]:
    """Returns the classes and functions, by name, that unpickling the file would import beyond those that torch finds safe."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    except Exception:  # no archive of torch.save, or a damaged one
        return []


def state_in(content: Any) -> dict[str, Tensor] | None:
    """Returns the state dict in what a file holds: itself, an entry of a checkpoint, or the weights of a module; else None."""
    if isinstance(content, nn.Module):
        return dict(content.state_dict())
    if not isinstance(content, Mapping) or not content:
        return None
    if all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()):
        return dict(content)
    return next((state for key in ENTRIES if key in content and (state := state_in(content[key])) is not None), None)


def fitted(state: dict[str, Tensor], net: nn.Module) -> dict[str, Tensor]:
    """Returns `state` without the prefix of a wrapper ("module.", "model.", ...) that all its names have and that `net` does not
    know, and without the entries of other parts where only such a part, as "backbone.", is the network."""
    known = net.state_dict().keys()
    for _ in range(3):  # "module.model." and the like
        if known & state.keys():
            break
        for prefix in PREFIXES:
            part = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            if part and (len(part) == len(state) or known <= part.keys()):
                state = part
                break
    return state


def classes_of(state: Mapping[str, Tensor], net: nn.Module) -> int | None:
    """Returns the number of classes that `state` has where it differs from `net` in nothing but their number, which its last
    layers have on axis 0: `fc.weight` [5, 512] and `fc.bias` [5] in place of [1000, 512] and [1000]; else None."""
    own = net.state_dict()
    if own.keys() != state.keys():
        return None
    changed = [(own[key].shape, state[key].shape) for key in own if own[key].shape != state[key].shape]
    counts = {(old[:1], new[:1]) for old, new in changed}
    same = all(len(old) == len(new) and len(old) and old[1:] == new[1:] for old, new in changed)
    return next(iter(counts))[1][0] if same and len(counts) == 1 else None


def check_fit(net: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Raises ValueError, with what is missing, unknown or of another shape, where `state` is not that of `net`."""
    own = net.state_dict()
    # A batch norm counts its batches only since torch 0.4, and the count decides nothing in eval mode.
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unknown = [key for key in state if key not in own]
    shapes = [f"{k} {list(state[k].shape)} where it has {list(own[k].shape)}" for k in own if k in state and
              own[k].shape != state[k].shape]  # fmt: skip
    found = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for names, what in ((missing, "missing"), (unknown, "that it does not have"), (shapes, "of another shape"))
        if names
    ]
    if found:
        raise ValueError(
            f"the weights in {path} do not fit {type(net).__name__}: {len(state)} tensors, of which {'; '.join(found)}. For a "
            "network that was changed, such as one with another head, name the function that makes it: --model module:function"
        )


def weights_hash(net: nn.Module) -> str:
    """Returns the SHA-256, in hex, of names, shapes, dtypes and values of the state dict."""
    digest = hashlib.sha256()
    for name, tensor in net.state_dict().items():
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _line(error: BaseException) -> str:
    """Returns the first line of an error's message, or its type where it has none."""
    return str(error).strip().split("\n")[0][:300] or type(error).__name__
