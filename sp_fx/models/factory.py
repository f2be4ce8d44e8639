"""A model of one's own by the name of the function that makes it: `package.module:function`."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from torch import nn


def is_own(name: str) -> bool:
    """Whether `name` is that of a function of the user's, not of timm's hub (`timm/hf-hub:...`)."""
    return ":" in name and not name.startswith("timm/")


def called(spec: str) -> Any:
    """Returns what the function at `spec` returns when it is called without arguments. "my_networks:resnet" is the function, or
    the module, resnet of my_networks.py, in the working folder or installed.

    Raises:
        ValueError: there is no such module or function; the message says which, and those that there are. What the file and the
            function themselves raise stays as it is.
    """
    name, _, attribute = spec.partition(":")
    if not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(
            f"{spec!r} is no module:function; a model of your own is named as my_networks:resnet, for resnet of my_networks.py"
        )
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # at the end: a file there hides no installed module
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise  # the module is there and misses another
        raise ValueError(f"{spec}: there is no module {error.name!r} in {os.getcwd()}, nor installed") from error
    made = getattr(module, attribute, None)
    if isinstance(made, nn.Module):
        return made
    if not callable(made):
        own = [n for n, value in vars(module).items() if callable(value) and getattr(value, "__module__", "") == name]
        raise ValueError(f"{name} has no function {attribute!r}; it has {', '.join(sorted(own)) or 'none'}")
    return made()
