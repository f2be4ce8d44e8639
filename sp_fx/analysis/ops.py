"""The table of ops: what is known of each name that a call in a graph may have, and the sets of names drawn from it.

A name is the one that `calls.name_of` gives, the same however a model spells the op: `relu` for `F.relu`, `torch.relu_`,
`Tensor.relu_` and `aten.relu_.default`; `iadd` for `operator.iadd`. No other file of the package lists names of ops.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# What each trait says of an op, with an example. A trait that ends in "=" has a value.
TRAITS = {
    # what it computes
    "product": "multiplies operands that may both vary with the input, and keeps the product rule: `matmul`",
    "quotient": "divides operands that may both vary with the input, and keeps the quotient rule: `div`",
    "factor": "is the elementwise product of two tensors, one of which may be the gate of the other: `mul`",
    "scales": "gives a multiple of its only varying operand: `div` in `x / 2`",
    "shifts": "gives its only varying operand plus a constant, up to sign: `rsub` in `2 - x`",
    "minus": "subtracts, as a mean is taken off a signal: `sub` in `x - x.mean(-1, True)`",
    "power": "raises to a power: `pow` in `x ** 2`",
    "affine": "is affine in its only varying operand, so that it may stand between a softmax and its product: `masked_fill`",
    "mixes": "applies the weights of attention to values, by a product that the table of gates has: `bmm`",
    "mixes_otherwise": "applies weights to values in a form of its own, which may have no adjoint at a temperature: `einsum`",
    "smooth": "has a continuous derivative, and keeps it: `exp`",
    "share": "says which share of a product's other factor passes: `sigmoid` in `sigmoid(a) * b`",
    "activation": "gates a product in which nothing is a share: `gelu` in `gelu(a) * b`",
    "piecewise": "chooses by value and has no rule, unless a reader knows the call: `topk`",
    "indices": "gives positions; of token ids, which are the caller's, they say where a text ends: `argmax`",
    "comparison": "compares values, and gives a mask: `gt` in `x > 0`",
    "chooser": "takes each element from one of two operands, by a mask: `where`",
    "logical": "makes a mask of masks, or casts one: `logical_and`",
    "complex": "gives complex numbers, as do all ops whose names begin so: `fft_` of `fft_rfft2`",
    "cell": "is a recurrent network, with gates inside: `lstm`",
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
    # gates and norms that a model writes out
    "pointwise": "maps element by element, and may be part of a written gate: `sigmoid` in `x * sigmoid(x)`",
    "closes": "may be the last call of a written gate or norm: `mul` in `x * sigmoid(x)`",
    "carries": "carries the values of a norm's signal or statistic into another dtype or shape: `unsqueeze`",
    "reduces": "reduces a signal to a norm's statistic: `mean` in `x.pow(2).mean(-1, True)`",
    "squares": "takes squares, or other powers of a norm: `std`",
    "between": "may stand between a signal and its statistic: `rsqrt` in `(x.pow(2).mean(-1, True) + eps).rsqrt()`",
    "centre": "gives means that may be taken off a signal: `var_mean`",
    "norm": "is a norm by name, which makes its quotient a `normalize`, not an RMS norm: `linalg_vector_norm`",
    "window": "averages over windows, as local response norms do over channels: `avg_pool3d`",
    # coverage: families of gates, counted below a model's Python code and in its report
    "family=": "the family that it counts for in both: `relu6`, family=clamp, as PyTorch dispatches hardtanh for it",
    "dispatched=": "the family, where PyTorch dispatches this name and reports have another: `native_layer_norm`",
    "listed=": "the family, where reports have this name and PyTorch dispatches another: `clip`",
}

# A line has the names of ops, a colon, and their traits. After a "?", there or on the next line, stands a mark: the sets disagree
# about ops that are alike, and a later change is to settle it. `? mul in place: ...` says that an op is mul but for being in
# place, and lacks traits of mul's that it should have; after the colon, what comes of that. What has no traits is here for that.
TABLE = """
# -- products
mul:                    product factor scales affine pointwise closes between
imul:                   product factor affine pointwise closes between
    ? mul in place: `operator.imul(x, 2)` is no multiple of x, to written norms and gated products
