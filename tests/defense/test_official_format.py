from pathlib import Path

import numpy as np
import pytest
import torch

from defense import ImportanceError, NeuronImportance
from defense.official_format import read_official, write_official

OFFICIAL = Path(__file__).parents[1] / "data" / "official_rn18_w16.npz"


def write_units(directory: Path, scores: np.ndarray) -> Path:
    """As the official code does: scores [C, N], a file for each neuron."""
    directory.mkdir(exist_ok=True)
    for unit, column in enumerate(scores.T):
        np.save(directory / f"unit{unit}.npy", column)
    return directory


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_units(tmp_path / "layer4", np.arange(36, dtype=np.float32).reshape(3, 12))


def test_each_file_is_a_neuron(directory: Path) -> None:
    importance = read_official(directory, "layer4", model_digest="sha256:x", class_names=("cat", "dog", "fox"))
    assert importance.scores.tolist() == [[float(12 * c + n) for n in range(12)] for c in range(3)]
    assert (importance.method, importance.layer, importance.model_digest) == ("imported", "layer4", "sha256:x")
    assert importance.class_names == ("cat", "dog", "fox")


def test_a_written_ranking_reads_back(tmp_path: Path) -> None:
    scores = torch.randn(5, 30, generator=torch.Generator().manual_seed(0))
    write_official(NeuronImportance(scores, method="lo-ir", layer="layer4"), tmp_path / "deep" / "layer4")
    assert torch.equal(read_official(tmp_path / "deep" / "layer4", "layer4").scores, scores)
    unit = np.load(tmp_path / "deep" / "layer4" / "unit7.npy")
    assert unit.dtype == np.float32 and unit.tolist() == scores[:, 7].tolist()


def test_the_official_codes_own_scores_come_through(tmp_path: Path) -> None:
    with np.load(OFFICIAL) as arrays:
        scores = arrays["loir_layer4"]
    importance = read_official(write_units(tmp_path / "layer4", scores), "layer4")
    assert np.array_equal(importance.scores.numpy(), scores) and importance.degenerate is None


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int32])
def test_scores_of_other_number_types_become_float32(tmp_path: Path, dtype: type) -> None:
    importance = read_official(write_units(tmp_path / "layer4", np.array([[1, 2], [3, 4]], dtype)), "layer4")
    assert importance.scores.dtype == torch.float32 and importance.scores.tolist() == [[1, 2], [3, 4]]


def test_other_files_are_left_alone(directory: Path) -> None:
    for name in ("notes.txt", "unit1.npy.bak", "unit01.npy", "units.npy", "unit-1.npy"):
        (directory / name).write_text("")
    assert read_official(directory, "layer4").num_neurons == 12


def test_the_guards_look_at_an_imported_ranking(tmp_path: Path) -> None:
    importance = read_official(write_units(tmp_path / "layer4", np.tile(np.arange(40.0), (3, 1))), "layer4")
    assert importance.degenerate
    assert "3 classes share one top-10 set: 0, 1, 2" in importance.warnings


def test_missing_units_are_named(directory: Path) -> None:
    for unit in (0, 5):
        (directory / f"unit{unit}.npy").unlink()
    with pytest.raises(ImportanceError, match=r"each of 12 neurons .* 2 are missing: unit0\.npy, unit5\.npy;"):
        read_official(directory, "layer4")


def test_files_of_different_lengths_are_named(directory: Path) -> None:
    np.save(directory / "unit3.npy", np.ones(4))
    with pytest.raises(ImportanceError, match=r"expected 3 scores .* 1 of 12: unit3\.npy \(4\)"):
        read_official(directory, "layer4")


def test_a_ranking_of_other_classes_is_refused(directory: Path) -> None:
    with pytest.raises(ImportanceError, match=r"expected 2 scores .*the model's classes.* 12 of 12"):
        read_official(directory, "layer4", class_names=("cat", "dog"))


def test_a_pickle_is_never_run(directory: Path, tmp_path: Path) -> None:
    class Exploit:
        def __reduce__(self) -> tuple[object, tuple[str, ...]]:
            return Path.touch, (tmp_path / "owned",)

    np.save(directory / "unit3.npy", np.array([Exploit()]), allow_pickle=True)
    with pytest.raises(ImportanceError, match=r"unit3\.npy is not a NumPy file of numbers"):
        read_official(directory, "layer4")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (np.array([1.0, np.nan, np.inf]), "2 of 3 scores are NaN or infinite"),
        (np.array([1.0, 2.0, 1e300]), "1 of 3 scores"),
        (np.ones((3, 1)), r"got \[3, 1\] float64"),
        (np.float32(1), r"got \[\] float32"),
        (np.array([1j, 2, 3]), "complex128"),
        (np.array(["a", "b", "c"]), "<U1"),
    ],
)
def test_what_is_not_a_finite_vector_is_refused(directory: Path, scores: np.ndarray, message: str) -> None:
    np.save(directory / "unit3.npy", scores)
    with pytest.raises(ImportanceError, match=rf"unit3\.npy.*{message}"):
        read_official(directory, "layer4")


@pytest.mark.parametrize("data", [b"", b"text", b"\x93NUMPY\x01\x00", b"PK\x03\x04"])
def test_a_damaged_file_is_refused(directory: Path, data: bytes) -> None:
    (directory / "unit3.npy").write_bytes(data)
    with pytest.raises(ImportanceError, match=r"unit3\.npy"):
        read_official(directory, "layer4")


def test_a_truncated_file_is_refused(directory: Path) -> None:
    (directory / "unit3.npy").write_bytes((directory / "unit3.npy").read_bytes()[:-1])
    with pytest.raises(ImportanceError, match=r"unit3\.npy"):
        read_official(directory, "layer4")


def test_a_folder_without_units_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImportanceError, match="found none"):
        read_official(tmp_path, "layer4")
    with pytest.raises(ImportanceError, match="No such file"):
        read_official(tmp_path / "nowhere", "layer4")


def test_a_ranking_is_not_written_over_another(directory: Path) -> None:
    importance = NeuronImportance(torch.ones(2, 2), method="lo-ir", layer="layer4")
    with pytest.raises(ImportanceError, match="choose another"):
        write_official(importance, directory)
    with pytest.raises(ImportanceError, match="cannot be written"):
        write_official(importance, directory / "unit0.npy")
