"""Budget: how far an adversarial image may be from the image it was made from."""

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

Norm = Literal["Linf", "L2"]
ROUNDING = 1e-6  # of float32 arithmetic on pixels in [0, 1]


@dataclass(frozen=True)
class Budget:
    """A ball around each image, cut with [0, 1].

    Args:
        epsilon: its radius, in pixel units of [0, 1] (8/255 is usual on CIFAR-10 for L-infinity).
        norm: ``"Linf"`` or ``"L2"``, over all pixels and channels of an image.

    Raises:
        ValueError: epsilon is negative, or the norm another one.
    """

    epsilon: float
    norm: Norm = "Linf"

    def __post_init__(self) -> None:
        if not 0 <= self.epsilon < float("inf"):
            raise ValueError(f"expected epsilon >= 0, in pixel units of [0, 1], got {self.epsilon}")
        if self.norm not in get_args(Norm):
            raise ValueError(f"expected norm 'Linf' or 'L2', got '{self.norm}'")

    def project(self, adversarial: Tensor, images: Tensor) -> Tensor:
        """The nearest images that are allowed, [B, C, H, W]; those that are allowed already stay as they are."""
        change = adversarial - images
        if self.norm == "Linf":
            change = change.clamp(-self.epsilon, self.epsilon)
        else:
            length = change.flatten(1).square().sum(dim=1).sqrt().clamp(min=1e-12)
            change = change * (self.epsilon / length).clamp(max=1).view(-1, 1, 1, 1)
        return (images + change).clamp(0, 1)

    def distance(self, adversarial: Tensor, images: Tensor) -> Tensor:
        """Distance of each pair of images, [B]."""
        change = (adversarial - images).flatten(1)
        return change.abs().amax(dim=1) if self.norm == "Linf" else change.square().sum(dim=1).sqrt()

    def allows(self, adversarial: Tensor, images: Tensor) -> Tensor:
        """Whether each image is in its ball and in [0, 1] to rounding, [B] bool."""
        inside = ((adversarial >= 0) & (adversarial <= 1)).flatten(1).all(dim=1)
        return inside & (self.distance(adversarial, images) <= self.epsilon + ROUNDING)
