"""Files of weights: read without running what is in them, and loaded into a network or refused with the reason."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import os
import pickle
import pickletools
import re
import sys
import warnings
import zipfile
from collections.abc import KeysView, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import zoo

# Training loops put the weights under one of these.
ENTRIES = ("state_dict", "model_state_dict", "model", "net", "ema_state_dict", "state_dict_ema", "model_ema", "weights")
# Heads that train GoogLeNet and Inception v3, and take no part in what they predict.
AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")
WITH_AUXILIARY = ("GoogLeNet", "Inception3", "InceptionV3")
COMPILED = "_orig_mod."  # what torch.compile puts before the names of what it has compiled
COUNTED = "num_batches_tracked"  # of a batch norm, since torch 0.4; the count decides nothing in eval mode
TORCH = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")  # what torch.save wrote first before it wrote archives
# torchvision's files of DenseNets are from before its layers were renamed: "norm.1" is "norm1".
OLD_DENSENET = re.compile(r"(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\..*)")


class UnfitError(ValueError):
    """Weights are those of another network."""


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
    check_kinds(net, state, path)
    try:
        check_fit(net, state, path)
    except ValueError:
        # Some modules read the names of their older versions (torchvision's ViT): on a copy, since one that does not fit is left
        # half loaded.
        try:
            copy.deepcopy(net).load_state_dict(dict(state))
        except Exception:
            state = {}
        if not state:
            raise
        whole: Mapping[str, Tensor] = state
    else:
        # In the network's own dictionary, which says by which version of each module it was written (MNASNet asks), and has the
        # counts that older ones lack.
        whole = net.state_dict()
        whole.update(state)
    zoo.store.check_finite(path, state)
    net.load_state_dict(whole)


def read_state(path: Path, trust_pickle: bool = False) -> dict[str, Tensor]:
    """Returns the state dict at `path`. A checkpoint that has it under a name such as "state_dict" is searched for it.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no file there.
        ValueError: it cannot be read, or would have to be unpickled (see `read_file`), or has no weights in it.
    """
    content = read_file(path, trust_pickle)
    state = state_in(content)
    if state is None:
        what = f"the entries {', '.join(map(str, list(content)[:5]))}" if isinstance(content, Mapping) else type(content).__name__
        what = what if not isinstance(content, Mapping) or content else "an empty dictionary"
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
    with path.open("rb") as file:
        if file.read(24).startswith(b"version https://git-lfs."):
            raise ValueError(f"{path} is a pointer of Git LFS to a file that is not here: `git lfs pull` fetches it")
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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other protocols of pickle
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and torch each have their own; all mean the same to the user
        if objects := pickled_objects(path):
            raise ValueError(
                f"{path} holds pickled objects ({', '.join(objects[:3])}{', ...' if len(objects) > 3 else ''}), and loading them "
                "runs code of whoever made the file. If you trust its maker: --trust-pickle (trust_pickle=True). Better: save "
                "weights alone, torch.save(model.state_dict(), 'weights.pth')"
            ) from None
        raise ValueError(f"{path} is no whole file of weights: {_unread(path, error)}") from error


def unpickled(path: Path) -> Any:
    """Returns what is pickled in the file, by `torch.save` or by `pickle` itself. Its classes may be those of modules in the
    working folder or beside the file. Errors as of `read_file`."""
    for folder in (os.getcwd(), str(path.parent.absolute())):
        if folder not in sys.path:
            sys.path.append(folder)
    try:
        with path.open("rb") as file:
            head = file.read(32)
            if head.startswith(b"\x80") and TORCH not in head:  # torch.load would run it before it sees that it is not its own
                file.seek(0)
                return pickle.load(file)
        return torch.load(path, map_location="cpu", weights_only=False)
    except (AttributeError, ImportError) as error:
        if "__main__" in str(error):
            way = (
                "The class is one of the script that made the file, and nothing else can import it: save weights alone there, "
                "torch.save(model.state_dict(), ...), and name the function that makes the network, --model script.py:function"
            )
        else:
            way = (
                "The classes of what is in it have to be importable: work in the folder of their files, or install their package"
            )
        raise ValueError(f"{path} cannot be unpickled here: {_line(error)}. {way}") from error
    except Exception as error:
        raise ValueError(f"{path} is no whole file of a model or weights: {_unread(path, error)}") from error


def is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, ValueError, OSError):  # none, or a damaged one
        return False


def pickled_objects(path: Path) -> list[str]:
    """Returns the classes and functions, by name, that unpickling the file would import beyond those that torch finds safe.
    Nothing of it is run."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    except Exception:  # no archive of today's torch.save: an older one's pickles, one after another, or a plain one
        return _imports_of(path)


