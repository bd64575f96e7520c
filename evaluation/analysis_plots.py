"""Pictures of what an attack does to neurons: by group of neurons, and of one image neuron by neuron.

Each function returns a figure and the numbers it shows; ``write_analysis`` writes both.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from evaluation.analysis import ATTACKED, ATTACKED_ONLY, GROUPS, OTHERS, TRUE, TRUE_ONLY, UNIMPORTANT, Analysis
from evaluation.errors import EvaluationError
from evaluation.figures import new_figure
from evaluation.importance_plots import DPI
from evaluation.statistics import bootstrap_interval, wilson_interval

Numbers = dict[str, Any]
COLORS = {
    TRUE: "tab:blue",
    ATTACKED: "tab:red",
    OTHERS: "tab:green",
    UNIMPORTANT: "gray",
    TRUE_ONLY: "lightsteelblue",
    ATTACKED_ONLY: "lightcoral",
}
OPPOSITE, ALL_FALL = "true class falls and attack's class rises", "true, attack's and other classes fall"
OUTCOMES = {"successful": True, "failed": False}


def write_analysis(
    analysis: Analysis, directory: Path, *, facts: Numbers, class_names: Sequence[str], image: int | None = None
) -> list[Path]:
    """Write ``groups.png``, ``neurons.png`` and, with the numbers they show, ``analysis.json``.

    Args:
        facts: about the run (model, layer, attack, ...); ``title`` is drawn.
        image: index, in what was analyzed, of the image to show neuron by neuron; by default the first that was
            attacked successfully, and the first that withstood.

    Returns:
        The paths of the three files.

    Raises:
        EvaluationError: that image, or every image, was misclassified before the attack.
    """
    if not len(analysis.indices):
        raise EvaluationError("expected images that the model classifies correctly before the attack, found none")
    directory.mkdir(parents=True, exist_ok=True)
    summary = summarize(analysis)
    shown = [_row_of(analysis, image)] if image is not None else _first_of_each_outcome(analysis)
    neurons_figure, neurons = _neurons(analysis, shown, class_names)
    figures = {"groups": _groups(summary, str(facts["title"])), "neurons": neurons_figure}
    paths = [directory / f"{name}.png" for name in figures]
    for path, figure in zip(paths, figures.values(), strict=True):
        figure.savefig(path, dpi=DPI, bbox_inches="tight", pad_inches=0.15)
    paths.append(directory / "analysis.json")
    text = json.dumps(facts | {"groups": summary, "neurons": neurons}, indent=1, allow_nan=False)
    paths[-1].write_text(text + "\n", encoding="utf-8")
    return paths


def summarize(analysis: Analysis) -> Numbers:
    """Of successful and of failed attacks: how many, the change of each group with its interval, and how often the
    paper's observation holds image by image.
    """
    return {
        outcome: _summarize_outcome(analysis, analysis.successful == succeeded)
        for outcome, succeeded in OUTCOMES.items()
    }


def _summarize_outcome(analysis: Analysis, chosen: Tensor) -> Numbers:
    groups = {group: _summarize_group(analysis, group, chosen) for group in GROUPS}
    numbers: Numbers = {"images": int(chosen.sum()), "change": groups}
    signs = torch.stack([analysis.changes(group)[chosen] for group in (TRUE, ATTACKED, OTHERS)])
    numbers["true class falls"] = _share(signs[0] < 0)
    numbers["attack's class rises"] = _share(signs[1] > 0)
    numbers[OPPOSITE] = _share((signs[0] < 0) & (signs[1] > 0))
    numbers[ALL_FALL] = _share((signs < 0).all(dim=0))
    return numbers


def _summarize_group(analysis: Analysis, group: str, chosen: Tensor) -> Numbers:
    relative, absolute = analysis.relative_changes(group)[chosen], analysis.changes(group)[chosen]
    return {
        "neurons": _rounded(analysis.members[group].sum(dim=1).float().mean()),
        "relative": _with_interval(relative[~relative.isnan()]),
        "absolute": _with_interval(absolute[~absolute.isnan()]),
    }


def _with_interval(values: Tensor) -> Numbers | None:
    return _interval(float(values.mean()), bootstrap_interval(values.double().numpy())) if len(values) else None


def _share(holds: Tensor) -> Numbers | None:
    count = int(holds.sum())
    return _interval(count / len(holds), wilson_interval(count, len(holds))) if len(holds) else None


def _interval(mean: float, bounds: tuple[float, float]) -> Numbers:
    return {"mean": _rounded(mean), "low": _rounded(bounds[0]), "high": _rounded(bounds[1])}


def _groups(summary: Numbers, title: str) -> Figure:
    """Relative change of each group, for successful and for failed attacks."""
    figure = new_figure(12, 5.5)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (outcome, numbers) in zip(panels, summary.items(), strict=True):
        axes.axhline(0, color="black", linewidth=0.8)
        for place, group in enumerate(GROUPS):
            _bar(axes, place, group, numbers["change"][group])
        axes.set_title(f"{numbers['images']} {outcome} attacks{_shares(numbers)}", fontsize=9)
        axes.set_xticks(range(len(GROUPS)), [group.replace(" ", "\n") for group in GROUPS], fontsize=9)
        axes.grid(alpha=0.3, axis="y")
        axes.margins(y=0.15)
    panels[0].set_ylabel("change of the group's mean activation, %\n(mean over images, 95% interval)")
    figure.suptitle(title)
    return figure


def _shares(numbers: Numbers) -> str:
    opposite, all_fall = numbers[OPPOSITE], numbers[ALL_FALL]
    if not opposite:
        return ""
    rises, falls = f"{opposite['mean']:.0%}", f"{all_fall['mean']:.0%}"
    return f"\ntrue class falls and attack's rises in {rises}; true, attack's and others fall in {falls}"


def _bar(axes: Axes, place: int, group: str, numbers: Numbers) -> None:
    relative = numbers["relative"]
    if relative is None:
        axes.annotate("none", (place, 0), ha="center", va="bottom", fontsize=9)
        return
    mean, low, high = (100 * relative[name] for name in ("mean", "low", "high"))
    axes.bar(place, mean, color=COLORS[group], yerr=[[mean - low], [high - mean]], capsize=4, width=0.7)
    axes.annotate(
        f"{mean:+.1f}",
        (place, high if mean >= 0 else low),
        xytext=(0, 4 if mean >= 0 else -4),
        textcoords="offset points",
        ha="center",
        va="bottom" if mean >= 0 else "top",
        fontsize=9,
    )


def _neurons(analysis: Analysis, rows: Sequence[int], class_names: Sequence[str]) -> tuple[Figure, list[Numbers]]:
    """Each neuron of single images before and after, those of a group together, the most active first."""
    figure = new_figure(13, 1 + 3.4 * len(rows))
    numbers = []
    for number, row in enumerate(rows):
        axes = figure.add_subplot(len(rows), 1, number + 1)
        numbers.append(_draw_neurons(axes, analysis, row, class_names))
        if number == 0:
            axes.legend(loc="upper right", fontsize=9)
    return figure, numbers


def _draw_neurons(axes: Axes, analysis: Analysis, row: int, class_names: Sequence[str]) -> Numbers:
    before, after = analysis.before[row].numpy(), analysis.after[row].numpy()
    groups = _disjoint_groups(analysis, row)
    order = [j for members in groups.values() for j in sorted(members, key=lambda j: -before[j])]
    places = np.arange(len(order))
    axes.vlines(places, before[order], after[order], color="silver", linewidth=1)
    axes.plot(places, before[order], "o", color="tab:gray", markersize=3.5, label="before")
    rose = after[order] > before[order]
    axes.plot(places[rose], after[order][rose], "^", color="tab:red", markersize=4, label="after: higher")
    axes.plot(places[~rose], after[order][~rose], "v", color="tab:blue", markersize=4, label="after: lower or equal")
    _name_groups(axes, groups)
    true, attacked = (class_names[int(c)] for c in (analysis.labels[row], analysis.attack_classes[row]))
    succeeded = bool(analysis.successful[row])
    became = f"taken for {attacked}" if succeeded else f"withstood; nearest wrong class {attacked}"
    index = int(analysis.indices[row])
    axes.set_title(f"image {index}: {true}, {became}", fontsize=10)
    axes.set_ylabel("activation")
    axes.set_xlim(-1, len(order))
    return {
        "image": index,
        "true_class": true,
        "attack_class": attacked,
        "successful": succeeded,
        "groups": groups,
        "before": [_rounded(value) for value in before],
        "after": [_rounded(value) for value in after],
    }


def _disjoint_groups(analysis: Analysis, row: int) -> dict[str, list[int]]:
    """The neurons of each group, those of both classes apart."""
    members = {group: rows[row] for group, rows in analysis.members.items()}
    apart = {
        TRUE_ONLY: members[TRUE_ONLY],
        "both": members[TRUE] & members[ATTACKED],
        ATTACKED_ONLY: members[ATTACKED_ONLY],
        OTHERS: members[OTHERS],
        UNIMPORTANT: members[UNIMPORTANT],
    }
    return {group: rows.nonzero().flatten().tolist() for group, rows in apart.items()}


def _name_groups(axes: Axes, groups: dict[str, list[int]]) -> None:
    """Borders between the groups, and their names below."""
    borders = np.cumsum([0, *(len(members) for members in groups.values())]) - 0.5
    for border in borders[1:-1]:
        axes.axvline(border, color="black", linewidth=0.8, linestyle=":")
    named = [
        (name, (low + high) / 2) for name, low, high in zip(groups, borders, borders[1:], strict=False) if high > low
    ]
    axes.set_xticks([place for _, place in named], [name.replace(" ", "\n") for name, _ in named], fontsize=9)


def _row_of(analysis: Analysis, image: int) -> int:
    rows = (analysis.indices == image).nonzero().flatten().tolist()
    if not rows:
        raise EvaluationError(
            f"expected an image that is classified correctly before the attack, got {image}; "
            f"the first of those are {analysis.indices[:8].tolist()}"
        )
    return int(rows[0])


def _first_of_each_outcome(analysis: Analysis) -> list[int]:
    first = [(analysis.successful == succeeded).nonzero().flatten()[:1].tolist() for succeeded in OUTCOMES.values()]
    return [row for rows in first for row in rows]


def _rounded(value: float | Tensor) -> float:
    return round(float(value), 5)
