"""Every kernel compiles ahead of time, for three GPUs that need not be there; what streams moves 16 bytes at a time."""

import functools
import re

import pytest
import torch

triton = pytest.importorskip("triton")
kernels = pytest.importorskip("sp_fx_kernels")

pytestmark = pytest.mark.skipif(
    bool(triton.knobs.runtime.interpret), reason="the interpreter replaces the compiler: run these without TRITON_INTERPRET"
)
TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}

FLOATS = {"v_ptr", "z_ptr", "x_ptr", "y_ptr", "q_ptr", "k_ptr", "slope_ptr", "gamma_ptr", "start_ptr", "out_ptr"}
GATE = dict(TAU=0.6, HARD=False, A=None, B=None, C=None, WIDE=False, BLOCK=1024)
POOL = dict(
    TAU=0.3, HARD=False, H=112, W=112, OH=56, OW=56, INNER=1, KH=3, KW=3, SH=2, SW=2, PH=1, PW=1, DH=1, DW=1, SAMPLE=2**30,
    WIDE=False, UNROLL=9, BLOCK=512,
)  # fmt: skip
NORM = dict(EPS=1e-5, CENTRED=True, SCALED=True, SAVED=False, ROWS=1, BLOCK=1024, LOOP=False)
ROWS = dict(
    SCALE=0.125, PER_TAU=1.0, MASK="none", CAUSAL=False, D=64, SIZE=1024, BLOCK_D=64, BLOCK_N=128, BLOCK_M=64,
    q_col=1, k_col=1, mask_col=1,
)  # fmt: skip
KEYS = ROWS | dict(SAVED=False, DV=64, BLOCK_DV=64, BLOCK_N=64, BLOCK_M=128, v_col=1)
MOVE = dict(STEP=20.0, RADIUS=None, LOW=None, HIGH=None, PIECES=128, BLOCK=2048)

#      name: (module, kernel, constants)
CASES = {
    "relu": ("gate", "_gate_kernel", GATE | {"KIND": "relu"}),
    "relu_frozen": ("gate", "_gate_kernel", GATE | {"KIND": "relu", "TAU": 1.0, "HARD": True}),
    "relu_per_sample": ("gate", "_gate_kernel", GATE | {"KIND": "relu", "TAU": None}),
    "leaky_relu": ("gate", "_gate_kernel", GATE | {"KIND": "leaky_relu", "A": 0.01}),
    "prelu": ("gate", "_gate_kernel", GATE | {"KIND": "prelu"}),
    "prelu_wide": ("gate", "_gate_kernel", GATE | {"KIND": "prelu", "WIDE": True}),
    "hardtanh": ("gate", "_gate_kernel", GATE | {"KIND": "hardtanh", "A": 0.0, "B": 6.0}),
    "elu": ("gate", "_gate_kernel", GATE | {"KIND": "elu", "A": 1.0, "B": 1.0, "C": 1.0}),
    "elu_frozen": ("gate", "_gate_kernel", GATE | {"KIND": "elu", "A": 1.0, "B": 1.0, "C": 1.0, "TAU": 1.0, "HARD": True}),
    "gelu": ("gate", "_gate_kernel", GATE | {"KIND": "gelu"}),
    "gelu_tanh": ("gate", "_gate_kernel", GATE | {"KIND": "gelu_tanh"}),
    "silu": ("gate", "_gate_kernel", GATE | {"KIND": "silu"}),
    "hardswish": ("gate", "_gate_kernel", GATE | {"KIND": "hardswish"}),
    "mish": ("gate", "_gate_kernel", GATE | {"KIND": "mish"}),
    "layer_norm": ("norm", "_norm_kernel", NORM),
    "layer_norm_loop": ("norm", "_norm_kernel", NORM | {"BLOCK": 8192, "LOOP": True}),
    "rms_norm_rows": ("norm", "_norm_kernel", NORM | {"CENTRED": False, "ROWS": 8, "BLOCK": 128}),
    "norm_saved": ("norm", "_norm_kernel", NORM | {"SAVED": True, "SCALED": False}),
    "pool_share": ("max_pool", "_share_kernel", POOL),
    "pool_gather": ("max_pool", "_gather_kernel", POOL | {"UNROLL": 4}),
    "pool_gather_nhwc": ("max_pool", "_gather_kernel", POOL | {"UNROLL": 4, "INNER": 64}),
    "pool_gather_frozen_large": (
        "max_pool", "_gather_kernel", POOL | {"HARD": True, "KH": 13, "KW": 13, "SH": 1, "SW": 1, "UNROLL": 1, "WIDE": True}
    ),
    "attention_rows": ("attention", "_rows_kernel", ROWS),
    "attention_rows_causal": ("attention", "_rows_kernel", ROWS | {"CAUSAL": True}),
    "attention_rows_masked": ("attention", "_rows_kernel", ROWS | {"MASK": "added"}),
    "attention_keys": ("attention", "_keys_kernel", KEYS),
    "attention_keys_saved": ("attention", "_keys_kernel", KEYS | {"SAVED": True}),
    "attention_keys_causal": ("attention", "_keys_kernel", KEYS | {"CAUSAL": True}),
    "attention_keys_masked_128": (
        "attention", "_keys_kernel", KEYS | {"MASK": "bool", "D": 100, "DV": 100, "BLOCK_D": 128, "BLOCK_DV": 128, "BLOCK_M": 64}
    ),
    "attention_keys_added_128": (
        "attention", "_keys_kernel", KEYS | {"MASK": "added", "D": 128, "DV": 128, "BLOCK_D": 128, "BLOCK_DV": 128, "BLOCK_M": 64}
    ),
    "ascent_sums": ("ascent", "_sums_kernel", {"BALL": False, "BLOCK": 2048}),
    "ascent_sums_ball": ("ascent", "_sums_kernel", {"BALL": True, "BLOCK": 2048}),
    "ascent_move": ("ascent", "_move_kernel", MOVE),
    "ascent_move_projected": ("ascent", "_move_kernel", MOVE | {"RADIUS": 10.0, "LOW": -1.0, "HIGH": 1.0}),
}  # fmt: skip


