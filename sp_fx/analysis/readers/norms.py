"""Calls of normalisations."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .reader import Gate, Unread, aten, reads


@reads(F.layer_norm, torch.layer_norm, aten.layer_norm)
def layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5, cudnn_enable=True):
    return Gate("layer_norm", (input, weight, bias), {"normalized_shape": normalized_shape, "eps": eps})


@reads(F.rms_norm, torch.rms_norm, aten.rms_norm)
def rms_norm(input, normalized_shape, weight=None, eps=None):
    return Gate("rms_norm", (input, weight), {"normalized_shape": normalized_shape, "eps": eps})


@reads(F.group_norm)
def group_norm(input, num_groups, weight=None, bias=None, eps=1e-5):
    return Gate("group_norm", (input, weight, bias), {"num_groups": num_groups, "eps": eps})


@reads(torch.group_norm, aten.group_norm)
def aten_group_norm(input, num_groups, weight=None, bias=None, eps=1e-5, cudnn_enabled=True):
    return group_norm(input, num_groups, weight, bias, eps)


@reads(torch.instance_norm, aten.instance_norm)
def aten_instance_norm(input, weight, bias, running_mean, running_var, use_input_stats, momentum, eps, cudnn_enabled=True):
    return instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)


@reads(F.instance_norm)
def instance_norm(
    input, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True, momentum=0.1, eps=1e-5
):
    if not use_input_stats:
        return None  # affine
    if running_mean is not None:
        return Unread("instance_norm that updates its running statistics")
    return Gate("instance_norm", (input, weight, bias), {"eps": eps})


@reads(F.batch_norm)
def batch_norm(input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    if not training:
        return Gate("affine_norm", (input, running_mean, running_var, weight, bias), {"eps": eps})
    if running_mean is not None:
        return Unread("batch_norm that updates its running statistics")
    return Gate("batch_norm", (input, weight, bias), {"eps": eps})


@reads(torch.batch_norm, aten.batch_norm)
def aten_batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled=True):
    return batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


@reads(F.normalize)
def normalize(input, p=2.0, dim=1, eps=1e-12, out=None):
    return Gate("normalize", (input,), {"p": p, "dim": dim, "eps": eps})


@reads(F.cosine_similarity, torch.cosine_similarity, aten.cosine_similarity)
def cosine_similarity(x1, x2, dim=1, eps=1e-8):
    return Gate("cosine_similarity", (x1, x2), {"dim": dim, "eps": eps})


@reads(F.local_response_norm)
def local_response_norm(input, size, alpha=1e-4, beta=0.75, k=1.0):
    return Gate("local_response_norm", (input,), {"size": size, "alpha": alpha, "beta": beta, "k": k})
