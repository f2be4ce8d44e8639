"""`nn.MultiheadAttention` with dual-path attention inside: one call, the module's own arithmetic, soft through the values."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from ..adjoints.attention import is_tempered, tempered_softmax
from ..adjoints.row import Temperature
from ..calls.autocast import Region, under
from ..dual_path import dual_path, frozen


def multihead_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: dict[str, Tensor | None],
    *,
    num_heads: int,
    tau: Temperature,
    batch_first: bool = False,
    add_zero_attn: bool = False,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
    autocast: Region = (),
) -> tuple[Tensor, Tensor | None]:
    """What `nn.MultiheadAttention` in eval mode returns for the same arguments, by the same operations in the same order.

    `weights` has the module's parameters by name, None for those it lacks. PyTorch's fused fast path (nothing requires grad) is
    not taken: there the results differ in the last bits. `autocast` is that of the model's own region, if the call is in one.
    """
    if autocast or has_torch_function((query, key, value)):
        options: dict[str, Any] = {
            "num_heads": num_heads, "tau": tau, "batch_first": batch_first, "add_zero_attn": add_zero_attn,
            "key_padding_mask": key_padding_mask, "need_weights": need_weights, "attn_mask": attn_mask,
            "average_attn_weights": average_attn_weights, "is_causal": is_causal,
        }  # fmt: skip
        if not has_torch_function((query, key, value)):
            return under(autocast, multihead_attention, query, key, value, weights, **options)
        options |= {"autocast": autocast} if autocast else {}
        return handle_torch_function(multihead_attention, (query, key, value), query, key, value, weights, **options)
    batched = query.dim() == 3
    self_attention, shared_key = query is key and key is value, key is value
    if not batched:
        query, key, value = (t.unsqueeze(1) for t in (query, key, value))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    elif batch_first:
        query, key, value = (t.transpose(1, 0) for t in (query, key, value))
    length, batch, width = query.shape

    mask = merged_mask(query, attn_mask, key_padding_mask, num_heads, need_weights, is_causal)
    is_causal = is_causal and key_padding_mask is None and not need_weights

    q, k, v = project(query, key, value, weights, 3 if self_attention else 2 if shared_key else 1)
    if weights["bias_k"] is not None and weights["bias_v"] is not None:
        k = torch.cat([k, weights["bias_k"].repeat(1, batch, 1)])
        v = torch.cat([v, weights["bias_v"].repeat(1, batch, 1)])
        mask = None if mask is None else F.pad(mask, (0, 1))
    q, k, v = (t.reshape(t.shape[0], batch * num_heads, width // num_heads).transpose(0, 1) for t in (q, k, v))
    if add_zero_attn:
        k, v = (torch.cat([t, t.new_zeros(t.shape[0], 1, t.shape[2])], 1) for t in (k, v))
        mask = None if mask is None else F.pad(mask, (0, 1))

    averaged = None
    if need_weights:
        scaled = q * math.sqrt(1.0 / q.shape[-1])
        scores = torch.bmm(scaled, k.mT) if mask is None else torch.baddbmm(mask, scaled, k.mT)
        attention = torch.softmax(scores, -1)
        soft = tempered_softmax(scores, tau).detach() if is_tempered(tau) else None
        mixed = dual_path("mix", frozen(attention), soft, v, tau=tau).transpose(0, 1).reshape(length * batch, width)
        averaged = attention.view(batch, num_heads, length, k.shape[1])
        averaged = averaged.mean(1) if average_attn_weights else averaged
    else:
        if mask is not None:
            mask = mask.unsqueeze(0) if mask.shape[0] == 1 else mask.view(batch, num_heads, -1, k.shape[1])
        q, k, v = (t.view(batch, num_heads, t.shape[1], t.shape[2]) for t in (q, k, v))
        mixed = dual_path("attention", q, k, v, mask, tau=tau, is_causal=is_causal)
        mixed = mixed.permute(2, 0, 1, 3).reshape(batch * length, width)
    out = F.linear(mixed, weights["out_proj.weight"], weights["out_proj.bias"]).view(length, batch, -1)  # type: ignore[arg-type]
    if not batched:
        return out.squeeze(1), None if averaged is None else averaged.squeeze(0)
    return (out.transpose(1, 0) if batch_first else out), averaged


def project(query: Tensor, key: Tensor, value: Tensor, weights: dict[str, Tensor | None], shared: int) -> list[Tensor]:
    """Queries, keys and values, [length, batch, width] all three; the last `shared` inputs are one tensor (3: self-attention)."""
    packed, bias = weights["in_proj_weight"], weights["in_proj_bias"]
    if packed is None:
        separate = [weights[f"{name}_proj_weight"] for name in ("q", "k", "v")]
        biases = [None] * 3 if bias is None else bias.chunk(3)
        return [F.linear(t, w, b) for t, w, b in zip((query, key, value), separate, biases)]  # type: ignore[arg-type]
    width = query.shape[-1]
    parts = {3: [(query, 3)], 2: [(query, 1), (key, 2)], 1: [(query, 1), (key, 1), (value, 1)]}[shared]
    projected: list[Tensor] = []
    for t, count in parts:
        rows = slice(len(projected) * width, (len(projected) + count) * width)
        joint = F.linear(t, packed[rows], None if bias is None else bias[rows])
        if count > 1:  # torch regroups a shared product, so that each part is contiguous
            joint = joint.unflatten(-1, (count, width)).unsqueeze(0).transpose(0, -2).squeeze(-2).contiguous()
        projected.extend(joint.unbind(0) if count > 1 else [joint])
    return projected


def merged_mask(
    query: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None, heads: int, need_weights: bool, is_causal: bool
) -> Tensor | None:
    """Both masks as one float mask that is added to the scores, [1 or batch * heads, length, keys]; None where there is none, or
    where the causal kernel stands for it."""

    def added(mask: Tensor | None) -> Tensor | None:
        if mask is None or mask.is_floating_point():
            return mask
        return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask, -math.inf)

    if is_causal and attn_mask is None:
        raise ValueError("is_causal=True is a hint about attn_mask, which is None: pass the mask as well")
    if is_causal and key_padding_mask is None and not need_weights:
        return None
    mask = added(attn_mask)
    if mask is not None and mask.dim() == 2:
        mask = mask.unsqueeze(0)
    if key_padding_mask is not None:
        batch, keys = key_padding_mask.shape
        padding = added(key_padding_mask).view(batch, 1, 1, keys).expand(-1, heads, -1, -1).reshape(batch * heads, 1, keys)  # type: ignore[union-attr]
        mask = padding if mask is None else mask + padding
    return mask
