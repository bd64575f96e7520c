"""Surrogates: what an attack differentiates in place of the model that it is judged on.

Each takes images [B, channels, H, W] and returns logits [B, C]. Of a model that is no DefendedClassifier, and so has
neither masks nor noise, most surrogates are the model itself: a control meets the same attacks as the defense.
"""

import torch
from torch import Tensor, nn

from defense import DefendedClassifier


def undefended(model: nn.Module) -> nn.Module:
    """The classifier under the defense: one pass, no noise, no masks."""
    return model.split if isinstance(model, (DefendedClassifier, FirstPass)) else model


def first_pass(model: nn.Module) -> nn.Module:
    """The noisy first pass alone."""
    return FirstPass(model) if isinstance(model, DefendedClassifier) else model


def has_noise(model: nn.Module) -> bool:
    """Whether two calls on the same images differ: by its sigma or, of other models, an attribute ``has_noise``."""
    inside = (FirstPass, SmoothPseudoLabel, BothPasses)
    defended = model.defended if isinstance(model, inside) else model
    return defended.sigma > 0 if isinstance(defended, DefendedClassifier) else bool(getattr(model, "has_noise", False))


class FirstPass(nn.Module):
    """The noisy first pass of a defense: its logits are those of the pseudo-label. Also the control "noise only"."""

    def __init__(self, defended: DefendedClassifier) -> None:
        super().__init__()
        self.defended, self.split = defended, defended.split

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, C], averaged over the noise draws."""
        noisy = self.defended.with_noisy_copies(images)[len(images) if self.defended.sigma else 0 :]
        logits: Tensor = self.split(noisy)  # the clean images need not go through the trunk
        mean: Tensor = logits.unflatten(0, (-1, len(images))).mean(dim=0)
        return mean


class SmoothPseudoLabel(nn.Module):
    """The defense forward; backward, the pseudo-label's softmax has another temperature.

    At temperature 0.01 the softmax is a step almost everywhere: its gradient is 0 although it is there. BPDA (Athalye
    et al., arXiv 1802.00420) replaces it, on the way back only, by a function that is like it and has a gradient.
    """

    def __init__(self, defended: DefendedClassifier, temperature: float = 1.0) -> None:
        super().__init__()
        self.defended, self.temperature = defended, temperature

    def forward(self, images: Tensor) -> Tensor:
        return smooth_passes(self.defended, images, self.temperature)[1]


class BothPasses(nn.Module):
    """The mean log-probability of both passes: its cross-entropy pushes both away from the true class."""

    def __init__(self, defended: DefendedClassifier, temperature: float = 1.0) -> None:
        super().__init__()
        self.defended, self.temperature = defended, temperature

    def forward(self, images: Tensor) -> Tensor:
        first, second = smooth_passes(self.defended, images, self.temperature)
        return (first.log_softmax(dim=1) + second.log_softmax(dim=1)) / 2


class FixedMask(nn.Module):
    """One pass without noise, with the mask of one class of each image, whatever the first pass would say.

    Args:
        place: 0 for the image's true class, 1 for the one that the undefended model puts next, and so on.
    """

    classes: Tensor

    def __init__(self, defended: DefendedClassifier, place: int = 0) -> None:
        super().__init__()
        self.defended, self.place = defended, place

    @torch.no_grad()
    def hold(self, images: Tensor, labels: Tensor) -> None:
        """Choose the class of each of these (clean) images; until the next call, inputs belong to them in order."""
        logits = self.defended.split(images).scatter(1, labels[:, None], torch.inf)
        self.classes = logits.argsort(dim=1, descending=True)[:, self.place]

    def forward(self, images: Tensor) -> Tensor:
        weights = nn.functional.one_hot(self.classes, self.defended.split.num_classes).to(images.dtype)
        # APGD asks for the first image alone, to count the classes.
        return self.defended.masked_pass(self.defended.split.cut(images), weights[: len(images)])


class FixedNoise(nn.Module):
    """The defense with the same noise in every call and for every image: a deterministic model.

    Args:
        seed: of the noise.
    """

    def __init__(self, defended: DefendedClassifier, seed: int = 0) -> None:
        super().__init__()
        self.defended, self.seed = defended, seed

    def forward(self, images: Tensor) -> Tensor:
        shape = (self.defended.num_noise_samples, 1, *images.shape[1:])
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(self.seed)).to(images)
        logits: Tensor = self.defended(images, noise.expand(-1, len(images), -1, -1, -1))
        return logits


def first_pass_of(defended: DefendedClassifier, images: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """What crosses the split for the clean images, and the first pass's logits [B, C]."""
    return defended.first_pass(defended.split.cut(defended.with_noisy_copies(images)))


def smooth_passes(defended: DefendedClassifier, images: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Logits [B, C] of both passes; backward, the pseudo-label's softmax has another temperature."""
    clean, first = first_pass_of(defended, images)
    smooth = torch.softmax(first / temperature, dim=1)
    weights = smooth + (defended.pseudo_label(first) - smooth).detach()
    return first, defended.masked_pass(clean, weights)
