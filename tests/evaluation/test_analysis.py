"""Networks whose neurons are the pixels, so that what an attack does to them is read off the image."""

import pytest
import torch
from torch import Tensor

from defense import SplitClassifier
from evaluation.analysis import (
    ATTACKED,
    ATTACKED_ONLY,
    GROUPS,
    OTHERS,
    TRUE,
    TRUE_ONLY,
    UNIMPORTANT,
    analyze,
    best_wrong_class,
    neuron_groups,
)
from toy_models import PixelNet, small_conv_net

# Class c has the neuron c; the fourth neuron matters for nobody.
ONE_NEURON_A_CLASS = [[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 1.0, 0]]


def pixels(*rows: list[float]) -> Tensor:
    return torch.tensor(rows).view(len(rows), 1, 1, -1)


@pytest.fixture
def split() -> SplitClassifier:
    return SplitClassifier(PixelNet(ONE_NEURON_A_CLASS))


def test_a_successful_attack_that_swaps_two_neurons_moves_their_two_groups_and_no_other(split: SplitClassifier) -> None:
    before, after = pixels([0.6, 0.4, 0.1, 0.5]), pixels([0.4, 0.6, 0.1, 0.5])
    found = analyze(split, torch.tensor(ONE_NEURON_A_CLASS), before, after, torch.tensor([0]))

    assert found.successful.tolist() == [True]
    assert found.attack_classes.tolist() == [1]
    changes = {group: pytest.approx(found.changes(group).item(), abs=1e-6) for group in GROUPS}
    assert changes == {TRUE: -0.2, ATTACKED: 0.2, OTHERS: 0, UNIMPORTANT: 0, TRUE_ONLY: -0.2, ATTACKED_ONLY: 0.2}
    assert found.relative_changes(TRUE).item() == pytest.approx(-1 / 3)
    assert found.relative_changes(ATTACKED).item() == pytest.approx(1 / 2)


def test_a_failed_attack_belongs_to_the_wrong_class_that_it_came_closest_to(split: SplitClassifier) -> None:
    before, after = pixels([0.9, 0.2, 0.4, 0.5]), pixels([0.7, 0.1, 0.3, 0.5])
    found = analyze(split, torch.tensor(ONE_NEURON_A_CLASS), before, after, torch.tensor([0]))

    assert found.successful.tolist() == [False]
    assert found.attack_classes.tolist() == [2]
    assert found.changes(ATTACKED).item() == pytest.approx(-0.1)
    assert found.changes(OTHERS).item() == pytest.approx(-0.1)


def test_the_attack_class_is_the_prediction_where_that_is_wrong_else_the_runner_up() -> None:
    logits = torch.tensor([[0.1, 0.7, 0.2], [0.6, 0.1, 0.3]])
    assert best_wrong_class(logits, torch.tensor([0, 0])).tolist() == [1, 2]


def test_images_that_were_wrong_before_the_attack_are_left_out(split: SplitClassifier) -> None:
    images = pixels([0.1, 0.9, 0, 0], [0.9, 0.1, 0, 0], [0.1, 0.9, 0, 0])
    found = analyze(split, torch.tensor(ONE_NEURON_A_CLASS), images, images, torch.tensor([0, 0, 1]), batch_size=2)
    assert found.indices.tolist() == [1, 2]
    assert found.labels.tolist() == [0, 1]


def test_shared_neurons_are_in_both_groups_and_in_neither_of_the_exclusive_ones() -> None:
    masks = torch.tensor([[1.0, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 0]])
    groups = neuron_groups(masks, torch.tensor([0]), torch.tensor([1]))
    assert {name: members[0].nonzero().flatten().tolist() for name, members in groups.items()} == {
        TRUE: [0, 1],
        ATTACKED: [1, 2],
        OTHERS: [3],
        UNIMPORTANT: [4],
        TRUE_ONLY: [0],
        ATTACKED_ONLY: [2],
    }


def test_the_change_of_an_empty_or_silent_group_is_not_a_number(split: SplitClassifier) -> None:
    masks = torch.tensor([[1.0, 0, 0, 0], [1.0, 0, 0, 0], [0, 0, 1.0, 0]])  # no neuron is class 1's alone
    before, after = pixels([0.9, 0.2, 0, 0.5]), pixels([0.8, 0.4, 0.1, 0.5])
    found = analyze(split, masks, before, after, torch.tensor([0]))
    assert found.changes(TRUE_ONLY).isnan().all()
    assert found.changes(OTHERS).item() == pytest.approx(0.1)
    assert found.relative_changes(OTHERS).isnan().all()  # 0.1 more than nothing


def test_batches_do_not_matter_and_feature_maps_are_averaged_over_space() -> None:
    split = SplitClassifier(small_conv_net(), "conv1")  # a skip connection passes around conv2, none around conv1
    images = torch.rand(7, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    attacked, labels = (images + 0.05).clamp(0, 1), split(images).argmax(1)
    masks = torch.eye(4, 6)
    at_once = analyze(split, masks, images, attacked, labels)
    done: list[int] = []
    in_parts = analyze(split, masks, images, attacked, labels, batch_size=3, progress=done.append)
    assert done == [3, 6, 7]
    torch.testing.assert_close(in_parts.after, at_once.after)
    torch.testing.assert_close(at_once.before, split.trunk(images).mean(dim=(2, 3)))
