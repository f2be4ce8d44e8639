"""A model of one's own: by the name of the function that makes it, `package.module:function`, or by the file it is pickled in."""

from __future__ import annotations

import ast
import contextlib
import difflib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .published.torchvision_models import torchvision_net
from .weights import classes_of, fitted, read_file, state_in

ENDINGS = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".safetensors")  # of files that hold a model or its weights
PACKAGES = (".onnx", ".pt2")


def is_own(name: str) -> bool:
    """Whether `name` is that of a function of the user's, not of a hub (`timm/hf-hub:...`)."""
    return ":" in name and not name.startswith(("timm/", "hf/")) and not Path(name).is_file()


def is_file(name: str) -> bool:
    """Whether `name` is that of a file that holds a model: there is one, however it is called (`best.pth.tar`), or it ends so."""
    if name.startswith(("timm/", "hf/", "zoo/")) or Path(name).suffix in PACKAGES or is_own(name):
        return False
    return name.lower().endswith(ENDINGS) or Path(name).is_file()


def called(spec: str, num_classes: int | None = None) -> Any:
    """Returns what the function at `spec` returns. "my_networks:resnet" is the function, or the module, resnet of my_networks.py,
    in the working folder or installed; "my_networks:resnet?num_classes=5&wide=True" calls it with these keyword arguments,
    written as in Python, or else text. `num_classes` is one more of them.

    Raises:
        ValueError: there is no such module or function, or it does not take an argument; the message says which, and those that
            there are. What the file and the function themselves raise stays as it is.
    """
    place, _, query = spec.partition("?")
    name, _, attribute = place.partition(":")
    module = _module(name, place)
    made = getattr(module, attribute, None)
    arguments = {key: _literal(value) for key, value in parse_qsl(query, keep_blank_values=True)}
    if num_classes is not None:
        arguments["num_classes"] = num_classes
    if isinstance(made, nn.Module):
        if arguments:
            raise ValueError(f"{place} is a module, which takes no arguments; got {', '.join(arguments)}")
        return made
    if not callable(made):
        own = [n for n, value in vars(module).items() if callable(value) and getattr(value, "__module__", "") == module.__name__]
        raise ValueError(f"{name} has no function {attribute!r}; it has {', '.join(sorted(own)) or 'none'}")
    _check_arguments(made, arguments, place)
    try:
        return made(**arguments)
    except Exception as error:  # whose message alone would not say whose it is
        frame = traceback.extract_tb(error.__traceback__)[-1]
        error.add_note(f"raised by {place}, in {frame.filename}:{frame.lineno}")
        raise


def _module(name: str, place: str) -> Any:
    """Returns the Python module of that name, or of that file."""
    if name.endswith(".py"):
        file = Path(name)
        if not file.is_file():
            raise ValueError(f"{place}: there is no file {name}")
        if (folder := str(file.parent.absolute())) not in sys.path:
            sys.path.append(folder)  # where it finds the files beside it, as when Python runs it
        spec = importlib.util.spec_from_file_location(file.stem, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        before = sys.modules.get(file.stem)
        if before is None or _file_of(before) == file.absolute():  # not in place of another of that name
            sys.modules[file.stem] = module  # where pickle and dataclasses look for its classes
        try:
            spec.loader.exec_module(module)
        except BaseException:
            if sys.modules.get(file.stem) is module:
                del sys.modules[file.stem]
            raise
        return module
    if not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(
            f"{place!r} is no module:function; a model of your own is named as my_networks:resnet, for resnet of my_networks.py"
        )
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # at the end: a file there hides no installed module
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise  # the module is there and misses another
        raise ValueError(f"{place}: there is no module {error.name!r} in {os.getcwd()}, nor installed") from error


def _file_of(module: Any) -> Path | None:
    file = getattr(module, "__file__", None)
    return None if file is None else Path(file).absolute()


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _check_arguments(function: Any, arguments: Mapping[str, Any], place: str) -> None:
    try:
        parameters = inspect.signature(function).parameters
    except (ValueError, TypeError):  # a builtin without a signature: the call will say
        return
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    names = [p.name for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if unknown := [key for key in arguments if key not in names]:
        close = difflib.get_close_matches(unknown[0], names, 1, 0.6)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ValueError(f"{place} takes no argument {unknown[0]!r}; {hint}it takes {', '.join(names) or 'none'}")


def pickled_model(path: Path, trust_pickle: bool) -> nn.Module:
    """Returns the module that `torch.save(model, path)` has written, or the only one in a checkpoint.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no file there.
        ValueError: it holds weights alone (whose network, where torchvision has it, is named), several modules or none; or the
            pickle is not trusted (`weights.read_file`).
    """
    if path.suffix == ".py":
        raise ValueError(f"{path} is a file of Python: name the function in it that makes the network, {path}:function")
    try:
        content = read_file(path, trust_pickle)
    except FileNotFoundError:
        raise FileNotFoundError(f"no model file at {path}") from None
    if isinstance(content, nn.Module):
        return content
    modules = [v for v in content.values() if isinstance(v, nn.Module)] if isinstance(content, Mapping) else []
    if len(modules) == 1:
        return modules[0]
    if modules:
        names = [str(key) for key, value in content.items() if isinstance(value, nn.Module)]
        raise ValueError(f"{path} holds several modules, {', '.join(names)}: torch.save the one that is meant")
    if (state := state_in(content)) is None:
        raise ValueError(f"{path} holds no model: got {type(content).__name__}, where a torch.nn.Module was expected")
    raise ValueError(f"{path} holds weights alone, and not the network that they are of; {_named(path, state)}")


def _named(path: Path, state: dict[str, Any]) -> str:
    function = f"--model module:function --weights {path}, where the function makes the network"
    if (found := architecture(state)) is None:
        return f"name it: {function}"
    name, classes = found
    return f"they fit torchvision's {name} with {classes} classes: --model {name} --weights {path}; or {function}"


def architecture(state: dict[str, Tensor]) -> tuple[str, int] | None:
    """Returns the name of torchvision's classifier whose state dict has the names and shapes of `state`, but for the number of
    classes, and that number; None where there is none or several, or torchvision is not installed."""
    if importlib.util.find_spec("torchvision") is None:
        return None
    from torchvision import models

    found = []
    for name in models.list_models(module=models):
        with _Empty(), contextlib.suppress(RuntimeError, ValueError):
            net = torchvision_net(name, None)
            candidate = fitted(state, net)
            own = net.state_dict()
            if own.keys() == candidate.keys():
                same = all(own[key].shape == candidate[key].shape for key in own)
                if classes := 1000 if same else classes_of(candidate, net):
                    found.append((name, classes))
    return found[0] if len(found) == 1 else None


class _Empty(TorchFunctionMode):
    """Parameters have no values; what a network counts with while it is made, as RegNet's widths, has."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.empty, torch.zeros, torch.ones):
            kwargs = {"device": "meta"} | {key: value for key, value in kwargs.items() if value is not None}
        return func(*args, **kwargs)
