"""Evaluation and its report, in this process."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from defense import NeuronImportance, load_importance
from defense.digest import model_digest
from evaluation.attacks import Budget, Effort
from evaluation.errors import EvaluationError
from evaluation.folding import fast_copy
from evaluation.report import read_results
from evaluation.run import Evaluation, Job
from evaluation.settings import RunSettings

BUNDLED = Path(__file__).parents[2] / "models" / "fashion-mnist"
TINY = Effort(steps=2, eot=1, targets=1, draws=1)


@pytest.fixture
def grays(tmp_path: Path) -> str:
    pixels = np.random.default_rng(0).integers(110, 140, (6, 1, 10, 1), dtype=np.uint8)
    np.savez(tmp_path / "grays.npz", images=pixels, labels=np.zeros(6, np.int64))
    return str(tmp_path / "grays.npz")


def test_an_image_that_falls_with_one_seed_has_fallen(grays, tmp_path):
    job = Job(model=None, factory="toy_factory:make", data=grays, n=6, curve_images=0)
    settings = RunSettings(Budget(0.1), ("apgd-ce",), TINY, redraws=2, seeds=(0, 1, 2))
    evaluation = Evaluation(job, settings, tmp_path / "run")
    evaluation.run()
    result = read_results(evaluation)[1]
    each = np.stack([outcomes.robust for outcomes in result.seeds])
    assert len(each) == 3
    assert np.array_equal(result.robust, each.all(axis=0))
    evaluation.report()
    row = json.loads((tmp_path / "run" / "report.json").read_text())["targets"][1]
    assert row["robust_of_each_seed"] == each.mean(axis=1).tolist()


def test_a_model_directory_is_evaluated_with_its_controls(tmp_path):
    job = Job(model=BUNDLED, data="probe", n=4, curve_images=0)
    settings = RunSettings(Budget(0.01), ("apgd-ce",), TINY, redraws=2)
    evaluation = Evaluation(job, settings, tmp_path)
    evaluation.run()
    text = evaluation.report()[0].read_text()
    names = ["undefended", "defended", "noise only", "random masks 0", "defended, no noise"]
    assert [target.name for target in evaluation.targets] == names
    assert all(f"| {name} |" in text for name in names)
    assert evaluation.checks["two_passes_without_masks"] < 1e-4
    assert "the ranking has seen them" in text
    kept = NeuronImportance.from_bytes((tmp_path / "rankings" / "defended.safetensors").read_bytes())
    again = Evaluation(
        replace(job, importances={"defended": tmp_path / "rankings" / "defended.safetensors"}), settings, tmp_path
    )
    assert kept.method == "lo-ir"
    assert again.targets[1].fingerprint == evaluation.targets[1].fingerprint


def test_another_ranking_in_the_same_folder_is_refused_and_leaves_the_one_that_was_kept(tmp_path):
    own = load_importance(BUNDLED)
    (tmp_path / "other").write_bytes(replace(own, scores=own.scores.flip(1)).to_bytes())
    job = Job(model=BUNDLED, data="probe", n=4, curve_images=0, controls=())
    settings = RunSettings(Budget(0.01), ("apgd-ce",), TINY, redraws=2)
    Evaluation(job, settings, tmp_path / "run").run()
    kept = (tmp_path / "run" / "rankings" / "defended.safetensors").read_bytes()

    with pytest.raises(EvaluationError, match="another settings"):
        Evaluation(replace(job, importances={"defended": tmp_path / "other"}), settings, tmp_path / "run").run()
    assert (tmp_path / "run" / "rankings" / "defended.safetensors").read_bytes() == kept


def test_a_fast_copy_answers_alike_and_leaves_the_model_alone():
    job = Job(model=BUNDLED, data="probe", n=4, curve_images=0)
    from defense import SplitClassifier, load_classifier

    split = SplitClassifier(load_classifier(job.model))
    before, images = model_digest(split), torch.rand(4, 1, 28, 28)
    folded = fast_copy(split)
    assert torch.allclose(folded(images), split(images), atol=1e-4)
    assert model_digest(split) == before
    assert not any("running_mean" in name for name in folded._trunk.state_dict())
    assert not any(parameter.requires_grad for parameter in folded.parameters())


def test_a_factory_that_is_none_is_refused(grays, tmp_path):
    def evaluation(factory: str) -> Evaluation:
        return Evaluation(
            Job(model=None, factory=factory, data=grays, n=2), RunSettings(Budget(0.1), ("apgd-ce",)), tmp_path
        )

    for factory, message in (
        ("toy_factory", "module:function"),
        ("toy_factory:none", "expected a function"),
        ("toy_models:small_conv_net", "'labels'"),
    ):
        with pytest.raises(EvaluationError, match=message):
            evaluation(factory)
