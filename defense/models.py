"""load_classifier: from a model directory to a model that takes [0, 1] images."""

import pickle
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from defense.errors import ModelDirectoryError
from defense.model_config import ArchitectureConfig, ModelConfig, read_config
from defense.resnet import CifarResNet

# A new architecture is one entry here: a callable that takes in_channels, num_classes and what model.toml adds.
ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {"cifar-resnet": CifarResNet}
TORCHVISION = "torchvision/"


class Classifier(nn.Module):
    """A network with its normalization inside, so that epsilon and sigma stay in pixel units.

    Args:
        network: takes normalized images, returns logits.
        config: of the model directory; ``config.input`` has the normalization.
    """

    def __init__(self, network: nn.Module, config: ModelConfig) -> None:
        super().__init__()
        self.network = network
        self.input_size = config.input.shape
        self.normalize = Normalize(config.input.mean, config.input.std) if config.input.mean else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, C] of images [B, channels, H, W] in [0, 1]."""
        logits: Tensor = self.network(self.normalize(images))
        return logits


class Normalize(nn.Module):
    """(image - mean) / std for each channel; mean and std are in units of [0, 1] pixels."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...] | None) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std or [1.0] * len(mean)).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


def load_classifier(directory: Path | str) -> Classifier:
    """Build the architecture of a model directory and load its weights, strictly; in eval mode, on the CPU.

    No pickle is ever run: ``weights.safetensors``, or ``weights.pt`` with ``weights_only=True``.

    Raises:
        ModelDirectoryError: naming the file and what is wrong with it; for weights, every missing and unexpected key.
    """
    config = read_config(directory)
    network = _build(config)
    _load_strictly(network, *_read_weights(Path(directory)))
    return Classifier(network, config).eval()


def _build(config: ModelConfig) -> nn.Module:
    architecture = config.architecture
    try:
        if architecture.name.startswith(TORCHVISION):
            return _build_torchvision(architecture, len(config.labels))
        if architecture.name not in ARCHITECTURES:
            known = ", ".join([*ARCHITECTURES, TORCHVISION + "<name>"])
            raise ModelDirectoryError(f"expected architecture.name to be one of {known}, got '{architecture.name}'")
        build = ARCHITECTURES[architecture.name]
        return build(in_channels=config.input.channels, num_classes=len(config.labels), **architecture.arguments)
    except (TypeError, ValueError) as error:
        raise ModelDirectoryError(f"[architecture] of '{architecture.name}': {error}") from error


def _build_torchvision(architecture: ArchitectureConfig, num_classes: int) -> nn.Module:
    from torchvision import models  # imports slowly, and most model directories do without

    name = architecture.name.removeprefix(TORCHVISION)
    network: nn.Module = models.get_model(name, weights=None, num_classes=num_classes, **architecture.arguments)
    return network


def _read_weights(directory: Path) -> tuple[dict[str, Tensor], Path]:
    safetensors, pt = directory / "weights.safetensors", directory / "weights.pt"
    try:
        if safetensors.exists():
            return load_file(safetensors), safetensors
        if pt.exists():
            return _tensors_of(torch.load(pt, map_location="cpu", weights_only=True), pt), pt
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        path = safetensors if safetensors.exists() else pt
        raise ModelDirectoryError(f"{path} cannot be read: {error}") from error
    raise ModelDirectoryError(f"expected {safetensors.name} or {pt.name} in '{directory}', found neither")


def _tensors_of(loaded: object, path: Path) -> dict[str, Tensor]:
    if isinstance(loaded, dict) and all(isinstance(value, Tensor) for value in loaded.values()):
        return loaded
    found = list(loaded)[:8] if isinstance(loaded, dict) else type(loaded).__name__
    raise ModelDirectoryError(f"expected {path} to hold a state dict (names to tensors), found {found}")


def _load_strictly(network: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    expected = network.state_dict()
    problems = [f"missing key {name}" for name in sorted(expected.keys() - weights.keys())]
    problems += [f"unexpected key {name}" for name in sorted(weights.keys() - expected.keys())]
    problems += [
        f"{name}: expected shape {list(expected[name].shape)}, got {list(weights[name].shape)}"
        for name in sorted(expected.keys() & weights.keys())
        if expected[name].shape != weights[name].shape
    ]
    if problems:
        raise ModelDirectoryError(f"{path} does not fit the architecture of model.toml: " + "; ".join(problems))
    network.load_state_dict(weights)
