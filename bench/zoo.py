"""Does `transform` take every network of a library? `python bench/zoo.py --torchvision`, `--timm`, `--huggingface`,
`--libraries`, `--segmentation`, `--video`.

All classification models of torchvision, or the smallest variant of every architecture module of timm, weights and statistics
filled from a seed, on inputs as small as the model takes. Of each: the explainer's forward is the model's bit for bit (fused
attention aside), the gating ATen ops that the model dispatches are those that the report lists, no gate that is in units of a
sample's deviation has lost where the sample is, the map of a random direction is finite, not zero, and not the gradient; and all
that with an example and without, which gives the same map, or is refused with a message that says to give one. With `--checks`,
instead of that, the verdicts of `sp_fx.check` on two samples, none of which may be FAILED.

The other collections, tiny models of `breadth_huggingface.py` and `breadth_libraries.py`, are examined by `breadth.py`, which
compares frozen maps with an oracle. A model whose library is not installed is skipped, and said to be.

Rows are kept as they come; a second call goes on where the first ended, `--again` does failures anew, `--minutes` ends a piece.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import gc
import json
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import breadth
import torch
from provenance import provenance
from torch import nn

import sp_fx
from sp_fx.capture.clones.clone import EvalClone
from sp_fx.checks.check import check_coverage, check_forward
from sp_fx.gates.table import TABLE
from sp_fx.targets import primary

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers import fill

SIZES = (64, 96, 128, 160, 192, 224, 256, 299, 331, 384, 512)
RESULTS = Path(__file__).parent / "results"
COLLECTIONS = {  # and the libraries whose versions their results have
    "huggingface": ["transformers"],
    "segmentation": ["torchvision", "segmentation_models_pytorch"],
    "video": ["torchvision", "transformers"],
    "libraries": [
        "torchvision",
        "open_clip_torch",
        "monai",
        "vit-pytorch",
        "x-transformers",
        "torch_geometric",
        "peft",
        "diffusers",
    ],
}


def torchvision_models() -> Iterator[tuple[str, str, Any]]:
    """Yields each model's key, its name, and a function that builds it."""
    import torchvision

    for name in torchvision.models.list_models(module=torchvision.models):
        options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        yield name, name, lambda name=name, options=options: torchvision.models.get_model(name, weights=None, **options)


def timm_models() -> Iterator[tuple[str, str, Any]]:
    """Yields the smallest model of each module: the module's name, the model's, and a function that builds it."""
    import timm

    for module, name in smallest().items():
        yield module, name, lambda name=name: timm_model(timm, name)


def timm_model(timm: Any, name: str) -> nn.Module:
    size = timm.get_pretrained_cfg(name).input_size[-1]
    if size > 256:  # attention over a large picture is a matter of minutes
        try:
            return timm.create_model(name, pretrained=False, img_size=224)
        except (TypeError, AssertionError, ValueError, RuntimeError):
            pass
    return timm.create_model(name, pretrained=False)


def smallest() -> dict[str, str]:
    """Returns the variant with the fewest parameters of each module of timm's architectures; counted once a version of timm."""
    import timm

    known = RESULTS / "zoo_timm_smallest.json"
    stored = json.loads(known.read_text()) if known.exists() else {}
    if stored.get("timm") == timm.__version__:
        return stored["variants"]
    variants = {}
    for module in timm.list_modules():
        sizes = {}
        for name in timm.list_models(module=module):
            with torch.device("meta"):
                try:
                    sizes[name] = sum(p.numel() for p in timm.create_model(name, pretrained=False).parameters())
                except Exception:  # what cannot be built without data is not the smallest
                    continue
        if sizes:
            variants[module] = min(sizes, key=sizes.__getitem__)
    known.write_text(json.dumps({"timm": timm.__version__, "variants": variants}, indent=1) + "\n")
    return variants


def collection(source: str) -> Iterator[tuple[str, str, Any]]:
    """Yields each model of a collection: its name, the name again, and a function that builds it."""
    if source == "huggingface":
        import transformers
        from breadth_huggingface import HUGGINGFACE as table

        transformers.logging.set_verbosity_error()
    else:
        import breadth_huggingface
        import breadth_libraries

        videos = {**breadth_libraries.VIDEO, **breadth_huggingface.VIDEO}
        table = {"segmentation": breadth_libraries.SEGMENTATION, "video": videos, "libraries": breadth_libraries.LIBRARIES}[
            source
        ]
    for name, build in table.items():
        yield name, name, build


