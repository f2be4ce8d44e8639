"""Where a number comes from: date, device, threads, versions."""

from __future__ import annotations

import datetime
import platform
from pathlib import Path
from typing import Any

import torch

import sp_fx


def device_name(device: str = "cpu") -> str:
    """Returns the name of the GPU, or of the processor with the number of threads, as in "AMD EPYC, 2 threads"."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {torch.get_num_threads()} threads"


def provenance(device: str = "cpu") -> dict[str, Any]:
    """Returns the entries that every file of results has."""
    versions = {"sp_fx": sp_fx.__version__, "torch": torch.__version__, "python": platform.python_version()}
    return {"date": datetime.date.today().isoformat(), "device": device_name(device), "versions": versions}
