"""The table of ops, as text: each name that a call in a graph may have, and its traits. `ops.py` reads it.

A name is the one that `calls.name_of` gives, the same however a model spells the op: `relu` for `F.relu`, `torch.relu_`,
`Tensor.relu_` and `aten.relu_.default`; `iadd` for `operator.iadd`. No other file of the package lists names of ops. What torch
can be asked about a trait, `tests/test_analysis_ops.py` asks it.
"""

# What each trait says of an op, with an example. A trait that ends in "=" has a value.
TRAITS = {
    # what it computes
    "product": "multiplies operands that may both vary with the input, and keeps the product rule: `matmul`",
    "quotient": "divides operands that may both vary with the input, and keeps the quotient rule: `div`",
    "addend": "adds something to the product or quotient: `addmm`",
    "between": "goes from its first operand some way to its second: `lerp`",
    "factor": "is the elementwise product of two tensors, one of which may be the gate of the other: `mul`",
    "scales": "gives a multiple of its only varying operand: `div` in `x / 2`",
    "shifts": "gives its only varying operand plus a constant, up to sign: `rsub` in `2 - x`",
    "plus": "adds two things: `add`",
    "power": "raises to a power: `pow` in `x ** 2`",
    "affine": "is affine in its only varying operand, so that it may stand between a softmax and its product: `masked_fill`",
    "layer": "is a layer with weights: `linear`",
    "mixes": "applies the weights of attention to values, by a product that the table of gates has: `bmm`",
    "exponential": "is a power of a number, or a softmax of the negative: `exp`",
    "logarithm": "is the logarithm of a softmax: `log_softmax`",
    "real": "gives real numbers of complex ones: `angle`",
    "smooth": "has a continuous derivative, and keeps it: `exp`",
    "share": "says which share of a product's other factor passes: `sigmoid` in `sigmoid(a) * b`",
    "activation": "gates a product in which nothing is a share: `gelu` in `gelu(a) * b`",
    "bounded": "is such a gate where no other is beside it: a clamp, which else is a bound: `hardtanh`",
    "piecewise": "chooses by value and has no rule, unless a reader knows the call: `topk`",
    "order": "gives values of its argument that it chose by their order, each to go back where it is from: `median`",
    "indices": "gives positions; of token ids, which are the caller's, they say where a text ends: `argmax`",
    "comparison": "compares values, and gives a mask: `gt` in `x > 0`",
    "guard": "asks whether numbers are finite, as casts to half precision make it necessary: `isinf`",
    "chooser": "takes each element from one of two operands, by a mask: `where`",
    "logical": "makes a mask of masks, or reads one: `logical_and`",
    "whole": "gives whole numbers or masks, through which no derivative goes: `long`",
    "lookup": "reads whole numbers, its first operand, as positions in a table: `embedding`; of `getitem`, the second",
    "index": "reads whole numbers, its argument `index`, as positions along an axis: `gather`",
    "form": "takes of its further operands their dtype, shape or device alone: `b` of `a.type_as(b)`",
    "complex": "gives complex numbers: `fft_fft`",
    "cell": "is a recurrent network: `lstm`; a smooth one has no gate",
    "gated": "has gates inside that are products: `gru`",
    "state": "keeps a state beside its output: `lstm`",
    "fused": "is an op of torch with gates inside: `native_multi_head_attention`",
    # storage, values and shapes
    "view": "may share the storage of its first input: `transpose`; `dropout`, which in eval mode gives its input",
    "same_values": "gives in eval mode the numbers that it got, in order or not: `flatten`",
    "shape": "depends on the shape, dtype or device of its input alone: `zeros_like`",
    "number": "gives a number or a plain object, not a tensor: `size`",
    "fresh": "makes a tensor that nothing has read yet, and keeps nothing of it for its derivative: `zeros_like`",
    "same_form": "gives the dtype and shape of its input, or raises, in place or not: `relu`",
    "in_place": "has no form out of place that gives the same: `copy_`",
    "itself": "returns its very input, in eval mode: `dropout`",
    "several": "returns a tuple of tensors: `chunk`",
    # functions that a model writes out
    "pointwise": "maps element by element, and may be part of a written gate: `sigmoid` in `x * sigmoid(x)`",
    "carries": "carries the values of a norm's signal or statistic into another dtype or shape: `unsqueeze`",
    "reduces": "reduces a signal along axes: `mean` in `x.pow(2).mean(-1, True)`",
    "centre": "gives means that may be taken off a signal: `var_mean`",
    "norm": "is a norm by name, which makes its quotient a `normalize`, not an RMS norm: `linalg_vector_norm`",
    "by_index": "puts values where whole numbers say, and adds them up there, unless its reader says otherwise: `scatter_add`",
    "renormalises": "divides by a norm, and so weights by their sum: `normalize`",
    "joins": "puts tensors side by side: `cat`",
    "either": "is over axes, or of two tensors, which then has another name, `maximum`: `max`",
    "bounds": "keeps its operand above or below a bound: `clamp`",
    "window": "averages over windows, as local response norms do over channels: `avg_pool3d`",
    "degree=": "its degree of homogeneity in its first operand: `sqrt`, degree=1/2, as sqrt(4 x) is 2 sqrt(x)",
    "parity=": "the sign it gives to the negative of its operand, where it is not that of the operand: `abs`, parity=even",
    # coverage: families of gates, counted below a model's Python code and in its report
    "family=": "the family that it counts for in both: `relu6`, family=clamp, as PyTorch dispatches hardtanh for it",
    "dispatched=": "the family, where PyTorch dispatches this name and reports have another: `native_layer_norm`",
    "listed=": "the family, where reports have this name and PyTorch dispatches another: `normalize`; clamp*2 of one or two,"
    " sign+abs of several",
}

