"""Parity with the official implementation, on an adversarially trained CIFAR-10 ResNet-18 of width 16.

``tests/data/official_rn18_w16.npz`` has what the official code gives. The CIFAR images it was given are not ours to
ship; without them these tests skip.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from defense import DefendedClassifier, SplitClassifier, leave_one_out_importance, top_k_masks
from defense.resnet import CifarResNet

DATA = Path(__file__).parents[1] / "data"
IMAGES = Path(__file__).parents[3] / "shared" / "golden" / "official_rn18_w16.npz"
LAYERS = ["layer4", "layer3", "layer1"]

pytestmark = pytest.mark.skipif(not IMAGES.exists(), reason=f"the CIFAR-10 images of the goldens are not at {IMAGES}")


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    with np.load(DATA / "official_rn18_w16.npz") as numbers, np.load(IMAGES) as images:
        arrays = {name: torch.from_numpy(numbers[name]) for name in numbers}
        for name in ("probe_images", "test_images"):
            arrays[name] = torch.from_numpy(images[name]).permute(0, 3, 1, 2) / 255
    return arrays


@pytest.fixture(scope="module")
def splits() -> dict[str, SplitClassifier]:
    model = CifarResNet(width=16)
    model.load_state_dict(load_file(DATA / "rn18_w16.safetensors"))
    return {layer: SplitClassifier(model, layer) for layer in LAYERS}


def test_undefended_logits(golden: dict[str, Tensor], splits: dict[str, SplitClassifier]) -> None:
    logits = splits["layer4"](golden["test_images"])
    torch.testing.assert_close(logits, golden["undefended_logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("layer", LAYERS)
def test_importance_masks_and_defended_logits(
    layer: str, golden: dict[str, Tensor], splits: dict[str, SplitClassifier]
) -> None:
    split, top_k = splits[layer], int(golden[f"k_{layer}"])
    probe = zip(golden["probe_images"].split(100), golden["probe_labels"].split(100), strict=True)
    importance = leave_one_out_importance(split, probe)
    largest = float(golden[f"loir_{layer}"].max())
    torch.testing.assert_close(importance.scores, golden[f"loir_{layer}"], atol=1e-4 * largest, rtol=0)
    assert_masks_equal_where_not_tied(importance.scores, golden[f"masks_{layer}"], top_k)

    for suffix, num_noise_samples, sigma in (("nonoise", 1, 0), ("sigma4_n1", 1, 4 / 255), ("sigma4_n4", 4, 4 / 255)):
        noise = golden[f"noise_n{num_noise_samples}"].float() if sigma else None
        defended = DefendedClassifier(
            split, importance, top_k=top_k, temperature=0.01, sigma=sigma, num_noise_samples=num_noise_samples
        )
        expected = golden[f"defended_{layer}_{suffix}"]
        torch.testing.assert_close(defended(golden["test_images"], noise), expected, atol=1e-4, rtol=0)
        prediction = defended.predict(golden["test_images"], noise)
        torch.testing.assert_close(prediction.logits, expected, atol=1e-4, rtol=0)


def assert_masks_equal_where_not_tied(scores: Tensor, official: Tensor, top_k: int) -> None:
    masks = top_k_masks(scores, top_k)
    threshold = scores.sort(dim=1, descending=True).values[:, top_k - 1 : top_k + 1].mean(dim=1, keepdim=True)
    tied = (scores - threshold).abs() < 1e-6 * scores.max()
    assert torch.equal(masks.bool() | tied, official.bool() | tied)
    assert tied.float().mean() < 0.01