def uninitialised() -> None:
    """Turn PyTorch's initialisations off, for good: everything is filled from a seed afterwards."""
    for name in dir(nn.init):
        if name.endswith("_") and not name.startswith("_"):
            setattr(nn.init, name, lambda tensor, *args, **kwargs: tensor)


def example(model: nn.Module) -> torch.Tensor:
    """Returns noise [1, 3, N, N] of the smallest N in `SIZES` that the model takes."""
    refusals = []
    for size in SIZES:
        x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
        try:
            with torch.no_grad():
                model(x)
            return x
        except (RuntimeError, AssertionError, ValueError, IndexError) as error:
            refusals.append(f"{size}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
    raise RuntimeError(f"no size works: {refusals[-1]}")


def examine(build: Any) -> dict[str, Any]:
    """Returns the row of one network; `ok` and, where it is not, `why`."""
    started = time.perf_counter()
    model = fill(build())
    row: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    try:
        x = example(model)
        row["size"] = x.shape[-1]
        leaf = x.clone().requires_grad_()
        y = primary(model(leaf * 1))
        u = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        (gradient,) = torch.autograd.grad(y, leaf, u)
        wrong = [] if y.isfinite().all() and y.any() else ["the outputs are zero or not finite, with these weights"]
        begun = time.perf_counter()
        explainer = sp_fx.transform(model, example_inputs=x)
        row["transform_s"] = round(time.perf_counter() - begun, 2)
        map, facts, faults = examined(model, explainer, x, u, gradient)
        row |= facts
        wrong += faults
        alone, faults = without_example(model, x, u, gradient, map, facts)
        row["without an example"] = alone
        wrong += [f"without an example: {fault}" for fault in faults]
    except Exception as error:  # whatever a network raises is its row
        wrong = [f"{type(error).__name__}: {str(error)[:300]}"]
    return {**row, "ok": not wrong, "why": "; ".join(wrong), "seconds": round(time.perf_counter() - started, 1)}


def checked(build: Any) -> dict[str, Any]:
    """Returns the row of one network with the verdicts of `sp_fx.check`; `ok` and, where one FAILED, `why`."""
    started = time.perf_counter()
    model, row = fill(build()), {}
    try:
        x = example(model)
        explainer = sp_fx.transform(model, example_inputs=x)
        lines = sp_fx.check(explainer, torch.cat([x, x.roll(7, -1)])).lines
        row["verdicts"] = {line.name: line.verdict for line in lines}
        row["notes"] = {line.name: line.note for line in lines if line.note}
        wrong = [f"{line.name}: {line.found} {line.note}" for line in lines if line.verdict == "FAILED"]
    except Exception as error:  # whatever a network raises is its row
        wrong = [f"{type(error).__name__}: {str(error)[:300]}"]
    return {**row, "ok": not wrong, "why": "; ".join(wrong), "seconds": round(time.perf_counter() - started, 1)}


def examined(
    model: nn.Module, explainer: sp_fx.Explainer, x: torch.Tensor, u: torch.Tensor, gradient: torch.Tensor
) -> tuple[torch.Tensor, dict[str, Any], list[str]]:
    """Returns the map of the direction `u`, what goes into the row, and what is wrong."""
    map = explainer.pullback(x, u)
    report = explainer.report()  # after the first call, which may have changed it
    facts: dict[str, Any] = {"tracer": report.tracer}
    facts |= {status: len(report.of(status)) for status in ("rewritten", "kept", "NOT REWRITTEN")}  # type: ignore[arg-type]
    # Gates whose temperature could follow the sample's scale, and does not since it is not known where the sample is.
    scaled = [s for s in report.of("rewritten") if s.kind in TABLE and TABLE[s.kind].homogeneous]
    facts["absolute"] = sum(s.scale == "absolute" for s in scaled)
    clone = EvalClone()(model)
    lines = [check_forward(explainer, clone, (x,), {}), check_coverage(explainer, clone, (x,), {})]
    facts |= {"forward": lines[0].found, "coverage": lines[1].note}
    facts["from_gradient"] = float((map - gradient).norm() / gradient.norm().clamp_min(1e-30))
    wrong = [f"{line.name}: {line.note or line.found}" for line in lines if line.verdict == "FAILED"]
    if facts["absolute"]:
        wrong.append(f"the scale of {facts['absolute']} gates is not known")
    if not map.isfinite().all() or not map.any():
        wrong.append("the map is zero or not finite")
    if report.of("rewritten") and not facts["from_gradient"] > 1e-3:
        wrong.append("the map is the gradient")
    return map, facts, wrong


def without_example(
    model: nn.Module, x: torch.Tensor, u: torch.Tensor, gradient: torch.Tensor, map: torch.Tensor, facts: dict[str, Any]
) -> tuple[str, list[str]]:
    """Returns what becomes of the network without an example, beside its `map` and `facts` with one, and what is wrong."""
    try:
        explainer = sp_fx.transform(model)
        alone, others, wrong = examined(model, explainer, x, u, gradient)
    except sp_fx.CaptureError as error:
        return "refused", [] if "example_inputs" in str(error) else [f"refused, and not asked for one: {str(error)[:200]}"]
    if others["NOT REWRITTEN"] > facts["NOT REWRITTEN"]:  # what is opaque to a symbolic trace is listed as one call
        wrong = [fault for fault in wrong if not fault.startswith("coverage")]
        return f"{others['NOT REWRITTEN']} not rewritten", wrong
    difference = float((alone - map).norm() / map.norm().clamp_min(1e-30))
    return f"differs by {difference:.0e}", wrong + ["another map"] * (difference > 1e-4)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--torchvision", action="store_const", dest="source", const="torchvision")
    which.add_argument("--timm", action="store_const", dest="source", const="timm")
    for source in COLLECTIONS:
        which.add_argument(f"--{source}", action="store_const", dest="source", const=source)
    parser.add_argument("--checks", action="store_true", help="the verdicts of sp_fx.check; of torchvision and timm")
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--again", action="store_true", help="failures are done anew")
    parser.add_argument("--only", nargs="+", help="these models, anew")
    parser.add_argument("--out", type=Path, help="default: bench/results/zoo_LIBRARY.json, or zoo_LIBRARY_checks.json")
    args = parser.parse_args()
    out = args.out or RESULTS / f"zoo_{args.source}{'_checks' if args.checks else ''}.json"
    rows: dict[str, dict[str, Any]] = json.loads(out.read_text())["rows"] if out.exists() else {}
    warnings.simplefilter("ignore")
    broad = args.source in COLLECTIONS
    if not broad:
        uninitialised()
    how = breadth.examine if broad else checked if args.checks else examine
    started = time.perf_counter()
    models = list(collection(args.source) if broad else torchvision_models() if args.source == "torchvision" else timm_models())
    absent = 0
    for key, name, build in models:
        done = key in rows and not (args.again and not rows[key]["ok"])
        wanted = args.only is None or key in args.only or name in args.only
        if (done and args.only is None) or not wanted or time.perf_counter() - started > 60 * args.minutes:
            continue
        try:
            rows[key] = row = {"model": name, **how(build)}
        except ModuleNotFoundError as error:
            print(f"{key:24} skipped: {error.name} is not installed", flush=True)
            absent += 1
            continue
        plain = f"{key:24} {name:34} {'ok' if row['ok'] else 'FAILED':7} {row['seconds']:6} s  {row['why']}"
        print(printed(key, row) if broad else plain, flush=True)
        good = sum(r["ok"] for r in rows.values())
        record = {**provenance(), "library": library_version(args.source), "ok": good, "of": len(models) - absent,
                  "seconds": round(sum(r["seconds"] for r in rows.values()), 1), "rows": rows}  # fmt: skip
        out.write_text(json.dumps(record, indent=1) + "\n")
        del build
        gc.collect()
    good = sum(r["ok"] for r in rows.values())
    print(f"{good} of {len(models)} ({good / len(models):.1%}); {len(models) - len(rows)} not done yet")
    if broad and rows:
        counts = collections.Counter(row["verdict"] for row in rows.values()).most_common()
        print(f"right: {good / len(rows):.1%} of {len(rows)}; " + ", ".join(f"{n} {verdict}" for verdict, n in counts))
    return 0 if good == len(models) else 1


def printed(key: str, row: dict[str, Any]) -> str:
    """Returns a line of the table: model, tracer, gates rewritten/kept/NOT, the map's distance from the oracle, verdict."""
    off = row.get("map")
    cells = (
        row.get("tracer", "").removeprefix("torch."),
        row.get("gates", ""),
        "" if off is None else f"{off:.0e}",
        row["verdict"],
    )
    return f"{key:28} {cells[0]:6} {cells[1]:9} {cells[2]:6} {cells[3]:19} {row['seconds']:6} s  {row['why'][:150]}"


def library_version(library: str) -> str:
    import importlib.metadata

    found = []
    for name in COLLECTIONS.get(library, [library]):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join(found)


if __name__ == "__main__":
    sys.exit(main())