# A line has the names of ops that are alike, a colon, and their traits; lines that follow, indented, continue it.
TABLE = """
# -- products
mul imul multiply:      product factor scales affine pointwise
matmul imatmul linalg_matmul bmm mm:    product mixes
einsum:                 product
mv dot vdot inner outer ger tensordot kron linalg_vecdot linalg_multi_dot chain_matmul cross linalg_cross:   product
addbmm baddbmm addmm addmv addr bilinear:   product addend
addcmul:                product addend pointwise
lerp:                   product between pointwise
addcdiv:                quotient addend pointwise

# -- quotients
truediv itruediv div divide true_divide:    quotient scales affine pointwise
reciprocal:             smooth pointwise degree=-1

# -- sums and differences
add iadd:               shifts plus affine pointwise
sub isub subtract:      shifts affine pointwise
rsub:                   shifts affine pointwise
neg negative:           scales affine pointwise
positive:               scales affine view same_values

# -- powers
pow ipow float_power:   smooth power pointwise
square:                 smooth pointwise degree=2 parity=even
sqrt:                   smooth pointwise degree=1/2
rsqrt:                  smooth pointwise degree=-1/2

# -- smooth
sigmoid special_expit tanh:    smooth share pointwise
exp:                    smooth pointwise exponential
exp2 special_exp2:      smooth pointwise exponential
expm1 special_expm1:    smooth pointwise
log log2 log10 log1p special_log1p:    smooth pointwise
erf special_erf erfc special_erfc erfinv special_erfinv special_erfcx special_ndtr special_log_ndtr:    smooth pointwise
sin cos tan sinh cosh asin arcsin acos arccos atan arctan asinh arcsinh acosh arccosh atanh arctanh sinc special_sinc:
    smooth pointwise
softsign:               smooth pointwise listed=abs
softplus tanhshrink log_sigmoid logit special_logit:    smooth pointwise
log_sigmoid_forward:    smooth several
atan2 arctan2 hypot xlogy special_xlogy special_xlog1py logaddexp logaddexp2:    smooth pointwise
lgamma digamma special_gammaln special_digamma special_psi i0 special_i0 special_i1 special_entr:
    smooth pointwise
logsumexp special_logsumexp logcumsumexp prod cumprod:    smooth
cdist cdist_forward euclidean_dist pdist pairwise_distance dist:    smooth
hardsigmoid:            share pointwise same_form

# -- softmax and attention
softmax special_softmax:                family=softmax share
softmin:                smooth listed=softmax share exponential
log_softmax special_log_softmax:        smooth logarithm
gumbel_softmax:         piecewise listed=softmax
scaled_dot_product_attention MultiheadAttention:    listed=softmax
scaled_dot_product_attention_math scaled_dot_product_flash_attention scaled_dot_product_flash_attention_for_cpu
    scaled_dot_product_efficient_attention scaled_dot_product_cudnn_attention
    scaled_dot_product_fused_attention_overrideable safe_softmax:    family=softmax
transformer_encoder_layer_fwd native_multi_head_attention multi_head_attention_forward:    fused
lstm lstm_cell:         cell gated state
gru gru_cell:           cell gated
rnn_tanh rnn_tanh_cell: cell smooth
rnn_relu rnn_relu_cell: cell

# -- gates that readers know
relu:                   activation pointwise same_form family=itself
gelu silu hardswish mish:   activation pointwise same_form family=itself
relu6 hardtanh:         activation bounded pointwise same_form family=clamp
leaky_relu hardshrink softshrink:    pointwise same_form family=itself
prelu:                  same_form family=itself
prelu_kernel:           family=prelu
rrelu:                  same_form listed=leaky_relu
rrelu_with_noise:       dispatched=leaky_relu
elu selu celu:          pointwise same_form family=elu
abs absolute:           pointwise degree=1 parity=even family=abs real
angle:                  smooth pointwise real
fft_irfft fft_irfft2 fft_irfftn fft_hfft fft_hfft2 fft_hfftn fft_c2r istft:    real
threshold:              pointwise same_form family=clamp
clamp clip clamp_min clamp_max:    pointwise bounds family=clamp
maximum minimum fmax fmin:    pointwise piecewise bounds family=clamp
normalize:              listed=clamp renormalises
cosine_similarity:      listed=clamp*2
max_pool1d max_pool2d max_pool3d adaptive_max_pool1d:    listed=max_pool
max_pool1d_with_indices adaptive_max_pool1d_with_indices adaptive_max_pool2d_with_indices adaptive_max_pool3d_with_indices
    fractional_max_pool2d_with_indices fractional_max_pool3d_with_indices:    listed=max_pool several
mkldnn_max_pool2d adaptive_max_pool2d adaptive_max_pool3d fractional_max_pool2d fractional_max_pool3d:    family=max_pool
max_pool2d_with_indices max_pool3d_with_indices:    family=max_pool several
layer_norm:             listed=layer_norm
group_norm:             listed=group_norm
native_layer_norm:      dispatched=layer_norm
native_group_norm:      dispatched=group_norm

# -- piecewise
sign sgn:               piecewise pointwise parity=odd degree=0 family=sign
round floor ceil trunc frac:    piecewise pointwise family=itself
special_round:          piecewise pointwise listed=round
fix:                    piecewise pointwise listed=trunc
heaviside:              piecewise pointwise family=itself
fmod remainder mod imod:    piecewise pointwise family=remainder
floor_divide floordiv ifloordiv copysign:    piecewise pointwise
max:                    piecewise reduces either degree=1 family=max_pool
amax:                   piecewise reduces degree=1 family=max_pool
min:                    piecewise reduces either degree=1 family=max_pool
amin:                   piecewise reduces degree=1 family=max_pool
aminmax:                piecewise several
median nanmedian msort: piecewise order
quantile nanquantile:   piecewise order listed=ceil
topk sort kthvalue mode cummax cummin:    piecewise order several
argmax argmin:          piecewise indices whole
argsort:                indices whole
lp_pool1d lp_pool2d lp_pool3d:    piecewise listed=sign+abs+relu

# -- comparisons, masks and choices
gt ge lt le eq ne greater greater_equal less less_equal not_equal isclose signbit:    comparison whole pointwise
isnan isinf isfinite isposinf isneginf:    guard whole pointwise
where:                  chooser affine pointwise
masked_fill:            chooser affine pointwise
nan_to_num:             affine pointwise
logical_and logical_or logical_xor and or xor bitwise_and bitwise_or bitwise_xor iand ior ixor:    logical whole pointwise
logical_not invert bitwise_not bool:    logical whole pointwise
any all nonzero argwhere count_nonzero unique searchsorted bucketize histc isin:    whole
one_hot:                whole lookup
embedding embedding_bag:    lookup
int long short byte char:    whole pointwise

# -- casts and copies
to float double type type_as:    view same_values carries pointwise form affine
half bfloat16:          view carries pointwise form affine
to_copy:                same_values carries pointwise affine
contiguous:             view same_values carries pointwise affine
clone:                  fresh same_values carries affine pointwise
detach alias after:     view same_values
getattr:                view
dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout feature_alpha_dropout:    view same_values itself

requires_grad:          itself
copy fill zero set random uniform bernoulli exponential geometric log_normal cauchy map apply:    in_place

# -- views that change the shape
view reshape view_as reshape_as:    view same_values carries form
unsafe_view:            view same_values carries
flatten ravel unflatten squeeze unsqueeze:    view same_values carries
expand broadcast_to expand_as:    view same_values carries form

# -- views that move axes
permute transpose swapaxes swapdims t T numpy_T mT mH H adjoint matrix_H conj movedim moveaxis:    view same_values carries

# -- views of parts
split chunk unsafe_split unsafe_chunk tensor_split split_with_sizes hsplit vsplit dsplit unbind broadcast_tensors checked:
    view several
getitem:                view lookup
select narrow slice diagonal linalg_diagonal as_strided:    view
unfold:                 view
real imag view_as_real:    view real
view_as_complex:        view complex
stft complex polar fft_fft fft_ifft fft_rfft fft_ihfft fft_fft2 fft_ifft2 fft_rfft2 fft_ihfft2 fft_fftn fft_ifftn fft_rfftn
    fft_ihfftn fft_r2c fft_c2c:    complex

# -- shapes
shape dtype device ndim size sym_size dim numel sym_numel stride len is_floating_point get_device nelement ndimension:
    shape number
zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty new_tensor:    shape fresh
zeros ones full empty arange linspace eye rand randn:    fresh
rand_like randn_like randint_like:    fresh

# -- reductions
mean sum nanmean nansum:    affine reduces centre degree=1
cumsum:                 affine
var:                    smooth reduces degree=2 parity=even
std:                    smooth reduces degree=1 parity=even
var_mean std_mean:      smooth reduces centre several degree=1
norm linalg_vector_norm linalg_norm linalg_matrix_norm frobenius_norm nuclear_norm:
    smooth reduces norm degree=1 parity=even
avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d:    reduces window degree=1

# -- joining, padding, layers
cat concat concatenate iconcat stack row_stack hstack vstack dstack:    joins
pad constant_pad_nd:    affine degree=1
index_select gather:    affine index
take_along_dim flip roll fliplr flipud repeat tile repeat_interleave:    affine
index_add scatter_add:  affine index by_index
index_copy scatter:     affine index
index_put:              affine
scatter_reduce index_reduce:    piecewise index by_index
segment_reduce:         piecewise by_index
linear conv1d conv2d conv3d batch_norm:    affine layer
"""
