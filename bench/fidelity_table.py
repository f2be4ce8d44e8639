"""What fidelity.py writes: rows with intervals, paired comparisons, a table, a plot."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from faithfulness import holm, sign_flip_p
from measures import paired_interval
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What each measure is best at: "low", "high", or nearest to 0; the headline ones come first.
METRICS = {
    "infidelity": "low",
    "faithfulness correlation": "high",
    "max-sensitivity": "low",
    "mask mass": "high",
    "faithfulness estimate": "high",
    "monotonicity": "high",
    "random logit": "zero",
    "focus": "high",
    "deletion": "low",
    "insertion": "high",
    "pointing game": "high",
    "random top 0.25": "zero",
    "random top 0.5": "zero",
    "random top 1.0": "zero",
}
HEADLINE = tuple(METRICS)[:4]
OURS = ("pullback", "double pullback", "ascent", "integrated pullback-10")
PAIRS = [
    *[(f"{ours}", other) for ours in ("pullback", "ascent", "integrated pullback-10") for other in ("gradient", "SmoothGrad-50")],
    *[(ours, f"{ours}, paper's rules") for ours in ("pullback", "double pullback", "ascent")],
]
SHORT = ("Infid. ↓", "Faith. corr. ↑", "Max-sens. ↓", "Mask mass ↑", "Faith. est. ↑", "Monot. ↑", "Rand. logit → 0", "Focus ↑",
         "Del. ↓", "Ins. ↑", "Point. ↑", "¼ random → 0", "½ random → 0", "all random → 0")  # fmt: skip
FEW = 10  # fewer values give a mean without an interval


def rows(results: dict[str, dict[str, Tensor]], passes: dict[str, int]) -> dict[str, Any]:
    """For each method its passes and, for each measure, the mean with a bootstrap interval over what was defined."""
    return {
        method: {"passes": passes[method], **{name: summary(found[name]) for name in METRICS if name in found}}
        for method, found in results.items()
    }


def summary(values: Tensor) -> dict[str, float]:
    finite = values[values.isfinite()]
    found = {"mean": finite.mean().item()} if len(finite) < FEW else paired_interval(finite)
    return {**rounded(found), "of": len(finite)}


def rounded(row: dict[str, float]) -> dict[str, float]:
    """To four digits: the last bits of float32 sums differ from run to run with the alignment of memory."""
    return {name: float(f"{value:.4g}") for name, value in row.items()}


def compared(results: dict[str, dict[str, Tensor]]) -> list[dict[str, Any]]:
    """Ours against others, paired, on the headline measures; `p` by sign flips, `holm` corrected over all of them together."""
    found = []
    for ours, other in PAIRS:
        for name in HEADLINE:
            if name not in results.get(ours, {}) or name not in results.get(other, {}):
                continue
            a, b = results[ours][name], results[other][name]
            both = a.isfinite() & b.isfinite()
            difference = (a - b)[both]
            if len(difference) < FEW:
                continue
            ratio = a[both].mean().item() / b[both].mean().item()
            numbers = rounded({**paired_interval(difference), "ratio": ratio})
            found.append({"measure": name, "ours": ours, "other": other, **numbers, "p": sign_flip_p(difference)})
    adjusted = holm({f"{i}": row["p"] for i, row in enumerate(found)})
    for i, row in enumerate(found):
        row["holm"] = adjusted[f"{i}"]
        sign = {"low": -1, "high": 1}[METRICS[row["measure"]]] * row["mean"]
        row["verdict"] = "no difference shown" if row["holm"] >= 0.05 else "better" if sign > 0 else "worse"
    return found


def table(record: dict[str, Any]) -> str:
    """The rows in Markdown, the best two of each measure set off: **first**, *second*."""
    listed = record["methods"]
    known = [name for name in METRICS if any(name in row for row in listed.values())]
    marks = {name: best(listed, name) for name in known}
    head = ["", "passes", *(SHORT[list(METRICS).index(name)] for name in known)]
    lines = [f"**{record['network']}**, {record['samples']}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for method, row in listed.items():
        cells = [marks[name].get(method, "{}").format(f"{row[name]['mean']:.3g}") if name in row else "-" for name in known]
        lines.append("| " + " | ".join([method, str(row["passes"]), *cells]) + " |")
    lines += [f"| {method} | | {why} " + "|" * (len(known)) for method, why in record["not applicable"].items()]
    lines += ["", "Paired, Holm-corrected:"]
    for c in record["comparisons"]:
        lines.append(f"- {c['measure']}, {c['ours']} less {c['other']}: {c['mean']:+.3g} [{c['low']:+.3g}, {c['high']:+.3g}], "
                     f"ratio {c['ratio']:.2f}, p {c['holm']:.2g}: {c['verdict']}")  # fmt: skip
    return "\n".join(lines)


def best(listed: dict[str, Any], name: str) -> dict[str, str]:
    """Marks of the first and second on a measure. Several methods may share a mean: they share the mark."""
    if name.startswith("random"):
        return {}
    sign = {"low": 1, "high": -1, "zero": 1}[METRICS[name]]
    values = {method: sign * row[name]["mean"] for method, row in listed.items() if name in row}
    order = sorted({round(value, 9) for value in values.values()})
    return {m: ("**{}**", "*{}*")[order.index(round(v, 9))] for m, v in values.items() if order.index(round(v, 9)) < 2}


def plotted(record: dict[str, Any]) -> Figure:
    """The headline measures with their intervals, a method a line."""
    from matplotlib.figure import Figure

    names = [name for name in HEADLINE if any(name in row for row in record["methods"].values())]
    figure = Figure(figsize=(3.0 * len(names) + 1.5, 0.26 * len(record["methods"]) + 1.2), layout="constrained", dpi=100)
    methods = list(record["methods"])[::-1]
    for axis, name in zip(figure.subplots(1, len(names), sharey=True, squeeze=False)[0], names):
        for at, method in enumerate(methods):
            found = record["methods"][method].get(name)
            if found is None:
                continue
            colour = "#b2182b" if method.split(",")[0] in OURS else "#4d4d4d"
            axis.plot(
                [found.get("low", found["mean"]), found.get("high", found["mean"])], [at, at], color=colour, lw=2, alpha=0.5
            )
            axis.plot(found["mean"], at, "o", color=colour, ms=4)
        if METRICS[name] == "low":
            axis.set_xscale("log")
        axis.set_title(f"{name} ({'lower' if METRICS[name] == 'low' else 'higher'} is better)", fontsize=8)
        axis.tick_params(labelsize=7, which="both")
        axis.grid(axis="x", alpha=0.3)
        axis.set_yticks(range(len(methods)), [f"{m} ({record['methods'][m]['passes']})" for m in methods], fontsize=7)
    figure.suptitle(f"{record['network']}, {record['samples']}; means with 95 % intervals, passes in brackets", fontsize=9)
    return figure
