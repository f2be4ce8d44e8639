"""`sp-fx compile`: a model as a package. `sp-fx batch`: a folder of pictures by a package."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..build import transform
from ..methods.ascent import Ascent
from ..models import TextModel, load_with
from ..program.program import Program
from .explaining import noise, printed_to_stderr, say_assumed, say_unused, takes_pixels
from .parser import options_of, rules_of
from .progress import Progress, Stages
from .texts import packaged

if TYPE_CHECKING:
    from ..serving.folders.batches import Batches
    from ..serving.folders.jobs import Share

# Seconds that a graph takes, on two cores of an AMD EPYC: so many, and so many for each call in it. Measured of five networks of
# 549 to 1,551 calls: as ONNX within 1.3 times, as machine code within 1.4.
SECONDS = {".onnx": (1.0, 0.0125), ".pt2": (12.0, 0.045)}


def run_compile(args: argparse.Namespace) -> int:
    if args.out.parent != Path() and not args.out.parent.is_dir():
        raise NotADirectoryError(f"there is no folder {args.out.parent} to write {args.out.name} into")
    if (args.model is None) == (args.named is None):
        raise ValueError("compile takes one model: sp-fx compile MODEL --out x.onnx; `sp-fx --help` lists their names")
    args.model = args.named if args.model is None else args.model
    if args.out.is_dir():
        raise IsADirectoryError(f"{args.out} is a folder, and a package is a file")
    if args.method != "ascend" and (args.steps, args.step_size) != (None, None):
        raise ValueError(f"--steps and --step-size are of --method ascend; got --method {args.method}")
    with printed_to_stderr(args.json):
        path = compiled(args)
    if args.json:
        from ..packages.package import read_manifest

        manifest = read_manifest(path)
        print(json.dumps({key: value for key, value in manifest.items() if key != "probe"}, indent=2))
    return 0


def compiled(args: argparse.Namespace) -> Path:
    """Returns the package that `sp-fx compile` asks for, which is written."""
    stages = Stages(quiet=args.json)
    with stages("load the model"):
        named = load_with(args.model, options_of(args))
        if isinstance(named, TextModel):
            return compiled_text(named, args, stages)
        net, x = named.model.to(args.device), noise(named, args.batch).to(args.device)
    say_assumed(named)
    with stages("transform it, and compare with it"), takes_pixels(named):
        explainer = transform(net, rules=rules_of(args.rules, args.temperature), example_inputs=x)
        outputs = explainer(x)
    say_unused(args, explainer)
    check_names(named.labels, outputs)
    with stages("make one graph of the model and its explanation"):
        # By PyTorch op by op: what is saved is compiled when it is saved, if at all.
        program = explainer.compile(
            args.method, example_inputs=x, dynamic_batch=not args.fixed_batch, inductor=False, **ascent_options(args, x)
        )
    program.report = replace(program.report, model=named.name)  # not the class of what stands in front of it
    said = {"class_names": named.labels, "preprocessing": named.preprocessing, "multi_label": named.multi_label}
    path = saved(program, args.out, stages, said)
    how = f"explain IMAGE --model {path}" if program.dynamic_batch else f"batch {path} FOLDER --batch {args.batch}"
    stages.end(f"{path}: {path.stat().st_size / 2**20:.1f} MiB; try it: sp-fx {how} --out out")
    return path


def saved(program: Program, out: Path, stages: Stages, said: dict[str, Any]) -> Path:
    """Returns the package that is written of a program, with what is `said` of its model."""
    calls = sum(node.op == "call_function" for node in program.graph.graph.nodes)
    first, each = SECONDS[out.suffix]
    how = "to machine code" if out.suffix == ".pt2" else "to ONNX"
    with stages(f"compile {calls} calls {how}, write, load and try it", first + each * calls):
        return program.save(out, **said)


def compiled_text(net: TextModel, args: argparse.Namespace, stages: Stages) -> Path:
    """Returns the package of a network for text, which is written: from token ids to the output and the shares of the tokens."""
    if args.method != "pullback":
        raise ValueError(f"a package of a network for text has the shares of its tokens: leave --method {args.method} out")
    inputs = net.tokens(["An example of a sentence.", "And a second one, which is longer."])
    inputs = {name: torch.cat([t] * args.batch)[: args.batch].to(args.device) for name, t in inputs.items()}
    model, target = packaged(net)
    with stages("transform it, and compare with it"):
        explainer = transform(model.to(args.device), rules=rules_of(args.rules, args.temperature), example_inputs=inputs)
    say_unused(args, explainer)
    with stages("make one graph of the model and its explanation"):
        options: dict[str, Any] = {"dynamic_batch": not args.fixed_batch, "inductor": False, "target": target}
        program = explainer.compile("tokens", example_inputs=inputs, **options)
    program.report = replace(program.report, model=net.name)
    classes = net.labels if program.target == "class" else None
    path = saved(program, args.out, stages, {"class_names": classes})
    names = ", ".join(f"{name} [batch, {', '.join(map(str, shape))}]" for name, shape in zip(inputs, program.shapes))
    stages.end(f"{path}: {path.stat().st_size / 2**20:.1f} MiB; it takes {names}: sp_fx.load({str(path)!r})(inputs, target)")
    return path


def check_names(labels: tuple[str, ...] | None, outputs: Any) -> None:
    """Raises ValueError where the model gives no class scores, or there are other class names than classes."""
    from ..targets import primary

    scores = primary(outputs)
    if scores.dim() != 2:
        raise ValueError(f"expected class scores [B, classes] of the model, got {list(scores.shape)}")
    classes = scores.shape[-1]
    if labels is not None and len(labels) != classes:
        raise ValueError(f"there are {len(labels)} class names, and the model has {classes} classes")


def ascent_options(args: argparse.Namespace, x: Any) -> dict[str, Any]:
    if args.method != "ascend":
        return {}
    steps = args.steps or 5
    return {"steps": steps, "step_size": Ascent(steps, args.step_size).length([x[:1]]), "bounds": (-1.0, 1.0)}


def run_batch(args: argparse.Namespace) -> int:
    from ..serving.folders import jobs
    from ..serving.folders.batches import Batches, begin, forget_changed, pictures
    from ..serving.folders.results import written

    share = jobs.share_of(os.environ)
    check_batch(args, share)
    if not args.package.is_file() and args.package.suffix not in (".onnx", ".pt2"):
        made = f"sp-fx compile {args.package} --out net.onnx makes one of a model"
        raise ValueError(f"batch takes a package, *.onnx or *.pt2; got {args.package}: {made}")
    files = pictures(args.folder)
    if not files:
        raise ValueError(f"there is no picture in the folder {args.folder}")
    device = args.device if share is None else jobs.own_device(args.package, args.device)
    options = {"root": args.folder, "target": args.target, "device": device, "threads": args.threads}
    batches = Batches(args.package, files, args.batch, **options)
    out, count = begin(args.out, batches), len(batches)
    if share is not None:
        return run_one_of(args, batches, out, share)
    changed = forget_changed(out, batches)
    there = len(written(out))
    if not args.json:
        going = f", of which {there} are there" if there else ""
        going += f"; the pictures of {changed} have changed, and they are made again" if changed else ""
        of, are = f"{len(files)} picture{'s' * (len(files) > 1)}", f"{count} batch{'es' * (count > 1)}"
        print(f"sp-fx: {of} in {are}{going}", file=sys.stderr)
    progress = Progress(count, "batches", always=not args.json)

    def done(now: int) -> None:
        progress.advance(max(0, now - progress.done))

    done(there)
    try:
        with jobs.told_to_end():
            if there < count and args.ray:
                from ..serving.folders import ray_jobs

                ray_jobs.run(out, batches, {**options, "device": batches.classifier.program.device.type}, args.workers, done)
            elif there < count and args.workers > 1:
                say = functools.partial(progress.say, file=sys.stderr)
                workers = min(args.workers, count - there)
                status = jobs.in_processes(again(args), workers, lambda: done(len(written(out))), say)
                if status:
                    return status
            else:
                jobs.run_share(batches, out, done=done)
            progress.end()
            return summed_up(args, batches, out)
    except KeyboardInterrupt as error:
        progress.end()
        print(f"sp-fx: stopped after {len(written(out))} of {count} batches; the same command goes on", file=sys.stderr)
        return 143 if isinstance(error, jobs.Terminated) else 130


def check_batch(args: argparse.Namespace, share: Any) -> None:
    """Raises ValueError for options that do not go together, before anything is loaded."""
    if args.page < 0:
        raise ValueError(f"--page is a number of pictures, 0 for no page; got {args.page}")
    if args.ray and importlib.util.find_spec("ray") is None:
        raise ValueError("--ray needs an extra: pip install 'sp-fx[ray]'")
    if share is not None and (args.ray or args.workers > 1):
        raise ValueError(
            f"this is worker {share.rank} of {share.world}, as RANK and WORLD_SIZE in the environment say, and starts no "
            f"{'actors' if args.ray else 'workers'} of its own: unset RANK, or leave {'--ray' if args.ray else '--workers'} out"
        )


def run_one_of(args: argparse.Namespace, batches: Batches, out: Path, share: Share) -> int:
    """Do one worker's share, of torchrun's or of our own. Unreadable pictures are no failure of it, after which torchrun would
    start it again."""
    from ..serving.folders import jobs
    from ..serving.folders.results import written

    count, who = len(batches), f"sp-fx: worker {share.rank} of {share.world}"
    if not share.ours:  # says so, since these variables may be left over in a shell
        own = len(range(share.rank, count, share.world))
        print(f"{who} ({own} of {count} batches) by RANK and WORLD_SIZE in the environment; unset RANK for all", file=sys.stderr)
    try:
        with jobs.told_to_end():
            jobs.run_share(batches, out, share.rank, share.world)
    except jobs.Terminated:
        os.kill(os.getpid(), signal.SIGTERM)  # now that nothing is half written; who waits for it sees that it was told to
    except KeyboardInterrupt:
        return 130
    if share.ours:
        return 0
    there = len(written(out))
    if there == count:  # the last of torchrun's
        summed_up(args, batches, out)
    else:
        print(f"{who} is done; {there} of {count} batches are there, and the last worker writes the page", file=sys.stderr)
    return 0


def summed_up(args: argparse.Namespace, batches: Batches, out: Path) -> int:
    """Write the table and the page of a job whose batches are all there, and say what has come of it; returns the status."""
    from ..serving.folders.report import report

    summary = report(batches, out, args.page)
    if args.json:
        print(json.dumps({"out": printable(out), **summary.record()}))
        return 1 if summary.errors else 0
    for name, reason in summary.errors[:10]:
        print(f"sp-fx: {printable(name)}: {printable(reason)}", file=sys.stderr)
    if summary.errors:
        more = f"; all are in {printable(out / 'results.csv')}" if len(summary.errors) > 10 else ""
        print(f"sp-fx: {len(summary.errors)} of {summary.pictures} pictures could not be explained{more}", file=sys.stderr)
    shown = f"; {printable(out / 'index.html')} shows {summary.shown} of them" if args.page else ""
    print(f"{summary.pictures - len(summary.errors)} pictures explained: {printable(out / 'results.csv')}{shown}")
    return 1 if summary.errors else 0


def printable(name: object) -> str:
    """Returns a name as one line of text: with escapes where it has line breaks, commands to a terminal, or bytes that are no
    text."""
    return str(name) if str(name).isprintable() else ascii(str(name))[1:-1]


def again(args: argparse.Namespace) -> list[str]:
    """Returns this command for one worker. Paths are absolute, since one may begin with a dash."""
    command = [sys.executable, "-m", "sp_fx", "batch", str(args.package.absolute()), str(args.folder.absolute())]
    given = {"out": args.out.absolute(), "batch": args.batch, "threads": args.threads}
    given |= {"target": args.target, "device": args.device}
    return command + [f"--{flag}={value}" for flag, value in given.items() if value is not None]
