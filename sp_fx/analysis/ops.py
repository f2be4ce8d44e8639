"""The table of ops: what is known of each name that a call may have."""

from __future__ import annotations

# What chooses by value, and has no rule: reported as not rewritten.
PIECEWISE = frozenset(
    """max min amax amin maximum minimum aminmax topk kthvalue sort msort median nanmedian quantile nanquantile mode cummax cummin
    logcumsumexp sign sgn heaviside round floor ceil trunc frac fmod remainder mod argmax argmin lp_pool1d lp_pool2d lp_pool3d
    gumbel_softmax""".split()
)


INDICES = frozenset(("argmax", "argmin"))  # of token ids, which are the caller's, they say where a text ends


# What is no gate, and keeps its derivative, as products and quotients of two things that vary do.
SMOOTH = frozenset(
    """sigmoid tanh softplus softsign logsigmoid hardsigmoid tanhshrink exp expm1 log log1p sin cos erf atan log_softmax
    logsumexp softmin""".split()
)


PRODUCT = frozenset("mul imul multiply matmul bmm mm einsum baddbmm addcmul addbmm bilinear".split())


QUOTIENT = frozenset("truediv div divide true_divide itruediv".split())


SHARES = frozenset("sigmoid hardsigmoid softmax tanh".split())  # what gates a product, before


ACTIVATIONS = frozenset("silu gelu relu relu6 hardtanh".split())


COMPLEX = ("stft", "fft_", "rfft", "ifft", "complex", "polar", "view_as_complex")  # what gives complex numbers


COMPARISONS = frozenset("gt ge lt le greater less greater_equal less_equal".split())


CHOICES = frozenset("where masked_fill".split())


LOGICAL = frozenset("logical_not logical_and logical_or logical_xor invert bitwise_not and or xor bool half double type".split())


CELLS = frozenset("lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell".split())


RECURRENT = "a recurrent cell, whose gates keep their derivative"


# torch's own, with gates inside
FUSED = frozenset("transformer_encoder_layer_fwd native_multi_head_attention multi_head_attention_forward".split())


# What may share the storage of its first input.
VIEW = frozenset(
    """view reshape view_as reshape_as flatten unflatten permute transpose swapaxes t T mT H movedim moveaxis squeeze unsqueeze
    expand expand_as split chunk unbind tensor_split narrow select getitem diagonal contiguous detach to float type_as getattr
    slice alias adjoint mH unfold real view_as_real unsafe_view checked
    dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout""".split()
)


# What depends on the shape of its input alone.
SHAPES = frozenset(
    """shape dtype device ndim size sym_size dim numel sym_numel stride len is_floating_point get_device zeros_like ones_like
    full_like empty_like new_zeros new_ones new_full new_empty new_tensor""".split()
)


MULTIPLICATION = frozenset("mul imul multiply".split())


MULTIPLES = frozenset(
    "mul truediv div rsub sub add".split()
)  # with one varying input: what a multiple of it, or an offset, is made by


MATRIX_PRODUCTS = frozenset("matmul bmm mm".split())


ATTENTION_PRODUCTS = MATRIX_PRODUCTS | frozenset("einsum baddbmm addmm addbmm".split())


WEIGHTS_PASS = frozenset(
    "mul imul truediv itruediv div add iadd sub isub sum mean masked_fill where linear conv2d clone flip roll".split()
)
