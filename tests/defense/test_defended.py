import copy

import pytest
import torch
from torch import Tensor

from defense import DefendedClassifier, ImportanceError, ImportanceMismatch, NeuronImportance, SplitClassifier
from toy_models import PixelNet, importance_of, small_conv_net

SETTINGS = {"top_k": 4, "temperature": 0.5, "sigma": 0.1}


def small_defended(layer: str = "hidden", **settings: float) -> DefendedClassifier:
    split = SplitClassifier(small_conv_net(), layer)
    torch.manual_seed(1)
    return DefendedClassifier(split, importance_of(split, torch.rand(4, split.num_neurons)), **(SETTINGS | settings))


def test_the_answer_of_a_hand_weighted_network() -> None:
    # Clean logits of activations (1, 2): (1, 2). Noise (10, -10) * 0.1 makes the activations (2, 1), so z = (2, 1).
    # w = softmax(z / 1) = (e, 1) / (e + 1). Class 0 keeps neuron 0 and class 1 neuron 1, so m = w.
    split = SplitClassifier(PixelNet([[1.0, 0.0], [0.0, 1.0]]))
    defended = DefendedClassifier(
        split, importance_of(split, [[5.0, 1.0], [1.0, 5.0]]), top_k=1, temperature=1.0, sigma=0.1
    )
    noise = torch.tensor([10.0, -10.0]).view(1, 1, 1, 1, 2)
    w0 = torch.e / (torch.e + 1)
    logits = defended(torch.tensor([1.0, 2.0]).view(1, 1, 1, 2), noise=noise)
    torch.testing.assert_close(logits, torch.tensor([[1 * w0, 2 * (1 - w0)]]))


def test_noise_is_not_clamped_to_the_pixel_range() -> None:
    split = SplitClassifier(PixelNet([[1.0, 0.0], [0.0, 1.0]]))
    defended = DefendedClassifier(
        split, importance_of(split, [[5.0, 1.0], [1.0, 5.0]]), top_k=1, temperature=1.0, sigma=1
    )
    noise = torch.tensor([3.0, 0.0]).view(1, 1, 1, 1, 2)
    prediction = defended.predict(torch.ones(1, 1, 1, 2), noise)
    torch.testing.assert_close(prediction.class_weights, torch.tensor([[4.0, 1.0]]).softmax(1))


def test_dropped_neurons_keep_unimportant_weight() -> None:
    split = SplitClassifier(PixelNet([[1.0, 1.0], [1.0, 1.0]]))
    importance = importance_of(split, [[2.0, 1.0], [2.0, 1.0]])
    defended = DefendedClassifier(split, importance, top_k=1, sigma=0, unimportant_weight=0.25)
    torch.testing.assert_close(defended(torch.ones(1, 1, 1, 2)), torch.full((1, 2), 1.25))


@pytest.mark.parametrize("layer", ["conv1", "conv2", "hidden", "linear:input"])
def test_keeping_every_neuron_leaves_logits_unchanged(layer: str) -> None:
    defended = small_defended(layer, top_k=8 if layer in ("hidden", "linear:input") else 6)
    images = torch.rand(3, 3, 8, 8)
    torch.testing.assert_close(defended(images), defended.split(images))


def test_several_noise_draws_average_first_pass_logits() -> None:
    defended, images, noise = small_defended(num_noise_samples=3), torch.rand(2, 3, 8, 8), torch.randn(3, 2, 3, 8, 8)
    mean_logits = torch.stack([defended.split(images + 0.1 * draw) for draw in noise]).mean(0)
    expected = torch.softmax(mean_logits / 0.5, dim=1)
    torch.testing.assert_close(defended.predict(images, noise).class_weights, expected)


@pytest.mark.parametrize("settings", [{}, {"sigma": 0}, {"num_noise_samples": 4}])
def test_predict_and_forward_give_the_same_logits(settings: dict[str, float]) -> None:
    defended, images = small_defended(**settings), torch.rand(5, 3, 8, 8)
    noise = torch.randn(defended.num_noise_samples, 5, 3, 8, 8)
    prediction = defended.predict(images, noise)
    torch.testing.assert_close(prediction.logits, defended(images, noise))
    torch.testing.assert_close(prediction.undefended_logits, defended.split(images))


