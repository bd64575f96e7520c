"""Test images: labelled images of a dataset in an order that never changes, so that a run can grow."""

import copy
import gzip
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from defense.datasets import OWN_PROBE_SET, DatasetSpec, open_dataset
from defense.model_config import InputConfig
from defense.probe import ArrayProbeSet, ProbeSet, load_probe_set
from evaluation.errors import EvaluationError

ORDER_SEED = 0
_IDX = "t10k-{}-idx{}-ubyte"


@dataclass(frozen=True)
class Block:
    """Consecutive test images.

    Attributes:
        start: place of the first in the order of the run. images: [B, C, H, W] float32 in [0, 1]. labels: [B].
    """

    start: int
    images: Tensor
    labels: Tensor

    @property
    def stop(self) -> int:
        return self.start + len(self.labels)

    @property
    def digest(self) -> str:
        """``"sha256:..."`` of pixels and labels."""
        digest = hashlib.sha256(f"{tuple(self.images.shape)}|".encode())
        digest.update(self.images.contiguous().numpy().tobytes() + self.labels.numpy().tobytes())
        return f"sha256:{digest.hexdigest()}"


class TestImages:
    """The first ``n`` images of a dataset in a shuffled order: the same images whatever ``n`` is, and more of them.

    Shuffled, because datasets are stored class after class.

    Args:
        dataset: labelled images, labels as the model's class indices.
        config: the network's input, to which images are fitted.
    """

    __test__ = False  # for pytest, which takes the name for tests

    def __init__(self, dataset: ProbeSet, config: InputConfig | None, n: int, class_names: Sequence[str] = ()) -> None:
        if not 1 <= n <= len(dataset):
            raise EvaluationError(f"expected 1 to {len(dataset)} images of '{dataset.name}', got n = {n}")
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(ORDER_SEED))[:n].tolist()
        self.name, self.class_names = dataset.name, tuple(class_names or dataset.class_names)
        self.indices, self.labels = order, dataset.labels[order]
        pixels = [torch.tensor(dataset.pixels(i, config)) for i in order]
        self.images = torch.stack(pixels).permute(0, 3, 1, 2).float() / 255

    @property
    def digest(self) -> str:
        """Of all pixels and labels, whatever kind of files they come from."""
        return Block(0, self.images, self.labels).digest

    def first(self, n: int) -> "TestImages":
        """The first n of these."""
        few = copy.copy(self)
        few.indices, few.labels, few.images = self.indices[:n], self.labels[:n], self.images[:n]
        return few

    def __len__(self) -> int:
        return len(self.labels)

    def blocks(self, size: int) -> Iterator[Block]:
        """Blocks of that many images, the last one perhaps of fewer."""
        for start in range(0, len(self), size):
            here = slice(start, start + size)
            yield Block(start, self.images[here].contiguous(), self.labels[here])


def open_data(data: str, labels: Sequence[str], model_directory: Path | None = None) -> ProbeSet:
    """The dataset at a path, whatever its kind: the test set where there are two.

    Args:
        data: a tar of class folders, a folder of them, ``.npz`` or ``.safetensors`` arrays, the folder that has
            CIFAR's or MNIST's (Fashion-MNIST's) files; or ``probe``, the model directory's own probe set.
        labels: the model's.

    Raises:
        ProbeSetError: it cannot be read, or its classes are not the model's.
        EvaluationError: there is nothing at the path.
    """
    path = Path(data)
    if data == OWN_PROBE_SET and model_directory:
        return load_probe_set(model_directory)
    if not path.exists():
        raise EvaluationError(f"expected a dataset at {path}: a tar, a folder, .npz or .safetensors; found nothing")
    if idx_folder := _idx_folder(path):
        return _open_idx(path.name, idx_folder, labels)
    spec = DatasetSpec.model_validate({"kind": _kind(path), "path": path.absolute(), "split": "test"})
    return open_dataset(path.stem, {path.stem: spec}, labels)


def _kind(path: Path) -> str:
    if path.suffix in (".npz", ".safetensors"):
        return "arrays"
    if path.is_file():
        return "tar"
    cifar = {"cifar-10-batches-py": "cifar10", "cifar-100-python": "cifar100"}
    return next((kind for folder, kind in cifar.items() if (path / folder).is_dir()), "image-folder")


def _idx_folder(path: Path) -> Path | None:
    """Where MNIST's test files are: here, or where torchvision puts them below."""
    folders = [path, *path.glob("*/raw")] if path.is_dir() else []
    return next((f for f in folders if list(f.glob(_IDX.format("images", 3) + "*"))), None)


def _open_idx(name: str, folder: Path, labels: Sequence[str]) -> ProbeSet:
    images = _read_idx(folder / _IDX.format("images", 3)).unsqueeze(-1)
    return ArrayProbeSet(name, images, _read_idx(folder / _IDX.format("labels", 1)).long(), labels)


def _read_idx(path: Path) -> Tensor:
    from torchvision.datasets.mnist import read_sn3_pascalvincent_tensor  # imports slowly

    if path.exists():
        tensor: Tensor = read_sn3_pascalvincent_tensor(str(path))
        return tensor
    with TemporaryDirectory() as directory:  # torchvision reads the unpacked file only
        unpacked = Path(directory) / path.name
        unpacked.write_bytes(gzip.decompress(path.with_name(path.name + ".gz").read_bytes()))
        return _read_idx(unpacked)
