"""`sp-fx explain`: pictures, by a model or a package, into figures, records and the paths of ascents."""

from __future__ import annotations

import argparse
import contextlib
import functools
import glob
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TextIO

import torch

from ..build import transform
from ..figures import records
from ..figures.drawing import save
from ..gates.rules import KINDS
from ..methods.ascent import Ascent
from ..models.images import Picture, Preprocessing
from ..models.named import NamedModel, load_model
from ..models.options import Options
from ..models.own import PACKAGES
from ..packages.errors import names_file
from ..serving.folders.batches import pictures as folder_pictures
from ..version import __version__
from .parser import options_of, rules_of
from .progress import Progress

LONGEST = 200  # bytes of a picture's name that its figure takes over; most file systems take 255


@dataclass(frozen=True)
class Subject:
    """What explains: the model as a function to class probabilities, its ways of explaining, how it takes pictures, its classes,
    and what records say of it."""

    predict: Callable[[torch.Tensor], torch.Tensor]
    ways: list[records.Way]
    preprocessing: Preprocessing
    labels: tuple[str, ...] | None
    facts: dict[str, Any]


def run_explain(args: argparse.Namespace) -> int:
    images = pictures_named(args.images, args.out)
    printed = sys.stdout
    with printed_to_stderr(args.json):
        return explain(args, images, printed)


def explain(args: argparse.Namespace, images: list[Path], printed: TextIO) -> int:
    subject = package(args) if Path(args.model).suffix in PACKAGES else model(args)
    targets = records.parse_targets(args.target or ["top1"], subject.labels)
    if args.out.exists() and not args.out.is_dir():
        raise NotADirectoryError(f"{args.out} is a file, and --out is a folder")
    args.out.mkdir(parents=True, exist_ok=True)
    common = {**subject.facts, "device": str(args.device), "versions": {"sp_fx": __version__, "torch": torch.__version__}}
    progress, failed = Progress(len(images)), 0
    taken = {path.name for path in images if path.resolve().parent == args.out.resolve()}  # pictures stay what they are
    try:
        for batch in batches(images, subject.preprocessing, args.batch_size):
            readable = [(path, picture) for path, picture in batch if not isinstance(picture, Exception)]
            for path, error in batch:
                if isinstance(error, Exception):  # one damaged file does not stop the others
                    progress.say(f"sp-fx: skipped {path}: {error}", sys.stderr)
                    failed += 1
            results = records.explain_pictures(
                subject.predict, subject.ways, [p for _, p in readable], subject.labels, targets, args.device, args.times_input,
                args.path,
            )  # fmt: skip
            for (path, _), explained in zip(readable, results):
                if isinstance(explained, Exception):
                    progress.say(f"sp-fx: skipped {path}: {explained}", sys.stderr)
                    failed += 1
                    continue
                name = free_name(path.stem, len(explained.paths), taken, args)
                with names_file(args.out / name):
                    record = write(explained, path, name, common, args)
                top = record["prediction"][0]
                line = f"{path.name}: {top['label']} ({top['probability']:.2f}) -> {args.out / record['figure']}"
                progress.say(json.dumps(record) if args.json else line, printed)
            progress.advance(len(batch))
    finally:
        progress.end()
    if failed:
        print(f"sp-fx: {failed} of {len(images)} pictures could not be explained", file=sys.stderr)
    return 1 if failed else 0


def printed_to_stderr(wanted: bool) -> contextlib.AbstractContextManager[Any]:
    """With JSON on stdout, what a model's own code prints goes to stderr."""
    return contextlib.redirect_stdout(sys.stderr) if wanted else contextlib.nullcontext()


def names_of(name: str, paths: int, args: argparse.Namespace) -> list[str]:
    """Returns the names of the figure and then, of each path, of its strip and its animation."""
    stems = [f"{name}_path{number + 1}" if paths > 1 else f"{name}_path" for number in range(paths)]
    return [
        f"{name}.{args.format}",
        *(f"{stem}.{ending}" for stem in stems for ending in (args.format, args.animation or "webp")),
    ]


