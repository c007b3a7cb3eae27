"""Benchmarks that users run with `lori bench NAME`, one per file.

A file has `run(**options)`, which returns {"rows": one record for each measurement, "ratios": name -> quotient}. Ratios
compare what was measured side by side in the same process or gang, since absolute times differ between machines.
Dropping in a file adds a benchmark; files that begin with an underscore are shared. Only `lori bench` imports it.
"""

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

__all__ = ["machine", "provenance"]

VERSIONS_OF = ("torch", "deepspeed", "transformers", "accelerate", "peft", "ray")


def provenance(command: str) -> dict[str, Any]:
    """The provenance of a figure: command, date, machine and its load, and versions."""
    versions = {name: found for name in VERSIONS_OF if (found := _version(name)) is not None}
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"command": command, "date": today, "machine": machine(), "versions": versions}


def machine() -> dict[str, Any]:
    """The machine of a measurement. load: processes that ran or waited, on average over the last minute."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    load = round(os.getloadavg()[0], 1)
    return {"cpu": _processor(), "cores": os.cpu_count(), "gpu": gpu, "torch": torch.__version__, "load": load}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), platform.machine())
