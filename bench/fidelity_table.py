"""What fidelity.py writes: rows with intervals, paired comparisons, a table, a plot.

`python bench/fidelity_table.py [--results DIR] [--pages FILE ...] [--plots]` makes the tables of docs/evidence.md, and the short
one of the README, from the JSON files: each stands between `<!-- fidelity: NAME -->`, `<!-- fidelity in short: NAME NAME -->`,
`<!-- pullback against METHOD: NAME NAME -->` or `<!-- temperatures: STUDY -->` (of temperatures.py) and `<!-- end -->`; with
`--plots` it draws the plots anew, too.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from faithfulness import holm, sign_flip_p
from measures import paired_interval, ratio_interval
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Measure(NamedTuple):
    """What a measure is `best` at, "low", "high" or nearest to "zero"; its heading; whether it is compared; what it is of:
    "pictures", "text", or "paper", of pictures as the paper's evaluation has it."""

    best: str
    short: str
    headline: bool = False
    of: str = "pictures"


MEASURES = {
    "infidelity, small": Measure("low", "Infid. small ↓", headline=True),
    "infidelity, large": Measure("low", "Infid. large ↓", headline=True),
    "infidelity, scattered": Measure("low", "Infid. scattered ↓", headline=True),
    "infidelity, published": Measure("low", "Infid. published ↓", headline=True),
    "faithfulness correlation": Measure("high", "Faith. corr. ↑", headline=True),
    "max-sensitivity 0.02": Measure("low", "Max-sens. 0.02 ↓", headline=True),
    "max-sensitivity 0.1": Measure("low", "Max-sens. 0.1 ↓", headline=True),
    "mask mass": Measure("high", "Mask mass ↑", headline=True),
    "faithfulness estimate": Measure("high", "Faith. est. ↑"),
    "monotonicity": Measure("high", "Monot. ↑"),
    "random logit": Measure("zero", "Rand. logit → 0"),
    "focus": Measure("high", "Focus ↑"),
    "deletion": Measure("low", "Del. ↓"),
    "insertion": Measure("high", "Ins. ↑"),
    "pointing game": Measure("high", "Point. ↑"),
    "random top 0.25": Measure("zero", "¼ random → 0"),
    "random top 0.5": Measure("zero", "½ random → 0"),
    "random top 1.0": Measure("zero", "all random → 0"),
    "deletion of a fifth": Measure("high", "Del. ⅕ ↑", headline=True, of="text"),
    "deletion to a half": Measure("high", "Del. to ½ ↑", headline=True, of="text"),
    "infidelity, tokens": Measure("low", "Infid. ↓", headline=True, of="text"),
    "correlation, tokens": Measure("high", "Corr. ↑", headline=True, of="text"),
    "infidelity, paper": Measure("low", "Infid. ↓", headline=True, of="paper"),
    "faithfulness correlation, paper": Measure("high", "Faith. corr. ↑", headline=True, of="paper"),
    "faithfulness estimate, paper": Measure("high", "Faith. est. ↑", headline=True, of="paper"),
    "monotonicity, paper": Measure("high", "Mono. corr. ↑", headline=True, of="paper"),
    "max-sensitivity, paper": Measure("low", "Max-sens. ↓", headline=True, of="paper"),
    "random logit, paper": Measure("zero", "Rand. logit → 0", headline=True, of="paper"),
    "focus, paper": Measure("high", "Focus ↑", headline=True, of="paper"),
}
METRICS = {name: measure.best for name, measure in MEASURES.items()}
HEADLINE = tuple(name for name, measure in MEASURES.items() if measure.headline)
OURS = ("pullback", "double pullback", "ascent", "integrated pullback-10", "DeepLift pullback", "FusionPullback-25",
        "guided-CAM pullback", "soft pullback", "pullback ascent")  # fmt: skip
PAIRS = [
    *[(ours, other) for ours in ("pullback", "ascent", "integrated pullback-10") for other in ("gradient", "SmoothGrad-50")],
    *[(ours, f"{ours}, paper's rules") for ours in ("pullback", "double pullback", "ascent")],
    *[("pullback", other) for other in ("equal shares", "gradient x input", "gradient norm", "random")],
    ("ascent", "gradient ascent"),
    ("occlusion", "equal shares"),
    *[(f"{ours}{rules}", other)
      for ours, other in (("soft pullback", "gradient"), ("soft pullback", "SmoothGrad"), ("pullback ascent", "gradient ascent"))
      for rules in ("", ", default rules")],
]  # fmt: skip
# What the short table has: these measures, and "best peer" is for each of them the best of all methods but ours and the gradient.
IN_SHORT = ("infidelity, small", "infidelity, published", "faithfulness correlation", "max-sensitivity 0.02", "mask mass")
NETWORKS = {"residual_cnn": "zoo CNN", "pyramid_transformer": "zoo transformer", "squeezenet1_0": "SqueezeNet 1.0",
            "efficientnet_lite0": "EfficientNet-Lite0", "efficientnet_lite1": "EfficientNet-Lite1",
            "efficientnet_lite2": "EfficientNet-Lite2"}  # fmt: skip
