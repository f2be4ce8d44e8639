"""The report: what became of every gating call of a model, with which temperature."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

from ..gates.adjoints.row import FROZEN, Temperature
from ..gates.rules import UNTEMPERED, Rules
from ..gates.table import TABLE

WRITTEN_OUT = ", written out"  # how the op of a call ends that closes a function written out
IDLE = "no signal passes"  # what the reason of a call says through which nothing goes back
PART = "part of the "  # how the reason of a call begins that is inside a function written out
Status = Literal["rewritten", "kept", "NOT REWRITTEN"]
HARD, OPEN = 0.05, 20.0  # where a Gaussian pre-activation's gain is on average 0.016 from the step, and from one half


@dataclass(frozen=True)
class Site:
    """One gating call: the op, its place (module path, `#2` for its second call there), and what became of it.

    `scale` is what the temperature is in units of: "absolute" (1), each "sample"'s own deviation, its and each "channel"'s
    distance from the kink, what the "batch_norm" before it says of each channel, or a calibrated number; `margin` is that of
    `Soft`; `spread` the deviation of the pre-activation over the data that a report was made with.
    """

    place: str
    op: str
    kind: str
    status: Status
    temperature: Temperature | None = None
    reason: str = ""
    scale: str | float = "absolute"
    margin: float = 0.0
    spread: float | None = None
    opaque: bool = False  # the trace went round it
    unit: float | None = None  # by what a batch norm says, over all channels, where `spread` is known

    @property
    def relative(self) -> float | None:
        """The temperature in units of the deviation of the pre-activation, where that is known."""
        if not isinstance(self.temperature, int | float) or (self.scale == "absolute" and self.spread is None):
            return None
        if self.spread is None or self.scale in ("sample", "channel"):
            return float(self.temperature)
        unit = self.scale if isinstance(self.scale, float) else self.unit or 1.0
        return self.temperature * unit / max(self.spread, 1e-30)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to be done about it: no signal passes it, or it is a part of something."""
        return IDLE in self.reason or self.reason.startswith(PART)

    @property
    def misfit(self) -> str:
        """What is wrong with a temperature that does not fit the scale of its pre-activation."""
        relative = self.relative or 1.0
        if self.status != "rewritten" or HARD <= relative <= OPEN:
            return ""
        return "effectively hard" if relative < HARD else "effectively open"

    @property
    def note(self) -> str:
        """What to know of it: why it was left, or a temperature that does not fit the scale of its pre-activation; and what can
        be done about it."""
        text = "; ".join(filter(None, (self.reason, self.misfit)))
        text = text if self.status == "rewritten" else f"{self.status}: {text}"
        return f"{text} -> {self.remedy}" if self.status == "NOT REWRITTEN" else text

    @property
    def remedy(self) -> str:
        """What a user can do about it; "" where that is nothing."""
        if self.misfit:
            return "calibrate(), or scale='sample'"
        if self.opaque:
            return "pass example_inputs, so that torch.export sees into it, or give it a rule by register_gate"
        if self.status == "NOT REWRITTEN":
            return (
                "put it into a function of its own and give that a rule by register_gate, if it works element by element; or "
                "leave its derivative as it is"
            )
        if self.idle or not self.kind:
            return ""
        choices = "'frozen', or None for its plain derivative" if self.kind in UNTEMPERED else "a number, 'frozen' or None"
        choices = "None for its exact adjoint" if self.kind == "stride" else choices
        return f"Rules(overrides={{{self.place!r}: {choices}}}) changes it"

    @property
    def sentence(self) -> str:
        """What became of it and why, as a sentence."""
        what = f"{self.op} at {self.place}"
        if self.status == "NOT REWRITTEN":
            text = f"{what} keeps its plain derivative, and is NOT REWRITTEN: {self.reason}"
        elif self.status == "kept":
            text = f"{what} keeps its derivative: {self.reason}"
        elif self.kind == "stride":
            text = f"{what} steps over places, rewritten: on the way back it is the mean over the grids that it might have"
        elif self.kind in UNTEMPERED:
            held = "the gate of the product is" if self.kind == "product" else "its statistics are"
            text = f"{what} is a {self.kind}, rewritten: the forward is the model's, and on the way back {held} constant"
        else:
            frozen = self.temperature == FROZEN
            gate = "the gate of its forward, a constant" if frozen else f"its gate at temperature {self.temperature_text}"
            text = f"{what} is a {self.kind}, rewritten: the forward is the model's, and the signal goes back through {gate}"
        extra = "; ".join(filter(None, (self.reason if self.status == "rewritten" else "", self.misfit)))
        needed = self.misfit or self.status == "NOT REWRITTEN"
        remedy = f"To do: {self.remedy}" if needed else self.remedy or "Nothing needs to be done"
        return f"{text}{f' ({extra})' if extra else ''}. {remedy}."

    @property
    def supposes_unit_scale(self) -> bool:
        return self.relative is None and isinstance(self.temperature, int | float) and TABLE[self.kind].homogeneous

    @property
    def temperature_text(self) -> str:
        if self.temperature is None:
            return ""
        words = {"sample": " x scale", "channel": " x scale by channel", "batch_norm": " x scale by batch norm"}
        unit = f" x {self.scale:.4g}" if isinstance(self.scale, float) else words.get(self.scale, "")
        return f"{self.temperature}{unit}{f', margin {self.margin:g}' if self.margin else ''}"


