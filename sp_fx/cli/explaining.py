"""`sp-fx explain`: pictures, by a model or a package, into figures, records and the paths of ascents."""

from __future__ import annotations

import argparse
import glob
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..build import transform
from ..figures import records
from ..figures.drawing import save
from ..methods.ascent import Ascent
from ..models.images import Picture, Preprocessing, pictures_in
from ..models.named import NamedModel, Options, load_model
from ..version import __version__
from .parser import options_of, rules_of
from .progress import Progress


@dataclass(frozen=True)
class Subject:
    """What explains: the model as a function, its ways of explaining, how it takes pictures, its classes, and what records say
    of it."""

    predict: Callable[..., Any]
    ways: list[records.Way]
    preprocessing: Preprocessing
    labels: tuple[str, ...] | None
    facts: dict[str, Any]


def run_explain(args: argparse.Namespace) -> int:
    images = pictures_named(args.images)
    subject = package(args) if Path(args.model).suffix in (".onnx", ".pt2") else model(args)
    targets = records.parse_targets(args.target or ["top1"], subject.labels)
    args.out.mkdir(parents=True, exist_ok=True)
    common = {**subject.facts, "device": str(args.device), "versions": {"sp_fx": __version__, "torch": torch.__version__}}
    progress, failed, taken = Progress(len(images)), 0, set[str]()
    for batch in batches(images, subject.preprocessing, args.batch_size):
        readable = [(path, picture) for path, picture in batch if not isinstance(picture, Exception)]
        for path, error in batch:
            if isinstance(error, Exception):  # one damaged file does not stop the others
                progress.say(f"sp-fx: skipped {path}: {error}", sys.stderr)
                failed += 1
        pictures = [picture for _, picture in readable]
        results = [] if not pictures else records.explain_pictures(
            subject.predict, subject.ways, pictures, subject.labels, targets, args.device, args.times_input, args.path
        )  # fmt: skip
        for (path, _), explained in zip(readable, results):
            record = write(explained, path, free_name(path.stem, taken), common, args)
            top = record["prediction"][0]
            line = f"{path.name}: {top['label']} ({top['probability']:.2f}) -> {args.out / record['figure']}"
            progress.say(json.dumps(record) if args.json else line)
        progress.advance(len(batch))
    progress.end()
    if failed:
        print(f"sp-fx: {failed} of {len(images)} pictures could not be read", file=sys.stderr)
    return 1 if failed else 0


def write(
    explained: records.Explained, path: Path, name: str, common: dict[str, Any], args: argparse.Namespace
) -> dict[str, Any]:
    """Write figure, record and paths of the picture at `path` under that name; returns the record."""
    from ..figures.animation import animate

    figure = f"{name}.{args.format}"
    record = {"image": path.name, "figure": figure, **common, **explained.record}
    climbs = []
    for number, climb in enumerate(explained.paths):
        stem = f"{name}_path{number + 1}" if len(explained.paths) > 1 else f"{name}_path"
        strip, moving = f"{stem}.{args.format}", f"{stem}.{args.animation}"
        save(climb.strip, args.out / strip, record)
        animate(climb.iterates, args.out / moving, titles=climb.titles)
        climbs.append({"toward": climb.label, "strip": strip, "animation": moving})
    if climbs:
        record["paths"] = climbs
    save(explained.figure, args.out / figure, record)
    (args.out / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
    return record


# -- what explains


def model(args: argparse.Namespace) -> Subject:
    """Returns the model that `--model` and its options name, by each of the rules."""
    named = load_model(args.model, options_of(args))
    say_assumed(named)
    net = named.model.to(args.device)
    example = blank(named, 2).to(args.device)
    explainers = {name: transform(net, rules=rules_of(name, args.temperature), example_inputs=example) for name in args.rules}
    wanted = args.method or (["ascend"] if args.path else ["pullback"])
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
    return Subject(next(iter(explainers.values())), ways, named.preprocessing, named.labels, facts)


def say_assumed(named: NamedModel) -> None:
    """Prints what nobody has said of the pixels that the model takes, and is taken for granted."""
    if named.assumed:
        assumed = f"assumed: {named.assumed} (--mean, --std, --pixels say otherwise)"
        print(f"sp-fx: {named.name} says nothing of its pixels; {assumed}", file=sys.stderr)


def blank(named: NamedModel, count: int) -> torch.Tensor:
    """Returns `count` grey pictures of the size that the model takes."""
    return torch.zeros(count, len(named.preprocessing.mean), *named.preprocessing.cropped)


def package(args: argparse.Namespace) -> Subject:
    """Returns the package that `--model` names. What it explains by is in it: other options than these would be ignored."""
    from ..packages.classifier import Classifier

    given = {
        "--weights, --input-size and other options of a model": options_of(args) != Options(),
        "--rules": args.rules != ["default"],
        "--temperature": args.temperature,
        "--method": args.method,
        "--steps": args.steps,
        "--step-size": args.step_size,
        "--path": args.path,
    }
    ignored = [flag for flag, value in given.items() if value]
    if ignored:
        raise ValueError(f"{args.model} is a package, whose model, rules and method are what it was made with: no {ignored[0]}")
    of_device = None if str(args.device) == "cpu" else str(args.device)
    classifier = Classifier.load(args.model, device=of_device)
    manifest, preprocessing = classifier.manifest, classifier.for_pictures()
    facts = {"model": manifest["model"], "package": Path(args.model).name, "weights_sha256": manifest["weights_sha256"],
             "preprocessing": asdict(preprocessing), "rules": manifest["rules"]}  # fmt: skip
    ways = [records.way_of_package(classifier.program)]
    labels = None if classifier.class_names is None else tuple(classifier.class_names)
    return Subject(lambda x: classifier.program(x)[0], ways, preprocessing, labels, facts)


# -- pictures


def pictures_named(names: Sequence[str]) -> list[Path]:
    """Returns the files that the arguments name: files, the pictures in folders, what patterns fit.

    Raises:
        ValueError: a folder without pictures, or a pattern that fits nothing.
    """
    found: list[Path] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            inside = pictures_in(path)
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


def free_name(stem: str, taken: set[str]) -> str:
    """Returns `stem`, or `stem_2`, `stem_3`, ... where pictures of several folders share it, and adds it to `taken`."""
    name, number = stem, 1
    while name in taken:
        number += 1
        name = f"{stem}_{number}"
    taken.add(name)
    return name