FEW = 10  # fewer values give a mean without an interval


def rows(results: dict[str, dict[str, Tensor]], passes: dict[str, int]) -> dict[str, Any]:
    """For each method its passes and, for each measure, the mean with a bootstrap interval over what was defined."""
    return {
        method: {
            "passes": passes[method],
            **{name: summary(outcome[name]) for name in METRICS if name in outcome and outcome[name].isfinite().any()},
        }
        for method, outcome in results.items()
    }


def summary(values: Tensor) -> dict[str, float]:
    finite = values[values.isfinite()]
    outcome = {"mean": finite.mean().item()} if len(finite) < FEW else paired_interval(finite)
    return {**rounded({**outcome, "median": finite.median().item()}), "of": len(finite)}


def rounded(row: dict[str, float]) -> dict[str, float]:
    """To four digits: the last bits of float32 sums differ from run to run with the alignment of memory."""
    return {name: float(f"{value:.4g}") for name, value in row.items()}


def compared(results: dict[str, dict[str, Tensor]]) -> list[dict[str, Any]]:
    """Ours against others, paired, on the headline measures; `p` by sign flips, `holm` corrected over all of them together."""
    outcome = []
    for ours, other in PAIRS:
        for name in HEADLINE:
            if METRICS[name] == "zero" or name not in results.get(ours, {}) or name not in results.get(other, {}):
                continue
            a, b = results[ours][name], results[other][name]
            both = a.isfinite() & b.isfinite()
            difference = (a - b)[both]
            if len(difference) < FEW:
                continue
            least = paired_interval(b[both])["low"]  # a ratio to what may be 0 or below says nothing
            numbers = rounded({**paired_interval(difference), **(ratio_interval(a[both], b[both]) if least > 0 else {})})
            outcome.append({"measure": name, "ours": ours, "other": other, **numbers, "p": sign_flip_p(difference)})
    adjusted = holm({f"{i}": row["p"] for i, row in enumerate(outcome)})
    for i, row in enumerate(outcome):
        row["holm"] = adjusted[f"{i}"]
        sign = {"low": -1, "high": 1}[METRICS[row["measure"]]] * row["mean"]
        row["verdict"] = "no difference shown" if row["holm"] >= 0.05 else "better" if sign > 0 else "worse"
    return outcome


def table(record: dict[str, Any]) -> str:
    """Tables and comparisons, for a terminal."""
    lines = [f"**{record['network']}**, {record['samples']}", "", *markdown(record, tuple(METRICS), intervals=False)]
    lines += left_out(record)
    for key, legend in (("comparisons", "Paired, Holm-corrected:"), ("comparisons_fresh", f"The same of {record.get('fresh')}:")):
        lines += ["", legend] if record.get(key) else []
        for c in record.get(key, ()):
            change = f"{c['mean']:+.3g} [{c['low']:+.3g}, {c['high']:+.3g}]"
            ratio = f", ratio {c['ratio']:.3f} [{c['ratio_low']:.3f}, {c['ratio_high']:.3f}]" if "ratio" in c else ""
            legend = f"{change}{ratio}, p {c['holm']:.2g}: {c['verdict']}"
            lines.append(f"- {c['measure']}, {c['ours']} less {c['other']}: {legend}")
    return "\n".join(lines)


def markdown(record: dict[str, Any], names: tuple[str, ...], intervals: bool) -> list[str]:
    """The rows in Markdown, the best two of each measure set off: **first**, *second*."""
    listed = record["methods"]
    known = [name for name in names if any(name in row for row in listed.values())]
    marks = {name: best(listed, name) for name in known}
    head = ["", "passes", *(MEASURES[name].short for name in known)]
    lines = []
    for method, row in {**listed, **record["controls"]}.items():  # controls are not ranked
        cells = [marks[name].get(method, "{}").format(f"{row[name]['mean']:.3g}") if name in row else "-" for name in known]
        if intervals:
            cells = [f"{cell} {interval(row.get(name, {}))}".strip() for cell, name in zip(cells, known)]
        lines.append([method, str(row["passes"]), *cells])
    return in_markdown(head, lines)


