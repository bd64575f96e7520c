"""The probe set: clean labelled images that a ranking is computed on."""

import hashlib
import io
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from defense.errors import ProbeSetError, UnreadableImage
from defense.model_config import InputConfig
from defense.preprocessing import IMAGE_FORMATS, to_gray_or_rgb, to_pixels

PROBE_FILE = "probe.safetensors"
MAX_UNREADABLE = 0.01
# 1% of a set of 50 would be none at all: a few damaged files are no reason to refuse a small set.
ALWAYS_TOLERATED = 3


class SkippedImage(NamedTuple):
    """An image that a pass left out: its index in the set, and why."""

    index: int  # type: ignore[assignment]  # hides tuple.index
    reason: str

    def __str__(self) -> str:
        return f"image {self.index}: {self.reason}"


class ProbeSet(ABC):
    """Labelled images, in memory or in files, read in order.

    Attributes:
        name: what requests and importances call it.
        labels: [n] int64, indices of the model's classes.
        class_names: the model's labels, ``class_names[label]``; may be empty.
        skipped: what the latest pass of ``batches`` could not read.
    """

    def __init__(self, name: str, labels: Tensor, class_names: Sequence[str] = ()) -> None:
        self.name, self.labels, self.class_names = name, labels, tuple(class_names)
        self.skipped: list[SkippedImage] = []

    @property
    @abstractmethod
    def digest(self) -> str:
        """``"sha256:..."`` of labels and pixels or, of files, their names, sizes and times: for caches."""

    @abstractmethod
    def image(self, index: int) -> Image.Image:
        """One image, in mode L or RGB.

        Raises:
            UnreadableImage: it cannot be decoded.
        """

    def __len__(self) -> int:
        return len(self.labels)

    def batches(
        self, batch_size: int = 256, *, config: InputConfig | None = None, start: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(images [B, channels, H, W] float32 in [0, 1], labels [B]) pairs, in order.

        An unreadable image is left out of its batch and noted in ``skipped``. More than 1% of the whole set, and more
        than 3 images, are a failure.

        Args:
            config: the network's input, to which images are fitted; None gives them as they are stored.
            start: index of the first image; those before it are not read. To go on after an interruption: how many
                images were given so far, and skipped.

        Raises:
            ProbeSetError: too many are unreadable, or images of several sizes and no ``config``.
        """
        if batch_size < 1 or not 0 <= start <= len(self):
            raise ProbeSetError(
                f"expected batch_size >= 1 and start from 0 to {len(self)}, got batch_size {batch_size}, start {start}"
            )
        self.skipped = [skip for skip in self.skipped if skip.index < start]
        for first in range(start, len(self), batch_size):
            pixels = self._read(range(first, min(first + batch_size, len(self))), config)
            if pixels:
                images = torch.from_numpy(_stack(list(pixels.values()))).permute(0, 3, 1, 2)
                yield images.float() / 255, self.labels[list(pixels)]

    def subset(self, images_per_class: int, seed: int = 0) -> "ProbeSet":
        """The same number of images of each class, drawn at random; the same ones for the same seed, in order.

        Raises:
            ProbeSetError: naming the classes that have fewer.
        """
        if images_per_class < 1 or not len(self):
            raise ProbeSetError(f"expected images_per_class >= 1, got {images_per_class}, of {len(self)} images")
        names = self.class_names or [str(c) for c in range(int(self.labels.max()) + 1)]
        members = [(self.labels == c).nonzero().flatten() for c in range(len(names))]
        few = [f"{name} ({len(m)})" for name, m in zip(names, members, strict=True) if len(m) < images_per_class]
        if few:
            raise ProbeSetError(
                f"expected {images_per_class} images of each class in probe set '{self.name}', got fewer of "
                f"{some_of(few)}; lower images_per_class"
            )
        generator = torch.Generator().manual_seed(seed)
        drawn = [m[torch.randperm(len(m), generator=generator)[:images_per_class]] for m in members]
        return _Subset(self, torch.cat(drawn).sort().values)

    def shard(self, rank: int, world: int) -> "ProbeSet":
        """Every ``world``-th image from ``rank`` on: the share of one of ``world`` processes."""
        return self if world == 1 else _Subset(self, torch.arange(rank, len(self), world))

    def _read(self, indices: Sequence[int], config: InputConfig | None) -> dict[int, NDArray[np.uint8]]:
        """Pixels of those that can be read."""
        pixels = {}
        for index in indices:
            try:
                pixels[index] = self.pixels(index, config)
            except UnreadableImage as error:
                self._skip(index, error)
        return pixels

    def _skip(self, index: int, error: UnreadableImage) -> None:
        self.skipped.append(SkippedImage(index, str(error)))
        if len(self.skipped) > max(ALWAYS_TOLERATED, MAX_UNREADABLE * len(self)):
            raise ProbeSetError(
                f"expected at most {MAX_UNREADABLE:.0%} of probe set '{self.name}' ({len(self)} images) to be "
                f"unreadable, got {len(self.skipped)} by image {index}; repair or remove them. "
                f"The first: {'; '.join(reason for _, reason in self.skipped[:3])}"
            ) from error

    def pixels(self, index: int, config: InputConfig | None) -> NDArray[np.uint8]:
        """[H, W, channels] uint8 of an image: fitted to the network's input, or as it is stored."""
        image = self.image(index)
        return to_pixels(image, config) if config else np.asarray(image).reshape(image.height, image.width, -1)


class ArrayProbeSet(ProbeSet):
    """Images and labels in memory.

    Args:
        images: [n, H, W, channels] uint8, 1 (gray) or 3 (RGB) channels.
        labels: [n] int64, class indices.
        ready: images of the network's input size are what the network takes, and are not resized and cropped again.

    Raises:
        ProbeSetError: shapes or types that are not these.
    """

    def __init__(
        self, name: str, images: Tensor, labels: Tensor, class_names: Sequence[str] = (), *, ready: bool = True
    ) -> None:
        if images.ndim != 4 or images.dtype != torch.uint8 or images.shape[3] not in (1, 3):
            raise ProbeSetError(
                "expected probe images [n, H, W, channels] uint8 with 1 or 3 channels, "
                f"got {list(images.shape)} {images.dtype}"
            )
        if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
            raise ProbeSetError(f"expected {len(images)} int64 probe labels, got {list(labels.shape)} {labels.dtype}")
        super().__init__(name, labels, class_names)
        self.images, self.ready = images, ready

    @cached_property
    def digest(self) -> str:
        digest = hashlib.sha256(f"arrays|{list(self.images.shape)}|".encode())
        digest.update(self.images.contiguous().numpy().data)
        return f"sha256:{digest.hexdigest()}"

    def image(self, index: int) -> Image.Image:
        pixels: NDArray[np.uint8] = self.images[index].numpy()
        return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)

    def pixels(self, index: int, config: InputConfig | None) -> NDArray[np.uint8]:
        stored = tuple(self.images.shape[1:])
        if config is None or (self.ready and stored == (*config.size, config.channels)):
            pixels: NDArray[np.uint8] = self.images[index].numpy()
            return pixels
        return to_pixels(self.image(index), config)


