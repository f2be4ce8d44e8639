"""How faithful, stable and class-specific are maps? `python bench/fidelity.py [--networks NAME ...] [--seed N] [--out DIR]`.

Without pictures of one's own: both networks of the zoo on scenes they have not seen, with masks; `squeezenet1_0` on photographs
where `--data` has its weights and pictures; `efficientnet_lite0` on photographs that no default was chosen on. The defaults of
`Rules` were chosen on scenes of seed 2025 and on ten of the photographs: another `--seed`, and the comparisons on the fresh
photographs alone, say whether they hold elsewhere.

On any network and pictures, or sentences:

    python bench/fidelity.py --model resnet50 --weights r50.pth --images pictures/ --labels labels.txt --samples 50
    python bench/fidelity.py --model my_networks:resnet --images pictures/ --methods pullback gradient "FusionGrad-25"
    python bench/fidelity.py --model all_minilm_l6_v2                                 # its sentences; --texts FILE takes others
    python bench/fidelity.py --paper --images imagenet/val --labels val.txt --samples 1000    # the paper's tables: paper.py

Names are those of `sp_fx.models.load`. A line of `--labels` is a picture's name in `--images`, with its folder, and its class, a
number or a name; these pictures are explained for that class, and others left out; without labels all for the predicted class.
Every method explains the same class and is judged on the same questions (faithfulness.py), so that comparisons are paired: mean
differences with bootstrap intervals, sign-flip tests, Holm's correction over a network's family.

Answers are kept in `--work`, one file each, under a key of everything they depend on: a run that was cut short goes on where it
stopped, and `--minutes` cuts it on purpose (exit status 3). For each network it writes `fidelity_NETWORK.json` and `.png`, with
`_seedN` in their names for scenes of another seed; two runs with the same number of threads write the same numbers.
`python bench/fidelity_table.py` makes the tables of docs/evidence.md, and the README's, from them.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import faithfulness as ask
import torch
from answers import Answers, digest
from fidelity_cases import SEED, Case, load_case, of_pictures
from fidelity_table import METRICS, compared, draw_plot, rows, table
from measures import mass_inside, pointing
from methods import Method, methods
from paper import NETWORKS, ablations, paper_measured, paper_methods
from provenance import provenance
from text_fidelity import TextCase, measured_texts, text_case, text_methods
from torch import Tensor

import sp_fx
from sp_fx.figures.records import rules_record
from sp_fx.models import TextModel
from sp_fx.models.own import is_own

LEAST = 10  # samples for an interval
# The measures that apply to equal shares: the others are about the order of shares or their changes, and these have none.
KNOWING_NOTHING = ("infidelity, small", "infidelity, large", "infidelity, scattered", "infidelity, published", "mask mass")
RADII = {"max-sensitivity 0.02": 0.02, "max-sensitivity 0.1": 0.1}  # Captum's default; and five times that


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


def measured(
    case: Case, chosen: dict[str, Method], answers: Answers
) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]]]:
    """Returns every measure of every method, [N] each, by method and measure; and those of two controls: a map of equal shares,
    which knows nothing, and occlusion, which is asked nearly what the measures ask."""
    x, target, counts, size = case.pixels, case.target, case.counts, case.pixels.shape[2:]
    cells, coarse, blocks = ask.grid(*size, counts.cells), ask.grid(*size, 6), ask.grid(*size, 4)
    masks = {**ask.removed_parts(cells, counts.removals), "cells": ask.single_cells(cells)}
    removals = {name: ask.Removal(m, answers(f"drops {name}", drops, case, m)) for name, m in masks.items()}
    changes = answers("redrawn", redrawn, case, coarse)
    greys = ask.grey_pictures(x.shape[1:], blocks)
    published = ask.Overwriting(
        blocks, greys, answers("drops overwritten", ask.overwritten, case.score, x, target, blocks, greys)
    )

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
        if n and case.classes > 1:
            result["random logit"] = answers(f"{name} logit", explained.of_another_class, x[:n], other_class(case)[:n], maps[:n])
        if case.mosaics is not None:
            result["focus"] = answers(f"{name} focus", explained.on_mosaics, *case.mosaics)
    nothing = measures_of_maps(Method(lambda x, target: x, 0, "share"), torch.ones_like(x))
    occluded = measures_of_maps(Method(lambda x, target: x, 0, "share"), ask.occlusion(removals["cells"], cells, x.shape[1]))
    controls = {
        "equal shares": {name: nothing[name] for name in KNOWING_NOTHING if name in nothing},
        "occlusion": {name: values for name, values in occluded.items() if name != "faithfulness estimate"},  # its own question
    }
    return results, controls


def randomised(case: Case, maps: dict[str, Tensor], answers: Answers) -> dict[str, dict[str, Tensor]]:
    """Returns the Spearman correlation of signed maps with those of the model whose top part is random, by method and part.

    Adebayo et al., arXiv:1810.03292: layers from the output down get Gaussian weights of their own mean and deviation.
    """
    n, results = case.counts.randomised, {}
    for part in (0.25, 0.5, 1.0) if n else ():
        chosen, _ = methods(case.with_random_top(part, draw(5)), case.pixels, layer=case.layer)
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
    """Judge the methods on one network and write its results; `name` is as given to `--model`.

    Raises:
        ValueError: too few samples, an unknown method, or options that do not go together.
        TimeoutError: `args.deadline` has passed.
    """
    case = chosen_case(name, args)
    if isinstance(case, TextCase):
        return run_texts(case, name, args)
    if len(case.target) < LEAST:
        raise ValueError(f"{len(case.target)} samples of {name}: an interval needs at least {LEAST}")
    if args.paper:
        return run_paper(case, name, args)
    known, left = methods(case.model, case.pixels, layer=case.layer)
    chosen = selected(known, {n: m.passes for n, m in known.items()}, case.name, args)
    answers = Answers(args.work, facts_of(case), args.deadline)
    results, controls = measured(case, chosen, answers)
    maps = {method: torch.load(answers.folder / f"{method} maps.pt", weights_only=True) for method in chosen}
    for method, parts in randomised(case, maps, answers).items():
        results[method] |= {f"random top {part}": values for part, values in parts.items()}
    record = recorded(case, {"radii": RADII}, results, {n: m.passes for n, m in chosen.items()}, controls, left)
    if case.fresh:
        fresh = {m: {measure: v[case.fresh :] for measure, v in values.items()} for m, values in {**results, **controls}.items()}
        record |= {"fresh": f"those from number {case.fresh} on, which no default was chosen on"}
        record |= {"comparisons_fresh": compared(fresh)}
    write(record, name, "", args)


def run_texts(case: TextCase, name: str, args: argparse.Namespace) -> None:
    """As `run`, of a network for text."""
    if len(case.ids) < LEAST:
        raise ValueError(f"{len(case.ids)} sentences: an interval needs at least {LEAST}")
    known = text_methods(case)
    chosen = selected(known, {name: passes for name, (_, passes) in known.items()}, case.name, args)
    results, controls = measured_texts(case, chosen, Answers(args.work, facts_of(case), args.deadline))
    passes = {name: passes for name, (_, passes) in chosen.items()}
    write(recorded(case, {}, results, {**passes, "random": 0}, controls, {}), name, "", args)


def run_paper(case: Case, name: str, args: argparse.Namespace) -> None:
    """As `run`, of the paper's explainers and measures, or of its ablations."""
    known, left = (ablations(case.model, case.pixels), {}) if args.ablations else paper_methods(case.model, case.pixels)
    chosen = selected(known, {n: m.passes for n, m in known.items()}, case.name, args)
    answers = Answers(args.work, facts_of(case), args.deadline)
    other = other_class(case) if case.classes > 1 else None
    results = paper_measured(case, chosen, lambda m: InBatches(m, case.counts.batch), other, answers)
    kind = "ablations" if args.ablations else "paper"
    record = recorded(case, {"evaluation": kind}, results, {n: m.passes for n, m in chosen.items()}, {}, left)
    write(record, name, f"{kind}_", args)


