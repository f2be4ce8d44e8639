"""Quantus's calling convention: `explain_func(model, inputs, targets, **options)`, arrays in and out."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
from torch import nn

from ..build import transform
from ..explainer import Explainer
from ..gates.rules import Rules

METHODS = ("pullback", "double_pullback", "ascend")


def explain_func(
    model: nn.Module,
    inputs: np.ndarray,
    targets: np.ndarray,
    *,
    method: str = "pullback",
    rules: Rules | None = None,
    device: str | torch.device | None = None,
    example_inputs: Any = None,
    **options: Any,
) -> np.ndarray:
    """Quantus's `explain_func`: explains the raw module `model`, on numpy arrays; returns an array shaped like `inputs`.

    The model is transformed anew at every call, since metrics that randomise weights hand in another one each time.

    Args:
        model: what Quantus evaluates; an explainer is used as it is, and then `rules` is None.
        inputs: float array [B, ...], in the model's dtype or cast to it.
        targets: integer array [B], or one integer.
        method: "pullback", "double_pullback" or "ascend".
        device: where to explain; None leaves the model where it is. The model itself is not moved.
        options: arguments of the method.

    Raises:
        ValueError: an unknown method; a model on another device than `device`.
        TypeError: options that the method does not take.
    """
    if method not in METHODS:
        raise ValueError(f"method is one of {', '.join(METHODS)}, got {method!r}")
    known = set(inspect.signature(getattr(Explainer, method)).parameters) - {"self", "inputs", "target", "return_path"}
    if unknown := set(options) - known:
        raise TypeError(f"{method} takes no {', '.join(sorted(unknown))}; it takes {', '.join(sorted(known))}")
    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    if device is not None and weight.numel() and weight.device.type != torch.device(device).type:
        raise ValueError(f"device is {device} and the model is on {weight.device}: move one of them")
    x = torch.as_tensor(np.asarray(inputs)).to(weight.device, weight.dtype)
    if isinstance(model, Explainer):
        if rules is not None:
            raise ValueError("an explainer has its rules already: pass the model it was made from")
        explainer = model
    else:
        explainer = transform(model, rules=rules, example_inputs=x if example_inputs is None else example_inputs)
    target = torch.as_tensor(np.asarray(targets)).long().to(weight.device)
    maps = getattr(explainer, method)(x, target.flatten() if target.dim() else int(target), **options)
    return maps.cpu().numpy().astype(np.asarray(inputs).dtype, copy=False)
