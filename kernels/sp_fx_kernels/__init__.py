"""Triton kernels for the pullbacks that are worth one: launchers on plain tensors, without autograd.

A launcher takes cotangents and tensors of the forward pass, float32, float16 or bfloat16, and returns new ones; it computes in
float32.
"""

from .ascent import ascent_step
from .attention import attention_adjoint
from .gate import gate_adjoint
from .max_pool import max_pool_adjoint
from .norm import norm_adjoint

__all__ = ["ascent_step", "attention_adjoint", "gate_adjoint", "max_pool_adjoint", "norm_adjoint"]