multiply:               product factor pointwise closes  ? mul by another name
matmul:                 product mixes
imatmul linalg_matmul:  ? matmul in place and by another name: attention by them is no attention
bmm:                    product mixes
mm:                     product mixes
einsum:                 product mixes_otherwise  ? permute, where it has one operand: a view then
addbmm baddbmm:         product mixes_otherwise
addmm:                  mixes_otherwise  ? addbmm of single matrices: no product in reports
bilinear:               product
addcmul:                product
addcdiv:                ? addcmul with a quotient, which is none in reports
mv dot vdot inner outer ger addmv addr tensordot kron linalg_vecdot linalg_multi_dot chain_matmul:
    ? matmul in other forms, of which reports say nothing

# -- quotients
truediv div:            quotient scales affine pointwise closes between
itruediv:               quotient affine pointwise closes between  ? div in place
divide:                 quotient pointwise closes  ? div by another name
true_divide:            quotient pointwise  ? div by another name: `x / (1 + exp(-x))` by it is no SiLU
reciprocal:             pointwise between

# -- sums and differences
add:                    shifts affine pointwise between
iadd:                   affine pointwise between  ? add in place
sub:                    shifts minus affine pointwise between
isub:                   minus affine pointwise between  ? sub in place
rsub:                   shifts pointwise  ? sub with its operands exchanged
subtract:               pointwise  ? sub by another name
neg negative:           pointwise  ? mul by -1

# -- powers
pow:                    power pointwise between
ipow:                   power between  ? pow in place: a written gate with `operator.ipow(x, 3)` in it is not recognised
square:                 squares pointwise
sqrt rsqrt:             pointwise between

# -- smooth
sigmoid tanh:           smooth share pointwise
special_expit:          ? sigmoid by another name
hardsigmoid:            smooth share pointwise  ? has two kinks: not smooth, and no rule has them
exp expm1 erf log1p softplus:    smooth pointwise
special_expm1 special_erf special_log1p:    ? expm1, erf, log1p by other names
special_ndtr erfc special_erfc:    ? erf but for scale and shift: GELU by `x * ndtr(x)` is none
log:                    smooth  ? log1p but for a shift: Mish by `x * tanh(log(1 + exp(x)))` is not recognised
log2 log10 exp2 special_exp2:    ? log and exp to another base, of which reports say nothing
sin cos atan:           smooth
arctan:                 ? atan by another name
tan sinh cosh asin arcsin acos arccos asinh arcsinh acosh arccosh atanh arctanh atan2 arctan2:
    ? sin and its like, of which reports say nothing
softsign:               smooth  ? written out as `x / (1 + x.abs())` it is an abs, which gates
tanhshrink:             smooth
logsigmoid:             smooth  ? no call has this name: `F.logsigmoid` is called log_sigmoid
log_sigmoid log_sigmoid_forward:    ? logsigmoid by the names that calls have
logsumexp:              smooth
special_logsumexp:      ? logsumexp by another name
logaddexp logaddexp2:   ? logsumexp of two tensors, of which reports say nothing
logcumsumexp:           piecewise  ? logsumexp of all that came before: smooth, nothing in it chooses

# -- softmax and attention
softmax:                share family=softmax
special_softmax:        ? softmax by another name: rewritten, it gates no product, and coverage does not see that reports list it
softmin:                smooth  ? softmax of -x: attention by it, as fx traces it, keeps its derivative
log_softmax:            smooth  ? softmax but for the exp: attention by `log_softmax(x).exp()` keeps its derivative
special_log_softmax:    ? log_softmax by another name
gumbel_softmax:         piecewise  ? softmax of noisy scores: coverage counts it, and does not see that reports list it
scaled_dot_product_attention MultiheadAttention:    listed=softmax  ? matmul twice
scaled_dot_product_attention_math scaled_dot_product_flash_attention:    family=softmax
scaled_dot_product_flash_attention_for_cpu scaled_dot_product_efficient_attention:    family=softmax
scaled_dot_product_cudnn_attention safe_softmax:    family=softmax
scaled_dot_product_fused_attention:    family=softmax  ? no op has this name, which ends in _overrideable
scaled_dot_product_fused_attention_overrideable:    ? scaled_dot_product_fused_attention as torch has it
transformer_encoder_layer_fwd native_multi_head_attention multi_head_attention_forward:    fused
lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell:    cell

