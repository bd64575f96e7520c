"""Results of attacked candidates on disk: a tuning that was interrupted loses the candidate under way."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors.torch import load_file, save
from torch import Tensor

from evaluation.outcomes import write_bytes
from evaluation.tuning.adaptive import Judged, Reattacked

_WHOLE = ("clean", "fixed", "robust")
_OF_A_VERSION = ("defended", "pseudo_label", "undefended")


class KeptResults:
    """Compute a result once for everything that decides it.

    Args:
        folder: where they are kept; None keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def get_or_compute(self, deciding: Mapping[str, object], compute: Callable[[], Reattacked]) -> Reattacked:
        """The result that is kept for the same ``deciding`` values, else a new one, which is kept."""
        if self.folder is None:
            return compute()
        digest = hashlib.sha256(json.dumps(deciding, sort_keys=True, default=str).encode()).hexdigest()
        path = self.folder / f"{digest[:32]}.safetensors"
        if path.exists():
            return _from_tensors(load_file(path))
        found = compute()
        write_bytes(path, save(_to_tensors(found)))
        return found


def digest_of(*tensors: Tensor) -> str:
    """Of their values, for ``deciding``."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _to_tensors(found: Reattacked) -> dict[str, Tensor]:
    tensors = {name: getattr(found, name) for name in _WHOLE}
    for place, (name, judged) in enumerate(found.versions.items()):
        tensors |= {f"{place}|{name}|{part}": getattr(judged, part) for part in _OF_A_VERSION}
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}


def _from_tensors(tensors: dict[str, Tensor]) -> Reattacked:
    keys = sorted({tuple(key.split("|")[:2]) for key in tensors if "|" in key}, key=lambda key: int(key[0]))
    versions = {
        name: Judged(**{part: tensors[f"{place}|{name}|{part}"] for part in _OF_A_VERSION}) for place, name in keys
    }
    return Reattacked(**{name: tensors[name] for name in _WHOLE}, versions=versions)
