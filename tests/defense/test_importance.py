from datetime import UTC, datetime

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from defense import ImportanceError, NeuronImportance, top_k_masks
from defense.guards import importance_warnings


def example(**changes: object) -> NeuronImportance:
    values = {
        "scores": torch.tensor([[1.0, 2.0], [4.0, 3.0]]),
        "method": "lo-ir",
        "layer": "layer4",
        "model_digest": "sha256:abc",
        "num_images": 7,
        "class_names": ("cat", "dog"),
        "probe_set": "probe",
        "created_at": datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        "warnings": ("a warning",),
    }
    return NeuronImportance(**(values | changes))


def test_bytes_keep_scores_and_origin() -> None:
    importance = example()
    read = NeuronImportance.from_bytes(importance.to_bytes())
    assert torch.equal(read.scores, importance.scores)
    assert read.metadata() == importance.metadata()
    assert read.created_at == importance.created_at


def test_bytes_are_safetensors_that_others_can_read() -> None:
    from safetensors.torch import load

    assert torch.equal(load(example().to_bytes())["scores"], example().scores)


@given(st.integers(0, 10**6), st.integers(0, 255))
def test_damaged_bytes_are_an_importance_error_or_still_valid(position: int, value: int) -> None:
    data = bytearray(example().to_bytes())
    data[position % len(data)] = value
    try:
        NeuronImportance.from_bytes(bytes(data))
    except ImportanceError as error:
        assert str(error)


@pytest.mark.parametrize("data", [b"", b"{}", b"\x93NUMPY", b"\xff" * 64])
def test_other_bytes_are_refused_with_the_expected_format(data: bytes) -> None:
    with pytest.raises(ImportanceError, match="not a neuron importance"):
        NeuronImportance.from_bytes(data)


def test_truncated_bytes_are_refused() -> None:
    with pytest.raises(ImportanceError):
        NeuronImportance.from_bytes(example().to_bytes()[:-1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": torch.ones(3)}, r"\[classes, neurons\], got \[3\]"),
        ({"scores": torch.tensor([[1.0, float("nan")], [1.0, 2.0]])}, "1 of 4 scores are NaN"),
        ({"scores": torch.tensor([[1.0, 1.0], [float("inf"), 2.0]])}, "classes 1"),
        ({"class_names": ("cat",)}, "2 class names, got 1"),
    ],
)
def test_unusable_scores_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ImportanceError, match=message):
        example(**changes)


def test_masks_keep_the_top_k_of_each_class() -> None:
    masks = top_k_masks(torch.tensor([[3.0, -1.0, 2.0], [0.0, 5.0, 1.0]]), top_k=2)
    assert masks.tolist() == [[1, 0, 1], [0, 1, 1]]


def test_ties_keep_the_lower_index() -> None:
    assert top_k_masks(torch.ones(2, 5), top_k=2).tolist() == [[1, 1, 0, 0, 0]] * 2


@pytest.mark.parametrize("top_k", [0, 4, -1])
def test_top_k_out_of_range_is_refused(top_k: int) -> None:
    with pytest.raises(ImportanceError, match=f"from 1 to 3 .* got {top_k}"):
        top_k_masks(torch.ones(2, 3), top_k)


def test_masks_of_nan_scores_are_refused() -> None:
    with pytest.raises(ImportanceError, match="NaN"):
        top_k_masks(torch.tensor([[1.0, float("nan")]]), 1)


def test_classes_that_share_a_top_k_set_are_reported() -> None:
    scores = torch.rand(3, 40, generator=torch.Generator().manual_seed(0))
    scores[2] = scores[0] * 2
    (warning,) = importance_warnings(scores, class_names=["cat", "dog", "fox"])
    assert warning == "2 classes share one top-10 set: cat, fox"
    assert example(scores=scores, class_names=()).degenerate is None


@pytest.mark.parametrize("scores", [torch.arange(40.0).repeat(3, 1), torch.zeros(3, 40)])
def test_a_ranking_that_cannot_tell_classes_apart_is_degenerate(scores: torch.Tensor) -> None:
    assert example(scores=scores, class_names=()).degenerate
