"""The report: what became of every gating call of a model, with which temperature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..gates.adjoints.row import Temperature
from ..gates.rules import Rules
from ..gates.table import TABLE

WRITTEN_OUT = ", written out"  # how the op of a call ends that closes a function written out
PART = "part of the "  # how the reason of a call begins that is inside a function written out
Status = Literal["rewritten", "kept", "NOT REWRITTEN"]
HARD, OPEN = 0.05, 20.0  # where a Gaussian pre-activation's gain is on average 0.016 from the step, and from one half


@dataclass(frozen=True)
class Site:
    """One gating call: the op, its place (module path, `#2` for its second call there), and what became of it.

    `scale` is what the temperature is in units of: "absolute" (1), each "sample"'s own deviation, or a calibrated number;
    `spread` the deviation of the pre-activation over the data that a report was made with.
    """

    place: str
    op: str
    kind: str
    status: Status
    temperature: Temperature | None = None
    reason: str = ""
    scale: str | float = "absolute"
    spread: float | None = None
    opaque: bool = False  # the trace went round it

    @property
    def relative(self) -> float | None:
        """The temperature in units of the deviation of the pre-activation, where that is known."""
        if not isinstance(self.temperature, int | float) or (self.scale == "absolute" and self.spread is None):
            return None
        if self.spread is None or self.scale == "sample":
            return float(self.temperature)
        return self.temperature * (self.scale if isinstance(self.scale, float) else 1.0) / max(self.spread, 1e-30)

    @property
    def note(self) -> str:
        """What to know of it: why it was left, or a temperature that does not fit the scale of its pre-activation."""
        if self.status != "rewritten":
            return f"{self.status}: {self.reason}"
        relative = self.relative or 1.0
        misfit = "effectively hard" if relative < HARD else "effectively open" if relative > OPEN else ""
        return "; ".join(filter(None, (self.reason, misfit)))

    @property
    def supposes_unit_scale(self) -> bool:
        return self.relative is None and isinstance(self.temperature, int | float) and TABLE[self.kind].homogeneous

    @property
    def temperature_text(self) -> str:
        unit = f" x {self.scale:.4g}" if isinstance(self.scale, float) else " x scale" if self.scale == "sample" else ""
        return "" if self.temperature is None else f"{self.temperature}{unit}"


@dataclass(frozen=True)
class Report:
    """What became of every gating call of a model, in the order of the forward pass. Printable."""

    model: str
    rules: Rules
    sites: tuple[Site, ...]
    tracer: str = "torch.fx"
    notes: tuple[str, ...] = ()  # on the capture

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
        heading = f"{self.model} with {self.rules.brief()}, captured by {self.tracer}: {counts}"
        return "\n".join([heading, *(f"note: {note}" for note in self.notes), *lines, *self.misfits()])

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
