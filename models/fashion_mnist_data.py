"""Fashion-MNIST reading, the L-infinity PGD attack and the figures shared by the scripts of this folder.

Fashion-MNIST: Xiao, Rasul and Vollgraf, arXiv 1708.07747. PGD: Madry et al., arXiv 1706.06083.
Images travel as uint8 ``[N, 28, 28]`` and enter the model as float32 ``[N, 1, 28, 28]`` in [0, 1].
"""

import gzip
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # package dataset-fashion-mnist
DOWNLOAD_FOLDER = Path(".cache")
_IDX_UBYTE = 0x08  # the element type code of unsigned bytes in an idx header


def find_data(directory: Path | None) -> Path:
    """The folder of the idx files: the given one, else Debian's, else torchvision's download into ``.cache``."""
    if directory is not None:
        return directory
    if DEBIAN_FOLDER.is_dir():
        return DEBIAN_FOLDER
    from torchvision.datasets import FashionMNIST

    FashionMNIST(str(DOWNLOAD_FOLDER), download=True)
    return DOWNLOAD_FOLDER / "FashionMNIST" / "raw"


def load_split(directory: Path, *, train: bool) -> tuple[Tensor, Tensor]:
    """Images (uint8 ``[N, 28, 28]``) and labels (int64 ``[N]``) of the training or the test set."""
    prefix = "train" if train else "t10k"
    images = read_idx(directory / f"{prefix}-images-idx3-ubyte")
    labels = read_idx(directory / f"{prefix}-labels-idx1-ubyte").long()
    if images.ndim != 3 or len(images) != len(labels):
        raise ValueError(f"{directory}: {tuple(images.shape)} images do not match {tuple(labels.shape)} labels")
    return images, labels


def read_idx(path: Path) -> Tensor:
    """An idx file of unsigned bytes, plain or with ``.gz`` appended to its name, as a uint8 tensor."""
    raw = path.read_bytes() if path.exists() else gzip.decompress(path.with_name(path.name + ".gz").read_bytes())
    if len(raw) < 4 or raw[:3] != bytes([0, 0, _IDX_UBYTE]):
        raise ValueError(f"{path}: not an idx file of unsigned bytes")
    header = 4 + 4 * raw[3]  # the magic number, then one big-endian 32-bit size per dimension
    shape = [int.from_bytes(raw[start : start + 4], "big") for start in range(4, header, 4)]
    if len(raw) - header != math.prod(shape):
        raise ValueError(f"{path}: {len(raw) - header} bytes of data, but its header says {shape}")
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=header).copy()).reshape(shape)


def to_input(images: Tensor) -> Tensor:
    """Model input (float32 ``[N, 1, H, W]`` in [0, 1]) of uint8 images ``[N, H, W]``."""
    return images.unsqueeze(1).float() / 255


def pgd(
    logits: Callable[[Tensor], Tensor],
    x: Tensor,
    labels: Tensor,
    *,
    epsilon: float,
    steps: int,
    step_size: float,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Adversarial examples by projected gradient ascent on the cross-entropy (arXiv 1706.06083).

    Args:
        epsilon: L-infinity radius, in units of the [0, 1] pixel range; the start is uniform in that ball.
        step_size: length of each signed step, in the same units.
    """
    low, high = (x - epsilon).clamp_(min=0), (x + epsilon).clamp_(max=1)
    noise = torch.empty_like(x).uniform_(-epsilon, epsilon, generator=generator)
    adversarial = (x + noise).clamp_(0, 1)
    for _ in range(steps):
        adversarial.requires_grad_(True)
        with torch.enable_grad():
            loss = F.cross_entropy(logits(adversarial).float(), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, adversarial)
        adversarial = torch.clamp(adversarial.detach() + step_size * gradient.sign(), low, high)
    return adversarial.detach()


@torch.no_grad()
def correct(model: nn.Module, x: Tensor, labels: Tensor) -> int:
    """How many of the inputs the model puts in the class of their label."""
    return int((model(x).argmax(1) == labels).sum())