# -- gates that readers know
relu:                   activation pointwise same_form family=itself
gelu silu:              activation same_form family=itself
hardswish:              same_form family=itself  ? silu but for its share: gates no product
mish:                   same_form family=itself  ? silu but for its share: gates no product
relu6 hardtanh:         activation pointwise same_form family=clamp
leaky_relu prelu hardshrink softshrink:    same_form family=itself
prelu_kernel:           family=prelu
rrelu:                  listed=leaky_relu  ? leaky_relu in eval mode: listed, not counted where dispatched
elu selu celu:          same_form family=elu
abs:                    pointwise family=itself
absolute:               listed=abs  ? abs by another name: a written gate with it inside is not recognised
threshold:              same_form family=clamp  ? relu, where its numbers are 0: of another family, part of no written gate
clamp:                  pointwise between family=itself
clip:                   pointwise listed=clamp  ? clamp by another name
clamp_min:              pointwise between family=clamp
clamp_max:              pointwise family=clamp  ? clamp_min with the other bound
maximum:                piecewise between family=clamp
minimum:                piecewise family=clamp  ? maximum with the other sign
fmax fmin:              listed=clamp  ? maximum and minimum but for NaN: listed, not counted where dispatched
normalize:              listed=clamp
max_pool1d max_pool2d_with_indices max_pool3d_with_indices mkldnn_max_pool2d adaptive_max_pool2d:    family=max_pool
    ? return a tuple where they return indices, without several: which of its items is which is not known
adaptive_max_pool3d fractional_max_pool2d fractional_max_pool3d:    family=max_pool  ? return a tuple too, without several
max_pool2d max_pool3d max_pool1d_with_indices adaptive_max_pool1d adaptive_max_pool1d_with_indices:    listed=max_pool
    ? return a tuple too, without several
adaptive_max_pool2d_with_indices adaptive_max_pool3d_with_indices:    listed=max_pool  ? return a tuple too, without several
fractional_max_pool2d_with_indices fractional_max_pool3d_with_indices:    listed=max_pool  ? return a tuple too, without several
fractional_max_pool1d fractional_max_pool1d_with_indices:    listed=max_pool  ? torch has no such op
layer_norm:             listed=layer_norm
group_norm:             listed=group_norm
native_layer_norm:      dispatched=layer_norm
native_group_norm:      dispatched=group_norm

# -- piecewise
sign:                   piecewise pointwise family=itself
sgn:                    piecewise family=itself  ? sign, of real numbers
round floor ceil trunc frac:    piecewise family=itself
heaviside fmod remainder:    piecewise family=itself
mod:                    piecewise  ? remainder by Python's `%`: coverage counts it, and does not see that reports list it
imod fix special_round: ? remainder in place, trunc and round by other names
floor_divide floordiv ifloordiv:    ? floor of a quotient, of which reports say nothing
max:                    piecewise family=max_pool  ? maximum, where it has two tensors: of another family
amax:                   piecewise family=max_pool
min amin:               piecewise  ? max and amax with the other sign: of no family
median:                 piecewise  ? returns a tuple where it takes an axis away, without several
aminmax nanmedian kthvalue mode quantile nanquantile:    piecewise
    ? return a tuple, without several; `quantile` dispatches sort and floor, which coverage counts
msort:                  piecewise
topk sort cummax cummin:    piecewise  ? return a tuple, without several: which of its items is which is not known
argmax argmin:          piecewise indices
argsort:                ? argmax of each rank: neither piecewise nor indices
lp_pool1d lp_pool2d lp_pool3d:    piecewise  ? dispatch sign, abs and relu, which coverage counts and reports do not list

# -- comparisons, masks and choices
gt ge lt le:            comparison pointwise
greater greater_equal less less_equal:    comparison  ? gt, ge, lt, le by other names
eq ne not_equal:        ? gt but for what it asks: choices by them are not in reports
where:                  chooser affine pointwise closes
masked_fill:            chooser affine pointwise closes
masked_scatter index_put setitem:    ? masked_fill in other forms: choices as `x[x < 0] = 0` are not in reports
nan_to_num:             ? where x is NaN: attention whose weights pass through it is no attention
logical_and logical_or logical_xor and or xor:    logical
logical_not invert bitwise_not:    logical
bitwise_and bitwise_or bitwise_xor iand ior ixor:    ? and, or, xor, as exports have them and in place
bool half double type:  logical  ? float to another dtype: these are no views, that is not logical
bfloat16 int long short byte char to_copy:    ? float to another dtype, and to as exports have it

