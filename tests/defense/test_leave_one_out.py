import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from defense import ImportanceError, ProbeSetError, SplitClassifier, leave_one_out_importance
from defense.leave_one_out import logit_changes
from toy_models import PixelNet, small_conv_net

WEIGHT = [[1.0, -2.0, 0.5], [3.0, 0.0, -1.0]]


def pixels(*rows: list[float]) -> Tensor:
    return torch.tensor(rows).view(len(rows), 1, 1, -1)


def test_scores_are_the_mean_change_of_the_own_logit() -> None:
    # Of class 0: activations (1, 2, 4) and (3, 0, 2) times weights (1, -2, .5): changes (1, -4, 2) and (3, 0, 1).
    # Of class 1: activations (2, 1, 1) times weights (3, 0, -1): changes (6, 0, -1).
    split = SplitClassifier(PixelNet(WEIGHT))
    batch = (pixels([1, 2, 4], [2, 1, 1], [3, -5, 2]), torch.tensor([0, 1, 0]))
    absolute = leave_one_out_importance(split, [batch])
    signed = leave_one_out_importance(split, [batch], signed=True)
    assert absolute.scores.tolist() == [[2.0, 2.0, 1.5], [6.0, 0.0, 1.0]]
    assert signed.scores.tolist() == [[2.0, -2.0, 1.5], [6.0, 0.0, -1.0]]
    assert (absolute.method, signed.method, absolute.num_images) == ("lo-ir", "lo-ir-signed", 3)


@pytest.mark.parametrize("layer", ["conv1", "conv2", "bn", "pool", "hidden", "linear:input"])
def test_scores_equal_the_literal_loop_at_any_layer(layer: str) -> None:
    model, images, labels = small_conv_net(), torch.rand(7, 3, 8, 8), torch.tensor([0, 1, 2, 3, 0, 1, 1])
    split = SplitClassifier(model, layer)
    assert split.tail_is_affine == (layer == "linear:input")
    importance = leave_one_out_importance(split, zip(images.split(3), labels.split(3), strict=True), tail_batch_size=8)
    assert torch.allclose(importance.scores, literal_leave_one_out(split, images, labels), atol=1e-6)


def literal_leave_one_out(split: SplitClassifier, images: Tensor, labels: Tensor) -> Tensor:
    """The definition: one neuron, one image, one pass at a time."""
    scores = torch.zeros(split.num_classes, split.num_neurons)
    with torch.no_grad():
        for image, label in zip(images, labels, strict=True):
            activations, *bypass = split.cut(image[None])
            for j in range(split.num_neurons):
                without = activations.clone()
                without[:, j] = 0
                change = split.tail(activations, *bypass) - split.tail(without, *bypass)
                scores[label, j] += change[0, label].abs()
    return scores / torch.bincount(labels, minlength=split.num_classes).unsqueeze(1)


def test_the_closed_form_equals_leaving_out() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(144, 5)).eval()
    split = SplitClassifier(model, "1", input_size=(3, 8, 8))
    images, labels = torch.rand(9, 3, 8, 8), torch.arange(9) % 5
    closed = logit_changes(split, images, labels)
    assert split.tail_is_affine
    split.tail_is_affine = False
    torch.testing.assert_close(closed, logit_changes(split, images, labels), atol=1e-6, rtol=1e-5)


def test_the_batching_of_probe_images_does_not_matter() -> None:
    split = SplitClassifier(small_conv_net(), "hidden")
    images, labels = torch.rand(10, 3, 8, 8), torch.arange(10) % 4
    whole = leave_one_out_importance(split, [(images, labels)])
    parts = leave_one_out_importance(split, zip(images.split(3), labels.split(3), strict=True))
    torch.testing.assert_close(whole.scores, parts.scores)


def test_probe_batches_are_read_once_and_not_kept() -> None:
    seen: list[weakref.ref[Tensor]] = []

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(4):
            images = torch.rand(2, 3, 8, 8)
            seen.append(weakref.ref(images))
            yield images, torch.tensor([0, 1])
            del images
            gc.collect()
            assert sum(ref() is not None for ref in seen) <= 1

    leave_one_out_importance(SplitClassifier(small_conv_net(), "conv2"), batches())
    assert len(seen) == 4


def test_progress_counts_images() -> None:
    done: list[int] = []
    batches = [(torch.rand(3, 3, 8, 8), torch.tensor([0, 1, 2])), (torch.rand(1, 3, 8, 8), torch.tensor([3]))]
    leave_one_out_importance(SplitClassifier(small_conv_net()), batches, progress=done.append)
    assert done == [3, 4]


def test_a_class_without_images_is_named_in_the_warnings(caplog: pytest.LogCaptureFixture) -> None:
    importance = leave_one_out_importance(
        SplitClassifier(PixelNet(WEIGHT)), [(pixels([1, 2, 3]), torch.tensor([0]))], class_names=["cat", "dog"]
    )
    assert any("no probe images" in warning and "dog" in warning for warning in importance.warnings)
    assert "no probe images" in caplog.text


def test_a_neuron_that_never_fires_is_reported_dead() -> None:
    batch = (pixels([1, -2, 3], [1, -1, 1]), torch.tensor([0, 1]))
    importance = leave_one_out_importance(SplitClassifier(PixelNet(WEIGHT)), [batch])
    assert "1 of 3 neurons are dead (0 for every class): 1" in importance.warnings


def test_nan_weights_are_an_error_that_names_the_classes() -> None:
    split = SplitClassifier(PixelNet([[1.0, 2.0], [float("nan"), 1.0]]))
    with pytest.raises(ImportanceError, match=r"NaN or infinite \(classes 1\)"):
        leave_one_out_importance(split, [(pixels([1, 1], [1, 1]), torch.tensor([0, 1]))])


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "got none"),
        ([(pixels([1, 1, 1]), torch.tensor([2]))], "labels from 0 to 1 .* got 2 to 2"),
        ([(pixels([1, 1, 1]), torch.tensor([0, 1]))], "1 images and 2 labels"),
    ],
)
def test_a_probe_set_that_does_not_fit_is_refused(batches: list[tuple[Tensor, Tensor]], message: str) -> None:
    with pytest.raises(ProbeSetError, match=message):
        leave_one_out_importance(SplitClassifier(PixelNet(WEIGHT)), batches)
