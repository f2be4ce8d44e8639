"""The table of ops: well formed, the only place where ops are listed, and true to what torch computes.

What torch computes is measured: every callable of torch with a name of the table is run on small tensors, in each of the call
forms below that it takes. No run may contradict a trait, or show that an op lacks one.
"""

import ast
import builtins
import contextlib
import copy
import inspect
import math
import operator
import re
import warnings
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import sp_fx
from sp_fx.analysis import ops
from sp_fx.analysis.ops import OPS, TRAITS, having, parsed, values
from sp_fx.checks.coverage import dispatched
from sp_fx.gates import table
from sp_fx.gates.rules import KINDS

ROOT = Path(sp_fx.__file__).parent
NAMESPACES = (torch, torch.special, torch.linalg, torch.fft, F, operator, math, builtins)


# -- the table itself ---------------------------------------------------------------------------------------------------


def test_each_trait_is_explained_and_used():
    used = {re.sub("=.+", "=", trait) for op in OPS.values() for trait in op.traits}
    assert used == set(TRAITS)
    assert all("`" in sentence or "=" in sentence for sentence in TRAITS.values())  # each has an example


def test_each_op_is_there_once_and_for_a_reason():
    assert len(OPS) > 400 and all(op.traits for op in OPS.values())


@pytest.mark.parametrize(
    "line", ["mul product", "mul: produkt", "mul: product\nadd mul: view", "mul mul: view", "mul:", "mul: moves"]
)
def test_a_malformed_table_is_refused(line):
    with pytest.raises(ValueError, match="expected"):
        parsed(line)


def test_lines_that_follow_continue_a_line():
    ops = parsed("# -- heading\n\nadd\n    iadd: affine\nsub: view family=clamp\n    shape")
    assert ops["add"].traits == ops["iadd"].traits == {"affine"} and ops["sub"].traits == {"view", "family=clamp", "shape"}


def test_values_are_of_their_kinds():
    assert values("family").keys().isdisjoint(values("listed").keys() | values("dispatched").keys())
    assert values("family")["relu6"] == "clamp" and values("family")["relu"] == "relu"


def test_sets_are_nested_as_their_users_suppose():
    assert ops.FACTORS <= ops.PRODUCT and ops.CHOICES <= ops.POINTWISE and ops.COMPARISONS | ops.GUARDS <= ops.WHOLE
    assert ops.CENTRES <= ops.REDUCES and ops.MIXES <= ops.PRODUCT


# -- no other list of ops -----------------------------------------------------------------------------------------------


def words(node):
    """The strings that a literal lists: a set, tuple, list, the keys of a dict, a string of words."""
    if isinstance(node, ast.Set | ast.Tuple | ast.List | ast.Dict):
        elements = node.keys if isinstance(node, ast.Dict) else node.elts
        return [e.value for e in elements if isinstance(e, ast.Constant) and isinstance(e.value, str)]
    return re.findall(r"\w+", node.value) if isinstance(node, ast.Constant) and isinstance(node.value, str) else []


def lists_ops(strings):
    """Whether two strings or more, and most of them, are names of ops, not all of them kinds of gates.

    `relu` and `gelu` are both; `shape` and `dtype` are keywords and attributes too, so that two of these are no list of ops.
    """
    named = [s for s in strings if s in OPS]
    enough = len(named) >= (3 if ops.SHAPES & set(named) else 2)
    return enough and 2 * len(named) > len(strings) and not set(strings) <= {*table.TABLE, *KINDS}


# The readers are written for one op each; what they list are the keys of its signature and of its row.
ANALYSIS = ROOT / "analysis"
FILES = [p for p in ROOT.rglob("*.py") if p != ANALYSIS / "table_of_ops.py" and ANALYSIS / "readers" not in p.parents]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_other_file_lists_ops(path):
    lists = {node.lineno: strings for node in ast.walk(ast.parse(path.read_text())) if lists_ops(strings := words(node))}
    assert not lists, f"names of ops belong to analysis/table_of_ops.py, as traits: {lists}"