# -- casts and copies
to float:               view carries pointwise  ? contiguous in another dtype: without its same_values
type_as:                view carries pointwise  ? the same numbers: without same_values
contiguous:             view same_values carries pointwise
clone:                  fresh affine carries pointwise  ? contiguous in new storage: without its same_values
detach alias after:     view  ? contiguous, as a view of all: without its same_values
getattr:                view
dropout:                view same_values itself
dropout1d dropout2d dropout3d alpha_dropout feature_dropout feature_alpha_dropout:    view same_values itself

requires_grad:          itself
copy fill zero set random uniform bernoulli exponential geometric log_normal cauchy map apply:    in_place

# -- views that change the shape
view reshape:           view carries  ? flatten in other forms: without its same_values
unsafe_view:            view  ? view by another name
view_as reshape_as:     view  ? the same numbers: without same_values
flatten:                view same_values carries
ravel:                  ? flatten by another name
unflatten:              view carries  ? flatten undone: without its same_values
squeeze:                view carries  ? flatten of an axis of one: without its same_values
unsqueeze:              view carries  ? the same numbers: without same_values
expand broadcast_to:    view carries
expand_as:              view carries  ? the same numbers: without same_values

# -- views that move axes
permute:                view  ? movedim of several axes: without its same_values
transpose swapaxes swapdims:    view  ? movedim both ways: without its same_values
t T numpy_T:            view  ? the same numbers: without same_values
mT:                     view  ? the same numbers: without same_values
mH H adjoint matrix_H conj:    view  ? the same numbers: without same_values
movedim:                view same_values
moveaxis:               view  ? movedim by another name

# -- views of parts
split chunk:            view several
tensor_split split_with_sizes hsplit vsplit dsplit:    view several
unsafe_split unsafe_chunk:    ? split into copies
unbind:                 view several
checked:                view several
select:                 view
getitem:                view between
narrow slice diagonal linalg_diagonal as_strided:    view
unfold:                 view  ? the method is a view; `F.unfold`, which has the same name, is none
real imag view_as_real:    view
view_as_complex:        complex  ? view_as_real undone, and as much a view
stft:                   complex
complex polar:          complex
rfft ifft fft_:         complex  ? no name begins with rfft or ifft; `fft_irfft` and `fft_hfft`, which are real, with fft_

# -- shapes
shape dtype device ndim size sym_size dim numel sym_numel stride len is_floating_point get_device:    shape number
zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty new_tensor:    shape fresh
zeros ones full empty arange linspace eye rand randn:    fresh
nelement ndimension:    number  ? numel and dim by other names
rand_like randn_like randint_like:    fresh  ? zeros_like with other contents: what is made of them varies

# -- reductions
mean sum:               affine reduces centre
nanmean nansum:         ? mean and sum but for NaN
var std:                reduces squares
var_mean std_mean:      reduces squares centre  ? return a tuple, without several
norm:                   reduces squares norm
linalg_vector_norm:     reduces squares norm
vector_norm:            reduces squares norm  ? no call has this name: `torch.linalg.vector_norm` is called linalg_vector_norm
linalg_norm linalg_matrix_norm frobenius_norm:    ? norm by other names: normalisation by them is not recognised
prod:                    ? mul of what is in one tensor, of which reports say nothing
avg_pool2d avg_pool3d:  reduces window
avg_pool1d:             ? avg_pool2d along one axis

# -- joining, padding, layers
pad constant_pad_nd:    between
flip roll:              affine
fliplr flipud:          ? flip along an axis of their own
linear:                 affine
conv2d:                 affine
conv1d conv3d:          ? conv2d along other axes: attention whose weights pass through them is no attention
"""


@dataclass(frozen=True)
class Op:
    """What is known of the ops of one name: their traits, and what is unsettled about them: the mark's words."""

    traits: frozenset[str]
    unsettled: str = ""


