"""DefendedClassifier: the two passes of IG-Defense (Kulkarni & Weng, ECCV 2024, arXiv 2409.15190)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from defense.errors import ImportanceMismatch
from defense.importance import NeuronImportance
from defense.masking import top_k_masks
from defense.split import SplitClassifier


@dataclass(frozen=True)
class DefendedPrediction:
    """What both passes say of a batch.

    Attributes:
        logits: [B, C], of the masked second pass.
        undefended_logits: [B, C], of the same clean images without a mask.
        class_weights: [B, C], the soft pseudo-label of the noisy first pass; rows sum to 1.
    """

    logits: Tensor
    undefended_logits: Tensor
    class_weights: Tensor


class DefendedClassifier(nn.Module):
    """Classify twice, the second time with the neurons that matter for the classes the first pass believes in.

    Differentiable from logits to images, through the masks and through the pseudo-label. Always in eval mode and
    without state: an image's answer depends on its noise only, drawn from torch's global generator unless given.

    Args:
        split: the classifier as trunk and tail.
        importance: its neurons, ranked at the same layer.
        top_k: neurons kept for each class.
        temperature: of the softmax over first-pass logits.
        sigma: standard deviation of the first pass's noise, in pixel units of [0, 1]; 0 for none.
        num_noise_samples: noise draws whose first-pass logits are averaged.
        unimportant_weight: what a dropped neuron keeps of its activation, 0 in the paper.

    Raises:
        ImportanceMismatch: the importance is of another model, layer, or number of neurons or classes.
        ImportanceError: ``top_k`` is out of range.
        ValueError: a setting is out of range.
    """

    masks: Tensor

    def __init__(
        self,
        split: SplitClassifier,
        importance: NeuronImportance,
        *,
        top_k: int = 50,
        temperature: float = 0.01,
        sigma: float = 4 / 255,
        num_noise_samples: int = 1,
        unimportant_weight: float = 0.0,
    ) -> None:
        super().__init__()
        _check_settings(temperature, sigma, num_noise_samples, unimportant_weight)
        _check_fits(split, importance)
        self.split = split
        self.top_k, self.temperature, self.sigma = top_k, temperature, sigma
        self.num_noise_samples, self.unimportant_weight = num_noise_samples, unimportant_weight
        masks = top_k_masks(importance.scores, top_k)
        reference = next(split.parameters(), masks)
        self.register_buffer("masks", (masks + (1 - masks) * unimportant_weight).to(reference.device))
        self.eval()

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Classify twice, the second time with the important neurons only.

        Args:
            images: [B, channels, H, W], in [0, 1].
            noise: [num_noise_samples, B, channels, H, W], standard normal, scaled by sigma here; drawn if None.

        Returns:
            Logits of the second pass, [B, C].
        """
        clean, logits = self.first_pass(self.split.cut(self.with_noisy_copies(images, noise)))
        return self.masked_pass(clean, self.pseudo_label(logits))

    @torch.no_grad()
    def predict(self, images: Tensor, noise: Tensor | None = None) -> DefendedPrediction:
        """Both passes' answers; the undefended one costs an additional tail, not an additional trunk.

        Args:
            images, noise: as for ``forward``.
        """
        return self.judge(*self.split.cut(self.with_noisy_copies(images, noise)))

    def with_noisy_copies(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """What the trunk takes: the images [B, ...] and after them their noisy copies [n * B, ...], unless sigma is 0.

        One trunk call serves both passes: cheaper than two, at small batches most of all.

        Args:
            images, noise: as for ``forward``.
        """
        if self.sigma == 0:
            return images
        return torch.cat([images, self.noisy_copies(images, self._standard_normal(images, noise))])

    def noisy_copies(self, images: Tensor, noise: Tensor) -> Tensor:
        """[n * B, ...] of images [B, ...] and noise [n, B, ...]; not clamped, as in the paper."""
        return (images + self.sigma * noise).flatten(0, 1)

    def judge(self, *values: Tensor, masks: Tensor | None = None) -> DefendedPrediction:
        """Both passes' answers, from what crosses the split for ``with_noisy_copies(images)``.

        Args:
            values: activations [(1 + n) * B, ...] and what bypasses the layer; B without noise.
            masks: [C, N], in place of this importance's: for what is compiled once for all.
        """
        clean, logits = self.first_pass(values)
        undefended_logits = self.split.tail(*clean) if self.sigma else logits
        class_weights = self.pseudo_label(logits)
        return DefendedPrediction(self.masked_pass(clean, class_weights, masks), undefended_logits, class_weights)

    def first_pass(self, values: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor]:
        """What crosses the split for the clean images, and logits [B, C] averaged over the noisy copies.

        Args:
            values: what crosses the split for ``with_noisy_copies(images)``, as for ``judge``.
        """
        if self.sigma == 0:
            return values, self.split.tail(*values)
        copies = [value.unflatten(0, (1 + self.num_noise_samples, -1)) for value in values]
        noisy_logits = self.split.tail(*(copy[1:].flatten(0, 1) for copy in copies))
        return tuple(copy[0] for copy in copies), noisy_logits.unflatten(0, (self.num_noise_samples, -1)).mean(dim=0)

    def pseudo_label(self, logits: Tensor) -> Tensor:
        """Class weights [B, C] of first-pass logits [B, C]."""
        # Softmax, not argmax: an adaptive attack needs this gradient.
        return torch.softmax(logits / self.temperature, dim=1)

    def masked_pass(self, clean: tuple[Tensor, ...], class_weights: Tensor, masks: Tensor | None = None) -> Tensor:
        """The second pass from the split on: logits [B, C] with the neurons that matter for these classes.

        Args:
            clean: activations [B, N, ...] of the clean images, and what bypasses the layer. class_weights: [B, C].
            masks: as for ``judge``.
        """
        activations, *bypass = clean
        kept = class_weights @ (self.masks if masks is None else masks).to(class_weights)
        return self.split.tail(activations * _per_channel(kept, activations.ndim), *bypass)

    def second_pass(self, first_pass_logits: Tensor, activations: Tensor, *bypass: Tensor) -> Tensor:
        """Defended logits [B, C], where the first pass is known already: the tail alone runs.

        Args:
            first_pass_logits: [B, C], of the noisy copies, averaged; without noise the undefended logits.
            activations: [B, N, ...] of the clean images, and what bypasses the layer.
        """
        return self.masked_pass((activations, *bypass), self.pseudo_label(first_pass_logits))

    def train(self, mode: bool = True) -> "DefendedClassifier":
        """Stay in eval mode: this is a test-time defense, and batch statistics would mix the images of a batch."""
        return super().train(False)

    def _standard_normal(self, images: Tensor, noise: Tensor | None) -> Tensor:
        shape = (self.num_noise_samples, *images.shape)
        if noise is None:
            return torch.randn(shape, dtype=images.dtype, device=images.device)
        if tuple(noise.shape) != shape:
            raise ValueError(f"expected noise of shape {list(shape)} [noise samples, *images], got {list(noise.shape)}")
        return noise.to(images)


def _per_channel(masks: Tensor, ndim: int) -> Tensor:
    return masks.reshape(*masks.shape, *(1,) * (ndim - 2))


def _check_settings(temperature: float, sigma: float, num_noise_samples: int, unimportant_weight: float) -> None:
    if not temperature > 0:
        raise ValueError(f"expected temperature > 0, got {temperature}")
    if not 0 <= sigma < float("inf"):
        raise ValueError(f"expected sigma >= 0, in pixel units of [0, 1], got {sigma}")
    if num_noise_samples < 1:
        raise ValueError(f"expected num_noise_samples >= 1, got {num_noise_samples}; for no noise set sigma=0")
    if not 0 <= unimportant_weight <= 1:
        raise ValueError(f"expected unimportant_weight from 0 to 1, got {unimportant_weight}")


def _check_fits(split: SplitClassifier, importance: NeuronImportance) -> None:
    expected = (split.num_classes, split.num_neurons)
    if tuple(importance.scores.shape) != expected:
        raise ImportanceMismatch(
            f"expected importance [classes, neurons] = {list(expected)} for layer '{split.layer}', got "
            f"{list(importance.scores.shape)} of layer '{importance.layer}'; rank this model at this layer"
        )
    if importance.layer != split.layer:
        raise ImportanceMismatch(
            f"expected importance of layer '{split.layer}', got one of '{importance.layer}'; "
            "rank that layer, or split there"
        )
    if importance.model_digest and importance.model_digest != split.model_digest:
        raise ImportanceMismatch(
            f"expected importance of the weights {split.model_digest}, got one of {importance.model_digest}; "
            "rank these weights with 'igd rank' or leave_one_out_importance"
        )
