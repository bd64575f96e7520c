"""Evaluation: from a model directory and a dataset to a folder of outcomes and a report."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from defense import (
    NeuronImportance,
    ProbeSet,
    SplitClassifier,
    load_classifier,
    load_importance,
    read_config,
)
from defense.shards import rank_and_world
from evaluation.errors import EvaluationError
from evaluation.factory import labels_of_factory, targets_of_factory
from evaluation.manifest import write_manifest
from evaluation.outcomes import slug, write_bytes
from evaluation.protocol import num_steps, run_protocol
from evaluation.settings import RunSettings, curve_epsilons
from evaluation.targets import (
    CONTROLS,
    NOISE_ONLY,
    UNDEFENDED,
    Target,
    defense_targets,
    two_passes_without_masks,
    without_noise,
)
from evaluation.test_images import TestImages, open_data

# Both ways into the defense, and the way around its gradients: enough to see a curve go to zero.
CURVE_ATTACKS = ("apgd-ce", "transfer-cw", "bpda-cw")
DEFENDED = "defended"


@dataclass(frozen=True)
class Job:
    """What to attack, and with which images.

    Attributes:
        model: directory. factory: ``module:function`` in its place. data: see ``open_data``.
        n: images; fewer if the dataset has fewer and ``n_given`` is false.
        importances: files of rankings by name; none for the model directory's own.
        curve_images: images of the accuracy-over-epsilon curve.
    """

    model: Path | None
    data: str
    n: int
    factory: str | None = None
    n_given: bool = True
    importances: Mapping[str, Path] = field(default_factory=dict)
    controls: tuple[str, ...] = CONTROLS
    random_masks: int = 1
    curve_images: int = 30
    keep_adversarial: bool = True


class Evaluation:
    """A run: its targets and images, what is done of it, and its report.

    Args:
        folder: where all of it goes; a run that has been there goes on.
        command: how it was called, for the manifest.
    """

    def __init__(self, job: Job, settings: RunSettings, folder: Path, command: str = "") -> None:
        torch.set_flush_denormal(True)  # gradients of saturated images are denormal, and these are slow on CPUs
        self.job, self.settings, self.folder = job, settings, folder
        self.images = _test_images(job)
        self.class_names = self.images.class_names or [str(c) for c in range(int(self.images.labels.max()) + 1)]
        self._importances = {} if job.factory else _importances(job)
        self.targets, self.checks = _targets(job, self.images, self._importances)
        self.curve = _curve(job, settings, self.images)
        self.curve_targets = _curve_targets(self.targets)
        if rank_and_world()[0] == 0:
            write_manifest(folder, self.description(), command)

    @property
    def num_steps(self) -> int:
        curve = sum(num_steps(self.curve_targets, len(images), settings) for settings, images in self.curve.values())
        return curve + num_steps(self.targets, len(self.images), self.settings)

    def run(self, progress: Callable[[str], None] = lambda step: None) -> None:
        """Attack, or go on."""
        run_protocol(
            self.targets,
            self.images,
            self.settings,
            self.folder,
            keep_adversarial=self.job.keep_adversarial,
            progress=progress,
        )
        for name, (settings, images) in self.curve.items():
            run_protocol(
                self.curve_targets, images, settings, self.folder / name, keep_adversarial=False, progress=progress
            )
        if rank_and_world()[0] == 0:
            # Not before: another ranking of that name would have been refused, and should leave the one that was kept.
            for name, importance in self._importances.items():
                write_bytes(self.folder / "rankings" / f"{slug(name)}.safetensors", importance.to_bytes())

    def report(self) -> list[Path]:
        """Write the report of all that is done; the paths of its files."""
        from evaluation.report import write_report  # matplotlib imports slowly

        return write_report(self)

    def description(self) -> dict[str, Any]:
        """What decides the numbers, as JSON."""
        return {
            "model": str(self.job.model) if self.job.model else None,
            "factory": self.job.factory,
            "dataset": self.images.name,
            "images": len(self.images),
            "images_digest": self.images.digest,
            "settings": self.settings.as_dict(),
            "targets": [{"name": t.name, "about": t.about, "fingerprint": t.fingerprint} for t in self.targets],
            "checks": self.checks,
            "curve": {name: asdict(settings.budget) for name, (settings, _) in self.curve.items()},
        }


def _test_images(job: Job) -> TestImages:
    if job.factory:
        labels = labels_of_factory(job.factory)
        if labels is None:
            raise EvaluationError(f"expected {job.factory} to have an attribute 'labels', the names of its classes")
        dataset, config = open_data(job.data, labels), None
    else:
        assert job.model is not None
        description = read_config(job.model)
        labels = list(description.labels)
        dataset, config = open_data(job.data, labels, job.model), description.input
    return TestImages(dataset, config, _how_many(job, dataset), labels)


def _how_many(job: Job, dataset: ProbeSet) -> int:
    return job.n if job.n_given else min(job.n, len(dataset))


def _targets(
    job: Job, images: TestImages, importances: Mapping[str, NeuronImportance]
) -> tuple[list[Target], dict[str, float]]:
    if job.factory:
        return targets_of_factory(job.factory, images.images[:8]), {}
    assert job.model is not None
    settings = read_config(job.model).defense
    split = SplitClassifier(load_classifier(job.model), settings.layer)
    targets = defense_targets(split, importances, settings, controls=job.controls, random_masks=job.random_masks)
    return targets, {"two_passes_without_masks": two_passes_without_masks(split, settings, images.images[:32])}


def _importances(job: Job) -> dict[str, NeuronImportance]:
    if job.importances:
        return {name: NeuronImportance.from_bytes(file.read_bytes()) for name, file in job.importances.items()}
    assert job.model is not None
    own = load_importance(job.model)
    if own is None:
        raise EvaluationError(
            f"expected an importance in {job.model}, found none; run 'igd rank --output FILE' and pass --importance"
        )
    return {DEFENDED: own}


def _curve_targets(targets: list[Target]) -> list[Target]:
    """The undefended model, the first defense with and without noise, noise only: a curve of all would be a tangle."""
    first = next((target for target in targets if not target.is_control), targets[0])
    names = {UNDEFENDED, NOISE_ONLY, targets[0].name, first.name, without_noise(first.name)}
    return [target for target in targets if target.name in names]


def _curve(job: Job, settings: RunSettings, images: TestImages) -> dict[str, tuple[RunSettings, TestImages]]:
    if not job.curve_images or not settings.budget.epsilon:
        return {}
    few = images.first(job.curve_images)
    effort = replace(settings.effort, steps=min(settings.effort.steps, 20), eot=min(settings.effort.eot, 4))
    return {
        f"curve/{epsilon:g}": (
            replace(
                settings,
                budget=replace(settings.budget, epsilon=epsilon),
                attacks=CURVE_ATTACKS,
                effort=effort,
                seeds=settings.seeds[:1],
            ),
            few,
        )
        for epsilon in curve_epsilons(settings.budget.epsilon)
    }
