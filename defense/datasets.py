"""Probe datasets by name: the settings' file lists them, so that a request names a dataset and never a path.

::

    [datasets.imagenet-train]
    kind = "image-folder"       # or "tar", "arrays", "cifar10", "cifar100"
    path = "imagenet/train"     # relative to this file
    class_names = { n01440764 = "tench" }   # optional: the dataset's name = the model's label
"""

import json
import os
import re
import tarfile
import tomllib
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from defense.errors import ProbeSetError
from defense.probe import ArrayProbeSet, FileProbeSet, ImageFile, ProbeSet, some_of

OWN_PROBE_SET = "probe"
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's ImageFolder's
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class DatasetSpec(BaseModel):
    """What and where a dataset is.

    Attributes:
        kind: ``image-folder`` (torchvision's: a folder of class folders), ``tar`` (of class folders, not compressed),
            ``cifar10`` and ``cifar100`` (the folder that has torchvision's files), or ``arrays`` (``.npz`` or
            ``.safetensors`` with ``images`` [n, H, W, channels] uint8 and ``labels`` [n]; the names of its classes in
            an array or metadata entry ``class_names``, else labels are the model's class indices).
        class_names: the model's label of a class that has another name in the dataset; of arrays without names, the
            model's label of a label ("0", "1", ...).
        split: of CIFAR; the paper ranks on the training set.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Literal["image-folder", "tar", "arrays", "cifar10", "cifar100"]
    path: Path
    class_names: dict[str, str] = Field(default_factory=dict)
    split: Literal["train", "test"] = "train"


class _DatasetsFile(BaseModel):
    model_config = ConfigDict(extra="forbid")
    datasets: dict[str, DatasetSpec]


def read_datasets(file: Path) -> dict[str, DatasetSpec]:
    """The datasets that a TOML file lists, by name, with absolute paths.

    Raises:
        ProbeSetError: no such file, not TOML, a field that is missing, unknown or wrong, or a name that cannot be one.
    """
    try:
        specs = _DatasetsFile.model_validate(tomllib.loads(file.read_text(encoding="utf-8"))).datasets
    except OSError as error:
        raise ProbeSetError(f"expected a file of datasets at '{file}': {error.strerror}; see IGD_DATASETS") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ProbeSetError(f"{file} is not valid TOML: {error}") from error
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ProbeSetError(f"{file}: {problems}; expected tables [datasets.NAME] with kind and path") from error
    for name in specs:
        if name == OWN_PROBE_SET or not _NAME.fullmatch(name):
            raise ProbeSetError(
                f"{file}: expected names of letters, digits, '.', '_' and '-' other than '{OWN_PROBE_SET}' (the model "
                f"directory's own), got '{name}'"
            )
    folder = file.absolute().parent
    return {name: spec.model_copy(update={"path": folder / spec.path}) for name, spec in specs.items()}


def open_dataset(name: str, specs: Mapping[str, DatasetSpec], labels: Sequence[str]) -> ProbeSet:
    """The dataset of that name, its classes matched to the model's labels.

    Names match whatever their case, spaces, underscores, dashes and slashes; both sides must have the same classes.

    Raises:
        ProbeSetError: no dataset of that name, nothing or something else at its path, or classes that do not match.
    """
    if name not in specs:
        raise ProbeSetError(
            f"expected one of the datasets {', '.join([OWN_PROBE_SET, *sorted(specs)])}, got '{name}'; "
            "add it to the file that IGD_DATASETS names"
        )
    spec = specs[name]
    try:
        return _OPEN[spec.kind](name, spec, tuple(labels))
    except OSError as error:
        raise ProbeSetError(f"dataset '{name}' at {spec.path} cannot be read: {error.strerror or error}") from error


def match_classes(
    found: Sequence[str], labels: Sequence[str], renamed: Mapping[str, str] | None = None, *, dataset: str = ""
) -> list[int]:
    """The model's index of each of the dataset's classes.

    Args:
        renamed: the model's label of classes that have another name in the dataset.

    Raises:
        ProbeSetError: with both lists, unless each class has a label and each label a class.
    """
    renamed = renamed or {}
    names = [renamed.get(name, name) for name in found]
    loose = len({_loosely(name) for name in names}) == len(names) and len({*map(_loosely, labels)}) == len(labels)
    key: Callable[[str], str] = _loosely if loose else str
    index = {key(label): i for i, label in enumerate(labels)}
    unknown = [name for name in names if key(name) not in index]
    unused = sorted(renamed.keys() - set(found))
    missing = [label for label in labels if key(label) not in {*map(key, names)}]
    if unknown or missing or unused or len(names) != len(labels):
        odd = {"without a label": unknown, "labels without a class": missing, "class_names without a class": unused}
        raise ProbeSetError(
            f"expected the classes of dataset '{dataset}' to be the model's labels; "
            + "; ".join(f"{what}: {some_of(which)}" for what, which in odd.items() if which)
            + f". The dataset's {len(names)} classes: {some_of(names)}. The model's {len(labels)} labels: "
            f"{some_of(labels)}. Map the names in class_names of [datasets.{dataset}]"
        )
    return [index[key(name)] for name in names]


def _loosely(name: str) -> str:
    return re.sub(r"[\s_/\\-]", "", name).casefold()


def _open_folder(name: str, spec: DatasetSpec, labels: tuple[str, ...]) -> ProbeSet:
    if not spec.path.is_dir():
        raise ProbeSetError(f"expected a folder of class folders for dataset '{name}', found none at {spec.path}")
    paths = (Path(root, file) for root, _, files in os.walk(spec.path, followlinks=True) for file in files)
    inside = ((path.relative_to(spec.path).parts, path) for path in paths)
    files = [ImageFile(parts[0], "/".join(parts[1:]), str(path)) for parts, path in inside if len(parts) > 1]
    return _of_files(name, spec, files, labels)


def _open_tar(name: str, spec: DatasetSpec, labels: tuple[str, ...]) -> ProbeSet:
    try:
        with tarfile.open(spec.path, "r:") as archive:
            # Links and devices are left out; of two members of one name the later counts, as it does for tar itself.
            members = {PurePosixPath(m.name).parts: m for m in archive if m.isreg() and _is_image(m.name)}
            _check_end(spec.path, archive.offset)
    except tarfile.TarError as error:
        raise ProbeSetError(
            f"expected dataset '{name}' at {spec.path} to be a whole tar, not compressed (images are read out of "
            f"order): {error}"
        ) from error
    # What is above the class folders: nothing, or a folder that all have in common.
    above = _num_common([parts[:-1] for parts in members])
    files = [
        ImageFile(parts[above], "/".join(parts[above + 1 :]), str(spec.path), m.offset_data, m.size)
        for parts, m in members.items()
        if len(parts) > above + 1
    ]
    return _of_files(name, spec, files, labels)


def _num_common(folders: Sequence[tuple[str, ...]]) -> int:
    """How many leading folders all have in common."""
    levels = zip(*folders, strict=False)  # as deep as the shallowest
    return sum(1 for _ in takewhile(lambda names: len(set(names)) == 1, levels))


def _check_end(path: Path, offset: int) -> None:
    # tarfile takes a file that was cut between two members, or a damaged header, for the end.
    with path.open("rb") as archive:
        archive.seek(offset)
        if archive.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"it is cut off or damaged at byte {offset}")


def _of_files(name: str, spec: DatasetSpec, files: Iterable[ImageFile], labels: tuple[str, ...]) -> ProbeSet:
    files = sorted((f for f in files if _is_image(f.name)), key=_image_folder_order)
    if not files:
        raise ProbeSetError(
            f"expected class folders with images ({', '.join(EXTENSIONS)}) for dataset '{name}' at {spec.path}, "
            "found none"
        )
    found = sorted({f.class_name for f in files})
    index = dict(zip(found, match_classes(found, labels, spec.class_names, dataset=name), strict=True))
    return FileProbeSet(name, files, torch.tensor([index[f.class_name] for f in files]), labels)


def _image_folder_order(file: ImageFile) -> tuple[str, str, str]:
    folder, _, name = file.name.rpartition("/")
    return file.class_name, folder, name


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def _open_arrays(name: str, spec: DatasetSpec, labels: tuple[str, ...]) -> ProbeSet:
    try:
        read = {".npz": _read_npz, ".safetensors": _read_safetensors}[spec.path.suffix]
        images, stored, names = read(spec.path)
    except (KeyError, ValueError, TypeError, EOFError, BadZipFile, zlib.error, SafetensorError) as error:
        raise ProbeSetError(
            f"expected dataset '{name}' at {spec.path} to be .npz or .safetensors with arrays 'images' and 'labels' "
            f"and no pickles: {error!r}"
        ) from error
    images = images[..., None] if images.ndim == 3 else images
    if images.dtype != np.uint8 or stored.dtype.kind not in "iu":
        raise ProbeSetError(
            f"expected uint8 images and integer labels in {spec.path}, got {images.dtype}, {stored.dtype}"
        )
    model_labels = _matched(name, spec, torch.from_numpy(stored.astype(np.int64)), names, labels)
    return ArrayProbeSet(name, torch.from_numpy(images), model_labels, labels)


def _matched(
    name: str, spec: DatasetSpec, stored: Tensor, names: Sequence[str] | None, labels: tuple[str, ...]
) -> Tensor:
    """The model's indices of stored labels; without names they are those already."""
    if names is None and spec.class_names:
        names = [str(i) for i in range(int(stored.max()) + 1)]
    found = labels if names is None else names
    if len(stored) and not 0 <= int(stored.min()) <= int(stored.max()) < len(found):
        raise ProbeSetError(
            f"expected labels from 0 to {len(found) - 1} in dataset '{name}', got {int(stored.min())} to "
            f"{int(stored.max())}"
        )
    if names is None:
        return stored
    return torch.tensor(match_classes(names, labels, spec.class_names, dataset=name))[stored]