def _imports_of(path: Path) -> list[str]:
    found, recent = set[str](), [""]
    memo: dict[Any, str] = {}
    with path.open("rb") as file, contextlib.suppress(Exception):  # bytes that are no pickle end it
        for _ in range(4):  # torch's has three more before the object
            for code, argument, _position in pickletools.genops(file):
                if code.name == "GLOBAL":
                    found.add(str(argument).replace(" ", "."))
                elif code.name == "STACK_GLOBAL":
                    found.add(".".join(recent[-2:]))
                elif code.name == "MEMOIZE":
                    memo[len(memo)] = recent[-1]
                elif code.name in ("BINPUT", "LONG_BINPUT"):
                    memo[argument] = recent[-1]
                elif code.name in ("BINGET", "LONG_BINGET"):
                    recent.append(memo.get(argument, ""))
                else:
                    recent.append(argument if isinstance(argument, str) else "")
    return sorted(name for name in found if not name.startswith(("collections.", "torch._utils.", "torch.FloatStorage")))


def state_in(content: Any) -> dict[str, Tensor] | None:
    """Returns the state dict in what a file holds: itself, also with a number or a text beside its tensors, an entry of a
    checkpoint, or the weights of a module; else None."""
    if isinstance(content, nn.Module):
        return dict(content.state_dict())
    if not isinstance(content, Mapping) or not content:
        return None
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if len(tensors) == len(content):
        return tensors
    known = {key: state for key in ENTRIES if key in content and (state := state_in(content[key])) is not None}
    if known:
        if len(known) > 1:
            first, *others = known
            warnings.warn(
                f"the file has weights as {first!r} and as {', '.join(map(repr, others))}: {first!r} are taken; save the others "
                "alone where they are meant",
                stacklevel=2,
            )
        return next(iter(known.values()))
    others = [value for value in content.values() if isinstance(value, nn.Module) or _is_state(value)]
    if len(others) == 1:
        return state_in(others[0])
    return tensors if not others and len(tensors) > len(content) / 2 else None


def _is_state(value: Any) -> bool:
    pairs = value.items() if isinstance(value, Mapping) else ()
    return bool(pairs) and all(isinstance(key, str) and isinstance(each, Tensor) for key, each in pairs)


def fitted(state: dict[str, Tensor], net: nn.Module) -> dict[str, Tensor]:
    """Returns `state` with the names that `net` has: without what wrappers and training loops put before them ("module.",
    "model.net.") or, as torch.compile does, into them ("_orig_mod."); without the entries of other parts, such as a loss, where
    only those behind such a prefix are the network's; and without the heads that only train, where `net` is made without them."""
    known = net.state_dict().keys()
    if not any(COMPILED in key for key in known):
        state = {key.replace(COMPILED, ""): value for key, value in state.items()}
    prefix = prefix_of(state, known)
    state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if type(net).__name__ in WITH_AUXILIARY and not any(key.startswith(AUXILIARY) for key in known):
        state = {key: value for key, value in state.items() if not key.startswith(AUXILIARY)}
    return {key if key in known else OLD_DENSENET.sub(r"\1\2", key): value for key, value in state.items()}


