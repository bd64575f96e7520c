"""What a tiny CLIP is trained on: images, class names, templates, and the network's shape for them."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fashion_mnist_data
import torch
from torch import Tensor

from defense.datasets import DatasetSpec, open_dataset
from defense.probe import ProbeSet

Split = tuple[Tensor, Tensor]
# Width 32: the vocabulary of open_clip's tokenizer has 49,408 entries, and this is most of the file.
_TEXT_CFG = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
_PREPROCESS = {"interpolation": "bicubic", "resize_mode": "shortest"}


@dataclass(frozen=True)
class ClipData:
    """A dataset as the training script takes it.

    Attributes:
        title: for people. names: of the classes, in the order of the labels. templates: of prompts, with ``{}``.
        load: training and test images (uint8 ``[N, H, W]`` or ``[N, H, W, 3]``) and labels (int64 ``[N]``), the last
            of the training images in random order of classes, because they are held out.
        model_cfg, preprocess_cfg: open_clip's; mean and std are of the training pixels.
    """

    title: str
    names: tuple[str, ...]
    templates: tuple[str, ...]
    load: Callable[[argparse.Namespace], tuple[Split, Split]]
    model_cfg: dict[str, Any]
    preprocess_cfg: dict[str, Any]


def _load_fashion_mnist(arguments: argparse.Namespace) -> tuple[Split, Split]:
    folder = fashion_mnist_data.find_data(arguments.data)
    return fashion_mnist_data.load_split(folder, train=True), fashion_mnist_data.load_split(folder, train=False)


def _load_cifar10(arguments: argparse.Namespace) -> tuple[Split, Split]:
    if not arguments.data or not arguments.test_data:
        raise SystemExit("expected --data and --test-data, tar files of class folders with CIFAR-10's images, got none")
    (images, labels), test = (_of_tar(path) for path in (arguments.data, arguments.test_data))
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))  # a tar has class after class
    return (images[shuffled], labels[shuffled]), test


def _of_tar(path: Path) -> Split:
    spec = DatasetSpec(kind="tar", path=path)
    images: ProbeSet = open_dataset("images", {"images": spec}, CIFAR10.names)
    return torch.stack([torch.from_numpy(images.pixels(i, None).copy()) for i in range(len(images))]), images.labels


FASHION_MNIST = ClipData(
    title="Fashion-MNIST",
    names=fashion_mnist_data.CLASSES,
    templates=(
        "a photo of a {}",
        "a picture of a {}",
        "a grayscale photo of a {}",
        "a small photo of a {}",
        "clothing: {}",
    ),
    load=_load_fashion_mnist,
    model_cfg={
        "embed_dim": 64,
        "vision_cfg": {"image_size": 28, "layers": 5, "width": 64, "head_width": 16, "patch_size": 4, "mlp_ratio": 3.0},
        "text_cfg": _TEXT_CFG,
    },
    preprocess_cfg={"mean": [0.286] * 3, "std": [0.353] * 3, **_PREPROCESS},
)
CIFAR10 = ClipData(
    title="CIFAR-10",
    names=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    templates=("a photo of a {}", "a picture of a {}", "a blurry photo of a {}", "a small photo of a {}"),
    load=_load_cifar10,
    model_cfg={
        "embed_dim": 64,
        # A ResNet: in a few minutes, a transformer learns far less from color images.
        "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "head_width": 16},
        "text_cfg": _TEXT_CFG,
    },
    preprocess_cfg={"mean": [0.491, 0.482, 0.447], "std": [0.247, 0.243, 0.262], **_PREPROCESS},
)
DATASETS = {"fashion-mnist": FASHION_MNIST, "cifar10": CIFAR10}