@pytest.mark.parametrize(
    "code, lists",
    [
        ('{"add", "sub"}', True),
        ('X = frozenset("mul imul truediv".split())', True),
        ('name in ("view", "reshape", "unsafe_view")', True),
        ('{"mul": 1, "matmul": 2}', True),
        ('re.compile("(softmax|softmin)$")', True),
        ('dict.fromkeys(("T", "t"), f)', True),
        ('{"relu", "gelu", "quick_gelu"}', False),
        ('{"tau": 1, "dim": 2, "dtype": 3}', False),
        ('name == "mul"', False),
        ('"""Where operands are broadcast: a constant of more axes than the others."""', False),
    ],
)
def test_lists_of_ops_are_seen(code, lists):
    assert any(lists_ops(words(node)) for node in ast.walk(ast.parse(code))) is lists


# -- what torch computes ------------------------------------------------------------------------------------------------


X, Y = (torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(seed)) * 0.8 + 0.1 for seed in (0, 1))


def tensors():
    """[2, 3, 4] in (0.1, 0.9), another such, a mask, integers."""
    return X.clone(), Y.clone(), X > 0.5, (X * 10).long()


FORMS = [
    lambda x, y, mask, ints: (x,),
    lambda x, y, mask, ints: (x, y),
    lambda x, y, mask, ints: (x, 2),
    lambda x, y, mask, ints: (x, 1),
    lambda x, y, mask, ints: (x, 0.5),
    lambda x, y, mask, ints: (x, 0, 1),
    lambda x, y, mask, ints: (x, 2, 0, 1),
    lambda x, y, mask, ints: (x, 1, 2, 1),
    lambda x, y, mask, ints: (x, (1, 0, 2)),
    lambda x, y, mask, ints: (x, (3, 2, 4)),
    lambda x, y, mask, ints: (x, [1, 2], 1),
    lambda x, y, mask, ints: (x, 0, (2, 1)),
    lambda x, y, mask, ints: (x, 0.5, False),
    lambda x, y, mask, ints: (x, torch.float32),
    lambda x, y, mask, ints: (x, y, 0.3),
    lambda x, y, mask, ints: (x, mask, 0.0),
    lambda x, y, mask, ints: (mask, x, y),
    lambda x, y, mask, ints: (mask,),
    lambda x, y, mask, ints: (mask, ~mask),
    lambda x, y, mask, ints: (ints, ints + 1),
    lambda x, y, mask, ints: (x, y, y),
    lambda x, y, mask, ints: (x, y.mT),
    lambda x, y, mask, ints: (x[0], y[0].mT),
    lambda x, y, mask, ints: (x, (5, 2, 3, 4)),
    lambda x, y, mask, ints: (x, -1, (2, 2)),
    lambda x, y, mask, ints: (x[0],),
    lambda x, y, mask, ints: (torch.complex(x, y),),
    lambda x, y, mask, ints: (torch.stack([x, y], -1),),
    lambda x, y, mask, ints: ([x, y],),
    lambda x, y, mask, ints: (x, 0, ints % 2, y),
    lambda x, y, mask, ints: (x, 1, ints[0, :, 0] % 3, y),
    lambda x, y, mask, ints: (x, (ints[0, 0] % 2,), y[0]),
]


@cache
def callables():
    """By its plain name as `calls.name_of` has it: the functions, methods and operators of torch and Python, none in place."""
    functions = {}
    for namespace in (*NAMESPACES, torch.Tensor):
        for attribute in dir(namespace):
            function = inspect.getattr_static(namespace, attribute)
            if isinstance(function, property) or inspect.isgetsetdescriptor(function):  # x.T
                functions.setdefault(attribute, []).append(operator.attrgetter(attribute))
            elif callable(function) and not inspect.isclass(function) and not attribute.startswith("__"):
                name = attribute if namespace is torch.Tensor else getattr(function, "__name__", attribute)
                if namespace is operator or not name.endswith("_"):
                    functions.setdefault(name.strip("_"), []).append(function)
    return {name: list(dict.fromkeys(functions.get(name, ()))) or packets(name) for name in OPS}


def packets(name):
    """The ATen op of that name; slow to refuse arguments, since its errors print them."""
    return [packet for prefix in ("", "_") if (packet := getattr(torch.ops.aten, prefix + name, None))][:1]


@cache
def runs():
    """By name, (function, form, arguments, result) of each call that torch takes."""
    taken = {}
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, functions in callables().items():
            taken[name] = []
            for function in functions:
                for form in FORMS:
                    args = form(*tensors())
                    try:
                        taken[name].append((function, form, args, function(*args)))
                    except Exception:  # not the signature of this op
                        continue
    return taken