class ImageFile(NamedTuple):
    """A file of a class, or the part of a tar that holds one; ``size`` None is the whole file."""

    class_name: str
    name: str
    file: str
    offset: int = 0
    size: int | None = None


class FileProbeSet(ProbeSet):
    """Images that are decoded when they are read."""

    def __init__(self, name: str, files: Sequence[ImageFile], labels: Tensor, class_names: Sequence[str]) -> None:
        super().__init__(name, labels, class_names)
        self.files = files

    @cached_property
    def digest(self) -> str:
        stats = {file: Path(file).stat() for file in {f.file for f in self.files}}
        digest = hashlib.sha256(b"files|")
        for f in self.files:
            stat = stats[f.file]
            digest.update(f"{f.class_name}/{f.name}|{f.offset}|{f.size}|{stat.st_size}|{stat.st_mtime_ns}\n".encode())
        return f"sha256:{digest.hexdigest()}"

    def image(self, index: int) -> Image.Image:
        f = self.files[index]
        try:
            with Path(f.file).open("rb") as opened:
                opened.seek(f.offset)
                return _decode(opened.read(-1 if f.size is None else f.size))
        except Exception as error:  # of a damaged file, decoders raise nearly anything
            raise UnreadableImage(f"{f.class_name}/{f.name} cannot be read: {error}") from error


class _Subset(ProbeSet):
    """Some images of another set."""

    def __init__(self, whole: ProbeSet, indices: Tensor) -> None:
        super().__init__(whole.name, whole.labels[indices], whole.class_names)
        self._whole, self._indices = whole, indices

    @cached_property
    def digest(self) -> str:
        drawn = f"subset|{self._whole.digest}|".encode() + self._indices.numpy().tobytes()
        return f"sha256:{hashlib.sha256(drawn).hexdigest()}"

    def image(self, index: int) -> Image.Image:
        return self._whole.image(int(self._indices[index]))

    def pixels(self, index: int, config: InputConfig | None) -> NDArray[np.uint8]:
        return self._whole.pixels(int(self._indices[index]), config)


def load_probe_set(directory: Path | str) -> ArrayProbeSet:
    """The model directory's own probe set, named ``probe``.

    Raises:
        ProbeSetError: there is none, or it is damaged.
    """
    path = Path(directory) / PROBE_FILE
    try:
        tensors = load_file(path)
        return ArrayProbeSet("probe", tensors["images"], tensors["labels"])
    except FileNotFoundError as error:
        raise ProbeSetError(
            f"expected a probe set at {path}, found none; see models/README.md for its format"
        ) from error
    except (SafetensorError, KeyError, OSError) as error:
        raise ProbeSetError(f"{path} is not a probe set: {error!r}; expected tensors 'images' and 'labels'") from error


def some_of(items: Sequence[str], most: int = 20) -> str:
    """The items with commas between them; of many, the first and how many more."""
    shown = ", ".join(items[:most])
    return shown if len(items) <= most else f"{shown} and {len(items) - most} more"


def _stack(pixels: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    sizes = {image.shape for image in pixels}
    if len(sizes) > 1:
        first, second, *_ = sorted(sizes)
        raise ProbeSetError(
            f"expected images of one size (height, width, channels), got {first} and {second}; "
            "pass config, the model's input"
        )
    return np.stack(pixels)


def _decode(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as opened:
        opened.load()
        image = ImageOps.exif_transpose(opened)
    return to_gray_or_rgb(image)