def in_markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown."""
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *("| " + " | ".join(row) + " |" for row in rows)]


def left_out(record: dict[str, Any]) -> list[str]:
    """What does not apply to the network, by reason."""
    why = record["not applicable"]
    return [f"Left out: {', '.join(m for m in why if why[m] == reason)} ({reason})." for reason in dict.fromkeys(why.values())]


def interval(outcome: dict[str, float]) -> str:
    """The median, in round brackets, and the 95 % interval of the mean, as far as there are any."""
    median = f"({outcome['median']:.2g})" if "median" in outcome else ""
    return f"{median} [{outcome['low']:.2g}, {outcome['high']:.2g}]".strip() if "low" in outcome else median


def in_full(record: dict[str, Any]) -> str:
    """The headline measures, and the others folded away."""
    others = tuple(name for name in METRICS if name not in HEADLINE)
    lines = [*markdown(record, HEADLINE, intervals=True), ""]
    if any(name in row for row in record["methods"].values() for name in others):
        folded = markdown(record, others, intervals=True)
        lines += ["<details><summary>The other measures</summary>", "", *folded, "", "</details>", ""]
    return "\n".join([*lines, *left_out(record)]).rstrip()


def in_short(records: dict[str, dict[str, Any]]) -> str:
    """Four rows a network: the pullback, the gradient, the best other method of each measure, by its name, and equal shares.

    The best of the first three is set off in **bold**. Only means: the full tables have the intervals.
    """
    head = ["network", "map", *(MEASURES[measure].short for measure in IN_SHORT)]
    lines = []
    for network, record in records.items():
        columns = [short_column(record, measure) for measure in IN_SHORT]
        for i, row in enumerate(("pullback", "plain gradient", "best peer", "equal shares")):
            cells = [NETWORKS.get(network, network) if i == 0 else "", row, *(column[i] for column in columns)]
            lines.append(cells)
    return "\n".join(in_markdown(head, lines))


def in_pairs(records: dict[str, dict[str, Any]], other: str) -> str:
    """The paired comparisons of the pullback with another method: ratios of means where less is better, else differences, and p.

    What is worse is set off in *italics*, what shows no difference stands in brackets. A network of which some samples had a part
    in choosing a default has a second row, of the others.
    """
    parts = [(name, r["samples"], r["comparisons"]) for name, r in records.items()]
    parts += [(name, f"{r['samples']}: {r['fresh']}", r["comparisons_fresh"]) for name, r in records.items() if r.get("fresh")]
    order = list(records)
    rows = []
    for name, samples, comparisons in sorted(parts, key=lambda part: order.index(part[0])):
        cells = {c["measure"]: of_pair(c) for c in comparisons if (c["ours"], c["other"]) == ("pullback", other)}
        network = name.split("_seed")[0]
        if cells:
            rows.append((NETWORKS.get(network, network), samples, cells))
    known = [name for name in METRICS if any(name in cells for *_, cells in rows)]
    head = ["network", "samples", *(MEASURES[name].short for name in known)]
    return "\n".join(in_markdown(head, ([*row, *(cells.get(name, "-") for name in known)] for *row, cells in rows)))


def of_pair(comparison: dict[str, Any]) -> str:
    """A comparison in a cell: "0.37 ×, p 0.004"."""
    less = METRICS[comparison["measure"]] == "low"
    change = f"{comparison['ratio']:.2f} \N{MULTIPLICATION SIGN}" if less else f"{comparison['mean']:+.2f}"
    marks = {"better": "{}", "worse": "*{}*"}
    return marks.get(comparison["verdict"], "({})").format(f"{change}, p {comparison['holm']:.1g}")


def of_study(study: dict[str, Any]) -> str:
    """The means of a study of temperatures.py in Markdown, a way a row."""
    known = [name for name in METRICS if any(name in row for row in study["rules"].values())]
    head = [study["samples"], *(MEASURES[name].short for name in known)]
    rows = [[way, *(f"{row[name]:.3g}" if name in row else "-" for name in known)] for way, row in study["rules"].items()]
    return "\n".join(in_markdown(head, rows))


def short_column(record: dict[str, Any], measure: str) -> list[str]:
    """The short table's four cells of one network and measure, "-" where it has no value."""
    means = {method: row[measure]["mean"] for method, row in record["methods"].items() if measure in row}
    peers = [method for method in means if method != "gradient" and method.split(",")[0] not in OURS]
    sign = {"low": 1, "high": -1}[METRICS[measure]]
    shown = [method for method in ("pullback", "gradient") if method in means]
    shown += sorted(peers, key=lambda peer: sign * means[peer])[:1]
    first = min(shown, key=lambda method: sign * means[method], default=None)
    cells = {method: ("**{:.3g}**" if method == first else "{:.3g}").format(means[method]) for method in shown}
    peer = [f"{cells[method]} {method}" for method in shown if method in peers]
    shares = [f"{row[measure]['mean']:.3g}" for row in [record["controls"].get("equal shares", {})] if measure in row]
    return [cells.get("pullback", "-"), cells.get("gradient", "-"), *(peer or ["-"]), *(shares[:1] or ["-"])]


