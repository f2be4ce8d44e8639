"""Gates that users register: an activation of their own gets a soft adjoint, in every call form and under both tracers."""

from __future__ import annotations

import functools
import inspect
import math
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from ..containers import PLAIN, encoded
from .adjoints.row import Row, gain_row
from .table import TABLE

# What is registered, and the name of its row in the table.
FUNCTIONS: dict[Any, str] = {}  # functions, their stand-ins and ops
MODULES: dict[type[nn.Module], str] = {}
STAND_INS: dict[Any, Callable] = {}  # function: what a trace calls in place of it
SETTINGS: dict[str, tuple[Any, ...]] = {}  # by name, the gain and the temperatures that a gate was registered with


def register_gate(
    target: Any, gain: Callable[..., Tensor], *, tau: float = 1.0, frozen_at: float = 1.0, name: str | None = None
) -> Any:
    """Give an activation of your own a soft adjoint: `v -> v * gain(z, tau)` for `y = target(z)`; the forward stays what it is.

    From then on `transform` finds it in every model: a function however the model holds it (by a name, an attribute, in a
    dictionary or a `functools.partial`), an op of `torch.ops`, a class of modules with its subclasses. A report notes what was
    not met. `Rules(registered={name: ...})` and overrides by place set its temperature; None restores its plain derivative.
    Register in every process that uses, or unpickles, an explainer with it. The gain is tried on a small tensor [2, 3], unless it
    needs more than `z` and `tau`. Registering a name again, as a notebook does whose cell runs twice, replaces what it was, with
    a warning: explainers that were made look it up by its name.

    Args:
        target: the function, the op, or the `nn.Module` subclass. Its first argument is the pre-activation, the
            output is shaped like it.
        gain: from `z` (float32 at least), `tau` and the call's further plain arguments, by keyword, to the factor on the
            cotangent, shaped like `z`. For a gate `f(z) = z g(z)` that is `g(z / tau)`; for one that is hard, the average of its
            derivative under Gaussian noise of deviation `tau`.
        tau: the temperature that `Rules()` gives it.
        frozen_at: the temperature at which `gain` is the gate of the forward pass itself: 1 where that is smooth, 1e-9 where it
            is hard.
        name: what reports and rules call it; by default the target's own name.

    Returns:
        `target` itself, or a stand-in for a function, so that this can be partially applied as a decorator.

    Raises:
        TypeError: a target that is none of the three, or takes no argument; a gain that does not take `z` and `tau`, raises, or
            returns no real tensor shaped like `z`; a name that is no string.
        ValueError: a name that the table has already for another target; a target that is registered otherwise; a temperature
            that is not a finite number above 0.
    """
    target = target.overloadpacket if isinstance(target, torch._ops.OpOverload) else target
    target = next((function for function, stand_in in STAND_INS.items() if stand_in is target), target)
    is_class = isinstance(target, type) and issubclass(target, nn.Module)
    is_op = isinstance(target, torch._ops.OpOverloadPacket)
    if not (is_class or is_op or isinstance(target, types.FunctionType | types.BuiltinFunctionType)):
        kind = type(target).__name__
        raise TypeError(f"register_gate takes a function, an op of torch.ops or a subclass of nn.Module, got a {kind}")
    if not isinstance(name, str | None):
        raise TypeError(f"name is what reports and rules call the gate, a string, got {name!r}")
    name, known = name or target.__name__, {**FUNCTIONS, **MODULES}.get(target)
    if known == name and (gain, tau, frozen_at) == SETTINGS[name]:
        return STAND_INS.get(target, target)
    if known not in (None, name):
        raise ValueError(f"{target.__name__} is registered already, as {known!r}: pass name={known!r} to register it anew")
    if name in TABLE and not TABLE[name].registered:
        raise ValueError(f"{name!r} is a gate that the library knows already: pass another name=")
    for option, value in {"tau": tau, "frozen_at": frozen_at}.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"{option} is a temperature, a finite number above 0, got {value!r}")
    if not takes(target.forward if is_class else target, *([None] if is_class else []), None):
        raise TypeError(f"the first argument of {target.__name__} is to be the pre-activation, and it takes none")
    tried(gain, {tau, frozen_at})
    if name in TABLE:
        warnings.warn(f"{name!r} is registered anew: explainers with it that were made before are to be made again", stacklevel=2)
        forget(name)

    def tempered(z: Tensor, tau: Any, **args: Any) -> Tensor:
        return gain(z, frozen_at if isinstance(tau, str) else tau, **args)

    row = gain_row(lambda z, **args: target(z, **args), tempered, tau)
    TABLE[name] = Row(row.forward, row.adjoint, tau, registered=True)
    SETTINGS[name] = (gain, tau, frozen_at)
    if is_class:
        MODULES[target] = name
        return target
    FUNCTIONS[target] = name
    if is_op:
        return target
    STAND_INS[target] = stand_in(target, name)
    FUNCTIONS[STAND_INS[target]] = name
    return STAND_INS[target]


def forget(name: str) -> None:
    """Take a registered gate out of the tables."""
    for table in (FUNCTIONS, MODULES):
        for target in [target for target, known in table.items() if known == name]:
            del table[target]
            STAND_INS.pop(target, None)
    del TABLE[name], SETTINGS[name]


