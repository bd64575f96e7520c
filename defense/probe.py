"""The probe set: clean labelled images that a ranking is computed on."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from defense.errors import ProbeSetError

PROBE_FILE = "probe.safetensors"


@dataclass(frozen=True, eq=False)
class ProbeSet:
    """Images and labels in memory.

    Attributes:
        name: what requests and importances call it.
        images: [n, H, W, channels] uint8, as the network takes them.
        labels: [n] int64, class indices.

    Raises:
        ProbeSetError: shapes or types that are not these.
    """

    name: str
    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype != torch.uint8:
            raise ProbeSetError(
                f"expected probe images [n, H, W, channels] uint8, got {list(self.images.shape)} {self.images.dtype}"
            )
        if self.labels.shape != self.images.shape[:1] or self.labels.dtype != torch.int64:
            raise ProbeSetError(
                f"expected {len(self.images)} int64 probe labels, got {list(self.labels.shape)} {self.labels.dtype}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, batch_size: int = 256) -> Iterator[tuple[Tensor, Tensor]]:
        """(images [B, channels, H, W] float32 in [0, 1], labels [B]) pairs, in order."""
        for images, labels in zip(self.images.split(batch_size), self.labels.split(batch_size), strict=True):
            yield images.permute(0, 3, 1, 2).float() / 255, labels


def load_probe_set(directory: Path | str) -> ProbeSet:
    """The model directory's own probe set, named ``probe``.

    Raises:
        ProbeSetError: there is none, or it is damaged.
    """
    path = Path(directory) / PROBE_FILE
    try:
        tensors = load_file(path)
        return ProbeSet("probe", tensors["images"], tensors["labels"])
    except FileNotFoundError as error:
        raise ProbeSetError(
            f"expected a probe set at {path}, found none; see models/README.md for its format"
        ) from error
    except (SafetensorError, KeyError, OSError) as error:
        raise ProbeSetError(f"{path} is not a probe set: {error!r}; expected tensors 'images' and 'labels'") from error
