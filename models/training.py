"""What the training scripts share: checkpoints that survive a kill."""

import os
from pathlib import Path
from typing import Any

import torch


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write the checkpoint beside its final name, then rename it: a kill leaves the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load_state(path: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint of this recipe; of another one, an error that says what to do."""
    state: dict[str, Any] = torch.load(path, weights_only=True)
    if state["recipe"] != recipe:
        raise SystemExit(f"{path} was made with other settings: remove it or pass another --checkpoint")
    return state
