"""The engine: a model directory on a device, and both passes of a batch as one call."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
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
from service.compilers import Compiler, EngineError, check_openvino, choose_compiler
from service.engine import FALL_BACK_BELOW, WARN_BELOW, EngineSplit, StageClock, choose_dtype, resolve_device
from service.int8 import check_int8
from service.noise import StandardNormal
from service.openvino_part import fixed_sizes, padded_size
from service.passes import OpenVinoPasses, Passes, PyTorchPasses, agreement, openvino_chain, to_pixels
from service.settings import Settings

logger = logging.getLogger(__name__)

PROBE_IMAGES, CALIBRATION_BATCH = 256, 32
WARM_UP_S = 5.0
DEFAULT_THREADS = torch.get_num_threads()  # torch's choice, one a physical core; a Predictor may change it

Pixels = NDArray[np.uint8]
PassesOf = Callable[[DefendedClassifier], Passes]  # of an importance on the engine
_Engine = tuple[EngineSplit, PassesOf]
_Ready = tuple[EngineSplit, PassesOf, float | None]  # and the share of probe images that it agrees on


@dataclass(frozen=True, eq=False)
class ServedDefense:
    """One importance version, ready to serve. Requests hold on to the one they were admitted under.

    Attributes:
        dtype, compiler: of the trunk. int8_first_pass: whether some first passes are in int8.
        agreement: share of probe images with the same defended prediction in float32 by PyTorch, alone or in batches,
            whichever is less; None where there was nothing to compare.
    """

    version: str
    importance: NeuronImportance
    classifier: DefendedClassifier
    passes: Passes
    engine: EngineSplit
    agreement: float | None

    @property
    def dtype(self) -> torch.dtype:
        return self.engine.dtype

    @property
    def compiler(self) -> Compiler:
        return self.engine.compiler

    @property
    def int8_first_pass(self) -> bool:
        return self.engine.int8_batch is not None

    @property
    def runs_on_any_thread(self) -> bool:
        """Whether a prediction is as good on another thread than the others: OpenVINO's threads are its own."""
        return self.engine.compiler == "openvino"


@dataclass(frozen=True, slots=True)
class Inputs:
    """A batch, prepared.

    Attributes:
        pixels: [B, H, W, channels]. noise: [B, draws, channels, H, W], if any. B is padded for inductor.
        count: how many are asked for. began_s: when it was begun, on perf_counter's clock.
    """

    pixels: Pixels
    noise: Tensor | None
    count: int
    began_s: float