def chosen_case(name: str, args: argparse.Namespace) -> Case | TextCase:
    """Returns the network `name` with the pictures or sentences that the options say.

    Raises:
        ValueError: an option that does not go with the network.
    """

    def refuse(what: str, *options: str) -> None:
        if given := [f"--{option}" for option in options if getattr(args, option) not in (None, False)]:
            raise ValueError(f"{', '.join(given)} does not go with {name}, {what}")

    if args.images is None and name.startswith("zoo/"):
        refuse("whose scenes are drawn", "weights", "labels", "texts")
        return load_case(name, args.data, args.samples, args.seed, args.mosaics)
    if args.images is None and name == "squeezenet1_0":
        refuse("on its photographs (name others with --images)", "weights", "labels", "texts", "samples", "mosaics")
        return load_case(name, args.data)
    try:
        net = sp_fx.models.load(name, args.weights)
    except (TypeError, RuntimeError) as error:
        if is_own(name):
            raise  # the user's own, with its place
        raise ValueError(str(error)) from error  # weights that cannot be downloaded
    if isinstance(net, TextModel):
        refuse("a network for text", "images", "labels", "mosaics", "paper")
        return text_case(net, args.texts, args.samples)
    refuse("a network for pictures", "texts")
    return of_pictures(net, args.images, args.labels, args.data, args.samples, args.seed, args.mosaics)


