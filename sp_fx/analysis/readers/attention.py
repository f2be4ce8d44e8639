"""Calls of attention as one op, and of softmax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from .reader import Gate, Unread, aten, reads


@reads(F.scaled_dot_product_attention, aten.scaled_dot_product_attention)
def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    if dropout_p != 0:
        return Unread(f"attention with dropout_p={dropout_p!r} in the call, also in eval mode")
    return Gate(
        "attention", (query, key, value, attn_mask), {"is_causal": is_causal, "score_scale": scale, "enable_gqa": enable_gqa}
    )


# Of each call of a softmax, (scores, axis, dtype).
SOFTMAX: dict[Any, Callable[..., tuple]] = {
    **dict.fromkeys((F.softmax, "softmax"), lambda input, dim=None, _stacklevel=3, dtype=None: (input, dim, dtype)),
    **dict.fromkeys((torch.softmax, torch.special.softmax, aten.softmax, aten.special_softmax),
                    lambda input, dim, dtype=None: (input, dim, dtype)),
    aten._softmax: lambda input, dim, half_to_float=False: (input, dim, torch.float32 if half_to_float else None),
}  # fmt: skip
