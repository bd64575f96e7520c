"""The images that are sent: Fashion-MNIST's test images as they are, with noise, and attacked with gradients."""

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from defense import DefendedClassifier, SplitClassifier, load_classifier, load_importance, read_config
from models import BUNDLED

sys.path.append(str(BUNDLED.parent))  # the scripts that the model was trained and checked with
from check_gradient_masking import square_attack
from fashion_mnist_data import find_data, load_split, pgd, to_input

CACHE = Path(".cache/attack-traffic")
EPSILON = 25 / 255  # 0.1 in whole gray levels, so that nothing is lost in the uint8 pixels that travel
STEPS, STEP_SIZE, NOISE_DRAWS = 20, 0.01, 2
BATCH = 100

Pixels = NDArray[np.uint8]


def test_images(data: Path | None = None) -> tuple[Pixels, NDArray[np.int64]]:
    """All test images [N, 28, 28] and their labels [N], in a random order that is always the same."""
    pixels, labels = load_split(find_data(data), train=False)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return pixels[order].numpy(), labels[order].numpy()


def as_input(pixels: Pixels) -> Tensor:
    """[N, 1, H, W] in [0, 1]."""
    return to_input(torch.from_numpy(pixels))


def as_pixels(images: Tensor) -> Pixels:
    """[N, H, W] of [N, 1, H, W]."""
    return (images.squeeze(1) * 255).round().clamp(0, 255).to(torch.uint8).numpy()


def with_uniform_noise(pixels: Pixels) -> Pixels:
    """Each pixel moved by anything up to epsilon."""
    images, generator = as_input(pixels), torch.Generator().manual_seed(1)
    return as_pixels(images + torch.empty_like(images).uniform_(-EPSILON, EPSILON, generator=generator))


def with_random_signs(pixels: Pixels) -> Pixels:
    """Each pixel moved by epsilon, up or down: the same L-infinity norm as an attack at its radius."""
    images, generator = as_input(pixels), torch.Generator().manual_seed(2)
    return as_pixels(images + EPSILON * (torch.rand(images.shape, generator=generator) - 0.5).sign())


def defended_classifier() -> DefendedClassifier:
    """The bundled model under the defense, in float32, as an attacker who has the files would build it."""
    config = read_config(BUNDLED).defense
    split = SplitClassifier(load_classifier(BUNDLED).requires_grad_(False), config.layer)
    importance = load_importance(BUNDLED)
    assert importance is not None
    return DefendedClassifier(
        split,
        importance,
        top_k=config.top_k,
        temperature=config.temperature,
        sigma=config.sigma,
        num_noise_samples=config.num_noise_samples,
    )


def pgd_on_undefended(pixels: Pixels, labels: NDArray[np.int64]) -> Pixels:
    """PGD on the weights without the defense, which the attacker does not know of."""
    classifier = defended_classifier()
    return _cached("undefended", classifier, classifier.split, pixels, labels)


def pgd_on_defended(pixels: Pixels, labels: NDArray[np.int64]) -> Pixels:
    """PGD through both passes, each step on the mean logits of several noise draws (EoT, arXiv 1802.00420)."""
    classifier = defended_classifier()
    return _cached("defended", classifier, _expected(classifier), pixels, labels)


def search_squares(
    ask: Callable[[Pixels], NDArray[np.float32]], pixels: Pixels, labels: NDArray[np.int64], queries: int
) -> Pixels:
    """Square attack on whatever answers: the best images found.

    Args:
        ask: the probabilities [n, C] of images [n, H, W]. queries: of each image, at most.
    """

    def probabilities(candidates: Tensor) -> Tensor:
        return torch.from_numpy(ask(as_pixels(candidates)))

    torch.manual_seed(3)
    found, _ = square_attack(probabilities, as_input(pixels), torch.from_numpy(labels), queries, epsilon=EPSILON)
    return as_pixels(found)


def _expected(classifier: DefendedClassifier) -> Callable[[Tensor], Tensor]:
    return lambda images: torch.stack([classifier(images) for _ in range(NOISE_DRAWS)]).mean(0)


def _cached(
    name: str,
    classifier: DefendedClassifier,
    logits: Callable[[Tensor], Tensor],
    pixels: Pixels,
    labels: NDArray[np.int64],
) -> Pixels:
    """Attacked images, from a file if the same were made before."""
    settings = (classifier.split.model_digest, classifier.masks.sum(0).tolist(), classifier.sigma, len(pixels))
    made_of = f"{settings} {EPSILON} {STEPS} {STEP_SIZE} {NOISE_DRAWS}"
    path = CACHE / f"{name}-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"pixels": torch.from_numpy(_attack(logits, pixels, labels))}, path)
    return load_file(path)["pixels"].numpy()


def _attack(logits: Callable[[Tensor], Tensor], pixels: Pixels, labels: NDArray[np.int64]) -> Pixels:
    torch.set_flush_denormal(True)  # denormal numbers slow a CPU down many times
    torch.manual_seed(0)
    images = as_input(pixels).contiguous(memory_format=torch.channels_last)
    batches = zip(images.split(BATCH), torch.from_numpy(labels).split(BATCH), strict=True)
    attacked = [pgd(logits, x, y, epsilon=EPSILON, steps=STEPS, step_size=STEP_SIZE) for x, y in batches]
    return as_pixels(torch.cat(attacked))
