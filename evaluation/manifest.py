"""The manifest of a run: all that it takes to repeat it to the same numbers."""

import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from evaluation.outcomes import read_json, write_json

MANIFEST = "manifest.json"
PACKAGES = ("torch", "torchvision", "numpy", "pyautoattack", "safetensors", "ig-defense")


def write_manifest(folder: Path, run: dict[str, Any], command: str) -> Path:
    """Write what the run is, and add this sitting to those before it.

    Args:
        run: model, dataset, targets and settings. command: as it was typed.
    """
    path = folder / MANIFEST
    sittings = read_json(path)["sittings"] if path.exists() else []
    sitting = {"began": datetime.now(UTC).isoformat(timespec="seconds"), "command": command} | _machine()
    write_json(path, {"run": run, "sittings": [*sittings, sitting]})
    return path


def _machine() -> dict[str, Any]:
    return {
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "commit": _commit(),
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        # Sums are split over threads, so another number of them may round otherwise.
        "threads": torch.get_num_threads(),
    }


def _commit() -> str | None:
    """The commit of the source tree, with a plus where files differ from it; None outside of git."""
    try:
        head = _git("rev-parse", "HEAD").strip()
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":/defense", ":/evaluation")
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed else "")


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout  # noqa: S603