def prefix_of(state: Mapping[str, Tensor], known: KeysView[str]) -> str:
    """Returns what stands before the `known` names in `state`, for at least half of them; "" where they are there as they are, or
    not at all.

    Raises:
        ValueError: they are there behind several prefixes, as those of a student and its teacher.
    """
    if 2 * len(known & state.keys()) >= len(known):
        return ""
    # Some of the names, spread over the network, show what may stand before them, and all of them what does.
    some = [name for name in list(known)[:: max(1, len(known) // 20)] if not name.endswith(COUNTED)]
    prefixes = {key.removesuffix(name) for name in some for key in state if key.endswith(f".{name}")}
    counts = {prefix: sum(prefix + name in state for name in known) for prefix in sorted(prefixes)}
    best = [prefix for prefix, count in counts.items() if 2 * count >= len(known) and count == max(counts.values())]
    if len(best) > 1:
        raise ValueError(f"the weights are there several times, as {' and '.join(best)}: save those of one part alone")
    return best[0] if best else ""


def classes_of(state: Mapping[str, Tensor], net: nn.Module) -> int | None:
    """Returns the number of classes that `state` has where it differs from `net` in nothing but their number, which its last
    layers have on axis 0: `fc.weight` [5, 512] and `fc.bias` [5] in place of [1000, 512] and [1000]; else None."""
    own = net.state_dict()
    if any(not key.endswith(COUNTED) for key in own.keys() ^ state.keys()):
        return None
    changed = [(own[key].shape, state[key].shape) for key in own if key in state and own[key].shape != state[key].shape]
    counts = {(old[:1], new[:1]) for old, new in changed}
    same = all(len(old) == len(new) and len(old) and old[1:] == new[1:] for old, new in changed)
    return next(iter(counts))[1][0] if same and len(counts) == 1 else None


def check_kinds(net: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Raises ValueError where floating point weights are quantised numbers in `state`, which would be copied as they are."""
    own = net.state_dict()
    both = [key for key in own if key in state and own[key].is_floating_point()]
    if any(state[key].is_quantized for key in both):
        raise ValueError(f"the weights in {path} are quantised: save those of the network before that, or tensor.dequantize()")
    whole = [key for key in both if not state[key].is_floating_point()]
    if whole:
        raise ValueError(
            f"{len(whole)} of the weights in {path} are whole numbers, as of a quantised network, whose scales are not there: "
            f"{whole[0]} is {str(state[whole[0]].dtype)[6:]} where it has {str(own[whole[0]].dtype)[6:]}"
        )


def check_fit(net: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Raises ValueError, with what is missing, unknown or of another shape, where `state` is not that of `net`."""
    own = net.state_dict()
    missing = [key for key in own if key not in state and not key.endswith(COUNTED)]
    unknown = [key for key in state if key not in own]
    both = [key for key in own if key in state]
    shapes = [f"{k} {list(state[k].shape)} where it has {list(own[k].shape)}" for k in both if own[k].shape != state[k].shape]
    if missing or unknown or shapes:
        raise unfit(net, path, len(state), missing, unknown, shapes, classes_of(state, net))


def unfit(
    net: nn.Module,
    path: Path,
    count: int,
    missing: Sequence[str] = (),
    unknown: Sequence[str] = (),
    shapes: Sequence[str] = (),
    classes: int | None = None,
) -> UnfitError:
    """Returns the error for `count` tensors that are not those of `net`; `classes`, where they differ in nothing but that."""
    found = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for names, what in ((missing, "missing"), (unknown, "that it does not have"), (shapes, "of another shape"))
        if names
    ]
    hint = (
        "For a network that was changed, such as one with another head, name the function that makes it: --model module:function"
        if classes is None
        else f"They are of a network with {classes} classes: --num-classes {classes} (num_classes={classes}), which the function "
        "that makes it has to take"
    )
    return UnfitError(
        f"the weights in {path} do not fit {type(net).__name__}: {count} tensors, of which {'; '.join(found)}. {hint}"
    )


def weights_hash(net: nn.Module) -> str:
    """Returns the SHA-256, in hex, of names, shapes, dtypes and values of the state dict."""
    digest = hashlib.sha256()
    for name, tensor in net.state_dict().items():
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _unread(path: Path, error: BaseException) -> str:
    """Returns why a file could not be read."""
    if not path.stat().st_size:
        return "it is empty"
    archive = path.read_bytes()[:2] == b"PK"
    return _line(error) if archive or isinstance(error, RuntimeError) else "torch.save has not written it so"


def _line(error: BaseException) -> str:
    """Returns the first line of an error's message, without a terminal's colours, or its type where it has none."""
    return re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().split("\n")[0][:300] or type(error).__name__
