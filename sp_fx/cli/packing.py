"""`sp-fx compile`: a model as a package. `sp-fx batch`: a folder of pictures by a package."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..build import transform
from ..methods.ascent import Ascent
from ..models.images import pictures_in
from ..models.named import load_model
from .explaining import blank, say_assumed
from .parser import options_of, rules_of
from .progress import Progress, Stages

# Seconds that AOTInductor takes for a graph, on two cores of an AMD EPYC: so many, and so many for each call in it.
AOT_SECONDS = (12.0, 0.045)


def run_compile(args: argparse.Namespace) -> int:
    if args.out.parent != Path() and not args.out.parent.is_dir():
        raise NotADirectoryError(f"there is no folder {args.out.parent} to write {args.out.name} into")
    stages = Stages(quiet=args.json)
    with stages("load the model"):
        named = load_model(args.model, options_of(args))
        net, x = named.model.to(args.device), blank(named, args.batch).to(args.device)
    say_assumed(named)
    with stages("transform it, and compare with it"):
        explainer = transform(net, rules=rules_of(args.rules, args.temperature), example_inputs=x)
        check_names(named.labels, explainer(x))
    with stages("make one graph of the model and its explanation"):
        # By PyTorch op by op: what is saved is compiled when it is saved, if at all.
        program = explainer.compile(
            args.method, example_inputs=x, dynamic_batch=not args.fixed_batch, inductor=False, **ascent_options(args, x)
        )
    program.report = replace(program.report, model=named.name)  # not the class of what stands in front of it
    calls = sum(node.op == "call_function" for node in program.graph.graph.nodes)
    first, each = AOT_SECONDS
    expected = first + each * calls if args.out.suffix == ".pt2" else None
    how = "to machine code" if args.out.suffix == ".pt2" else "to ONNX"
    with stages(f"compile {calls} calls {how}, write, load and try it", expected):
        path = program.save(args.out, class_names=named.labels, preprocessing=named.preprocessing)
    stages.end(f"{path}: {path.stat().st_size / 2**20:.1f} MiB; try it: sp-fx explain IMAGE --model {path} --out out")
    if args.json:
        from ..packages.package import read_manifest

        manifest = read_manifest(path)
        print(json.dumps({key: value for key, value in manifest.items() if key != "probe"}, indent=2))
    return 0


def check_names(labels: tuple[str, ...] | None, outputs: Any) -> None:
    """Raises ValueError where there are other class names than classes."""
    from ..targets import primary

    classes = primary(outputs).shape[-1]
    if labels is not None and len(labels) != classes:
        raise ValueError(f"there are {len(labels)} class names, and the model has {classes} classes")


def ascent_options(args: argparse.Namespace, x: Any) -> dict[str, Any]:
    if args.method != "ascend":
        if args.steps or args.step_size:
            raise ValueError(f"--steps and --step-size are of --method ascend; got --method {args.method}")
        return {}
    steps = args.steps or 5
    return {"steps": steps, "step_size": Ascent(steps, args.step_size).length([x[:1]]), "bounds": (-1.0, 1.0)}


def run_batch(args: argparse.Namespace) -> int:
    from ..serving.folders import jobs
    from ..serving.folders.batches import Batches, begin
    from ..serving.folders.report import report

    files = pictures_in(args.folder)
    if not files:
        raise ValueError(f"there is no picture in the folder {args.folder}")
    share = jobs.rank_and_world()
    several = args.workers > 1 and share is None
    options = {"root": args.folder, "target": args.target, "device": args.device, "threads": args.threads}
    batches = Batches(args.package, files, args.batch, **options)
    out, count = begin(args.out, batches), len(batches)
    there = jobs.written(batches, out)
    if share is not None:
        rank, world = share
        jobs.run_share(batches, out, rank, world)
        if jobs.written(batches, out) == count and "SP_FX_PARENT" not in jobs.os.environ:  # the last of torchrun's
            report(batches, out, args.page)
        return 0
    if not args.json:
        going = f", of which {there} are there" if there else ""
        print(f"sp-fx: {len(files)} pictures in {count} batches{going}", file=sys.stderr)
    progress = Progress(count, "batches", always=not args.json)

    def done(now: int) -> None:
        progress.advance(max(0, now - progress.done))

    done(there)
    try:
        if args.ray:
            from ..serving.folders import ray_jobs

            shared = {**options, "root": args.folder.absolute()}
            arguments = (args.package.absolute(), [file.absolute() for file in files], args.batch)
            ray_jobs.run(out.absolute(), count, arguments, shared, args.workers, done)
        elif several:
            status = jobs.in_processes(again(args), args.workers, lambda: done(jobs.written(batches, out)), progress.say)
            if status:
                return status
        else:
            jobs.run_share(batches, out, done=done)
    except KeyboardInterrupt:
        progress.end()
        print(f"sp-fx: stopped after {jobs.written(batches, out)} of {count} batches; the same command goes on", file=sys.stderr)
        return 130
    progress.end()
    summary = report(batches, out, args.page)
    if args.json:
        print(json.dumps({"out": str(out), **summary.record()}))
        return 1 if summary.errors else 0
    for name, reason in summary.errors[:10]:
        print(f"sp-fx: {name}: {reason}", file=sys.stderr)
    if summary.errors:
        more = f"; all are in {out / 'results.csv'}" if len(summary.errors) > 10 else ""
        print(f"sp-fx: {len(summary.errors)} of {summary.pictures} pictures could not be read{more}", file=sys.stderr)
    shown = f"; {out / 'index.html'} shows {summary.shown} of them" if args.page else ""
    print(f"{summary.pictures - len(summary.errors)} pictures explained: {out / 'results.csv'}{shown}")
    return 1 if summary.errors else 0


def again(args: argparse.Namespace) -> list[str]:
    """Returns this command for one worker."""
    given = [args.package, args.folder, "--out", args.out, "--batch", args.batch, "--threads", args.threads]
    for flag, value in (("--target", args.target), ("--device", args.device)):
        given += [flag, value] if value is not None else []
    return [sys.executable, "-m", "sp_fx", "batch", *map(str, given)]
