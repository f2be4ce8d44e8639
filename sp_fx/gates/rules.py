"""Rules: which temperature each gate gets."""

from __future__ import annotations

import difflib
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any, Literal

from .adjoints import norms
from .adjoints.relu import CLAMP
from .adjoints.row import FROZEN, SMOOTH, Soft, Temperature
from .adjoints.smooth import GELU
from .table import TABLE

NORMS = tuple(norms.ROWS)
UNTEMPERED = (*NORMS, "product", "stride")
SCALES = ("absolute", "sample", "channel")
BATCH_NORM: Literal["batch_norm"] = "batch_norm"  # a scale that a Soft alone may have


@dataclass(frozen=True, kw_only=True)
class Rules:
    """The temperature of every kind of gate, and exceptions by place.

    Each kind takes a number > 0 (the soft adjoint at that temperature, in units of the pre-activation), a `Soft` (a temperature
    with a margin, or with a scale of its own), `"frozen"` (the gate of the forward pass itself, kept constant) or `None` (the
    op's plain derivative). Normalisations and products have no temperature: `"frozen"` (their statistics, or the gate that
    multiplies, are constants) or `None`. `stride` is `"smooth"` (the mean over the grids that a convolution's stride might
    have, where its exact adjoint leaves a checkerboard) or `None` (the exact adjoint).

    `scale` says what a temperature is measured in, for the gates whose hard form ignores the scale of their input (ReLU, leaky
    and parametric ReLU, max pooling): `"absolute"`, the paper's, supposes pre-activations of unit scale, as after a BatchNorm;
    `"sample"` multiplies it by the standard deviation of each sample's pre-activation, taken in the pass over all its own axes;
    `"channel"`, of gates that one kink opens, by how far that is from the kink in the sample and in each of its channels;
    a mapping from places to numbers above 0 (or to one of these words) multiplies it by that number, which is what
    `Explainer.calibrate` measures.

    `registered` has the temperatures of the gates that `register_gate` knows, by their names: `Rules(registered={"snake": 0.5})`.

    `overrides` maps patterns of places (`fnmatch`: `"layer4.*"`, as `report()` prints them), names of modules (`"layer4"`, with
    all that is in it) or ends that one place has to a temperature, or to a mapping from kinds to temperatures. A number passes
    over normalisations and products, and a mapping over the kinds that it does not name. Of several that fit a gate the last one
    in the order of the mapping wins, whichever is the more specific, so write the general one first: by
    `{"layer4": 0.3, "layer4.1.relu": None}` all gates in `layer4` are at 0.3 but that one. One that fits no gate is an error.

    Defaults: one deviation of the sample for ReLUs and max pooling, by `bench/temperatures.py`: on the zoo's CNN and SqueezeNet
    better than the published 0.6 and 0.3, absolute, in fidelity and stability. Clamps (ReLU6) behind a batch norm, and strides,
    by EfficientNet-Lite0; other clamps are ReLUs but for their upper kink, and have a ReLU's temperature. GELU by the zoo's
    transformer: the paper's 1.0 is the forward's own gate, so that of a transformer its map is the frozen one. For the others
    arXiv:2507.22832, and for kinds that it does not list those of the nearest kind it does.

    Raises:
        TypeError: a keyword that is no kind; overrides, scales or registered gates that are no mapping from strings.
        ValueError: a temperature that is not a finite number above 0, `"frozen"` or `None`; an unknown kind; an unknown scale.
    """

    relu: Temperature | Soft | None = 1.0  # and clamp, maximum and minimum with one bound, threshold
    leaky_relu: Temperature | Soft | None = 1.0
    prelu: Temperature | Soft | None = 1.0
    hardtanh: Temperature | Soft | None = CLAMP  # ReLU6, a clamp between two bounds, hardsigmoid
    hardshrink: Temperature | None = 0.6
    softshrink: Temperature | None = 0.6
    abs: Temperature | None = 1.0
    elu: Temperature | None = 0.6  # and SELU, CELU
    gelu: Temperature | Soft | None = GELU
    quick_gelu: Temperature | Soft | None = GELU
    silu: Temperature | Soft | None = 1.6
    hardswish: Temperature | Soft | None = 1.6
    mish: Temperature | Soft | None = 1.6
    max_pool: Temperature | None = 1.0  # adaptive, fractional and global (amax) too
    attention: Temperature | None = 1.0
    layer_norm: Temperature | None = FROZEN
    rms_norm: Temperature | None = FROZEN
    group_norm: Temperature | None = FROZEN
    instance_norm: Temperature | None = FROZEN
    batch_norm: Temperature | None = FROZEN  # only where it has no running statistics; with them it is affine
    local_response_norm: Temperature | None = FROZEN
    normalize: Temperature | None = FROZEN  # division by a norm
    stride: Literal["smooth"] | None = SMOOTH  # of a convolution that steps over places: the mean over the grids it might have
    product: Temperature | None = None  # of a signal with a gate (GLU, squeeze-and-excite, LSTM): frozen, that is a constant
    registered: Mapping[str, Temperature | None] = field(default_factory=dict)  # temperatures of registered gates, by name
    scale: Literal["absolute", "sample", "channel"] | Mapping[str, float | str] = "sample"
    overrides: Mapping[str, Temperature | Soft | Mapping[str, Temperature | Soft | None] | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for kind in KINDS:
            _check(f"Rules({kind}=...)", kind, getattr(self, kind))
        _check_keys("registered", self.registered, "names of registered gates", "registered={'snake': 0.5}")
        _check_keys("overrides", self.overrides, "places or patterns of them", "overrides={'layer4.*': 0.5}")
        if isinstance(self.scale, Mapping):
            _check_keys("scale", self.scale, "places", "scale={'layer4.1.relu': 0.8}")
        for name, tau in self.registered.items():
            if name not in registered_kinds():
                kinds = ", ".join(registered_kinds()) or "none"
                raise ValueError(f"no gate is registered as {name!r}; registered are: {kinds}")
            _check(f"registered gate {name!r}", name, tau)
        object.__setattr__(self, "registered", MappingProxyType(dict(self.registered)))
        if isinstance(self.scale, Mapping):
            for place, scale in self.scale.items():
                number = isinstance(scale, int | float) and not isinstance(scale, bool) and 0 < scale < math.inf
                if not number and scale not in SCALES:
                    expected = f"the scale of {place!r} is a finite number above 0, 'sample', 'channel' or 'absolute'"
                    raise ValueError(f"{expected}, got {scale!r}")
            object.__setattr__(self, "scale", MappingProxyType(dict(self.scale)))
        elif self.scale not in SCALES:
            choices = "'absolute', 'sample', 'channel' or a mapping from places to numbers above 0"
            raise ValueError(f"scale is {choices}, got {self.scale!r}")
        for pattern, override in self.overrides.items():
            by_kind: Mapping[str, Any] = override if isinstance(override, Mapping) else {"relu": override}
            for kind, tau in by_kind.items():
                if kind not in KINDS and kind not in registered_kinds():
                    raise ValueError(f"override {pattern!r}: {_unknown(kind, (*KINDS, *registered_kinds()))}")
                _check(f"override {pattern!r}", kind, tau)
        copied = {pattern: dict(tau) if isinstance(tau, Mapping) else tau for pattern, tau in self.overrides.items()}
        object.__setattr__(self, "overrides", MappingProxyType(copied))

    def __reduce__(self):  # a mappingproxy does not pickle
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return _restore, ({name: dict(v) if isinstance(v, Mapping) else v for name, v in values.items()},)

    @classmethod
    def paper(cls) -> Rules:
        """The published rules and nothing else: kinds that the paper does not list keep their plain derivative."""
        beyond = ("leaky_relu", "prelu", "hardtanh", "hardshrink", "softshrink", "abs", "elu", "quick_gelu", "hardswish", "mish",
                  "local_response_norm", "normalize", "stride")  # fmt: skip
        return cls(scale="absolute", relu=0.6, gelu=1.0, max_pool=0.3, **dict.fromkeys(beyond))  # type: ignore[arg-type]

    @classmethod
    def frozen(cls) -> Rules:
        """Rules that hold every gate as the forward pass set it: a network of affine layers and gates is then the affine map
        `W(x) x + b(x)` that it is at its input.

        What is no gate keeps its derivative, and the report counts it: smooth functions (tanh, exp), products and quotients of
        two signals of which neither is a gate, softmaxes that weigh no values, calls that are NOT REWRITTEN. A
        B-cos network is made of such products, `out * |out| / norm`, so its map under these rules is the plain gradient.
        """
        gates = dict.fromkeys((kind for kind in KINDS if kind != "stride"), FROZEN)
        return cls(**gates, stride=None, registered=dict.fromkeys(registered_kinds(), FROZEN))  # type: ignore[arg-type]

    def temperature(self, kind: str, place: str, normed: bool = False) -> Temperature | None:
        """The temperature of the gate of `kind` at `place`, None where it keeps its plain derivative. `normed` says, here and
        below, whether a batch norm is right before the gate."""
        value = self._value(kind, place, normed)
        return value.tau if isinstance(value, Soft) else value

    def margin(self, kind: str, place: str, normed: bool = False) -> float:
        """The margin of the gate of `kind` at `place`, in temperatures."""
        value = self._value(kind, place, normed)
        return value.margin if isinstance(value, Soft) and kind in TABLE and TABLE[kind].opens else 0.0

    def scale_of(self, kind: str, place: str, tau: Temperature | None, normed: bool = False) -> str | float:
        """The unit of `tau`, the temperature of the gate of `kind` at `place`; "missing" where the scales are measured ones and
        this gate's is not among them."""
        if not (kind in TABLE and TABLE[kind].homogeneous and isinstance(tau, float | int)):
            return "absolute"
        value = self._value(kind, place, normed)
        own = value.scale if isinstance(value, Soft) else None
        if isinstance(self.scale, Mapping):
            scale = self.scale.get(place, own or "missing")
            return scale if isinstance(scale, str) else float(scale)
        scale = own or self.scale
        return "sample" if scale == "channel" and not TABLE[kind].opens else scale  # without a kink, no distance from it

    def _value(self, kind: str, place: str, normed: bool) -> Temperature | Soft | None:
        """What these rules say of the gate of `kind` at `place`."""
        value = getattr(self, kind) if kind in KINDS else self.registered.get(kind, TABLE[kind].default)
        for pattern, override in self.overrides.items():
            if fnmatchcase(place, pattern):
                if isinstance(override, Mapping):
                    value = override.get(kind, value)
                elif override is None or kind not in UNTEMPERED or (override == FROZEN and kind != "stride"):
                    value = override
        if isinstance(value, Soft) and value.scale == BATCH_NORM:
            may = kind in TABLE and TABLE[kind].opens and TABLE[kind].homogeneous  # an override may be at other kinds too
            if not (normed and may):
                return replace(value, scale=None) if value.otherwise is None else value.otherwise
        return value

    def resolved(self, gates: Iterable[Any]) -> Rules:
        """These rules, with the full places in place of overrides that name a module (`"layer4"`: all that is in it), the end of
        one place (`"attn.softmax"`), or places as the model has them that this one only wraps (`"layer4.*"` of what
        `pixel_space` returns, whose own places are at `"model.layer4.*"`). `gates` are the sites of a report.

        Raises:
            ValueError: an end that several places have, or places in several modules; two overrides that name the same places.
        """
        known = sorted({site.place for site in gates if site.kind})
        overrides: dict[str, Any] = {}
        written: dict[str, str] = {}  # how the caller wrote each of them
        for pattern, override in self.overrides.items():
            ends, full = [place for place in known if place.endswith(f".{pattern}")], pattern
            if any(fnmatchcase(place, pattern) for place in known):
                pass
            elif any(place.startswith(f"{pattern}.") for place in known):
                full = f"{pattern}.*"
            elif len(ends) > 1:
                several = f"{len(ends)} places: {', '.join(ends[:5])}{', ...' if len(ends) > 5 else ''}"
                raise ValueError(f"the override {pattern!r} is the end of {several}; say which, or '*.{pattern}'")
            elif ends:
                full = ends[0]
            elif outer := _outer(pattern, known):
                if len(outer) > 1:
                    raise ValueError(
                        f"the override {pattern!r} fits places in {', '.join(outer)}; say which: {outer[0]}.{pattern}"
                    )
                inside = any(fnmatchcase(place, f"{outer[0]}.{pattern}") for place in known)
                full = f"{outer[0]}.{pattern}" if inside else f"{outer[0]}.{pattern}.*"
            if full in overrides:
                raise ValueError(f"the overrides {written[full]!r} and {pattern!r} are both for {full!r}: make them one")
            overrides[full], written[full] = override, pattern
        return self if overrides == dict(self.overrides) else replace(self, overrides=overrides)

    def check_places(self, gates: Iterable[Any]) -> None:
        """Raise ValueError if a pattern of the overrides, or a measured scale, fits none of the `gates`, sites of a report; or if
        an override sets a temperature where no gate has one."""
        kinds = {(site.place, site.kind): None for site in gates if site.kind}
        known = sorted({place for place, _ in kinds})
        unknown = [place for place in self.scale if place not in known] if isinstance(self.scale, Mapping) else []
        if unknown:
            raise ValueError(f"scales were measured at {', '.join(unknown)}, where this model has no gate: another model's?")
        for pattern, override in self.overrides.items():
            if not isinstance(override, Mapping):
                _check_some(pattern, override, [(place, kind) for place, kind in kinds if fnmatchcase(place, pattern)])
            if not any(fnmatchcase(place, pattern) for place in known):
                near = nearest(pattern, known)
                places = f"the nearest of its {len(known)} gates are at" if len(near) < len(known) else "its gates are at"
                close = difflib.get_close_matches(pattern, KINDS, 1, 0.7)
                kind = f"a kind of gate is called {close[0]!r}; " if close else ""
                if pattern in (*KINDS, *registered_kinds()):
                    tau = self.overrides[pattern]
                    setting = f"{pattern}={tau!r}" if pattern in KINDS else f"registered={{{pattern!r}: {tau!r}}}"
                    kind = f"{pattern!r} is a kind of gate, and Rules({setting}) sets it at every place; "
                hint = f"{kind}{places}: {', '.join(near) or 'none'}"
                raise ValueError(f"the override {pattern!r} fits no gate of this model; {hint}")

    def check_scales(self, gates: Iterable[Any]) -> None:
        """Raise ValueError if the scales are measured ones, and that of one of the `gates` is not among them."""
        for site in gates:
            if site.scale == "missing":
                measured = f"no scale was measured for the {site.kind} gate at {site.place!r}, but for {len(self.scale)} others"
                raise ValueError(f"{measured}: calibrate an explainer of this model")

    def __str__(self) -> str:
        return f"Rules({', '.join(f'{name}={value}' for name, value in self._changed().items())})"

    def brief(self) -> str:
        """The rules as they print, with measured scales only counted: `Rules(scale=<measured at 16 gates>)`."""
        scales = self.scale.values() if isinstance(self.scale, Mapping) else []
        numbers = sum(not isinstance(scale, str) for scale in scales)
        of = "" if numbers == len(scales) else f" of {len(scales)}"
        measured = {"scale": f"<measured at {numbers}{of} gates>"} if isinstance(self.scale, Mapping) else {}
        return f"Rules({', '.join(f'{name}={value}' for name, value in {**self._changed(), **measured}.items())})"

    def _changed(self) -> dict[str, str]:
        """The fields that differ from their default, as they print."""
        values = {name: (getattr(self, name), getattr(Rules(), name)) for name in (*KINDS, "registered", "scale", "overrides")}
        return {n: repr(dict(v) if isinstance(v, Mapping) else v) for n, (v, default) in values.items() if v != default}


KINDS = tuple(f.name for f in fields(Rules) if f.name not in ("scale", "overrides", "registered"))


def registered_kinds() -> tuple[str, ...]:
    """The names of the gates that users have registered."""
    return tuple(name for name, row in TABLE.items() if row.registered)


def _checking_names(init: Callable[..., None]) -> Callable[..., None]:
    """The `__init__` of `Rules`, with an error of our own for keywords that it does not have."""

    @functools.wraps(init)
    def checking(self: Rules, *args: Any, **values: Any) -> None:
        if args:
            raise TypeError(f"Rules takes its temperatures by keyword, such as Rules(relu=0.5), got {args[0]!r}")
        names = [f.name for f in fields(Rules)]
        for name in values:
            if name not in names:
                raise TypeError(f"Rules({name}=...): {_unknown(name, names)}")
        init(self, **values)

    return checking


Rules.__init__ = _checking_names(Rules.__init__)  # type: ignore[method-assign]


def _outer(pattern: str, places: Sequence[str]) -> list[str]:
    """Returns the modules in which the pattern, or all that is in the module of that name, fits some of the places: `["model"]`
    for `"layer4.*"` and `"layer4"`, where there is `"model.layer4.1.relu"`."""
    modules = dict.fromkeys(".".join(place.split(".")[:n]) for place in places for n in range(1, place.count(".") + 1))
    fitting = ((f"{module}.{pattern}", f"{module}.{pattern}.*") for module in modules)
    return [
        module for module, forms in zip(modules, fitting) if any(fnmatchcase(place, form) for form in forms for place in places)
    ]


def nearest(name: str, places: Iterable[str], cutoff: float = 0.0, count: int = 5) -> list[str]:
    """Returns those of the `places` that are closest to `name`, in their natural order: layer2 before layer10. `cutoff` is the
    least likeness, from 0 to 1."""
    close = difflib.get_close_matches(str(name), list(places), count, cutoff)
    return sorted(close, key=lambda place: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", place)])


def _unknown(kind: Any, choices: Sequence[str]) -> str:
    """What an error says of a kind that there is not among the `choices`."""
    near = difflib.get_close_matches(str(kind).lower(), choices, 3, 0.7)
    kinds = [choice for choice in choices if choice not in ("registered", "scale", "overrides")]
    those = f"the nearest are {', '.join(near)}" if near else f"the kinds are {', '.join(kinds)}"
    hint = f"registered={{{kind!r}: ...}} sets a gate that register_gate has given this name"
    return f"there is no kind {kind!r}; {those}. {hint}"


def _check_keys(option: str, value: Any, keys: str, example: str) -> None:
    """Raise TypeError unless `value` is a mapping from strings."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{option} is a mapping from {keys} to temperatures, such as {example}, got {value!r}")
    if wrong := [key for key in value if not isinstance(key, str)]:
        kind = ", and a kind has a keyword of its own: Rules(relu=0.5)" if option == "overrides" else ""
        raise TypeError(f"the keys of {option} are {keys}, which are strings, as in {example}{kind}; got {wrong[0]!r}")


def _restore(values: dict) -> Rules:
    return Rules(**values)


def _check(where: str, kind: str, tau: object) -> None:
    if tau is None or (isinstance(tau, str) and tau == (SMOOTH if kind == "stride" else FROZEN)):
        return
    if kind == "stride":
        raise ValueError(f"{where}: a stride is 'smooth' or None (its exact adjoint), got {tau!r}")
    if isinstance(tau, Soft):
        _check(f"the temperature of {where}", kind, tau.tau)
        _check_soft(where, kind, tau)
        return
    if kind in UNTEMPERED:
        family = "a product" if kind == "product" else "a normalisation"
        raise ValueError(f"{where}: {family} has no temperature: expected 'frozen' or None, got {tau!r}")
    if isinstance(tau, bool) or not isinstance(tau, int | float) or not (0 < tau < math.inf):
        choices = "a finite temperature above 0, 'frozen' (hard gate) or None (plain derivative)"
        raise ValueError(f"{where}: expected {choices}, got {tau!r}")


def _check_some(pattern: str, override: Any, gates: Sequence[tuple[str, str]]) -> None:
    """Raise unless one of the `gates` (place, kind) that the override fits may have that value: `layer4.*` has strides too."""
    refused = None
    for place, kind in gates:
        try:
            return _check(f"override {pattern!r} at {place}", kind, override.tau if isinstance(override, Soft) else override)
        except ValueError as error:
            refused = refused or error
    if refused is not None:
        raise refused


def _check_soft(where: str, kind: str, soft: Soft) -> None:
    """Raise unless a gate of `kind` may have this margin and this scale."""
    if isinstance(soft.tau, str | Soft) or soft.tau is None:
        raise ValueError(f"{where}: the temperature of a Soft is a finite number above 0, got {soft.tau!r}")
    if isinstance(soft.margin, bool) or not isinstance(soft.margin, int | float) or not math.isfinite(soft.margin):
        raise ValueError(f"{where}: a margin is a finite number, in temperatures, got {soft.margin!r}")
    if soft.margin and not (kind in TABLE and TABLE[kind].opens):
        margins = ", ".join(k for k in KINDS if k in TABLE and TABLE[k].opens)
        raise ValueError(f"{where}: a gate of kind {kind} has no margin, got {soft.margin!r}; kinds that have one are {margins}")
    if soft.scale not in (None, *SCALES, BATCH_NORM):
        choices = "'absolute', 'sample', 'channel', 'batch_norm' or None"
        raise ValueError(f"{where}: the scale of a Soft is {choices}, got {soft.scale!r}")
    if soft.scale not in (None, "absolute") and not (kind in TABLE and TABLE[kind].homogeneous):
        raise ValueError(f"{where}: the gate of kind {kind} is not the same at every scale, got scale={soft.scale!r}")
    if soft.scale in ("channel", BATCH_NORM) and not (kind in TABLE and TABLE[kind].opens):
        own = f"{where}: the gate of kind {kind} has no one kink that opens it, got scale={soft.scale!r}"
        raise ValueError(f"{own}; it may have scale='sample'")
    if soft.otherwise is not None:
        if soft.scale != BATCH_NORM:
            raise ValueError(f"{where}: otherwise={soft.otherwise!r} goes with scale='batch_norm', got scale={soft.scale!r}")
        number = isinstance(soft.otherwise, int | float) and not isinstance(soft.otherwise, bool)
        its = soft.otherwise if isinstance(soft.otherwise, Soft) else Soft(soft.otherwise if number else math.nan)  # type: ignore[arg-type]
        if its.scale == BATCH_NORM or not (isinstance(its.tau, int | float) and 0 < its.tau < math.inf):
            expected = "a finite temperature above 0, or a Soft whose scale every gate has"
            raise ValueError(f"{where}: otherwise is {expected}, got {soft.otherwise!r}")
        _check_soft(f"{where}, otherwise", kind, its)