class Predictor:
    """A model directory, loaded.

    Args:
        directory: the model directory.
        device: a torch device, or ``"auto"``: cuda if there is one, else cpu.
        dtype: ``"auto"``, ``"float32"``, ``"bfloat16"`` or ``"float16"``; see ``engine.choose_dtype``.
        compiler: ``"auto"``, ``"none"``, ``"inductor"`` or ``"openvino"``; see ``compilers.choose_compiler``.
        int8_first_pass: compute the pseudo-label in int8: see ``int8``.
        threads: CPU threads of an operation; None leaves torch's choice. Call everything from one thread: each
            thread that runs torch operations gets an OpenMP team of its own.
        max_batch_size: the largest batch to warm up for.

    Raises:
        ModelDirectoryError, SplitError: the directory cannot be served.
        EngineError: not on this device, by this compiler, or in int8.
    """

    @classmethod
    def of(cls, settings: Settings, *, max_batch_size: int | None = None) -> "Predictor":
        """The settings' model on their device.

        Args:
            max_batch_size: in place of the settings' own.
        """
        return cls(
            settings.model,
            device=settings.device,
            dtype=settings.dtype,
            compiler=settings.compile,
            int8_first_pass=settings.int8_first_pass,
            threads=settings.threads,
            max_batch_size=max_batch_size or settings.max_batch_size,
        )

    def __init__(
        self,
        directory: Path,
        *,
        device: str = "auto",
        dtype: str = "auto",
        compiler: str = "auto",
        int8_first_pass: bool = False,
        threads: int | None = None,
        max_batch_size: int = 64,
    ) -> None:
        self._threads = threads or DEFAULT_THREADS
        torch.set_num_threads(self._threads)
        self.device = resolve_device(device)
        self.config = read_config(directory)
        self._model = load_classifier(directory).to(self.device)
        self.split = SplitClassifier(self._model, self.config.defense.layer)
        self._splits = {self.split.layer: self.split}
        self._engines: dict[tuple[str, float, int], _Ready] = {}
        self._sizes = _powers_of_two(max_batch_size)
        self._probe = self._probe_images(directory)
        self._dtype, self._compiler = self._checked(choose_dtype(dtype, self.device), dtype), compiler
        chosen = choose_compiler(compiler, self.device)
        if compiler == "openvino":
            check_openvino(self._dtype)
        self._asked_for_int8 = int8_first_pass
        if self._int8:
            check_int8(chosen, has_probe_images=self._probe is not None)
        elif int8_first_pass:
            logger.warning("IGD_INT8_FIRST_PASS changes nothing: with sigma = 0 both passes are one")
        self._normal = StandardNormal(self.device)

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
        engine, passes_of, share = self._engine_at(importance)
        # What is left to PyTorch beside OpenVINO is small: to share it out takes longer than to do it.
        torch.set_num_threads(1 if engine.compiler == "openvino" else self._threads)
        classifier = self._defend(engine, importance)
        engine.stage_seconds()  # what getting warm took is no batch's
        return ServedDefense(version, importance, classifier, passes_of(classifier), engine, share)

    def _engine_at(self, importance: NeuronImportance) -> _Ready:
        # Once for all versions: another one is to be served within a second.
        key = importance.layer, self.config.defense.sigma, self._draws
        if key not in self._engines:
            self._engines[key] = self._engine_for(importance)
        return self._engines[key]

    def _engine_for(self, importance: NeuronImportance) -> _Ready:
        """The fastest engine that leaves the predictions as they are, and the share of the same ones."""
        torch.set_num_threads(self._threads)
        engine, passes_of = self._fast_engine(importance, int8=self._int8)
        share = self._agreement(engine, passes_of, importance)
        if share is not None and share < FALL_BACK_BELOW and engine.int8_batch:
            logger.error(
                "%s agrees with float32 on %.1f%% of probe images; serving without int8; set IGD_INT8_FIRST_PASS=false",
                engine.name,
                100 * share,
            )
            engine, passes_of = self._fast_engine(importance)
            share = self._agreement(engine, passes_of, importance)
        if share is None:
            return engine, passes_of, None
        if share < FALL_BACK_BELOW and (engine.dtype, engine.compiler) != (torch.float32, "none"):
            logger.error("%s agrees with float32 on %.1f%% of probe images; serving float32", engine.name, 100 * share)
            engine, passes_of = self._engine(importance, torch.float32, "none")
            return engine, passes_of, self._agreement(engine, passes_of, importance)
        level = logging.WARNING if share < WARN_BELOW else logging.INFO
        logger.log(level, "%s agrees with float32 on %.1f%% of probe images", engine.name, 100 * share)
        return engine, passes_of, share

    def predict(self, defense: ServedDefense, pixels: Sequence[Pixels]) -> NDArray[np.float32]:
        """Classify a batch.

        Args:
            pixels: B arrays [H, W, channels].

        Returns:
            [B, 5, C]: of each image the rows that ``passes.ROWS`` names, its probabilities first.
        """
        return self.both_passes(defense, self.inputs(defense, pixels))

    def inputs(self, defense: ServedDefense, pixels: Sequence[Pixels]) -> Inputs:
        """Pixels and noise of a batch; short, but it needs Python's lock."""
        began_s = time.perf_counter()
        batch = joined(self._padded(pixels) if defense.compiler == "inductor" else pixels)
        return Inputs(batch, self._noise(batch.shape), len(pixels), began_s)

    def both_passes(self, defense: ServedDefense, inputs: Inputs) -> NDArray[np.float32]:
        """The rest of ``predict``."""
        return defense.passes(inputs.pixels, inputs.noise)[: inputs.count]

    def _padded(self, pixels: Sequence[Pixels]) -> list[Pixels]:
        """To a size that is compiled already: inductor compiles every size anew."""
        missing = padded_size(len(pixels), self._sizes) - len(pixels)
        return [*pixels, *[np.zeros_like(pixels[0])] * missing]

    def _noise(self, shape: Sequence[int]) -> Tensor | None:
        """Standard normal, [B, draws, channels, H, W], for pixels [B, H, W, channels]."""
        if not self._draws:
            return None
        batch, height, width, channels = shape
        return self._normal.draw((batch, self._draws, channels, height, width))

    @property
    def _int8(self) -> bool:
        return self._asked_for_int8 and self._draws > 0

    @property
    def _draws(self) -> int:
        defense = self.config.defense
        return defense.num_noise_samples if defense.sigma else 0

    def _defend(self, split: SplitClassifier, importance: NeuronImportance) -> DefendedClassifier:
        return DefendedClassifier(split, importance, **self.config.defense.arguments)

    def _split_at(self, layer: str) -> SplitClassifier:
        """The split at the layer that an importance is of; model.toml's is only where rankings begin with."""
        if layer not in self._splits:
            self._splits[layer] = SplitClassifier(self._model, layer)
        return self._splits[layer]

    def _fast_engine(self, importance: NeuronImportance, *, int8: bool = False) -> _Engine:
        compiler = choose_compiler(self._compiler, self.device)
        if int8:
            try:
                engine, passes_of = self._engine(importance, self._dtype, compiler, int8=True)
                if not engine.int8_batch:
                    logger.warning("serving without an int8 first pass: it is not quicker here")
                return engine, passes_of
            except EngineError as error:
                logger.warning("serving without an int8 first pass: %s", error)
        if self._compiler != "auto":
            return self._engine(importance, self._dtype, compiler)
        if self._probe is None:  # what nothing can check is for those who ask for it
            compiler = "none"
        try:
            return self._engine(importance, self._dtype, compiler)
        except EngineError as error:
            logger.warning("serving without a compiler: %s", error)
            return self._engine(importance, self._dtype, "none")

    def _engine(
        self, importance: NeuronImportance, dtype: torch.dtype, compiler: Compiler, *, int8: bool = False
    ) -> _Engine:
        images = torch.rand(2, *self.config.input.shape, device=self.device)
        split, rows = self._split_at(importance.layer), fixed_sizes(self._sizes[-1] * (1 + self._draws))
        if int8 and not split.tail_is_affine:
            raise EngineError(f"what follows '{split.layer}' is not affine; rank a layer where it is")
        engine = EngineSplit(split, dtype, compiler, images, threads=self._threads, sizes=rows)
        classifier = self._defend(engine, importance)
        if compiler == "openvino" and engine.tail_is_affine:
            blank, sizes = self._blank(2), fixed_sizes(self._sizes[-1])
            calibration = self._calibration(self._probe) if int8 and self._probe is not None else None
            noise = self._noise(blank.shape)
            chain = openvino_chain(engine, classifier, blank, noise, self._threads, sizes, calibration)
            engine.int8_batch = chain.int8_batch
            passes_of: PassesOf = partial(OpenVinoPasses, chain=chain, clock=engine.clock)
        else:
            passes_of = partial(PyTorchPasses, clock=engine.clock)
        self._warm_up(passes_of(classifier), compiler)
        return engine, passes_of

    def _calibration(self, probe: Pixels) -> Iterator[tuple[Pixels, NDArray[np.float32]]]:
        """Batches of probe images and noise, which is always the same: restarts do not differ by it."""
        generator = torch.Generator().manual_seed(0)
        for begin in range(0, len(probe), CALIBRATION_BATCH):
            pixels = probe[begin : begin + CALIBRATION_BATCH]
            shape = len(pixels), self._draws, *self.config.input.shape
            yield pixels, torch.randn(shape, generator=generator).numpy()

    def _blank(self, batch: int) -> Pixels:
        return np.zeros((batch, *self.config.input.size, self.config.input.channels), np.uint8)

    def _warm_up(self, passes: Passes, compiler: Compiler) -> None:
        """Run batches of all sizes once: the first call of each allocates, chooses kernels, or compiles.

        OpenVINO takes 10 to 40 ms the first time for any number of images that it has no fixed size for. Where batches
        are quick that is a stumble of several; where they are not, it does not matter: hence the smaller sizes first,
        for ``WARM_UP_S``.
        """
        others = [size for size in range(1, self._sizes[-1]) if compiler == "openvino" and size not in self._sizes]
        began_s = time.perf_counter()
        for i, size in enumerate([*self._sizes, *others]):
            if i >= len(self._sizes) and time.perf_counter() - began_s > WARM_UP_S:
                return
            blank = self._blank(size)
            passes(blank, self._noise(blank.shape))

    def _probe_images(self, directory: Path) -> Pixels | None:
        try:
            probe = load_probe_set(directory)
            some = probe.shard(0, max(1, len(probe) // PROBE_IMAGES))  # of all classes: many are stored one by one
            images, _ = next(some.batches(PROBE_IMAGES, config=self.config.input))
        except ProbeSetError as error:
            logger.info("precisions are not compared: %s", error)
            return None
        # Their values are a byte's: where they were resized, that was done on bytes.
        return to_pixels(images)

    def _checked(self, dtype: torch.dtype, name: str) -> torch.dtype:
        return torch.float32 if name == "auto" and self._probe is None else dtype

    def _agreement(self, engine: EngineSplit, passes_of: PassesOf, importance: NeuronImportance) -> float | None:
        if self._probe is None:
            return None
        exact = PyTorchPasses(self._defend(self._split_at(importance.layer), importance), StageClock(self.device))
        fast, noise = passes_of(self._defend(engine, importance)), self._noise(self._probe.shape)
        # A lone image, one too small to be divided, a small batch and a large one have executables of their own.
        sizes = {1, *self._sizes[1:2], self._sizes[len(self._sizes) // 2], self._sizes[-1], engine.int8_batch or 1}
        return agreement(fast, exact, self._probe, noise, sizes)


def joined(pixels: Sequence[Pixels]) -> Pixels:
    """B arrays [H, W, channels] as one; a lone one is not copied, and may be read-only."""
    if len(pixels) == 1:
        return pixels[0][None]
    # Not numpy.stack, which lets go of Python's lock and then waits for it behind the event loop.
    values = np.frombuffer(bytearray().join(p.data for p in pixels), np.uint8)
    return values.reshape(len(pixels), *pixels[0].shape)


def _powers_of_two(largest: int) -> list[int]:
    """1, 2, 4, ... and ``largest``."""
    return sorted({largest, *(2**i for i in range(largest.bit_length()))} & set(range(1, largest + 1)))