@functools.cache
def compiled(case, target, dtype):
    module, name, constants = CASES[case]
    kernel = getattr(getattr(kernels, module), name)
    if "PRECISION" in kernel.arg_names:
        constants = constants | {"PRECISION": "tf32x3" if dtype == "fp32" and target != "gfx942" else "ieee"}
    signature, attributes = {}, {}
    for position, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
            continue
        if argument.endswith("_ptr"):
            mask = "u8" if constants.get("MASK") == "bool" else dtype
            signature[argument] = "*" + (mask if argument == "mask_ptr" else dtype if argument in FLOATS else "fp32")
        else:
            signature[argument] = "i32"
        attributes[(position,)] = [["tt.divisibility", 16]]  # as a launch specialises for aligned tensors of round sizes
    missing = constants.keys() - set(kernel.arg_names)
    assert not missing, missing
    source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
    gpu = triton.backends.compiler.GPUTarget(*TARGETS[target])
    return triton.compile(source, target=gpu, options={"num_warps": 4, **kernels.common.OPTIONS})


BF16_ALONE = ("attention_keys_saved", "attention_keys_added_128", "attention_rows_causal", "pool_gather_frozen_large")


@pytest.mark.parametrize("dtype,case", [(d, c) for d in ("fp32", "bf16") for c in CASES if d == "bf16" or c not in BF16_ALONE])
@pytest.mark.parametrize("target", TARGETS)
def test_compiles(target, dtype, case):
    binary = compiled(case, target, dtype)
    code = binary.asm["amdgcn" if target == "gfx942" else "ptx"]
    assert CASES[case][1] in code
    if target == "gfx942":
        assert "s_endpgm" in code and binary.asm["hsaco"]
        return
    assert f".target {target}" in code and binary.asm["cubin"]
    assert ".f64" not in code  # doubles, which a float argument would bring in, run at 1/2 to 1/64 of the speed
    streams = case.split("_")[0] == "ascent" or CASES[case][0] == "gate"
    if streams and target == "sm_90":
        loads, stores = (re.findall(rf"{kind}\.global\S*\.(v4\.b32|v2\.b64)", code) for kind in ("ld", "st"))
        tensors = {"_gate_kernel": 2, "_sums_kernel": 3 if "ball" in case else 1, "_move_kernel": 3 if "projected" in case else 2}
        assert len(loads) >= tensors[CASES[case][1]]
        assert stores or case.startswith("ascent_sums")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_attention_runs_on_tensor_cores(dtype):
    for case in ("attention_rows", "attention_keys"):
        assert "wgmma" in compiled(case, "sm_90", dtype).asm["ptx"]
        assert "mma.sync" in compiled(case, "sm_80", dtype).asm["ptx"]
        assert "v_mfma" in compiled(case, "gfx942", dtype).asm["amdgcn"]


def test_tensors_on_cpu_are_refused():
    x = torch.ones(1, 1, 4, 4)
    launches = [
        lambda: kernels.gate_adjoint("relu", x, x, tau=0.6),
        lambda: kernels.norm_adjoint(x, x, None, (4,), eps=1e-5, centred=True),
        lambda: kernels.max_pool_adjoint(x, x, x, tau=0.3, kernel=(1, 1), stride=(1, 1)),
        lambda: kernels.attention_adjoint(x, x, x),
        lambda: kernels.ascent_step(x, x, step=1.0),
    ]
    for launch in launches:
        with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
            launch()