_Arrays = tuple[NDArray[Any], NDArray[Any], list[str] | None]


def _read_npz(path: Path) -> _Arrays:
    with np.load(path, allow_pickle=False) as arrays:
        names = [str(n) for n in arrays["class_names"]] if "class_names" in arrays else None
        return arrays["images"], arrays["labels"], names


def _read_safetensors(path: Path) -> _Arrays:
    with safe_open(path, "np") as arrays:
        names = json.loads((arrays.metadata() or {}).get("class_names", "null"))
        if names is not None and not isinstance(names, list):
            raise ValueError(f"expected class_names to be a JSON list of names, got {names!r}")
        return arrays.get_tensor("images"), arrays.get_tensor("labels"), names


def _open_cifar(name: str, spec: DatasetSpec, labels: tuple[str, ...]) -> ProbeSet:
    from torchvision import datasets  # imports slowly

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[spec.kind]
    try:
        # These files are pickles; torchvision compares their MD5 with the published one before it reads them.
        cifar = kind(spec.path, train=spec.split == "train", download=False)
    except RuntimeError as error:
        raise ProbeSetError(
            f"expected torchvision's {kind.__name__} files ({kind.base_folder}/) for dataset '{name}' in {spec.path}, "
            f"found none, or damaged ones; unpack {kind.url} there"
        ) from error
    model_labels = _matched(name, spec, torch.tensor(cifar.targets), cifar.classes, labels)
    # Files like others, only stored as arrays: they are resized and cropped as model.toml says.
    return ArrayProbeSet(name, torch.from_numpy(cifar.data), model_labels, labels, ready=False)


_OPEN: dict[str, Callable[[str, DatasetSpec, tuple[str, ...]], ProbeSet]] = {
    "image-folder": _open_folder,
    "tar": _open_tar,
    "arrays": _open_arrays,
    "cifar10": _open_cifar,
    "cifar100": _open_cifar,
}