def write(
    explained: records.Explained, path: Path, name: str, common: dict[str, Any], args: argparse.Namespace
) -> dict[str, Any]:
    """Write figure, record and paths of the picture at `path` under that name; returns the record."""
    from ..figures.animation import animate

    figure, *files = names_of(name, len(explained.paths), args)
    record = {"image": path.name, "figure": figure, **explained.record}
    climbs = []
    for climb, strip, moving in zip(explained.paths, files[::2], files[1::2]):
        save(climb.strip, args.out / strip, record)
        animate(climb.iterates, args.out / moving, titles=climb.titles)
        climbs.append({"toward": climb.label, "strip": strip, "animation": moving})
    if climbs:
        record["paths"] = climbs
    record |= common
    save(explained.figure, args.out / figure, record)
    (args.out / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
    return record


# -- what explains


def model(args: argparse.Namespace) -> Subject:
    """Returns the model that `--model` and its options name, by each of the rules."""
    named = load_model(args.model, options_of(args))
    say_assumed(named)
    net = named.model.to(args.device)
    example = noise(named, 2).to(args.device)
    with takes_pixels(named):
        explainers = {name: transform(net, rules=rules_of(name, args.temperature), example_inputs=example) for name in args.rules}
    say_unused(args, next(iter(explainers.values())))
    wanted = args.method or (["pullback", "ascend"] if args.path else ["pullback"])
    if args.animation and not args.path:
        raise ValueError("--animation says how --path is written: add --path")
    if args.path and "ascend" not in wanted:
        raise ValueError("--path draws the steps of an ascent: add --method ascend")
    steps = args.steps or 5
    ascent = {"steps": steps, "step_size": Ascent(steps, args.step_size).length([example[:1]]), "bounds": (-1.0, 1.0)}
    ways = [
        records.way_of(explainer, method, ascent if method == "ascend" else {}, name if len(explainers) > 1 else "")
        for method in dict.fromkeys(wanted)
        for name, explainer in explainers.items()
    ]
    rules = {name: records.rules_record(explainer.report().rules) for name, explainer in explainers.items()}
    facts = {**named.provenance(), "rules": rules if len(rules) > 1 else next(iter(rules.values()))}
    by = "sigmoid" if named.multi_label else "softmax"
    predict = functools.partial(records.probabilities_of, next(iter(explainers.values())), by=by)
    return Subject(predict, ways, named.preprocessing, named.labels, facts)


@contextlib.contextmanager
def takes_pixels(named: NamedModel) -> Iterator[None]:
    """Raises ValueError in place of what a transform raises where the model itself fails on pictures of its size."""
    try:
        yield
    except Exception:  # whatever a model's code raises
        x = noise(named, 1).to(next((p.device for p in named.model.parameters()), "cpu"))
        try:
            with torch.no_grad():
                named.model(x)
        except Exception as error:
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            first = next((m for m in named.model.modules() if isinstance(m, torch.nn.Conv2d)), None)
            hint = "if they are of another size, --input-size N makes them N x N"
            if first is None:
                hint += "; a network of grey pictures that no convolution reads says so itself, in a NamedModel"
            if first is not None and first.in_channels not in (1, 3):
                hint = f"its first convolution reads {first.in_channels} channels, and pictures have 3, or 1 where they are grey"
            raise ValueError(f"{named.name} does not take pictures as {list(x.shape)}: {reason}; {hint}") from error
        raise


def say_assumed(named: NamedModel) -> None:
    """Prints what nobody has said of the model, and is taken for granted."""
    if named.assumed:
        print(f"sp-fx: {named.name} {named.assumed}", file=sys.stderr)


def say_unused(args: argparse.Namespace, explainer: Any) -> None:
    """Prints which temperatures that were asked for are of kinds of which the model has no gate."""
    there = sorted({site.kind for site in explainer.report().sites if site.kind})
    for kind, _ in args.temperature:
        if kind in KINDS and kind not in there:
            text = f"there is no {kind} gate in it, so that its temperature changes nothing; there are {', '.join(there)}"
            print(f"sp-fx: {text}", file=sys.stderr)


def noise(named: NamedModel, count: int) -> torch.Tensor:
    """Returns `count` pictures of noise, of the size that the model takes: on one colour a wrong graph may be right."""
    shape = (count, len(named.preprocessing.mean), *named.preprocessing.cropped)
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def package(args: argparse.Namespace) -> Subject:
    """Returns the package that `--model` names. What it explains by is in it: other options than these would be ignored."""
    from ..packages.classifier import Classifier

    said, flags = options_of(args), ("rules", "temperature", "method", "steps", "step_size", "path", "animation")
    given = {field.name: getattr(said, field.name) != field.default for field in fields(Options)}
    given |= {flag: str(getattr(args, flag)) not in ("None", "False", "[]", "['default']") for flag in flags}  # 0.0 is given
    ignored = [f"--{name.replace('_', '-')}" for name, value in given.items() if value]
    if ignored:
        text = "is a package, whose model, rules and method are what it was made with"
        raise ValueError(f"{args.model} {text}: no {', '.join(ignored)}")
    of_device = None if str(args.device) == "cpu" else str(args.device)
    classifier = Classifier.load(args.model, device=of_device)
    manifest, preprocessing = classifier.manifest, classifier.for_pictures()
    facts = {"model": manifest["model"], "package": Path(args.model).name, "weights_sha256": manifest["weights_sha256"],
             "preprocessing": asdict(preprocessing), "rules": manifest.get("temperatures", manifest["rules"])}  # fmt: skip
    ways = [records.way_of_package(classifier.program, classifier)]
    labels = None if classifier.class_names is None else tuple(classifier.class_names)
    by = classifier.program.signature.probabilities
    predict = functools.partial(records.probabilities_of, lambda x: classifier(x)[0], by=by)
    return Subject(predict, ways, preprocessing, labels, facts)


# -- pictures


def pictures_named(names: Sequence[str], out: Path) -> list[Path]:
    """Returns the files that the arguments name: files, the pictures in folders, what patterns fit. What is in `out`, the folder
    of the figures, is no picture of a folder that it is in.

    Raises:
        ValueError: a folder without pictures, or a pattern that fits nothing.
    """
    found: list[Path] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            inside = folder_pictures(path)
            if out.resolve() != path.resolve():
                inside = [file for file in inside if not file.resolve().is_relative_to(out.resolve())]
            if not inside:
                raise ValueError(f"there is no picture in the folder {name}")
            found += inside
        elif not path.exists() and glob.has_magic(name):
            fitting = sorted(Path(each) for each in glob.glob(name, recursive=True) if Path(each).is_file())
            if not fitting:
                raise ValueError(f"no file fits the pattern {name}")
            found += fitting
        else:
            found.append(path)
    return found


def batches(paths: Sequence[Path], preprocessing: Preprocessing, size: int) -> Iterator[list[tuple[Path, Picture | Exception]]]:
    """Yields the pictures at `paths`, `size` at a time, each with its path; where one cannot be read, its error."""
    for start in range(0, len(paths), size):
        batch: list[tuple[Path, Picture | Exception]] = []
        for path in paths[start : start + size]:
            try:
                batch.append((path, preprocessing(path)))
            except (OSError, ValueError) as error:
                batch.append((path, error))
        yield batch


def free_name(stem: str, paths: int, taken: set[str], args: argparse.Namespace) -> str:
    """Returns `stem`, or `stem_2`, `stem_3`, ... where a file under that name is `taken` by another picture of this run, or is
    there already and none that such a run has written; and adds its files to `taken`."""
    while len(os.fsencode(stem)) > LONGEST:
        stem = stem[:-1]
    name, number = stem, 1
    while True:
        files = {f"{name}.json", *names_of(name, paths, args)}
        if not taken & files and not {file for file in files - written_before(args.out, name) if (args.out / file).exists()}:
            taken |= files
            return name
        number += 1
        name = f"{stem}_{number}"


def written_before(out: Path, name: str) -> set[str]:
    """Returns the names of the files that an earlier run has written to `out` under that name, as its record says."""
    try:
        record = json.loads((out / f"{name}.json").read_text())
        if "sp_fx" not in record["versions"]:
            return set()
        paths = [each[what] for each in record.get("paths", []) for what in ("strip", "animation")]
        return {f"{name}.json", record["figure"], *paths}
    except (OSError, ValueError, TypeError, KeyError):  # none, or somebody else's
        return set()