def best(listed: dict[str, Any], name: str) -> dict[str, str]:
    """Marks of the first and second on a measure. Several methods may share a mean: they share the mark."""
    if METRICS[name] == "zero":
        return {}
    sign = {"low": 1, "high": -1}[METRICS[name]]
    values = {method: sign * row[name]["mean"] for method, row in listed.items() if name in row}
    order = sorted({round(value, 9) for value in values.values()})
    return {m: ("**{}**", "*{}*")[order.index(round(v, 9))] for m, v in values.items() if order.index(round(v, 9)) < 2}


def plotted(record: dict[str, Any]) -> Figure:
    """The headline measures with their intervals, a method a line."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    names = [name for name in HEADLINE if any(name in row for row in record["methods"].values())]
    figure = Figure(figsize=(2.4 * len(names) + 1.5, 0.26 * len(record["methods"]) + 1.2), layout="constrained", dpi=100)
    methods = list(record["methods"])[::-1]
    for axis, name in zip(figure.subplots(1, len(names), sharey=True, squeeze=False)[0], names):
        for at, method in enumerate(methods):
            outcome = record["methods"][method].get(name)
            if outcome is None:
                continue
            colour = "#b2182b" if method.split(",")[0] in OURS else "#4d4d4d"
            ends = [outcome.get(end, outcome["mean"]) for end in ("low", "high")]
            axis.plot(ends, [at, at], color=colour, lw=2, alpha=0.5)
            axis.plot(outcome["mean"], at, "o", color=colour, ms=4)
        equal = record["controls"].get("equal shares", {})
        if name in equal:
            axis.axvline(equal[name]["mean"], color="#999999", ls=":", lw=1)
        if METRICS[name] == "low":
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=5))
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_formatter("")
        aim = {"low": "lower is better", "high": "higher is better", "zero": "best at 0"}[METRICS[name]]
        axis.set_title(f"{name} ({aim})", fontsize=8)
        axis.tick_params(labelsize=7, which="both")
        axis.grid(axis="x", alpha=0.3)
        axis.set_yticks(range(len(methods)), [f"{m} ({record['methods'][m]['passes']})" for m in methods], fontsize=7)
    legend = "means with 95 % intervals, passes in brackets; dotted: equal shares"
    figure.suptitle(f"{record['network']}, {record['samples']}; {legend}", fontsize=9)
    return figure


def draw_plot(record: dict[str, Any], path: Path) -> None:
    """The plot, with what it is of written into the file."""
    facts = {key: value for key, value in record.items() if key not in RESULTS}
    plotted(record).savefig(path, metadata={"Comment": json.dumps(facts)})


STUDIED = r"(<!-- temperatures: ([^>]+?) -->)\n.*?\n?(<!-- end -->)"
PAIRED = r"(<!-- pullback against ([^:>]+): ([\w ]+) -->)\n.*?\n?(<!-- end -->)"
MARKED = r"(<!-- fidelity( in short)?: ([\w ]+) -->)\n.*?\n?(<!-- end -->)"  # where a page has a table, and of which networks
RESULTS = ("methods", "controls", "not applicable", "comparisons", "comparisons_fresh", "measures", "radii", "command", "fresh")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("bench/results"))
    parser.add_argument("--pages", type=Path, nargs="+", default=[Path("README.md"), Path("docs/evidence.md")])
    parser.add_argument("--plots", action="store_true")
    args = parser.parse_args(argv)
    for path in sorted(args.results.glob("fidelity_*.json")) if args.plots else ():
        draw_plot(json.loads(path.read_text()), path.with_suffix(".png"))

    def record_of(network: str) -> dict[str, Any]:
        return json.loads((args.results / f"fidelity_{network}.json").read_text())

    def filled(marked: re.Match[str]) -> str:
        opening, short, networks, closing = marked.groups()
        table = in_short({network: record_of(network) for network in networks.split()}) if short else in_full(record_of(networks))
        return f"{opening}\n{table}\n{closing}"

    def paired(marked: re.Match[str]) -> str:
        opening, other, networks, closing = marked.groups()
        return f"{opening}\n{in_pairs({network: record_of(network) for network in networks.split()}, other)}\n{closing}"

    def studied(marked: re.Match[str]) -> str:
        opening, study, closing = marked.groups()
        networks = json.loads((args.results / "temperatures.json").read_text())["networks"]
        return f"{opening}\n{of_study(networks[study])}\n{closing}"

    for page in args.pages:
        text, count = re.subn(MARKED, filled, page.read_text(), flags=re.DOTALL)
        text = re.sub(STUDIED, studied, text, flags=re.DOTALL)
        text = re.sub(PAIRED, paired, text, flags=re.DOTALL)
        if not count:
            print(f"fidelity_table: {page} has no <!-- fidelity: NAME --> ... <!-- end -->", file=sys.stderr)
            return 2
        page.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
