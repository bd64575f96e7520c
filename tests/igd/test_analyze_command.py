import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from defense import ImportanceMismatch
from evaluation.analysis import GROUPS
from evaluation.errors import EvaluationError
from igd.cli import app


def analyze(model: Path, out: Path, *arguments: object) -> dict[str, dict[str, dict[str, object]]]:
    where = ["--model", str(model), "--out", str(out)]
    small = ["--epsilon", "0.1", "-n", "24", "--steps", "3"]
    result = CliRunner().invoke(app, ["analyze", *small, *where, *map(str, arguments)])
    if result.exception:
        raise result.exception
    numbers: dict[str, dict[str, dict[str, object]]] = json.loads((out / "analysis.json").read_text())
    return numbers


def test_every_image_is_successful_failed_or_was_wrong_before(tiny_model: Path, tmp_path: Path) -> None:
    numbers = analyze(tiny_model, tmp_path)
    attacked = sum(int(str(part["images"])) for part in numbers["groups"].values())
    assert attacked == numbers["data"]["correct_before"]
    assert list(numbers["groups"]["successful"]["change"]) == list(GROUPS)
    for picture in ("groups.png", "neurons.png"):
        with Image.open(tmp_path / picture) as opened:
            assert min(opened.size) > 300


def test_any_layer_and_any_attack_by_name(tiny_model: Path, tmp_path: Path) -> None:
    numbers = analyze(tiny_model, tmp_path, "--layer", "layer2", "--attack", "square", "--top-k", 2, "--steps", 1)
    assert str(numbers["layer"]).endswith("layer2")
    assert len(numbers["neurons"][0]["before"]) == 4  # type: ignore[index]  # a list


def test_the_same_seed_gives_the_same_numbers(tiny_model: Path, tmp_path: Path) -> None:
    first, second = (analyze(tiny_model, tmp_path / name, "--seed", 3) for name in "ab")
    assert first == second


def test_a_ranking_of_another_layer_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ImportanceMismatch):
        analyze(tiny_model, tmp_path, "--layer", "layer3", "--importance", tiny_model / "importance.safetensors")


def test_an_unknown_attack_and_an_image_that_was_wrong_before_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="expected attacks among apgd-ce"):
        analyze(tiny_model, tmp_path, "--attack", "pgd")
    shown = analyze(tiny_model, tmp_path)
    image = shown["neurons"][0]["image"]  # type: ignore[index]
    assert analyze(tiny_model, tmp_path, "--image", image)["neurons"][0]["image"] == image  # type: ignore[index]
    with pytest.raises(EvaluationError, match="expected an image that is classified correctly"):
        analyze(tiny_model, tmp_path, "--image", 99)
