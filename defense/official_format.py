"""Rankings as the official repository keeps them: a folder of ``unit{k}.npy``, for each neuron one score a class.

``get_loir_rankings.py`` of Trustworthy-ML-Lab/Interpretability-Guided-Defense writes them to
``saved_loir_rankings/<checkpoint>/<layer>/``, ``get_cdir_rankings.py`` to ``saved_cdir_rankings``. They do not say of
which weights, classes or images.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from defense.errors import ImportanceError
from defense.importance import NeuronImportance
from defense.probe import some_of

_UNIT_FILE = re.compile(r"unit(0|[1-9]\d{0,6})\.npy")
METHOD = "imported"


def read_official(
    directory: Path | str, layer: str, *, model_digest: str = "", class_names: Sequence[str] = (), probe_set: str = ""
) -> NeuronImportance:
    """Read a folder of ``unit{k}.npy``; other files in it are left alone, and no pickle is ever run.

    Args:
        layer: that was ranked. model_digest: of the weights that were. The files say neither.
        class_names: C labels in the order of the scores.

    Returns:
        Importance [C, N] of method ``"imported"``, with the guards' warnings.

    Raises:
        ImportanceError: no such folder, a neuron without a file, a file that is not a vector of finite numbers, or
            vectors of several lengths.
    """
    files = _unit_files(Path(directory))
    columns = {unit: _read_unit(path) for unit, path in sorted(files.items())}
    lengths = {unit: len(column) for unit, column in columns.items()}
    num_classes = len(class_names) or lengths[0]
    odd = [f"unit{unit}.npy ({length})" for unit, length in lengths.items() if length != num_classes]
    if odd:
        expected_by = "the model's" if class_names else "unit0.npy's"
        raise ImportanceError(
            f"expected {num_classes} scores in each file of {directory} ({expected_by} classes), got other numbers in "
            f"{len(odd)} of {len(files)}: {some_of(odd, 8)}; is it a ranking of another model?"
        )
    return NeuronImportance.ranked(
        torch.from_numpy(np.stack(list(columns.values()), axis=1)),
        class_names=class_names,
        method=METHOD,
        layer=layer,
        model_digest=model_digest,
        probe_set=probe_set,
    )


def write_official(importance: NeuronImportance, directory: Path | str) -> None:
    """Write ``unit{k}.npy``, float32 [C], for each neuron; what else the importance knows is lost.

    Raises:
        ImportanceError: the folder has such files already, and the official code would read a mixture, or it cannot
            be written.
    """
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if any(_UNIT_FILE.fullmatch(path.name) for path in directory.iterdir()):
            raise ImportanceError(f"expected a folder without unit files, got {directory}; choose another, or empty it")
        for unit, scores in enumerate(importance.scores.T):
            np.save(directory / f"unit{unit}.npy", scores.contiguous().numpy(), allow_pickle=False)
    except OSError as error:
        raise ImportanceError(f"the ranking cannot be written to {directory}: {error.strerror or error}") from error


def _unit_files(directory: Path) -> dict[int, Path]:
    """The file of each neuron, without gaps."""
    try:
        matches = [(_UNIT_FILE.fullmatch(path.name), path) for path in directory.iterdir()]
    except OSError as error:
        raise ImportanceError(f"expected a folder of unit files at {directory}: {error.strerror}") from error
    files = {int(match[1]): path for match, path in matches if match}
    if not files:
        raise ImportanceError(f"expected files unit0.npy, unit1.npy, ... in {directory}, found none")
    missing = [f"unit{unit}.npy" for unit in range(max(files) + 1) if unit not in files]
    if missing:
        raise ImportanceError(
            f"expected a file for each of {max(files) + 1} neurons in {directory}, {len(missing)} are missing: "
            f"{some_of(missing, 8)}; finish the ranking (get_loir_rankings.py --start-dim) or rank with 'igd rank'"
        )
    return files


def _read_unit(path: Path) -> NDArray[np.float32]:
    try:
        with path.open("rb") as file:  # not np.load, which opens a zip by any name
            scores: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
    except (OSError, ValueError, EOFError, MemoryError) as error:
        raise ImportanceError(f"{path} is not a NumPy file of numbers: {error}; no pickle is read") from error
    if scores.ndim != 1 or scores.dtype.kind not in "fiu":
        found = f"{list(scores.shape)} {scores.dtype}"
        raise ImportanceError(f"expected {path} to hold one score a class, a vector of numbers, got {found}")
    with np.errstate(over="ignore"):  # what does not fit becomes infinite, and is refused
        scores = scores.astype(np.float32)
    if not np.isfinite(scores).all():
        raise ImportanceError(
            f"{path}: {int((~np.isfinite(scores)).sum())} of {len(scores)} scores are NaN or infinite; rank anew"
        )
    return scores