def outputs(value):
    parts = value if isinstance(value, tuple | list) else (value,)
    return [part for part in parts if isinstance(part, torch.Tensor)]


IN_PLACE = {
    name for name in OPS if name[0] == "i" and any(hasattr(operator, name[1:] + end) and name[1:] in OPS for end in ("", "_"))
}


def storage(tensor):
    return tensor.untyped_storage().data_ptr()


def floats(args):
    """Whether a call's first argument is the [2, 3, 4] of floats."""
    return isinstance(args[0], torch.Tensor) and args[0].is_floating_point() and args[0].shape == (2, 3, 4)


def accepted(name, *calls, **kwargs):
    """The results of those of the calls that torch takes; a call is a tuple of arguments."""
    results = []
    for function in callables()[name]:
        for args in calls:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    results.append(function(*map(copy.deepcopy, args), **kwargs))
                except Exception:  # not the signature of this op
                    continue
    return results


def test_enough_ops_run():
    assert sum(map(bool, runs().values())) > 320


def test_views_share_storage_and_nothing_else_does():
    """But for gates, which may be asked to work in place."""
    checked, sharing = set(), set()
    for name in OPS.keys() - IN_PLACE - ops.LISTED.keys() - having("same_form"):
        for _, _, args, result in runs()[name]:
            first = args[0][0] if isinstance(args[0], list) else args[0]
            checked.add(name)
            if any(storage(part) == storage(first) for part in outputs(result)):
                sharing.add(name)
    assert sorted(checked & ops.VIEW - sharing) == ["bfloat16", "double", "half"] and len(checked & ops.VIEW) > 40
    assert sorted(sharing - ops.VIEW) == ["bool", "einsum"]  # of a mask; of one operand, which `name_of` calls a diagonal


def test_same_values():
    """Of views and casts, but for a slice of all and the real part of real numbers."""
    same = set()
    for name in ops.VIEW | ops.CARRIES:
        for _, _, args, result in runs()[name]:
            if floats(args) and isinstance(result, torch.Tensor) and result.is_floating_point() and result.numel() == 24:
                if torch.equal(result.flatten().sort().values, args[0].flatten().sort().values):
                    same.add(name)
    no_form_fits = {"H", "matrix_H", "t", "after", "expand", "broadcast_to"}
    assert ops.SAME_VALUES <= same | no_form_fits and sorted(same - ops.SAME_VALUES - {"slice", "real", "unfold"}) == []


@pytest.mark.filterwarnings("ignore:To copy construct")
def test_shapes_do_not_depend_on_values():
    checked = set()
    for name in ops.SHAPES:
        for function, form, *_ in runs()[name]:
            x, *others = tensors()
            results = [function(*form(z, *others)) for z in (x, x**2)]
            checked.add(name)
            if isinstance(results[0], torch.Tensor):
                assert results[0].shape == results[1].shape and results[0].dtype == results[1].dtype, name
                assert "empty" in name or torch.equal(*results), name
            else:
                assert results[0] == results[1], name
    assert checked == ops.SHAPES


def test_pointwise_ops_commute_with_permutations():
    checked = set()
    for name in ops.POINTWISE:
        for function, form, _, result in runs()[name]:
            args, turned = form(*tensors()), form(*(t.flip(0, 1, 2) for t in tensors()))
            if floats(args) and isinstance(result, torch.Tensor):
                result, expected = (outputs(function(*a))[0] for a in (turned, args))
                assert torch.allclose(result, expected.flip(0, 1, 2).to(result.dtype), equal_nan=True), name
                checked.add(name)
    assert checked == ops.POINTWISE - {name for name in having("logical") if name not in checked}  # which take masks


def test_affine_ops_commute_with_means():
    checked, no_form_fits = set(), {"linear", "conv2d", "conv3d", "batch_norm", "index_select", "gather", "take_along_dim"}
    for name in ops.AFFINE:
        for function, form, _, result in runs()[name]:
            x, *others = tensors()
            if floats(form(x, *others)) and isinstance(result, torch.Tensor):
                first, second, mean = (function(*form(z, *others)) for z in (x * 1, x**2, (x + x**2) / 2))
                assert torch.allclose(mean, (first + second) / 2, rtol=1e-5 if mean.dtype == torch.float32 else 1e-2), name
                checked.add(name)
    assert checked == ops.AFFINE - no_form_fits


