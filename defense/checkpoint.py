"""Checkpoints of a ranking under way, so that an interruption costs minutes and not hours."""

import json
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

logger = logging.getLogger(__name__)


class Checkpoint:
    """Named tensors in one file, replaced atomically.

    Args:
        path: of the file.
        identity: what the ranking is of (method, layer, weights, probe set); a file of anything else is not used.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path, self._identity = path, json.dumps(identity, sort_keys=True)

    def load(self) -> dict[str, Tensor] | None:
        """The saved tensors; None if there are none, they are damaged, or of another ranking."""
        try:
            data = self.path.read_bytes()
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            tensors = load_safetensors(data)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, SafetensorError) as error:
            logger.warning("beginning again, the checkpoint %s is not readable: %s", self.path, error)
            return None
        if header.get("__metadata__", {}).get("identity") != self._identity:
            logger.warning("beginning again, the checkpoint %s is of another ranking", self.path)
            return None
        return tensors

    def save(self, tensors: dict[str, Tensor]) -> None:
        """Write; where that fails (a full disk) the ranking goes on, only an interruption would cost more."""
        temporary = self.path.with_suffix(".tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(save_safetensors(tensors, metadata={"identity": self._identity}))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path)
        except OSError as error:
            logger.warning("no checkpoint could be written (%s); an interrupted ranking would begin again", error)
            with suppress(OSError):
                temporary.unlink()