def takes(function: Callable, *arguments: Any) -> bool:
    """Whether the first parameters of a function take these arguments; true of builtins that do not say what they take."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return True
    try:
        signature.bind_partial(*arguments)
    except TypeError:
        return False
    return True


def tried(gain: Any, temperatures: Iterable[float]) -> None:
    """Raises TypeError where `gain(z, tau)`, tried on a tensor [2, 3], is seen to be no gain.

    Nothing is said of one that needs more arguments, or is not for such a tensor: it may want pictures, or a GPU.
    """
    expected = "expected a function of z and tau that returns a real tensor shaped like z"
    z = torch.linspace(-2, 2, 6).view(2, 3)
    if not callable(gain) or not takes(gain, z, 1.0):
        raise TypeError(f"got the gain {gain!r}; {expected}")
    for tau in temperatures:
        try:
            inspect.signature(gain).bind(z, tau)
        except (TypeError, ValueError):  # it needs more, or is a builtin that does not say
            return
        try:
            with torch.no_grad():
                factor = gain(z, tau)
        except (TypeError, AttributeError, NameError, RuntimeError, ValueError, IndexError, AssertionError) as error:
            wants_numbers = "converted to Python scalars" in str(error) or "converted to Scalar" in str(error)
            if wants_numbers or isinstance(error, TypeError | AttributeError | NameError):
                raise TypeError(f"the gain raises {type(error).__name__} at a z [2, 3] and tau={tau}: {error}") from error
            return
        if not isinstance(factor, Tensor) or factor.shape != z.shape or factor.is_complex():
            got = f"a {factor.dtype} tensor {list(factor.shape)}" if isinstance(factor, Tensor) else f"a {type(factor).__name__}"
            raise TypeError(f"the gain returns {got} for a z [2, 3]; {expected}")


def stand_in(function: Callable, name: str) -> Callable:
    """`function`, as a symbolic trace records it in one call, and an export with a marker behind it."""
    own = twin(function) if isinstance(function, types.FunctionType) else function  # `function` calls the stand-in in a trace

    first = first_parameter(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Tensor:
        if not args and first in kwargs:
            args = (kwargs.pop(first),)
        if has_torch_function(args[:1]):
            return handle_torch_function(call, args[:1], *args, **kwargs)
        return marked(name, args[0] if args else None, own(*args, **kwargs), named(own, args, kwargs))

    return call


def first_parameter(function: Callable) -> str:
    """The name of a function's first parameter; "" of a builtin that does not say."""
    try:
        return next(iter(inspect.signature(function).parameters), "")
    except (TypeError, ValueError):
        return ""


def twin(function: types.FunctionType) -> types.FunctionType:
    """Another function of the same code."""
    code, space, closure = function.__code__, function.__globals__, function.__closure__
    own = types.FunctionType(code, space, function.__name__, function.__defaults__, closure)
    own.__kwdefaults__ = function.__kwdefaults__
    return own


def passing_on(*args: Any, **kwargs: Any) -> Any:
    """The code that a registered function has in a trace: a call of its stand-in."""
    call: Any = "the stand-in"
    return call(*args, **kwargs)


@contextmanager
def calls_pass_on(others: Mapping[Any, Callable]) -> Iterator[None]:
    """While it lasts whoever calls a registered function, or one of the `others`, calls its stand-in, however he came by the
    function: by a name in any file, out of a dictionary, in a `functools.partial`, as a default. For all threads, of which the
    others notice nothing."""
    stand_ins = {**STAND_INS, **others}
    before = {f: f.__code__ for f in stand_ins if isinstance(f, types.FunctionType)}
    try:
        for function, code in before.items():
            template = passing_on.__code__
            constants = tuple(stand_ins[function] if c == "the stand-in" else c for c in template.co_consts)
            function.__code__ = template.replace(co_consts=constants, co_freevars=code.co_freevars)
        yield
    finally:
        for function, code in before.items():
            function.__code__ = code


def call_registered(name: str, z: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Call the function that is registered as `name`.

    Raises:
        LookupError: there is none in this process.
    """
    if has_torch_function((z,)):
        return handle_torch_function(call_registered, (z,), name, z, *args, **kwargs)
    function = next((f for f in STAND_INS if FUNCTIONS[f] == name), None)
    if function is None:
        raise LookupError(f"no function is registered as {name!r} in this process: call sp_fx.register_gate first")
    return function(z, *args, **kwargs)


def named(function: Callable, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The plain arguments of a call by name, without the first: {"rate": 3.0} for `sharp(z, 3.0)`."""
    try:
        arguments = inspect.signature(function).bind(*args, **kwargs).arguments
    except (TypeError, ValueError):  # builtins have no signature
        arguments = {"": None, **kwargs}
    return {name: value for name, value in list(arguments.items())[1:] if isinstance(value, PLAIN)}


def marked(name: str, z: Tensor | None, y: Tensor, args: dict[str, Any]) -> Tensor:
    """`y`, what the gate `name` made of `z`; in an export, by a marker op that says so."""
    if torch.compiler._is_exporting_flag and isinstance(z, Tensor):
        return torch.ops.sp_fx.registered(z, y, name, repr(encoded(args)))
    return y


@torch.library.custom_op("sp_fx::registered", mutates_args=(), schema="(Tensor z, Tensor y, str name, str args) -> Tensor")
def marker(z: Tensor, y: Tensor, name: str, args: str) -> Tensor:
    return y.clone()


marker.register_fake(lambda z, y, name, args: torch.empty_like(y))
marker.register_autograd(lambda ctx, v: (None, v, None, None))


def registered(module: nn.Module) -> str | None:
    """The name under which the module's class, or the nearest one that it derives from, is registered."""
    return next((MODULES[cls] for cls in type(module).__mro__ if cls in MODULES), None)
