"""A model of one's own by the name of the function that makes it: `package.module:function`."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from torch import nn


def called(spec: str) -> Any:
    """Returns what the function at `spec` returns when it is called without arguments: a module of normalised pixels, a
    `NamedModel` or a `TextModel`. "my_networks:resnet" is the function resnet of my_networks.py, in the working folder or
    installed.

    Raises:
        ValueError: there is no such module or function; the message says which, and the names that there are.
        TypeError: it returns none of these. What the function itself raises stays as it is.
    """
    name, _, attribute = spec.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise  # the module is there and misses another
        raise ValueError(
            f"{spec}: there is no module {error.name!r} in {os.getcwd()}, nor installed; a model of your own is module:function"
        ) from error
    except ValueError as error:  # an empty name
        raise ValueError(f"{spec!r} is no module:function") from error
    if not callable(getattr(module, attribute, None)):
        functions = sorted(n for n, value in vars(module).items() if callable(value) and not n.startswith("_"))
        raise ValueError(f"{name} has no function {attribute!r}; it has {', '.join(functions) or 'none'}")
    made = getattr(module, attribute)()
    if not (isinstance(made, nn.Module) or hasattr(made, "model")):
        raise TypeError(
            f"{spec} returns a torch.nn.Module, or a NamedModel or TextModel of sp_fx.models; got {type(made).__name__}"
        )
    return made
