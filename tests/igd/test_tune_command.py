import json
import re
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from defense import NeuronImportance, read_config
from defense.model_config import DefenseConfig
from evaluation.errors import EvaluationError
from igd.cli import app

SMALL = (
    *("--epsilon", "0.05", "-n", "12", "--steps", "2", "--eot", "1", "--redraws", "2"),
    *("--top-k", "2,4", "--temperature", "0.01,1", "--noise-samples", "1"),
)


def tune(model: Path, out: Path, *arguments: object) -> Result:
    result = CliRunner().invoke(app, ["tune", *SMALL, "--model", str(model), "--out", str(out), *map(str, arguments)])
    if result.exception:
        raise result.exception
    return result


def without_command(path: Path) -> dict[str, object]:
    return {name: value for name, value in json.loads(path.read_text()).items() if name != "command"}


def test_the_block_fits_into_model_toml_and_is_the_chosen_setting(tiny_model: Path, tmp_path: Path) -> None:
    printed = tune(tiny_model, tmp_path / "out").stdout
    block = (tmp_path / "out" / "defense.toml").read_text()
    assert block.strip() in printed
    text = (tiny_model / "model.toml").read_text()
    (tmp_path / "model.toml").write_text(text[: text.index("[defense]")] + block)
    numbers = json.loads((tmp_path / "out" / "tuning.json").read_text())
    chosen = {name: value for name, value in numbers["chosen"].items() if name != "method"}
    assert read_config(tmp_path).defense == DefenseConfig(**chosen)
    assert re.search(r"# (NO GAIN|A gain|A LOSS)", block)
    for picture in ("pareto.png",):
        with Image.open(tmp_path / "out" / picture) as opened:
            assert min(opened.size) > 500


def test_selection_and_final_figures_are_of_different_images_and_undefended_is_in_both(
    tiny_model: Path, tmp_path: Path
) -> None:
    tune(tiny_model, tmp_path)
    numbers = json.loads((tmp_path / "tuning.json").read_text())
    assert numbers["attacked_themselves"][0]["images"] == 6
    assert numbers["final"][0]["roles"] == ["undefended"]
    for candidate in (*numbers["attacked_themselves"], *numbers["final"]):
        assert candidate["worst_case"]["mean"] <= candidate["worst_case_of_fixed_attacks"]["mean"]
        assert candidate["worst_case_of_fixed_attacks"]["mean"] <= candidate["clean"]


def test_the_same_command_gives_the_same_numbers_and_goes_on_from_what_is_kept(
    tiny_model: Path, tmp_path: Path
) -> None:
    tune(tiny_model, tmp_path / "a", "--vary", "temperature")
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "a" / "kept").iterdir()}
    first = without_command(tmp_path / "a" / "tuning.json")
    tune(tiny_model, tmp_path / "a", "--vary", "temperature")
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "a" / "kept").iterdir()} == kept
    tune(tiny_model, tmp_path / "b", "--vary", "temperature")
    assert without_command(tmp_path / "a" / "tuning.json") == first == without_command(tmp_path / "b" / "tuning.json")


def test_a_ranking_from_a_file_is_tried_beside_the_methods(tiny_model: Path, tmp_path: Path) -> None:
    file = tiny_model / "importance.safetensors"
    layer = NeuronImportance.from_bytes(file.read_bytes()).layer
    tune(tiny_model, tmp_path, "--importance", f"mine={file}", "--method", "lo-ir-signed")
    numbers = json.loads((tmp_path / "tuning.json").read_text())
    assert {s["method"] for s in numbers["sweep"]["settings"]} == {"mine", "lo-ir-signed"}
    assert {s["layer"] for s in numbers["sweep"]["settings"]} == {layer}


def test_a_file_of_another_layer_and_no_ranking_at_all_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    file = tiny_model / "importance.safetensors"
    with pytest.raises(EvaluationError, match="the one layer that is tried"):
        tune(tiny_model, tmp_path, "--importance", f"mine={file}", "--layer", "layer3")
    with pytest.raises(EvaluationError, match="expected a ranking to try"):
        tune(tiny_model, tmp_path, "--method", "")


def test_unknown_attacks_and_fields_to_vary_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="expected attacks among apgd-ce"):
        tune(tiny_model, tmp_path, "--attacks", "pgd")
    with pytest.raises(EvaluationError, match="expected to vary method, layer"):
        tune(tiny_model, tmp_path, "--vary", "top-k")