@dataclass(frozen=True)
class Report:
    """What became of every gating call of a model, in the order of the forward pass. Printable."""

    model: str
    rules: Rules
    sites: tuple[Site, ...]
    tracer: str = "torch.fx"
    notes: tuple[str, ...] = ()  # on the capture
    inputs: str = ""  # that an export is for, with * for sizes that vary: "x [*, 3, 32, 32]"; "" of a trace, which is for all

    def explain(self, place: str) -> str:
        """What became of the gating calls at `place`, or in the module of that name, and why: a sentence for each.

        For example "relu at layer4.1.relu is a relu, rewritten: the forward is the model's, and the signal goes back through its
        gate at temperature 1.0 x scale. Rules(overrides={'layer4.1.relu': a number, 'frozen' or None}) changes it."

        Raises:
            ValueError: no gating call is there; the message has the nearest places.
        """
        places = [site.place for site in self.sites]
        at = [s for s in self.sites if s.place == place] or [s for s in self.sites if s.place.partition("#")[0] == place]
        at = at or [s for s in self.sites if s.place.startswith(f"{place}.")]
        # Inside of a wrapper, as `pixel_space` is.
        at = at or [s for s in self.sites if s.place.endswith(f".{place}") or f".{place}." in f".{s.place.partition('#')[0]}."]
        if not at:
            near = ", ".join(difflib.get_close_matches(str(place), places, 5, 0.4) or places[:5]) or "none"
            raise ValueError(
                f"no gating call of {self.model} is at {place!r}; the nearest places are {near}. What is affine is "
                "not listed: it has its exact adjoint"
            )
        return "\n".join(site.sentence for site in at)

    def of(self, status: Status) -> list[Site]:
        return [site for site in self.sites if site.status == status]

    def __str__(self) -> str:
        counts = ", ".join(f"{len(self.of(s))} {s}" for s in ("rewritten", "kept", "NOT REWRITTEN"))  # type: ignore[arg-type]
        rows = [["place", "op", "gate", "temperature", ""]]
        rows += [[site.place, site.op, site.kind, site.temperature_text, site.note] for site in self.sites]
        if any(site.spread is not None for site in self.sites):
            known = [("" if n is None else f"{n:.4g}" for n in (s.spread, s.relative)) for s in self.sites]
            for row, cells in zip(rows, [("deviation", "of it"), *known]):
                row[4:4] = cells
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
        lines = ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[-1]]).rstrip() for row in rows]
        inputs = f" for {self.inputs}" if self.inputs else ""
        heading = f"{self.model} with {self.rules.brief()}, captured by {self.tracer}{inputs}: {counts}"
        legend = "Rules(overrides={place: ...}) changes a line, report().explain(place) says why; what is kept needs nothing"
        return "\n".join([heading, *(f"note: {note}" for note in self.notes), *lines, *self.misfits(), legend])

    def misfits(self) -> list[str]:
        """Lines on temperatures that do not fit their gates, or that could not be compared with them."""
        lines = []
        for word, end in (("hard", "the way back through them is the gradient's"), ("open", "half of everything passes them")):
            count = sum(f"effectively {word}" in site.note for site in self.sites)
            if count:
                lines.append(f"{count} gates are effectively {word}: {end}. calibrate(), or a scale of 'sample', fits them")
        if any(site.supposes_unit_scale for site in self.sites):
            lines.append("absolute temperatures suppose pre-activations of unit scale: report(inputs) compares")
        return lines
