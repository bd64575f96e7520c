import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from defense import DefenseError, ImportanceError, NeuronImportance, load_importance
from igd.cli import app

Run = Callable[..., Result]
ULID = re.compile(r"[0-9A-Z]{26}")


@pytest.fixture
def run(tiny_model: Path, tmp_path: Path) -> Run:
    """``igd importance``, with an embedded store of the test's own."""

    def run_(*arguments: object, fails: bool = False) -> Result:
        where = ("--model", str(tiny_model), "--data-dir", str(tmp_path / "store"))
        result = CliRunner().invoke(app, ["importance", *map(str, arguments), *where])
        if not fails and result.exception:
            raise result.exception
        return result

    return run_


@pytest.fixture
def version(run: Run, tiny_model: Path) -> str:
    """What the model directory ships, published and active."""
    return run("import", tiny_model / "importance.safetensors", "--activate").stdout.strip()


@pytest.fixture
def shipped(tiny_model: Path) -> NeuronImportance:
    importance = load_importance(tiny_model)
    assert importance
    return importance


def test_an_exported_file_comes_back_as_a_new_version(run: Run, version: str, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    assert run("export", version, file).stdout.strip() == str(file)
    imported = run("import", file).stdout.strip()
    assert ULID.fullmatch(imported) and imported != version
    listed = run("list").stdout
    assert version[:8] in listed and "lo-ir" in listed


def test_an_exported_folder_is_what_the_official_code_writes(
    run: Run, version: str, shipped: NeuronImportance, tmp_path: Path
) -> None:
    run("export", "active", tmp_path / "layer4", "--format", "official")
    units = sorted((tmp_path / "layer4").iterdir(), key=lambda path: int(path.stem.removeprefix("unit")))
    assert [path.name for path in units] == [f"unit{k}.npy" for k in range(16)]
    assert np.array_equal(np.stack([np.load(path) for path in units], axis=1), shipped.scores.numpy())


def test_a_folder_is_imported_for_this_model_and_its_layer(
    run: Run, version: str, shipped: NeuronImportance, tmp_path: Path
) -> None:
    run("export", "active", tmp_path / "layer4", "--format", "official")
    run("import", tmp_path / "layer4", "--activate")
    run("export", "active", tmp_path / "again.safetensors")
    imported = NeuronImportance.from_bytes((tmp_path / "again.safetensors").read_bytes())
    assert (imported.method, imported.class_names) == ("imported", ("cat", "dog", "fox", "owl"))
    assert (imported.layer, imported.model_digest) == (shipped.layer, shipped.model_digest)
    assert np.array_equal(imported.scores.numpy(), shipped.scores.numpy())


@pytest.mark.parametrize(
    ("classes", "neurons", "message"),
    [(3, 16, "expected 4 scores in each file"), (4, 15, "neurons"), (4, 17, "neurons")],
)
def test_a_folder_of_another_model_is_refused(
    run: Run, tmp_path: Path, classes: int, neurons: int, message: str
) -> None:
    (tmp_path / "units").mkdir()
    for k in range(neurons):
        np.save(tmp_path / "units" / f"unit{k}.npy", np.random.default_rng(k).random(classes, np.float32))
    error = run("import", tmp_path / "units", fails=True).exception
    assert isinstance(error, ImportanceError) and message in str(error)
    assert "no versions" in run("list").stdout


def test_a_file_made_for_other_weights_is_refused(run: Run, make_model: Callable[..., Path]) -> None:
    other = make_model("other", seed=1) / "importance.safetensors"
    assert isinstance(run("import", other, fails=True).exception, DefenseError)


def test_warnings_of_an_imported_ranking_are_shown(run: Run, tmp_path: Path) -> None:
    (tmp_path / "units").mkdir()
    for k in range(16):
        np.save(tmp_path / "units" / f"unit{k}.npy", np.random.default_rng(k).random(4) * (k != 3))
    result = run("import", tmp_path / "units")
    assert "1 of 16 neurons are dead" in result.stderr and ULID.fullmatch(result.stdout.strip())


def test_an_unknown_format_is_refused(run: Run, version: str, tmp_path: Path) -> None:
    assert run("export", version, tmp_path / "x", "--format", "csv", fails=True).exit_code == 2


def test_a_version_is_drawn(run: Run, version: str, tmp_path: Path) -> None:
    printed = run("plot", version, "--output", tmp_path / "plots").stdout.split()
    assert sorted(Path(path).name for path in printed) == ["decay.png", "heatmap.png", "importance.json", "overlap.png"]
    assert all(Path(path).stat().st_size > 1000 for path in printed)
    numbers = json.loads((tmp_path / "plots" / "importance.json").read_text())
    assert numbers["top_k"] == 4 and numbers["heatmap"]["classes"] == ["cat", "dog", "fox", "owl"]


def test_top_k_of_a_plot_is_checked(run: Run, version: str, tmp_path: Path) -> None:
    run("plot", "--top-k", 2, "--output", tmp_path / "two")
    assert json.loads((tmp_path / "two" / "importance.json").read_text())["top_k"] == 2
    error = run("plot", "--top-k", 17, "--output", tmp_path / "many", fails=True).exception
    assert isinstance(error, ImportanceError) and "from 1 to 16" in str(error)
