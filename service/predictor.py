"""The engine: a model directory on a device, and both passes of a batch as one call."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from defense import DefendedClassifier, NeuronImportance, SplitClassifier, load_classifier, read_config

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class ServedDefense:
    """One importance version, ready to serve. Requests hold on to the one they were admitted under."""

    version: str
    importance: NeuronImportance
    classifier: DefendedClassifier


class Predictor:
    """A model directory, loaded.

    Args:
        directory: the model directory.
        device: a torch device, or ``"auto"``: cuda if there is one, else cpu.
        threads: CPU threads of an operation; None leaves torch's choice. Call everything from one thread: each
            thread that runs torch operations gets an OpenMP team of its own.

    Raises:
        ModelDirectoryError, SplitError: the directory cannot be served.
    """

    def __init__(self, directory: Path, *, device: str = "auto", threads: int | None = None) -> None:
        if threads:
            torch.set_num_threads(threads)
        self.device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        self.config = read_config(directory)
        self._model = load_classifier(directory).to(self.device)
        self.split = SplitClassifier(self._model, self.config.defense.layer)
        self._splits = {self.split.layer: self.split}
        # Noise that an attacker could predict would be no noise.
        self._generator = torch.Generator(self.device).manual_seed(secrets.randbits(63))

    @property
    def model_digest(self) -> str:
        return self.split.model_digest

    def check(self, importance: NeuronImportance) -> None:
        """Refuse an importance that does not fit this model.

        Raises:
            DefenseError: it does not fit.
        """
        self._defend(importance)

    def _defend(self, importance: NeuronImportance) -> DefendedClassifier:
        return DefendedClassifier(self._split_at(importance.layer), importance, **self.config.defense.arguments)

    def _split_at(self, layer: str) -> SplitClassifier:
        """The split at the layer that an importance is of; model.toml's is only where rankings begin with."""
        if layer not in self._splits:
            self._splits[layer] = SplitClassifier(self._model, layer)
        return self._splits[layer]

    def prepare(self, version: str, importance: NeuronImportance) -> ServedDefense:
        """Build the defense for an importance and warm it up.

        Raises:
            DefenseError: it does not fit this model.
        """
        defense = ServedDefense(version, importance, self._defend(importance))
        channels, height, width = self.config.input.shape
        self.predict(defense, [np.zeros((height, width, channels), np.uint8)])
        return defense

    @torch.inference_mode()
    def predict(self, defense: ServedDefense, pixels: Sequence[Pixels]) -> NDArray[np.float32]:
        """Classify a batch.

        Args:
            pixels: B arrays [H, W, channels].

        Returns:
            [B, 3, C]: probabilities defended and undefended, and the pseudo-label's class weights.
        """
        batch = torch.from_numpy(np.stack(pixels)).to(self.device, non_blocking=True)
        images = batch.permute(0, 3, 1, 2).float().div_(255)
        prediction = defense.classifier.predict(images, self._noise(images))
        rows = [prediction.logits.softmax(1), prediction.undefended_logits.softmax(1), prediction.class_weights]
        result: NDArray[np.float32] = torch.stack(rows, dim=1).float().cpu().numpy()
        return result

    def _noise(self, images: torch.Tensor) -> torch.Tensor | None:
        defense = self.config.defense
        if defense.sigma == 0:
            return None
        shape = (defense.num_noise_samples, *images.shape)
        return torch.randn(shape, generator=self._generator, device=self.device)