@pytest.mark.parametrize("settings", [{}, {"sigma": 0}])
def test_one_trunk_call_serves_both_passes(settings: dict[str, float]) -> None:
    defended, calls = small_defended(**settings), []
    defended.split._trunk.register_forward_hook(lambda *_: calls.append(1))
    defended(torch.rand(2, 3, 8, 8))
    assert len(calls) == 1


@pytest.mark.parametrize("layer", ["conv2", "hidden"])
def test_an_image_gets_the_same_answer_whatever_else_is_in_its_batch(layer: str) -> None:
    defended, images, noise = small_defended(layer), torch.rand(6, 3, 8, 8), torch.randn(1, 6, 3, 8, 8)
    together = defended(images, noise)
    alone = torch.cat([defended(images[i : i + 1], noise[:, i : i + 1]) for i in range(6)])
    torch.testing.assert_close(together, alone)


def test_gradients_reach_the_images_through_mask_and_pseudo_label() -> None:
    defended = small_defended(sigma=0.05).double()
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    noise = torch.randn(1, 2, 3, 8, 8, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: defended(x, noise), images, fast_mode=True)

    (whole,) = torch.autograd.grad(defended(images, noise).sum(), images)
    with torch.no_grad():
        masks = defended.predict(images, noise).class_weights @ defended.masks
    (without_pseudo_label,) = torch.autograd.grad(
        defended.split.tail(defended.split.trunk(images) * masks).sum(), images
    )
    assert not torch.allclose(whole, without_pseudo_label)


def test_answers_differ_by_their_noise_only() -> None:
    defended, images = small_defended(), torch.rand(2, 3, 8, 8)
    state = copy.deepcopy(defended.state_dict())
    torch.manual_seed(3)
    first, second = defended(images), defended(images)
    torch.manual_seed(3)
    assert torch.equal(first, defended(images)) and not torch.equal(first, second)
    assert all(torch.equal(value, state[name]) for name, value in defended.state_dict().items())


def test_it_moves_with_to() -> None:
    defended = small_defended().to(torch.float64)
    assert {t.dtype for t in defended.state_dict().values() if t.is_floating_point()} == {torch.float64}
    assert defended(torch.rand(1, 3, 8, 8, dtype=torch.float64)).dtype == torch.float64


def test_it_stays_in_eval_mode() -> None:
    defended = small_defended("conv2")
    defended.train()
    assert not any(module.training for module in defended.modules())


def test_importance_of_other_weights_is_refused() -> None:
    split, other = SplitClassifier(small_conv_net(0), "hidden"), SplitClassifier(small_conv_net(1), "hidden")
    with pytest.raises(ImportanceMismatch, match=r"of the weights sha256:.*got one of sha256:"):
        DefendedClassifier(split, importance_of(other, torch.rand(4, 8)))


@pytest.mark.parametrize(
    ("scores", "layer", "message"),
    [
        (torch.rand(4, 9), "hidden", r"= \[4, 8\] for layer 'hidden', got \[4, 9\]"),
        (torch.rand(3, 8), "hidden", r"got \[3, 8\]"),
        (torch.rand(4, 8), "linear:input", "layer 'hidden', got one of 'linear:input'"),
    ],
)
def test_importance_that_does_not_fit_is_refused(scores: Tensor, layer: str, message: str) -> None:
    split = SplitClassifier(small_conv_net(), "hidden")
    with pytest.raises(ImportanceMismatch, match=message):
        DefendedClassifier(split, NeuronImportance(scores, method="lo-ir", layer=layer))


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"top_k": 0}, ImportanceError),
        ({"top_k": 9}, ImportanceError),
        ({"temperature": 0.0}, ValueError),
        ({"temperature": float("nan")}, ValueError),
        ({"sigma": -0.1}, ValueError),
        ({"num_noise_samples": 0}, ValueError),
        ({"unimportant_weight": 1.5}, ValueError),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float], error: type[Exception]) -> None:
    with pytest.raises(error, match="expected"):
        small_defended(**settings)


def test_noise_of_a_wrong_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"noise of shape \[1, 2, 3, 8, 8\]"):
        small_defended()(torch.rand(2, 3, 8, 8), noise=torch.randn(2, 3, 8, 8))
