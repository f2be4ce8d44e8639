"""How faithful, stable and class-specific are maps? `python bench/fidelity.py [--networks NAME ...] [--seed N] [--out DIR]`.

Networks: both of the zoo on scenes they have not seen, with masks; `squeezenet1_0` on photographs where `--data` has its weights
and pictures. The defaults of `Rules` were chosen on scenes of seed 2025 and on ten of the photographs: another `--seed`, and the
comparisons on the fresh photographs alone, say whether they hold elsewhere. Every method explains the predicted class and is
judged on the same questions (faithfulness.py), so that comparisons are paired: mean differences with bootstrap intervals,
sign-flip tests, Holm's correction over a network's family.

Answers are kept in `--work`, one file each, under a key of everything they depend on: a run that was cut short goes on where it
stopped, and `--minutes` cuts it on purpose (exit status 3). For each network it writes `fidelity_NETWORK.json` and `.png`, with
`_seedN` in their names for scenes of another seed; two runs with the same number of threads write the same numbers.
`python bench/fidelity_table.py` makes the tables of docs/evidence.md, and the README's, from them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import faithfulness as ask
import torch
from fidelity_cases import SEED, Case, load_case
from fidelity_table import METRICS, compared, draw_plot, rows, table
from measures import mass_inside, pointing
from methods import Method, methods
from provenance import provenance
from torch import Tensor

import sp_fx
from sp_fx.figures.records import rules_record

LEAST = 10  # samples for an interval
# The measures that apply to equal shares: the others are about the order of shares or their changes, and these have none.
KNOWING_NOTHING = ("infidelity, small", "infidelity, large", "infidelity, scattered", "infidelity, published", "mask mass")
RADII = {"max-sensitivity 0.02": 0.02, "max-sensitivity 0.1": 0.1}  # Captum's default; and five times that


class Answers:
    """Tensors by name, computed once and kept on disk under a digest of all that they depend on (`facts`).

    A call raises TimeoutError where an answer is not there and `deadline` (of `time.monotonic`) is past.
    """

    def __init__(self, folder: Path, facts: dict[str, Any], deadline: float) -> None:
        self.key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
        self.folder, self.deadline, self.done = folder / self.key, deadline, 0
        self.folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, name: str, compute: Callable[..., Tensor], *args: Any) -> Tensor:
        path = self.folder / f"{name}.pt"
        self.done += 1
        if path.exists():
            return torch.load(path, weights_only=True)
        if time.monotonic() > self.deadline:
            raise TimeoutError(f"stopped before {name}: run the same command again to go on")
        started = time.monotonic()
        answer = compute(*args)
        torch.save(answer, path)
        print(f"{self.done:4} {name:50} {time.monotonic() - started:6.1f} s", file=sys.stderr, flush=True)
        return answer


@dataclass(frozen=True)
class InBatches:
    """A method that explains `batch` samples at a time, and measures that explain anew."""

    method: Method
    batch: int

    def __call__(self, x: Tensor, target: Tensor) -> Tensor:
        return torch.cat([self.method.run(a, b).detach() for a, b in zip(x.split(self.batch), target.split(self.batch))])

    def of_another_class(self, x: Tensor, other: Tensor, maps: Tensor) -> Tensor:
        return ask.cosine(maps, self(x, other))

    def on_mosaics(self, mosaics: Tensor, classes: Tensor, tiles: Tensor) -> Tensor:
        return ask.focus(self.method.shares(mosaics, self(mosaics, classes)), tiles)

    def like(self, x: Tensor, target: Tensor, maps: Tensor) -> Tensor:
        return ask.spearman(self(x, target).flatten(1), maps.flatten(1))


def drops(case: Case, masks: Tensor) -> Tensor:
    return ask.removal(case.score, case.pixels, case.target, masks).drops


def redrawn(case: Case, cells: Tensor) -> Tensor:
    return ask.redrawn(case.score, case.pixels, case.target, cells, 2, draw(3))


def curves(case: Case, shares: Tensor, cells: Tensor) -> Tensor:
    n = case.counts.curves
    return torch.stack(ask.curves(case.probability, case.pixels[:n], case.target[:n], shares[:n], cells, case.counts.steps))


def overwritten(case: Case, blocks: Tensor, noise: Tensor) -> Tensor:
    return ask.overwritten(case.score, case.pixels, case.target, blocks, noise)


def measured(
    case: Case, chosen: dict[str, Method], answers: Answers
) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]]]:
    """Returns every measure of every method, [N] each, by method and measure; and those of a map of equal shares, which knows
    nothing."""
    x, target, counts, size = case.pixels, case.target, case.counts, case.pixels.shape[2:]
    cells, coarse, blocks = ask.grid(*size, counts.cells), ask.grid(*size, 6), ask.grid(*size, 4)
    masks = {**ask.removed_parts(cells, counts.removals), "cells": ask.single_cells(cells)}
    removals = {name: ask.Removal(m, answers(f"drops {name}", drops, case, m)) for name, m in masks.items()}
    changes = answers("redrawn", redrawn, case, coarse)
    noise = ask.noise_pictures(x.shape[1:])
    published = ask.Overwriting(blocks, noise, answers("drops published", overwritten, case, blocks, noise))

    def measures_of_maps(method: Method, maps: Tensor) -> dict[str, Tensor]:
        """Returns the measures that need no other map than `maps`."""
        shares = method.shares(x, maps)
        values = {
            **ask.removals_judged(shares, removals),
            "infidelity, published": ask.infidelity_published(lambda instead: method.shares(x, maps, instead), published),
            "faithfulness estimate": ask.correlation(shares, removals["cells"]),
            "monotonicity": ask.monotonicity(shares, coarse, changes),
        }
        if case.masks is not None:
            values["mask mass"] = mass_inside(torch.ones_like(shares), shares, case.masks)
            values["pointing game"] = pointing(torch.ones_like(shares), shares, case.masks).double()
        return values

    results: dict[str, dict[str, Tensor]] = {}
    for name, method in chosen.items():
        explained = InBatches(method, counts.batch)
        maps = answers(f"{name} maps", explained, x, target)
        shares = method.shares(x, maps)
        result = results[name] = measures_of_maps(method, maps)
        if counts.curves:
            result["deletion"], result["insertion"] = answers(f"{name} curves", curves, case, shares, cells)
        if name not in counts.stable_too and method.passes > counts.dear:
            continue
        n = counts.sensitivity
        near = (explained, x[:n], target[:n], maps[:n], counts.draws)
        for measure, radius in RADII.items():
            result[measure] = answers(f"{name} sens {radius}", ask.max_sensitivity, *near, radius, 4)
        if method.passes > counts.dear:
            continue
        n = counts.logit
        if n:
            result["random logit"] = answers(f"{name} logit", explained.of_another_class, x[:n], other_class(case)[:n], maps[:n])
        if case.mosaics is not None:
            result["focus"] = answers(f"{name} focus", explained.on_mosaics, *case.mosaics)
    equal = measures_of_maps(Method(lambda x, target: torch.ones_like(x), 0, "share"), torch.ones_like(x))
    return results, {"equal shares": {name: equal[name] for name in KNOWING_NOTHING if name in equal}}


def randomised(case: Case, maps: dict[str, Tensor], answers: Answers) -> dict[str, dict[str, Tensor]]:
    """Returns the Spearman correlation of signed maps with those of the model whose top part is random, by method and part.

    Adebayo et al., arXiv:1810.03292: layers from the output down get Gaussian weights of their own mean and deviation.
    """
    n, results = case.counts.randomised, {}
    for part in (0.25, 0.5, 1.0) if n else ():
        chosen, _ = methods(case.with_random_top(part, draw(5)), layer=case.layer)
        for name, method in chosen.items():
            if name in maps and method.passes <= case.counts.dear:
                like = InBatches(method, case.counts.batch).like
                answer = answers(f"{name} random {part}", like, case.pixels[:n], case.target[:n], maps[name][:n])
                results.setdefault(name, {})[str(part)] = answer
    return results


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def other_class(case: Case) -> Tensor:
    """Returns a class other than the explained one, for each sample."""
    return (case.target + torch.randint(1, case.classes, case.target.shape, generator=draw(6))) % case.classes


def rules_facts(rules: sp_fx.Rules) -> dict[str, Any]:
    """Returns the rules in full, the defaults too: those change."""
    return {name: value for name, value in rules_record(rules).items() if value != {}}


def run(name: str, args: argparse.Namespace) -> None:
    """Judge the methods on one network and write its results.

    Raises:
        ValueError: too few samples, or an unknown method.
        TimeoutError: `args.deadline` has passed.
    """
    case = load_case(name, args.data, args.samples, args.seed)
    if len(case.target) < LEAST:
        raise ValueError(f"{len(case.target)} samples of {name}: an interval needs at least {LEAST}")
    chosen, left = methods(case.model, layer=case.layer)
    unknown = set(args.methods or ()) - set(chosen)
    if unknown:
        raise ValueError(f"no method of {name} is called {', '.join(sorted(unknown))}; they are: {', '.join(chosen)}")
    chosen = {m: chosen[m] for m in args.methods or chosen if chosen[m].passes <= args.passes}
    rules = {"default": rules_facts(sp_fx.Rules()), "paper": rules_facts(sp_fx.Rules.paper())}
    facts = {"network": name, "weights_sha256": case.weights, "rules": rules, "seed": case.seed, "counts": asdict(case.counts),
             "threads": torch.get_num_threads(), "torch": torch.__version__, "samples": case.samples}  # fmt: skip
    answers = Answers(args.work, facts, args.deadline)
    results, controls = measured(case, chosen, answers)
    maps = {method: torch.load(answers.folder / f"{method} maps.pt", weights_only=True) for method in chosen}
    for method, parts in randomised(case, maps, answers).items():
        results[method] |= {f"random top {part}": values for part, values in parts.items()}
    ranked, unranked = rows(results, {n: m.passes for n, m in chosen.items()}), rows(controls, dict.fromkeys(controls, 0))
    record = {**provenance(), "command": "python bench/fidelity.py", **facts, "radii": RADII, "methods": ranked,
              "controls": unranked, "not applicable": left, "comparisons": compared(results), "measures": METRICS}  # fmt: skip
    if case.fresh:
        fresh = {m: {measure: values[case.fresh :] for measure, values in measures.items()} for m, measures in results.items()}
        record |= {"fresh": f"those from number {case.fresh} on, which no default was chosen on"}
        record |= {"comparisons_fresh": compared(fresh)}
    args.out.mkdir(parents=True, exist_ok=True)
    stem = f"fidelity_{name.removeprefix('zoo/')}" + (f"_seed{case.seed}" if case.seed != SEED else "")
    (args.out / f"{stem}.json").write_text(json.dumps(record, indent=1) + "\n")
    draw_plot(record, args.out / f"{stem}.png")
    print(table(record))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["zoo/residual_cnn", "zoo/pyramid_transformer", "squeezenet1_0"])
    parser.add_argument("--samples", type=int, help="scenes of a zoo network (default: the case's)")
    parser.add_argument("--seed", type=int, default=SEED, help=f"of the scenes (default {SEED})")
    parser.add_argument("--passes", type=float, default=float("inf"), help="leave out methods that take more than this many")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="(default: all that apply)")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="squeezenet1_0_imagenet.safetensors, photos/")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--work", type=Path, default=Path("out/fidelity"))
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    args.deadline = time.monotonic() + 60 * args.minutes
    try:
        for name in args.networks:
            if name == "squeezenet1_0" and not args.data.exists() and len(args.networks) > 1:
                print(f"{name}: left out, there is no {args.data}", file=sys.stderr)
                continue
            run(name, args)
    except TimeoutError as stopped:
        print(f"fidelity: {stopped}", file=sys.stderr)
        return 3
    except (ValueError, OSError) as error:
        print(f"fidelity: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
