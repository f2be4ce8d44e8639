"""Packages for AOTInductor: a program's graph compiled ahead of time, for one kind of device and processor, in a `.pt2` archive.

The manifest stands in the archive's metadata, under `sp_fx`, with the digest of every other member.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import torch

from ..program.program import Program
from ..program.signature import Run
from .errors import PackageError
from .exporting import blamed, export_graph
from .manifest import machine, sealed, verified

CAPABILITIES = ("DEFAULT", "AVX2", "AVX512")  # of a CPU, each with the instructions of those before it


def write(program: Program, path: Path, manifest: dict[str, Any]) -> None:
    """Compiles ahead of time, and puts the manifest, which has the digest of every other member, in the archive's metadata."""
    from torch._inductor import aoti_compile_and_package

    from ..program.inductor import COMPILING, config_for, suited  # here, since it brings in torch's compilers

    try:
        with torch.inference_mode(False), torch.no_grad(), COMPILING:
            exported = export_graph(program, suited(program.graph), program.example)
            # As many threads as the process that loads it has, not as the one that saves it.
            configs = {**config_for(program.graph), "cpp.dynamic_threads": True}
            aoti_compile_and_package(exported, package_path=str(path), inductor_configs=configs)
    except Exception as error:  # Inductor's, export's and the C++ compiler's; all mean that there will be no package
        raise PackageError(f"AOTInductor does not compile this program: {blamed(error, program)}") from error
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    place = metadata_place(members)
    complete = sealed({**manifest, "digest": digest_of({k: v for k, v in members.items() if k != place})})
    members[place] = json.dumps({**json.loads(members[place]), "sp_fx": json.dumps(complete)}).encode()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def load_graph(path: Path, device: str | None, threads: int | None) -> tuple[dict[str, Any], Run]:
    """Returns the manifest, and what runs the graph on the tensors that it says."""
    manifest = read_manifest(path)
    fits_here(manifest, path, device)
    try:
        index = torch.device(device or manifest["device"]).index
        loaded = torch._inductor.aoti_load_package(str(path), device_index=-1 if index is None else index)
    except Exception as error:
        raise PackageError(f"torch {torch.__version__} does not load {path}: {str(error)[:400]}") from error
    # Not the model's own call, which reads the layout of its arguments from JSON every time: a program takes and gives tensors.
    return manifest, lambda *tensors: loaded.loader.boxed_run(list(tensors))


def read_manifest(path: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}  # checks each one's CRC
        place = metadata_place(members)
        manifest = json.loads(json.loads(members.pop(place))["sp_fx"])
    except (zipfile.BadZipFile, EOFError, StopIteration, KeyError, ValueError, OSError, NotImplementedError) as error:
        what = "it has no manifest, as what torch.export.save writes has none" if isinstance(error, StopIteration) else ""
        raise PackageError(
            f"{path} is not a whole package of this library: {what or f'{type(error).__name__}: {error}'}; "
            "sp-fx compile MODEL --out net.pt2 makes one"
        ) from error
    if digest_of(members) != manifest.get("digest"):
        raise PackageError(f"{path} was altered after it was written: its members have another digest than its manifest says")
    return verified(manifest, path)


def fits_here(manifest: dict[str, Any], path: Path, device: str | None) -> None:
    """Raises PackageError where the compiled code would not run on this machine, before it does."""
    kind = manifest["device"]
    asked = kind if device is None else torch.device(device).type
    if asked != kind:
        raise PackageError(f"{path} was made for {kind}, and {device!r} was asked for: save it from a program made on {asked}")
    if kind != "cpu" and not torch.cuda.is_available():
        raise PackageError(f"{path} was made for {kind} ({manifest['machine']['capability']}), and no such device is here")
    made, here = manifest["versions"]["torch"], str(torch.__version__)
    if release(here) < release(made):
        raise PackageError(
            f"{path} was compiled by torch {made}, and this is torch {here}: code compiled for a newer torch calls what "
            "an older one does not have. Install that torch, or save the package with this one"
        )
    target, this = manifest["machine"], machine(torch.device(device or kind))
    same = target["system"] == this["system"] and target["architecture"] == this["architecture"]
    if kind == "cpu":
        ranked = target["capability"] in CAPABILITIES and this["capability"] in CAPABILITIES
        rank = CAPABILITIES.index
        same &= rank(target["capability"]) <= rank(this["capability"]) if ranked else target == this
    else:
        same &= target["capability"] == this["capability"]
    if not same:
        names = [" ".join(str(m[k]) for k in ("system", "architecture", "capability")) for m in (target, this)]
        raise PackageError(
            f"{path} was compiled for {names[0]}, and this machine is {names[1]}: save it on a machine like this one"
        )


def release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def metadata_place(members: dict[str, bytes]) -> str:
    """Returns the name of the member that AOTInductor's loaders read the metadata from."""
    return next(name for name in sorted(members) if name.endswith("wrapper_metadata.json"))


def digest_of(members: dict[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name in sorted(members):
        digest.update(f"{name} {len(members[name])}\n".encode())
        digest.update(members[name])
    return digest.hexdigest()
