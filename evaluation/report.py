"""The report of a run: JSON with every figure, Markdown to read, and plots."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from evaluation.attacks import ATTACKS
from evaluation.errors import EvaluationError
from evaluation.markdown import markdown_of
from evaluation.outcomes import Outcomes, read_outcomes, write_json
from evaluation.plots import write_plots
from evaluation.sanity import Finding, check_curve, check_model, check_outcomes
from evaluation.statistics import bootstrap_interval, paired_difference, wilson_interval
from evaluation.targets import Target

if TYPE_CHECKING:
    from evaluation.run import Evaluation

REPORT = "report.json"
SANITY_IMAGES = 16


@dataclass(frozen=True)
class Result:
    """A target and what it withstood, with every seed."""

    target: Target
    seeds: list[Outcomes]

    @property
    def first(self) -> Outcomes:
        return self.seeds[0]

    @property
    def worst(self) -> NDArray[np.float64]:
        """[n], the smallest share of right redraws, over attacks and seeds."""
        return np.asarray(np.stack([outcomes.worst for outcomes in self.seeds]).min(axis=0))

    @property
    def clean(self) -> NDArray[np.float64]:
        return np.asarray(np.stack([outcomes.clean for outcomes in self.seeds]).mean(axis=0))

    @property
    def robust(self) -> NDArray[np.bool_]:
        return np.asarray(self.worst >= 1)

    def cut(self, n: int) -> "Result":
        return Result(self.target, [outcomes.cut(n) for outcomes in self.seeds])


def write_report(evaluation: "Evaluation") -> list[Path]:
    """Write ``report.json``, ``report.md`` and the plots into the run's folder; their paths.

    Raises:
        EvaluationError: not one block is finished for all targets.
    """
    results = read_results(evaluation)
    curves = _curves(evaluation)
    findings = _findings(evaluation, results, curves)
    report = report_of(evaluation.description(), results, findings, curves)
    folder = evaluation.folder
    write_json(folder / REPORT, report)
    plots = write_plots(evaluation, results, curves)
    (folder / "report.md").write_text(markdown_of(report, [path.name for path in plots]), encoding="utf-8")
    return [folder / "report.md", folder / REPORT, *plots]


def read_results(evaluation: "Evaluation") -> list[Result]:
    """What is finished, cut to the images that all targets have been attacked on."""
    settings, n = evaluation.settings, len(evaluation.images)
    results = [
        Result(t, [read_outcomes(evaluation.folder, t.name, s, settings.attacks, n) for s in settings.seeds])
        for t in evaluation.targets
    ]
    common = min(len(outcomes) for result in results for outcomes in result.seeds)
    return [result.cut(common) for result in results]


def report_of(
    run: dict[str, Any], results: Sequence[Result], findings: Sequence[Finding], curves: "Curves"
) -> dict[str, Any]:
    """Every figure of the report."""
    return {
        "run": run,
        "n": len(results[0].worst),
        "targets": [_row(result) for result in results],
        "differences": _differences(results),
        "attacks": {result.target.name: _attack_rows(result.first) for result in results},
        "looks_for": {name: _looks_for(name) for name in run["settings"]["attacks"]},
        "sanity": [asdict(finding) for finding in findings],
        "curves": curves,
    }


Curves = dict[str, list[dict[str, float]]]


def _row(result: Result) -> dict[str, Any]:
    n, robust = len(result.worst), int(result.robust.sum())
    low, high = wilson_interval(robust, n)
    gradient, forward = (sum(calls[i] for o in result.seeds for calls in o.calls.values()) / n for i in (0, 1))
    row: dict[str, Any] = {
        "target": result.target.name,
        "about": result.target.about,
        "control": result.target.is_control,
        "clean": float(result.clean.mean()),
        "clean_every_draw": float((result.clean >= 1).mean()),
        "robust": robust / n,
        "robust_low": low,
        "robust_high": high,
        "robust_one_draw": float(result.worst.mean()),
        "robust_of_each_seed": [float(outcomes.robust.mean()) for outcomes in result.seeds],
        "gradient_calls_an_image": gradient,
        "forward_calls_an_image": forward,
        "seconds": sum(outcomes.seconds for outcomes in result.seeds),
    }
    known = result.first.noise_known
    if known is not None:
        row["robust_noise_known"] = float(np.minimum(known, result.robust).mean())
    return row


def _differences(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Every defense against every control, the same images."""
    rows = []
    for defense in (r for r in results if not r.target.is_control):
        for control in (r for r in results if r.target.is_control):
            difference = paired_difference(defense.robust, control.robust)
            low, high = bootstrap_interval(defense.worst - control.worst)
            one_draw = {"mean": float((defense.worst - control.worst).mean()), "low": low, "high": high}
            rows.append(
                {"defense": defense.target.name, "control": control.target.name, "one_draw": one_draw}
                | asdict(difference)
                | {"distinguishable_from_zero": difference.is_distinguishable_from_zero}
            )
    return rows


def _attack_rows(outcomes: Outcomes) -> list[dict[str, Any]]:
    """By attack: images it was tried on, images that it broke first, and what is left after it."""
    rows, before, n = [], outcomes.clean, len(outcomes)
    for name, after in outcomes.after.items():
        left = int((after >= 1).sum())
        low, high = wilson_interval(left, n)
        tried_on = int(np.isfinite(outcomes.alone[name]).sum())
        rows.append(
            {
                "attack": name,
                "tried_on": tried_on,
                "gradient_calls_an_image_tried": outcomes.calls[name][0] / max(tried_on, 1),
                "forward_calls_an_image_tried": outcomes.calls[name][1] / max(tried_on, 1),
                "broke_first": int(((before >= 1) & (after < 1)).sum()),
                "left": left / n,
                "left_low": low,
                "left_high": high,
                "left_one_draw": float(after.mean()),
            }
        )
        before = after
    return rows


def _looks_for(name: str) -> str:
    return " ".join((ATTACKS[name].__doc__ or "").split())


def _curves(evaluation: "Evaluation") -> Curves:
    """Robust accuracy over epsilon, by target; nothing where the curve is not finished."""
    curves: Curves = {}
    for target in evaluation.curve_targets:
        points = []
        for name, (settings, images) in evaluation.curve.items():
            try:
                outcomes = read_outcomes(
                    evaluation.folder / name, target.name, settings.seeds[0], settings.attacks, len(images)
                )
            except EvaluationError:
                continue
            points.append(_point(settings.budget.epsilon, outcomes))
            clean = _point(0.0, outcomes, clean=True)
        if points:
            curves[target.name] = [clean, *points]
    return curves


def _point(epsilon: float, outcomes: Outcomes, *, clean: bool = False) -> dict[str, float]:
    right = int(((outcomes.clean if clean else outcomes.worst) >= 1).sum())
    low, high = wilson_interval(right, len(outcomes))
    return {"epsilon": epsilon, "robust": right / len(outcomes), "low": low, "high": high, "n": len(outcomes)}


def _findings(evaluation: "Evaluation", results: Sequence[Result], curves: Curves) -> list[Finding]:
    images, labels = evaluation.images.images[:SANITY_IMAGES], evaluation.images.labels[:SANITY_IMAGES]
    findings = []
    for result in results:
        findings += check_model(result.target, images, labels)
        findings += check_outcomes(result.first)
        if result.target.name in curves:
            accuracies = {point["epsilon"]: point["robust"] for point in curves[result.target.name]}
            findings.append(check_curve(accuracies, result.target.name))
    return findings
