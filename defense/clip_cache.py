"""CLIP's image features on disk: they do not depend on the classifier, so a second ranking need not compute them."""

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

logger = logging.getLogger(__name__)

FEATURES = "image_features"


class ClipFeatureCache:
    """Image features [n, D] by dataset digest and CLIP digest, one safetensors file each.

    Safe for several processes: a file appears whole or not at all, and whoever writes last wrote the same.

    Args:
        directory: created when first needed.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)

    def path(self, dataset_digest: str, clip_digest: str) -> Path:
        """Where these features are, or would be."""
        key = hashlib.sha256(f"{dataset_digest}|{clip_digest}".encode()).hexdigest()
        return self.directory / f"clip-{key[:32]}.safetensors"

    def get_or_compute(self, dataset_digest: str, clip_digest: str, compute: Callable[[], Tensor]) -> Tensor:
        """The cached features; else ``compute()``, kept for the next time."""
        features = self.get(dataset_digest, clip_digest)
        if features is None:
            features = compute()
            if torch.isfinite(features).all():  # an image that could not be read may be readable the next time
                self.put(dataset_digest, clip_digest, features)
        return features

    def get(self, dataset_digest: str, clip_digest: str) -> Tensor | None:
        """The cached features, or None: not there, or damaged (logged)."""
        path, expected = self.path(dataset_digest, clip_digest), _metadata(dataset_digest, clip_digest)
        try:
            with safe_open(path, framework="pt") as file:
                features: Tensor = file.get_tensor(FEATURES)
                found = file.metadata()
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError) as error:
            logger.warning("%s is damaged (%s); computing the CLIP features again", path, error)
            return None
        if found != expected or features.ndim != 2 or not torch.isfinite(features).all():
            logger.warning("%s has other contents than its name says; computing the CLIP features again", path)
            return None
        return features

    def put(self, dataset_digest: str, clip_digest: str, features: Tensor) -> None:
        """Keep features [n, D]. A disk that is full or read-only is logged: a cache may not fail a ranking."""
        path = self.path(dataset_digest, clip_digest)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            _write(features.detach().float().cpu().contiguous(), _metadata(dataset_digest, clip_digest), path)
        except (SafetensorError, OSError) as error:
            logger.warning("cannot cache CLIP features in %s: %s", path, error)


def _metadata(dataset_digest: str, clip_digest: str) -> dict[str, str]:
    return {"dataset_digest": dataset_digest, "clip_digest": clip_digest}


def _write(features: Tensor, metadata: dict[str, str], path: Path) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    os.close(descriptor)
    try:
        save_file({FEATURES: features}, temporary, metadata)
        with Path(temporary).open("rb") as file:
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)
