"""The passes of the trunk that all settings share: computed once, so that a setting costs a tail."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from defense import SplitClassifier

Progress = Callable[[int], None]


@dataclass(frozen=True)
class SharedPasses:
    """What the first and the second pass need of one version of the images (clean, or under one attack).

    Attributes:
        labels: [n].
        undefended_logits: [n, C].
        activations: of each layer, [n, N, ...] of the images as they are, and what bypasses the layer.
        noisy_logits: of each sigma > 0, [draws, n, C] of the noisy copies: they depend on no other setting.
    """

    labels: Tensor
    undefended_logits: Tensor
    activations: dict[str, tuple[Tensor, ...]]
    noisy_logits: dict[float, Tensor] = field(default_factory=dict)

    def first_pass_logits(self, sigma: float, num_noise_samples: int, redraw: int) -> Tensor:
        """[n, C] averaged over the noise samples of one redraw."""
        if sigma == 0:
            return self.undefended_logits
        first = redraw * num_noise_samples
        draws = self.noisy_logits[sigma][first : first + num_noise_samples]
        if len(draws) < num_noise_samples:
            available = len(self.noisy_logits[sigma])
            raise ValueError(f"expected {first + num_noise_samples} noise draws of sigma {sigma}, got {available}")
        return draws.mean(dim=0)


@torch.no_grad()
def share_passes(
    splits: Mapping[str, SplitClassifier],
    images: Tensor,
    labels: Tensor,
    *,
    sigmas: Sequence[float],
    draws: int,
    seed: int = 0,
    batch_size: int = 256,
    progress: Progress | None = None,
) -> SharedPasses:
    """Run all passes for one version of the images.

    A draw's noise is the same for every sigma, so that settings are compared on the same luck.

    Args:
        splits: the same classifier, split at each layer.
        images: [n, channels, H, W] in [0, 1]; labels: [n].
        sigmas: those above 0 are drawn. draws: noise draws of each.
        seed: of the noise. progress: called with the number of passes of a batch that are done.
    """
    batches, step = images.split(batch_size), progress or (lambda done: None)
    activations: dict[str, list[tuple[Tensor, ...]]] = {layer: [] for layer in splits}
    logits, noisy = [], {sigma: list[Tensor]() for sigma in sigmas if sigma > 0}
    for number, batch in enumerate(batches):
        for layer, split in splits.items():
            activations[layer].append(split.cut(batch))
        split = next(iter(splits.values()))
        logits.append(split.tail(*activations[split.layer][-1]))
        for sigma in noisy:
            noisy[sigma].append(_noisy_logits(split, batch, sigma, draws, seed + 7919 * number))
        step((number + 1) * passes_of_a_batch(len(splits), sigmas, draws))
    return SharedPasses(
        labels,
        torch.cat(logits),
        {layer: tuple(torch.cat(part) for part in zip(*parts, strict=True)) for layer, parts in activations.items()},
        {sigma: torch.cat(parts, dim=1) for sigma, parts in noisy.items()},
    )


def passes_of_a_batch(num_layers: int, sigmas: Sequence[float], draws: int) -> int:
    """How many passes one batch of one version of the images takes."""
    return num_layers + draws * sum(sigma > 0 for sigma in sigmas)


def _noisy_logits(split: SplitClassifier, images: Tensor, sigma: float, draws: int, seed: int) -> Tensor:
    """[draws, B, C]."""
    generator = torch.Generator().manual_seed(seed)
    noise = (torch.randn(images.shape, generator=generator).to(images) for _ in range(draws))
    return torch.stack([split(images + sigma * v) for v in noise])
