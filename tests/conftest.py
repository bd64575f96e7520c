"""Shared by all tests: a model directory that is made in a moment, and no settings from the developer's shell."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from defense import SplitClassifier, leave_one_out_importance, load_classifier, load_probe_set
from defense.resnet import CifarResNet

TINY_TOML = """
name = "tiny"
labels = ["cat", "dog", "fox", "owl"]

[architecture]
name = "cifar-resnet"
width = 2
blocks = [1, 1, 1, 1]

[input]
size = [8, 8]
channels = 3

[defense]
layer = "layer4"
top_k = 4
sigma = 0.001
"""


@pytest.fixture(autouse=True, scope="session")
def _no_settings_from_the_shell() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as environment:
        for name in [name for name in os.environ if name.startswith("IGD_")]:
            environment.delenv(name)
        yield


def write_model_directory(directory: Path, *, seed: int = 0, importance: bool = True) -> Path:
    """A model directory: 4 classes, 16 neurons, random weights that follow from the seed.

    Args:
        importance: whether it ships one.
    """
    generator = np.random.default_rng(seed)
    directory.mkdir(parents=True)
    (directory / "model.toml").write_text(TINY_TOML)
    torch.manual_seed(seed)
    network = CifarResNet(width=2, num_classes=4, blocks=(1, 1, 1, 1)).eval()
    with torch.no_grad():
        network.linear.weight.mul_(20)  # so that images differ in what the network says of them
    save_file(network.state_dict(), directory / "weights.safetensors")

    images = torch.from_numpy(generator.integers(0, 256, (24, 8, 8, 3), np.uint8))
    save_file({"images": images, "labels": torch.arange(24) % 4}, directory / "probe.safetensors")
    (directory / "samples").mkdir()
    Image.fromarray(images[0].numpy()).save(directory / "samples" / "cat.png")
    if importance:
        split = SplitClassifier(load_classifier(directory), "layer4")
        ranked = leave_one_out_importance(split, load_probe_set(directory).batches(), probe_set="probe")
        (directory / "importance.safetensors").write_bytes(ranked.to_bytes())
    return directory


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with everything in it; not to be changed."""
    return write_model_directory(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def make_model(tmp_path: Path) -> Callable[..., Path]:
    """A factory of model directories; ``seed`` changes the weights, ``importance=False`` leaves the ranking out."""

    def make(name: str, **options: object) -> Path:
        return write_model_directory(tmp_path / "models" / name, **options)  # type: ignore[arg-type]

    return make
