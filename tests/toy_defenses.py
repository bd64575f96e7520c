"""Models whose robustness is computed on paper, and defenses with a bug in them."""

import torch
from torch import Tensor, nn

from defense import DefendedClassifier, SplitClassifier
from toy_models import PixelNet, importance_of

SIDE = 10
GRAY = 0.5


class LinearModel(nn.Module):
    """Logits are ``pixels @ weight.T + bias`` over 10 x 10 gray pixels; two of its four classes never win."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.zeros(4, SIDE * SIDE)
        self.weight[:2] = torch.randn(2, SIDE * SIDE, generator=generator)
        self.bias = torch.tensor([0.0, 0.0, -1000.0, -2000.0])

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weight.T + self.bias


def gray_images(count: int) -> Tensor:
    """[count, 1, 10, 10], near gray, so that no small change leaves [0, 1]."""
    return GRAY + 0.02 * torch.randn(count, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def distance_to_border(model: LinearModel, images: Tensor, norm: str) -> Tensor:
    """The smallest change of each image that changes its class, [B]: margin / dual norm of the weights' difference."""
    logits, difference = model(images), model.weight[0] - model.weight[1]
    dual = difference.abs().sum() if norm == "Linf" else difference.square().sum().sqrt()
    return (logits[:, 0] - logits[:, 1]).abs() / dual


class Staircase(nn.Module):
    """The linear model on pixels that are rounded: right next to every image its gradient is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = LinearModel()

    def forward(self, images: Tensor) -> Tensor:
        return self.linear((images * 200).round() / 200)


# Pixel 0 speaks for class 0; 1 to 8 for class 1, but no mask keeps them; 9 for class 1, whose mask it is.
_WEIGHT = [[60.0] + [0.0] * 9, [0.0] + [5.0] * 9]
_BIAS = [-10.0, -11.0]
_SCORES = [[1.0] + [0.0] * 9, [0.0] * 9 + [1.0]]
EPSILON = 0.1
BENIGN_SEED = 0


def two_way_defense(
    kind: type[DefendedClassifier] = DefendedClassifier, *, temperature: float = 0.01, sigma: float = 0.0
) -> DefendedClassifier:
    """A defense that is weak through its first pass only.

    Logits at gray are 20 and 11.5. With the mask of class 0 they are 20 and -11, and pixels change nothing of that
    within epsilon. But the first pass can be fooled: pixels 0 and 9 bring its logits closer by 6.5 and, only if the
    attack sees the way through the masks, pixels 1 to 8 by another 4. Then the mask of class 1 leaves -10 and -8.5.
    At temperature 0.01 nothing of that is in float32's gradient.
    """
    split = SplitClassifier(PixelNet(_WEIGHT, _BIAS), "features")
    return kind(split, importance_of(split, _SCORES), top_k=1, temperature=temperature, sigma=sigma)


def gray_row(count: int) -> Tensor:
    """[count, 1, 1, 10], all gray: images of class 0."""
    return torch.full((count, 1, 1, 10), GRAY)


class ConstantNoise(DefendedClassifier):
    """Bug: noise from a generator that is seeded anew in every call."""

    def _standard_normal(self, images: Tensor, noise: Tensor | None) -> Tensor:
        if noise is None:
            generator = torch.Generator().manual_seed(BENIGN_SEED)
            noise = torch.randn((self.num_noise_samples, *images.shape), generator=generator)
        return super()._standard_normal(images, noise)


class DetachedPseudoLabel(DefendedClassifier):
    """Bug: attacks cannot see how the pseudo-label depends on the image."""

    def pseudo_label(self, logits: Tensor) -> Tensor:
        return super().pseudo_label(logits).detach()


class ArgmaxPseudoLabel(DefendedClassifier):
    """Bug: argmax in place of softmax."""

    def pseudo_label(self, logits: Tensor) -> Tensor:
        return nn.functional.one_hot(logits.argmax(dim=1), logits.shape[1]).to(logits.dtype)
