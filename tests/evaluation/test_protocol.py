from pathlib import Path

import numpy as np
import pytest
import torch

from defense.model_config import DefenseConfig
from defense.probe import ArrayProbeSet
from evaluation.attacks import Budget, Effort
from evaluation.errors import EvaluationError
from evaluation.outcomes import read_outcomes
from evaluation.protocol import num_steps, run_protocol
from evaluation.settings import RunSettings, preset
from evaluation.targets import Target, defense_targets, two_passes_without_masks
from evaluation.test_images import TestImages, open_data
from outcome_records import records
from toy_defenses import EPSILON, two_way_defense

ATTACKS = ("apgd-ce", "bpda")
SETTINGS = RunSettings(Budget(EPSILON), ATTACKS, Effort(steps=10, eot=2, targets=1, draws=2), block_size=4, redraws=4)


def grays(n: int = 12) -> ArrayProbeSet:
    """Images around gray, 1 x 10 pixels, all of class 0."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(110, 140, (n, 1, 10, 1), dtype=np.uint8)
    return ArrayProbeSet("grays", torch.from_numpy(pixels), torch.zeros(n, dtype=torch.int64))


def targets(sigma: float = 0.02) -> list[Target]:
    defended = two_way_defense(sigma=sigma)
    return [Target("undefended", defended.split, "", is_control=True), Target("defended", defended, "")]


def run(folder: Path, n: int, settings: RunSettings = SETTINGS, **options: object) -> list[str]:
    steps: list[str] = []
    run_protocol(targets(), TestImages(grays(), None, n), settings, folder, progress=steps.append, **options)
    return steps


def test_two_runs_give_the_same_outcomes_and_the_same_adversarial_images(tmp_path):
    for name in "ab":
        assert len(run(tmp_path / name, 8)) == num_steps(targets(), 8, SETTINGS)
    assert records(tmp_path / "a") == records(tmp_path / "b")
    images = [sorted((tmp_path / name / "adversarial").rglob("*.npz")) for name in "ab"]
    assert len(images[0]) > 0
    for first, second in zip(*images, strict=True):
        with np.load(first) as one, np.load(second) as other:
            assert np.array_equal(one["images"], other["images"])


def test_a_run_that_grows_keeps_what_it_has_and_equals_one_that_was_large_at_once(tmp_path):
    run(tmp_path / "grown", 4)
    before = records(tmp_path / "grown")
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "grown").rglob("*.json")}
    run(tmp_path / "grown", 12)
    run(tmp_path / "whole", 12)
    after = records(tmp_path / "grown")
    assert before.items() <= after.items()
    assert after == records(tmp_path / "whole")
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())


def test_a_block_that_was_cut_short_by_n_does_not_hide_those_behind_it(tmp_path):
    run(tmp_path, 6)
    run(tmp_path, 12)
    assert len(read_outcomes(tmp_path, "defended", 0, ATTACKS)) == 12


def test_an_attack_added_later_is_tried_on_what_stands(tmp_path):
    run(tmp_path, 4, RunSettings(**{**vars(SETTINGS), "attacks": ("apgd-ce",)}))
    with pytest.raises(EvaluationError, match="no finished block"):
        read_outcomes(tmp_path, "defended", 0, ATTACKS)
    run(tmp_path, 4)
    run(tmp_path / "whole", 4)
    assert records(tmp_path)["outcomes/defended/seed0/00000-00004.json"] == next(
        iter(records(tmp_path / "whole").values())
    )


def test_outcomes_of_other_settings_are_refused(tmp_path):
    run(tmp_path, 4)
    with pytest.raises(EvaluationError, match="another settings"):
        run(tmp_path, 4, RunSettings(**{**vars(SETTINGS), "budget": Budget(0.2)}))


def test_worst_case_is_image_by_image_over_attacks(tmp_path):
    run(tmp_path, 12)
    outcomes = read_outcomes(tmp_path, "defended", 0, ATTACKS)
    tried = [np.nan_to_num(outcomes.alone[name], nan=1.0) for name in ATTACKS]
    assert np.array_equal(outcomes.worst, np.minimum.reduce([outcomes.clean, *tried]))
    assert outcomes.robust.sum() < (outcomes.after["apgd-ce"] >= 1).sum()
    assert len(outcomes.cut(5)) == 5


def test_images_that_are_broken_or_misclassified_cost_no_gradient(tmp_path):
    wrong = ArrayProbeSet("wrong", grays(4).images, torch.ones(4, dtype=torch.int64))
    run_protocol(targets(), TestImages(wrong, None, 4), SETTINGS, tmp_path)
    outcomes = read_outcomes(tmp_path, "defended", 0, ATTACKS)
    assert outcomes.calls == dict.fromkeys(ATTACKS, (0, 0))
    assert outcomes.clean.tolist() == [0, 0, 0, 0]


def test_the_order_of_test_images_does_not_depend_on_how_many_are_taken():
    few, many = TestImages(grays(), None, 5), TestImages(grays(), None, 12)
    assert many.indices[:5] == few.indices
    assert torch.equal(many.images[:5], few.images)
    assert sorted(many.indices) == list(range(12)) != many.indices


def test_more_images_than_there_are_are_refused():
    with pytest.raises(EvaluationError, match="1 to 12 images"):
        TestImages(grays(), None, 13)


def test_keeping_every_neuron_is_the_undefended_model_whatever_the_noise():
    defended = two_way_defense()
    images = TestImages(grays(), None, 8).images
    assert two_passes_without_masks(defended.split, DefenseConfig(top_k=1, sigma=0.5), images) < 1e-4


def test_controls_stand_beside_the_defense():
    defended = two_way_defense()
    scores = torch.tensor([[1.0] + [0.0] * 9, [0.0] * 9 + [1.0]])
    from toy_models import importance_of

    importance = importance_of(defended.split, scores)
    settings = DefenseConfig(layer="features", top_k=1, sigma=0.1)
    found = defense_targets(defended.split, {"lo-ir": importance}, settings, random_masks=2)
    names = ["undefended", "lo-ir", "noise only", "random masks 0", "random masks 1", "lo-ir, no noise"]
    assert [t.name for t in found] == names
    assert [t.is_control for t in found] == [True, False, True, True, True, False]
    assert [t.has_noise for t in found] == [False, True, True, True, True, False]
    assert len({t.fingerprint for t in found}) == len(found)


@pytest.mark.parametrize("name", ["quick", "standard", "adaptive"])
def test_presets_run_attacks_that_exist(name):
    chosen = preset(name)
    assert RunSettings(Budget(0.1), chosen.attacks, chosen.effort).attacks


def test_unknown_attacks_and_presets_are_named():
    with pytest.raises(EvaluationError, match="apgd-ce"):
        RunSettings(Budget(0.1), ("nonsense",))
    with pytest.raises(EvaluationError, match="quick, standard, adaptive"):
        preset("nonsense")


def test_mnist_files_arrays_and_class_folders_are_found_by_what_they_are(tmp_path):
    from PIL import Image

    idx = tmp_path / "mnist"
    idx.mkdir()
    (idx / "t10k-images-idx3-ubyte").write_bytes(bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 2, 0, 0, 0, 3, *range(12)]))
    (idx / "t10k-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 2, 1, 0]))
    read = open_data(str(idx), ["a", "b"])
    assert read.labels.tolist() == [1, 0]
    assert read.pixels(1, None)[:, :, 0].tolist() == [[6, 7, 8], [9, 10, 11]]

    np.savez(tmp_path / "arrays.npz", images=grays(3).images.numpy(), labels=np.array([0, 1, 0]))
    assert open_data(str(tmp_path / "arrays.npz"), ["a", "b"]).labels.tolist() == [0, 1, 0]

    for label in ("a", "b"):
        (tmp_path / "folder" / label).mkdir(parents=True)
        Image.new("L", (2, 2)).save(tmp_path / "folder" / label / "0.png")
    assert open_data(str(tmp_path / "folder"), ["a", "b"]).labels.tolist() == [0, 1]
    with pytest.raises(EvaluationError, match="found nothing"):
        open_data(str(tmp_path / "none"), ["a", "b"])