def parsed(table: str) -> dict[str, Op]:
    """The ops of a table in the form of `TABLE`, by name.

    Raises:
        ValueError: a name twice, a trait that `TRAITS` lacks, no colon, no traits and no mark, or a mark without a reason.
    """
    ops: dict[str, Op] = {}
    new: dict[str, Op] = {}
    for line in table.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        op, mark, reason = map(str.strip, line.partition("?"))
        names, colon, after = op.partition(":")
        traits = frozenset(after.split())
        if op:
            ops |= new
            new = dict.fromkeys(names.split(), Op(traits))
            unknown = {trait for trait in traits if re.sub("=.+", "=", trait) not in TRAITS}
            if not colon or unknown or len(new) < len(names.split()) or set(new) & set(ops):
                raise ValueError(f"expected new names, a colon and traits of the glossary; got {line!r}")
        if mark:
            if not reason:
                raise ValueError(f"expected the reason of a mark; got {line!r}")
            new = {name: Op(known.traits, reason) for name, known in new.items()}
    return ops | new


OPS = parsed(TABLE)


def having(trait: str) -> frozenset[str]:
    """The names of the ops that have a trait: `having("view")`."""
    return frozenset(name for name, op in OPS.items() if trait in op.traits)


def values(trait: str) -> dict[str, str]:
    """The values of a trait, by the names of the ops that have it: `values("family")["relu6"]` is "clamp"."""
    words = ((name, *word.partition("=")) for name, op in OPS.items() for word in op.traits)
    return {name: name if value == "itself" else value for name, word, equals, value in words if equals and word == trait}


# Rewriting: what becomes of a call, and what reports say of it.
PIECEWISE = having("piecewise")  # NOT REWRITTEN: chooses by value
INDICES = having("indices")  # unless these are the caller's
SMOOTH = having("smooth")  # kept: smooth, no gate
PRODUCT = having("product")  # kept: product rule
QUOTIENT = having("quotient")  # kept: quotient rule
FACTORS = having("factor")  # products that a gate may be a factor of
SHARES = having("share")  # such gates
ACTIVATIONS = having("activation")  # such gates, where no factor is one of SHARES
COMPLEX = tuple(sorted(having("complex")))  # beginnings of names: of what gives complex numbers, whose abs is no gate
COMPARISONS = having("comparison")  # what makes masks of values
LOGICAL = having("logical")  # what makes masks of masks
CHOICES = having("chooser")  # what chooses by masks
CELLS = having("cell")  # NOT REWRITTEN, for this reason:
RECURRENT = "a recurrent cell, whose gates keep their derivative"
FUSED = having("fused")  # NOT REWRITTEN: torch's own ops with gates inside
SCALES = having("scales")  # multiples of one thing that varies
MULTIPLES = SCALES | having("shifts")  # the same, and what differs from it by a constant: back through these a factor is followed

# Attention: what a softmax's weights may meet on their way to the values.
MIXES = having("mixes")
MIXES_OTHERWISE = having("mixes_otherwise")
AFFINE = having("affine")  # talking heads, dropout, a mask, a second normalisation

# Storage, values and shapes.
VIEW = having("view")  # may share the storage of the first input
SAME_VALUES = having("same_values")  # gives the numbers it got, so that a BatchNorm before it still says their scale
SHAPES = having("shape")  # does not vary with the values of the input
SEVERAL = having("several")  # returns a tuple

# Written gates and norms.
POINTWISE = having("pointwise")  # inside a written gate
CLOSERS = having("closes")  # last in a written gate or norm
CARRIES = having("carries")  # casts and views around a signal and its statistic
REDUCES = having("reduces")  # makes a statistic of a signal
SQUARES = having("squares")  # or takes its squares
STATISTIC = REDUCES | SQUARES | CARRIES | having("between")  # all that a statistic may be made by
CENTRES = having("centre")
NORMS = having("norm")
WINDOWS = having("window")
POWERS = having("power")
DIFFERENCES = having("minus")

# Coverage: families of gates, by the names that PyTorch dispatches and by those that reports have.
DISPATCHED = values("family") | values("dispatched")
LISTED = values("family") | values("listed")