def alone(name):
    """The functions of that name that take one tensor of one axis."""
    return [f for f, form, *_ in runs()[name] if form is FORMS[0] and "matrix" not in name and "nuclear" not in name]


def jumps(function):
    """Whether the derivative of a function of one number jumps at a multiple of 1/16 in [-8, 8], where kinks are."""
    grid = torch.arange(-128, 129, dtype=torch.float64) / 16
    points = [(grid + d).requires_grad_() for d in (-1e-7, 1e-7)]
    below, above = (torch.autograd.grad(outputs(function(z))[0].sum(), z)[0] for z in points)
    return bool(((above - below).abs() > 1e-4 * (1 + above.abs()))[(above.abs() < 1e5) & (below.abs() < 1e5)].any())


@pytest.mark.filterwarnings("ignore:Implicit dimension")
def test_smooth_ops_have_no_kinks():
    names = ops.SMOOTH | {"relu", "abs", "hardtanh", "hardsigmoid"}
    assert {name for name in names for f in alone(name) if jumps(f)} == {"relu", "abs", "hardtanh", "hardsigmoid"}
    assert len([name for name in ops.SMOOTH if alone(name)]) > 60


def test_comparisons_give_masks_and_little_else_does():
    masks = set()
    for name in OPS:
        for _, _, args, result in runs()[name]:
            if floats(args) and isinstance(result, torch.Tensor) and result.shape == (2, 3, 4) and result.dtype == torch.bool:
                masks.add(name)
    assert ops.COMPARISONS <= masks and sorted(masks - ops.COMPARISONS - having("logical") - ops.GUARDS - {"isin"}) == []


def test_tuples():
    """But for those that return one where they take an axis away, or are asked to, and `where` of a mask alone."""
    asked = {"adaptive_max_pool1d", "adaptive_max_pool2d", "max", "min", "median", "nanmedian", "unique"}
    several = {name for name in OPS for _, _, _, r in runs()[name] if isinstance(r, tuple | list) and outputs(r)}
    assert several >= ops.SEVERAL - {"checked"} - {name for name in ops.SEVERAL if "3d" in name}  # which no form fits
    assert sorted(several - ops.SEVERAL - asked - {"where", "scaled_dot_product_attention_math"}) == []


def test_families_are_those_that_torch_dispatches():
    wrong = set()
    for name in OPS.keys() - IN_PLACE:
        for function, form, *_ in runs()[name][: None if name in ops.LISTED else 2]:
            if floats(args := form(*tensors())):
                with contextlib.suppress(Exception):  # asks for no gradient, which `dispatched` takes
                    families = dispatched(function, args, {})[1]
                    listed = re.split(r"[*+]", ops.LISTED.get(name, ""))[0]
                    if (name in ops.LISTED or families) and listed not in families:
                        wrong.add(name)
    assert wrong <= {"max", "min", "linalg_matrix_norm"}  # of two tensors; of some orders


# -- what torch says ----------------------------------------------------------------------------------------------------


def synonyms():
    """(name, the other's) of functions whose documentation says that they are another by another name."""
    for namespace, prefix in ((torch, ""), (torch.special, "special_"), (torch.linalg, "linalg_")):
        for attribute in dir(namespace):
            text = getattr(getattr(namespace, attribute), "__doc__", None)
            if alias := re.search(r"Alias (?:for|of) :func:`(?:torch\.)?([\w.]+)`", text if isinstance(text, str) else ""):
                yield prefix + attribute, alias[1].replace(".", "_")


def test_synonyms_have_the_same_traits():
    pairs = {(a, b) for a, b in synonyms() if a in OPS or (b in OPS and OPS[b].traits)}
    assert len(pairs) > 20 and {a for a, _ in pairs} <= set(OPS)
    pairs = {(a, b) for a, b in pairs if b in OPS}
    assert [(a, b) for a, b in pairs if OPS[a].traits != OPS[b].traits and "listed" not in str(OPS[a].traits)] == []


def test_in_place_operators_have_the_traits_of_their_twins():
    assert {"iadd", "imul", "ipow", "imod", "iand"} <= IN_PLACE
    twins = {name: name[1:] for name in IN_PLACE}
    assert sorted(name for name, twin in twins.items() if OPS[name].traits != OPS[twin].traits) == []
    unlisted = {f"i{name}" for name in OPS if OPS[name].traits and hasattr(operator, f"i{name}")} - set(OPS)
    assert not unlisted