def selected(known: dict[str, Any], passes: dict[str, int], name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Returns the methods of the network `name` that the options say."""
    if unknown := set(args.methods or ()) - set(known):
        raise ValueError(f"no method of {name} is called {', '.join(sorted(unknown))}; they are: {'; '.join(known)}")
    if not (chosen := {name: known[name] for name in args.methods or known if passes[name] <= args.passes}):
        raise ValueError(f"no method of {name} is left: --passes {args.passes:g} leaves them all out")
    return chosen


def facts_of(case: Case | TextCase) -> dict[str, Any]:
    """Returns all that answers depend on, but for the code."""
    rules = {"default": rules_facts(sp_fx.Rules()), "paper": rules_facts(sp_fx.Rules.paper())}
    digests = {"structure_sha256": digest(repr(case.model)), "inputs_sha256": digest(*case.inputs)}
    return {"network": case.name, "weights_sha256": case.weights, **digests, "rules": rules, "seed": case.seed,
            "samples": case.samples, "counts": asdict(case.counts), "threads": torch.get_num_threads(),
            "torch": torch.__version__}  # fmt: skip


def recorded(
    case: Case | TextCase, more: dict[str, Any], results: dict[str, dict[str, Tensor]], passes: dict[str, int],
    controls: dict[str, dict[str, Tensor]], left: dict[str, str],
) -> dict[str, Any]:  # fmt: skip
    """Returns what is written: where the numbers are from, a row a method, the comparisons."""
    controlled = {"occlusion": case.counts.cells**2} if isinstance(case, Case) else {}  # forwards
    return {
        **provenance(), **facts_of(case), **more,
        "methods": rows(results, passes),
        "controls": rows(controls, {name: controlled.get(name, 0) for name in controls}), "not applicable": left,
        "comparisons": compared({**results, **controls}), "measures": METRICS,
    }  # fmt: skip


def stem_of(name: str, args: argparse.Namespace) -> str:
    """Returns the end of the files' names: the network's name, its folder of pictures or its texts, the seed of its scenes."""
    parts = [re.sub(r"\W+", "_", name.removeprefix("zoo/"))]
    parts += [re.sub(r"\W+", "_", path.stem) for path in (args.images, args.texts) if path is not None]
    return "_".join(parts) + (f"_seed{args.seed}" if name.startswith("zoo/") and args.seed != SEED else "")


def write(record: dict[str, Any], name: str, kind: str, args: argparse.Namespace) -> None:
    """Write the record as JSON, and its plot beside it; print the table. `name` is the network's, as given to `--model`."""
    options = [f"--{o} {getattr(args, o)}" for o in TOLD if getattr(args, o) not in (None, False)]
    options += ["--methods " + " ".join(map(repr, args.methods))] if args.methods else []
    command = " ".join(["python bench/fidelity.py --networks", name, *options]).replace(" True", "")
    record, stem = {"command": command, **record}, f"fidelity_{kind}{stem_of(name, args)}"
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{stem}.json").write_text(json.dumps(record, indent=1) + "\n")
    draw_plot(record, args.out / f"{stem}.png")
    print(table(record))


TOLD = ("images", "labels", "texts", "weights", "samples", "mosaics", "seed", "paper", "ablations")  # of the command, in a record


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--networks", "--model", nargs="+", help="(default: zoo/residual_cnn zoo/pyramid_transformer squeezenet1_0)"
    )
    parser.add_argument("--weights", type=Path, help="a state dict, .safetensors or .pth (default: the published one)")
    parser.add_argument("--images", type=Path, metavar="DIR", help="pictures, in folders or not; N of them are spread over all")
    parser.add_argument("--labels", type=Path, metavar="FILE", help="the class of each picture: lines of a name and a class")
    parser.add_argument("--texts", type=Path, metavar="FILE", help="lines of a sentence, or of a query, a tab and a sentence")
    parser.add_argument("--samples", type=int, help="scenes, pictures or sentences (default: 60 scenes, all there are of others)")
    parser.add_argument("--mosaics", type=int, help="of four pictures each (default: 12 of scenes, one for each photograph)")
    parser.add_argument("--seed", type=int, default=SEED, help=f"of the scenes and mosaics (default {SEED})")
    parser.add_argument("--paper", action="store_true", help=f"the paper's evaluation, by default of {', '.join(NETWORKS)}")
    parser.add_argument("--ablations", action="store_true", help="with --paper: its ablations of temperatures, steps and lengths")
    parser.add_argument("--passes", type=float, default=float("inf"), help="leave out methods that take more than this many")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="(default: all that apply)")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="squeezenet1_0_imagenet.safetensors, photos/")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="of tables and plots (default: bench/results)")
    parser.add_argument("--work", type=Path, default=Path("out/fidelity"), help="of kept answers (default: out/fidelity)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after these; the same command goes on")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch (default: 1)")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    args.deadline = time.monotonic() + 60 * args.minutes
    networks = args.networks or (NETWORKS if args.paper else ("zoo/residual_cnn", "zoo/pyramid_transformer", "squeezenet1_0"))
    if args.weights is not None and len(networks) > 1:
        parser.error(f"--weights is of one network, got {', '.join(networks)}: name it with --model")
    if args.ablations and not args.paper:
        parser.error("--ablations are the paper's: add --paper")
    for option, least in (("samples", 1), ("mosaics", 0)):
        if getattr(args, option) is not None and getattr(args, option) < least:
            parser.error(f"--{option} is at least {least}, got {getattr(args, option)}")
    try:
        for name in networks:
            if name == "squeezenet1_0" and not args.data.exists() and len(networks) > 1:
                print(f"{name}: left out, there is no {args.data}", file=sys.stderr)
                continue
            run(name, args)
    except TimeoutError as stopped:
        print(f"fidelity: {stopped}", file=sys.stderr)
        return 3
    except (ValueError, OSError, ModuleNotFoundError, sp_fx.CaptureError) as error:
        print(f"fidelity: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
