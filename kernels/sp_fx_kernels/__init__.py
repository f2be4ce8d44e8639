"""Triton kernels for the pullbacks that are worth one: launchers on plain tensors, without autograd.

Each takes cotangents and what the forward pass knows, and returns new tensors; float32 inside, in every dtype but float64.
"""

from .ascent import ascent_step
from .attention import attention_adjoint
from .gate import gate_adjoint
from .max_pool import max_pool_adjoint
from .norm import norm_adjoint

__all__ = ["ascent_step", "attention_adjoint", "gate_adjoint", "max_pool_adjoint", "norm_adjoint"]
