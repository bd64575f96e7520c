"""The engine: a model directory on a device, and both passes of a batch as one call."""

import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from defense import (
    DefendedClassifier,
    NeuronImportance,
    ProbeSetError,
    SplitClassifier,
    load_classifier,
    load_probe_set,
    read_config,
)
from defense.importance import check_origin
from service.engine import FALL_BACK_BELOW, WARN_BELOW, EngineSplit, agreement, choose_dtype, resolve_device

logger = logging.getLogger(__name__)

PROBE_IMAGES = 256

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class ServedDefense:
    """One importance version, ready to serve. Requests hold on to the one they were admitted under.

    Attributes:
        dtype: of the trunk. agreement: share of probe images with the same defended prediction in float32; None where
            there was nothing to compare, or nothing to compare with.
    """

    version: str
    importance: NeuronImportance
    classifier: DefendedClassifier
    dtype: torch.dtype
    agreement: float | None


class Predictor:
    """A model directory, loaded.

    Args:
        directory: the model directory.
        device: a torch device, or ``"auto"``: cuda if there is one, else cpu.
        dtype: ``"auto"``, ``"float32"``, ``"bfloat16"`` or ``"float16"``; see ``engine.choose_dtype``.
        threads: CPU threads of an operation; None leaves torch's choice. Call everything from one thread: each
            thread that runs torch operations gets an OpenMP team of its own.
        max_batch_size: the largest batch to warm up for.

    Raises:
        ModelDirectoryError, SplitError: the directory cannot be served.
    """

    def __init__(
        self,
        directory: Path,
        *,
        device: str = "auto",
        dtype: str = "auto",
        threads: int | None = None,
        max_batch_size: int = 64,
    ) -> None:
        if threads:
            torch.set_num_threads(threads)
        self.device = torch.device(resolve_device(device))
        self.config = read_config(directory)
        self._model = load_classifier(directory).to(self.device)
        self.split = SplitClassifier(self._model, self.config.defense.layer)
        self._splits = {self.split.layer: self.split}
        self._engines: dict[tuple[str, torch.dtype], EngineSplit] = {}
        self._precisions: dict[str, tuple[torch.dtype, float | None]] = {}
        self._max_batch_size = max_batch_size
        self._probe = self._probe_images(directory)
        self._dtype = self._checked_dtype(dtype)
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
        check_origin(importance)
        self._defend(self._split_at(importance.layer), importance)

    def prepare(self, version: str, importance: NeuronImportance) -> ServedDefense:
        """Build the defense for an importance: as fast as it can be with the same answers, and warm.

        Raises:
            DefenseError: it does not fit this model.
        """
        layer = importance.layer
        if layer not in self._precisions:  # once a layer: another version is to be served within a second
            self._precisions[layer] = self._precision_for(importance)
        dtype, share = self._precisions[layer]
        return ServedDefense(version, importance, self._defend(self._engine_at(layer, dtype), importance), dtype, share)

    def _precision_for(self, importance: NeuronImportance) -> tuple[torch.dtype, float | None]:
        """The precision that leaves the predictions as they are in float32, and the share that it does."""
        dtype, share = self._dtype, self._agreement(importance, self._dtype)
        if share is None:
            return dtype, None
        if share < FALL_BACK_BELOW and dtype != torch.float32:
            logger.error("%s agrees with float32 on %.1f%% of probe images; serving float32", dtype, 100 * share)
            return torch.float32, self._agreement(importance, torch.float32)
        level = logging.WARNING if share < WARN_BELOW else logging.INFO
        logger.log(level, "%s agrees with float32 on %.1f%% of probe images", dtype, 100 * share)
        return dtype, share

    @torch.inference_mode()
    def predict(self, defense: ServedDefense, pixels: Sequence[Pixels]) -> NDArray[np.float32]:
        """Classify a batch.

        Args:
            pixels: B arrays [H, W, channels].

        Returns:
            [B, 3, C]: probabilities defended and undefended, and the pseudo-label's class weights.
        """
        images = self._to_device(pixels).permute(0, 3, 1, 2).float().div_(255)
        prediction = defense.classifier.predict(images, self._noise(images))
        rows = [prediction.logits.softmax(1), prediction.undefended_logits.softmax(1), prediction.class_weights]
        result: NDArray[np.float32] = torch.stack(rows, dim=1).float().cpu().numpy()
        return result

    def _to_device(self, pixels: Sequence[Pixels]) -> Tensor:
        tensor = torch.from_numpy(np.stack(pixels))
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def _noise(self, images: Tensor) -> Tensor | None:
        defense = self.config.defense
        if defense.sigma == 0:
            return None
        shape = (defense.num_noise_samples, *images.shape)
        return torch.randn(shape, generator=self._generator, device=self.device)

    def _defend(self, split: SplitClassifier, importance: NeuronImportance) -> DefendedClassifier:
        return DefendedClassifier(split, importance, **self.config.defense.arguments)

    def _split_at(self, layer: str) -> SplitClassifier:
        """The split at the layer that an importance is of; model.toml's is only where rankings begin with."""
        if layer not in self._splits:
            self._splits[layer] = SplitClassifier(self._model, layer)
        return self._splits[layer]

    def _engine_at(self, layer: str, dtype: torch.dtype) -> EngineSplit:
        if (layer, dtype) not in self._engines:
            engine = EngineSplit(self._split_at(layer), dtype)
            self._warm_up(engine)
            self._engines[layer, dtype] = engine
        return self._engines[layer, dtype]

    @torch.inference_mode()
    def _warm_up(self, engine: EngineSplit) -> None:
        """Run both passes' shapes once: the first call of each allocates and chooses kernels."""
        draws = self.config.defense.num_noise_samples if self.config.defense.sigma else 0
        size = 1
        while size <= self._max_batch_size:
            values = engine.cut(torch.zeros(size * (1 + draws), *self.config.input.shape, device=self.device))
            engine.tail(*values)
            engine.tail(*(value[:size] for value in values))
            size *= 2

    def _probe_images(self, directory: Path) -> Tensor | None:
        try:
            probe = load_probe_set(directory)
            images, _ = next(probe.batches(PROBE_IMAGES, config=self.config.input))
        except ProbeSetError as error:
            logger.info("precisions are not compared: %s", error)
            return None
        return images.to(self.device)

    def _checked_dtype(self, name: str) -> torch.dtype:
        dtype = choose_dtype(name, self.device)
        if name == "auto" and self._probe is None:
            return torch.float32  # a lower precision that nothing can check is for those who ask for it
        return dtype

    def _agreement(self, importance: NeuronImportance, dtype: torch.dtype) -> float | None:
        if self._probe is None:
            return None
        fast = self._defend(self._engine_at(importance.layer, dtype), importance)
        exact = self._defend(self._split_at(importance.layer), importance)
        return agreement(fast, exact, self._probe, self._noise(self._probe))
