"""What the kernel tests share: where they can run, and the rounding of a dtype."""

import pytest
import torch

triton = pytest.importorskip("triton")
kernels = pytest.importorskip("sp_fx_kernels")
INTERPRETED = triton.knobs.runtime.interpret
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

runs_kernels = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(
        not (INTERPRETED or torch.cuda.is_available()), reason="Triton kernels run on a GPU or, with TRITON_INTERPRET=1, on CPU"
    ),
]


def unit(dtype):
    """The relative error of one rounding: half an ulp, or a whole one where the interpreter truncates, as it does to bfloat16."""
    return torch.finfo(dtype).eps * (1 if INTERPRETED and dtype == torch.bfloat16 else 0.5)
