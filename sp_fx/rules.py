"""Rules: which temperature each gate gets."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Literal

from .adjoints import FROZEN, TABLE, Temperature

NORMS = ("layer_norm", "rms_norm", "group_norm", "instance_norm", "batch_norm", "local_response_norm")


@dataclass(frozen=True, kw_only=True)
class Rules:
    """The temperature of every kind of gate, and exceptions by place.

    Each kind takes a number > 0 (the soft adjoint at that temperature, in units of the pre-activation), `"frozen"` (the gate
    of the forward pass itself, kept constant) or `None` (the op's plain derivative). Normalisations have no temperature:
    `"frozen"` (their statistics are constants) or `None`.

    `scale` says what a temperature is measured in, for the gates whose hard form ignores the scale of their input (ReLU, leaky
    and parametric ReLU, max pooling): `"absolute"`, the paper's, supposes pre-activations of unit scale, as after a BatchNorm;
    `"sample"` multiplies it by the standard deviation of each sample's pre-activation, taken in the pass over all axes but
    the first.

    `overrides` maps patterns of places (`fnmatch`: `"layer4.*"`, as `report()` prints them) to a temperature, or to a mapping
    from kinds to temperatures. A number passes over normalisations. The last pattern that fits wins; one that fits no gate
    is an error.

    Defaults: arXiv:2507.22832, and for the kinds it does not list those of the nearest kind it does.

    Raises:
        ValueError: a temperature that is not a finite number above 0, `"frozen"` or `None`; an unknown kind.
    """

    relu: Temperature | None = 0.6
    leaky_relu: Temperature | None = 0.6
    prelu: Temperature | None = 0.6
    hardtanh: Temperature | None = 0.6  # ReLU6 and clamp are this kind
    elu: Temperature | None = 0.6  # and SELU, CELU
    gelu: Temperature | None = 1.0
    silu: Temperature | None = 1.6
    hardswish: Temperature | None = 1.6
    mish: Temperature | None = 1.6
    max_pool: Temperature | None = 0.3
    attention: Temperature | None = 1.0
    layer_norm: Temperature | None = FROZEN
    rms_norm: Temperature | None = FROZEN
    group_norm: Temperature | None = FROZEN
    instance_norm: Temperature | None = FROZEN
    batch_norm: Temperature | None = FROZEN  # only where it has no running statistics; with them it is affine
    local_response_norm: Temperature | None = FROZEN
    scale: Literal["absolute", "sample"] = "sample"
    overrides: Mapping[str, Temperature | Mapping[str, Temperature | None] | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for kind in KINDS:
            _check(f"Rules({kind}=...)", kind, getattr(self, kind))
        if self.scale not in ("absolute", "sample"):
            raise ValueError(f"scale is 'absolute' or 'sample', got {self.scale!r}")
        for pattern, override in self.overrides.items():
            for kind, tau in override.items() if isinstance(override, Mapping) else [("relu", override)]:
                if kind not in KINDS:
                    raise ValueError(f"override {pattern!r} names the kind {kind!r}; the kinds are {', '.join(KINDS)}")
                _check(f"override {pattern!r}", kind, tau)
        object.__setattr__(self, "overrides", MappingProxyType(dict(self.overrides)))

    def __reduce__(self):  # a mappingproxy does not pickle
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return _restore, ({**values, "overrides": dict(self.overrides)},)

    @classmethod
    def paper(cls) -> Rules:
        """The published rules and nothing else: kinds that the paper does not list keep their plain derivative."""
        beyond = ("leaky_relu", "prelu", "hardtanh", "elu", "hardswish", "mish", "local_response_norm")
        return cls(scale="absolute", **dict.fromkeys(beyond))  # type: ignore[arg-type]

    @classmethod
    def frozen(cls) -> Rules:
        """Every gate as the forward pass set it: the network as the affine map of its input that it acts as, `W(x) x + b(x)`."""
        return cls(**dict.fromkeys(KINDS, FROZEN))  # type: ignore[arg-type]

    def temperature(self, kind: str, place: str) -> Temperature | None:
        """The temperature of the gate of `kind` at `place`."""
        tau = getattr(self, kind)
        for pattern, override in self.overrides.items():
            if fnmatchcase(place, pattern):
                if isinstance(override, Mapping):
                    tau = override.get(kind, tau)
                elif kind not in NORMS or override in (None, FROZEN):
                    tau = override
        return tau

    def scale_of(self, kind: str, tau: Temperature | None) -> str:
        """What `tau`, a temperature of `kind`, is measured in."""
        return self.scale if TABLE[kind].homogeneous and isinstance(tau, float | int) else "absolute"

    def check_overrides(self, places: Iterable[str]) -> None:
        """Raise ValueError if a pattern fits none of `places`."""
        known = sorted(set(places))
        for pattern in self.overrides:
            if not any(fnmatchcase(place, pattern) for place in known):
                gates = ", ".join(known) or "none"
                raise ValueError(f"the override {pattern!r} fits no gate of this model; its gates are at: {gates}")

    def __str__(self) -> str:
        default = Rules()
        names = (*KINDS, "scale")
        changed = [f"{name}={getattr(self, name)!r}" for name in names if getattr(self, name) != getattr(default, name)]
        if self.overrides:
            changed.append(f"overrides={dict(self.overrides)!r}")
        return f"Rules({', '.join(changed)})"


KINDS = tuple(f.name for f in fields(Rules) if f.name in TABLE)


def _restore(values: dict) -> Rules:
    return Rules(**values)


def _check(where: str, kind: str, tau: object) -> None:
    if tau is None or (isinstance(tau, str) and tau == FROZEN):
        return
    if kind in NORMS:
        raise ValueError(f"{where}: a normalisation has no temperature: expected 'frozen' or None, got {tau!r}")
    if isinstance(tau, bool) or not isinstance(tau, int | float) or not (0 < tau < math.inf):
        choices = "a finite temperature above 0, 'frozen' (hard gate) or None (plain derivative)"
        raise ValueError(f"{where}: expected {choices}, got {tau!r}")
