import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from defense import ImportanceError, NeuronImportance
from evaluation.importance_plots import plot_importance

SCORES = [[9.0, 3.0, 1.0, 1.0], [0.0, 2.0, 4.0, 1.0]]


def drawn(directory: Path, scores: object, top_k: int, **options: Any) -> dict[str, Any]:
    """The numbers of the pictures, which must be there and show something."""
    importance = NeuronImportance(torch.as_tensor(scores), method="lo-ir", layer="layer4", **options)
    paths = plot_importance(importance, directory, top_k=top_k)
    for path in paths[:-1]:
        with Image.open(path) as image:
            assert image.format == "PNG" and min(image.size) > 400
            assert len(np.unique(np.asarray(image.convert("L")))) > 20
    text = paths[-1].read_text()
    assert "NaN" not in text
    numbers: dict[str, Any] = json.loads(text)
    return numbers


def test_neurons_are_sorted_by_the_class_they_matter_most_for(tmp_path: Path) -> None:
    heatmap = drawn(tmp_path, SCORES, top_k=2, class_names=("cat", "dog"))["heatmap"]
    assert heatmap["classes"] == ["cat", "dog"]
    assert heatmap["neurons"] == [0, 2, 1, 3]
    assert heatmap["score_within_class"] == [[1.0, 0.0, 0.25, 0.0], [0.0, 1.0, 0.5, 0.25]]


def test_overlap_is_the_jaccard_index_of_the_top_k_sets(tmp_path: Path) -> None:
    overlap = drawn(tmp_path, [*SCORES, [9.0, 8.0, 0.0, 1.0]], top_k=2)["overlap"]
    third = round(1 / 3, 4)  # {0, 1}, {1, 2}, {0, 1}
    assert overlap["jaccard"] == [[None, third, 1.0], [third, None, third], [1.0, third, None]]
    assert overlap["most_alike"][0] == {"classes": ["0", "2"], "jaccard": 1.0}
    assert overlap["mean_of_two_classes"] == pytest.approx((1 + 2 / 3) / 3, abs=1e-4)
    assert overlap["random_sets"] == third


def test_decay_is_sorted_and_says_what_the_top_k_hold(tmp_path: Path) -> None:
    decay = drawn(tmp_path, SCORES, top_k=1)["decay"]
    assert decay["score_within_class"] == [[1.0, 0.25, 0.0, 0.0], [1.0, 0.5, 0.25, 0.0]]
    assert decay["share_of_the_top_k"] == [0.8, round(1 / 1.75, 4)]


def test_many_classes_and_neurons_are_drawn_in_blocks(tmp_path: Path) -> None:
    scores = torch.rand(1000, 2048, generator=torch.Generator().manual_seed(0)) ** 4
    scores[501, 7] = 10.0
    numbers = drawn(tmp_path, scores, top_k=750)
    heatmap, overlap, decay = numbers["heatmap"], numbers["overlap"], numbers["decay"]
    cells = np.array(heatmap["score_within_class"])
    assert (heatmap["classes_per_cell"], heatmap["neurons_per_cell"]) == (2, 2) and cells.shape == (500, 1024)
    assert cells[501 // 2, heatmap["neurons"].index(7) // 2] == 1.0
    assert np.array(overlap["jaccard"]).shape == (500, 500)
    assert abs(overlap["mean_of_two_classes"] - overlap["random_sets"]) < 0.01
    assert len(decay["percentiles"]["50"]) == 2048 and "score_within_class" not in decay
    assert (tmp_path / "importance.json").stat().st_size < 8_000_000


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("scores", "top_k", "names"),
    [
        (torch.zeros(1, 1), 1, ("a",)),
        (torch.zeros(3, 8), 2, ()),
        (torch.arange(40.0).repeat(12, 1), 40, ()),
        (-torch.rand(45, 9), 3, ()),
        (torch.rand(2, 5), 2, ("100 $ or $x_", "a name that is far too long to stand beside an axis")),
    ],
)
def test_unusual_rankings_are_drawn_without_a_warning(
    tmp_path: Path, scores: torch.Tensor, top_k: int, names: tuple[str, ...]
) -> None:
    drawn(tmp_path, scores, top_k, class_names=names)


def test_top_k_out_of_range_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImportanceError, match="from 1 to 4"):
        drawn(tmp_path, SCORES, top_k=5)


def test_no_state_of_pyplot_is_touched(tmp_path: Path) -> None:
    from matplotlib import pyplot

    drawn(tmp_path, SCORES, top_k=1)
    assert pyplot.get_fignums() == []
