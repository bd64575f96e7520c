"""Pictures of a neuron importance: does it tell the classes apart, and how many neurons matter?

Each function returns a figure and the numbers it shows; ``plot_importance`` writes both. Figures are made without
pyplot, so that nothing is shared between threads.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from numpy.typing import NDArray

from defense import NeuronImportance, top_k_masks
from evaluation.figures import new_figure

Numbers = dict[str, Any]
Array = NDArray[np.float64]

NUMBERS_FILE = "importance.json"
DPI = 150
MAX_ROWS, MAX_COLUMNS = 500, 1024  # cells of a heatmap: more cannot be told apart
MAX_OVERLAP_CELLS = 500
MAX_NAMED = 40  # classes that are all named along an axis; of more, about 20
MAX_CURVES = 10  # classes that have a curve of their own


@dataclass(frozen=True)
class _Shown:
    """What every picture needs of an importance."""

    relative: Array  # [C, N], of the class's range: 0 its least important neuron, 1 its most important one
    masks: Array  # [C, N]
    names: list[str]
    top_k: int
    origin: str

    @property
    def num_classes(self) -> int:
        return len(self.relative)

    @property
    def num_neurons(self) -> int:
        return int(self.relative.shape[1])


def plot_importance(
    importance: NeuronImportance, directory: Path, *, top_k: int, class_names: Sequence[str] = ()
) -> list[Path]:
    """Write ``heatmap.png``, ``overlap.png``, ``decay.png`` and, with the numbers they show, ``importance.json``.

    Args:
        top_k: neurons that the defense keeps of each class.
        class_names: used where the importance has none.

    Returns:
        The paths of the four files.

    Raises:
        ImportanceError: ``top_k`` is not from 1 to N.
    """
    shown = _shown(importance, top_k, class_names)
    directory.mkdir(parents=True, exist_ok=True)
    numbers: Numbers = {"importance": importance.metadata(), "top_k": top_k}
    paths = []
    for name, plot in (("heatmap", _heatmap), ("overlap", _overlap), ("decay", _decay)):
        figure, numbers[name] = plot(shown)
        paths.append(directory / f"{name}.png")
        figure.savefig(paths[-1], dpi=DPI, bbox_inches="tight", pad_inches=0.15)
    paths.append(directory / NUMBERS_FILE)
    paths[-1].write_text(json.dumps(numbers) + "\n", encoding="utf-8")
    return paths


def _shown(importance: NeuronImportance, top_k: int, class_names: Sequence[str]) -> _Shown:
    scores: Array = importance.scores.numpy().astype(np.float64)
    lowest, highest = scores.min(axis=1, keepdims=True), scores.max(axis=1, keepdims=True)
    names = list(importance.class_names or class_names) or [str(c) for c in range(importance.num_classes)]
    return _Shown(
        relative=(scores - lowest) / np.maximum(highest - lowest, np.finfo(np.float64).tiny),
        masks=top_k_masks(importance.scores, top_k).numpy(),
        names=names,
        top_k=top_k,
        origin=f"{importance.method} at {importance.layer}",
    )


def _heatmap(shown: _Shown) -> tuple[Figure, Numbers]:
    """Classes x neurons; each neuron stands with the class it matters most for."""
    best_class = shown.relative.argmax(axis=0)
    order = np.lexsort((-shown.relative.max(axis=0), best_class))
    cells, per_cell = _largest_of_blocks(shown.relative[:, order], MAX_ROWS, MAX_COLUMNS)
    figure = new_figure(12, 1.8 + min(6.2, max(2.0, 0.28 * shown.num_classes)))
    axes = figure.add_subplot()
    image = axes.imshow(
        cells,
        norm=PowerNorm(0.5, 0, 1),
        cmap="magma",
        aspect="auto",
        interpolation="nearest",
        extent=_extent(shown.num_neurons, shown.num_classes),
    )
    axes.set_title(
        f"Importance of {shown.num_neurons} neurons for {shown.num_classes} classes ({shown.origin})\n"
        "neurons sorted by the class they matter most for" + _each_cell(per_cell, "classes", "neurons")
    )
    axes.set_xlabel("neurons, in that order")
    _name_classes(axes, shown.names, "y")
    bar = figure.colorbar(image, ax=axes, ticks=[0, 0.05, 0.25, 0.5, 0.75, 1], pad=0.01)
    bar.set_label("score within the class\n(0 least, 1 most important neuron; square-root scale)")
    return figure, {
        "classes": shown.names,
        "neurons": order.tolist(),
        "classes_per_cell": per_cell[0],
        "neurons_per_cell": per_cell[1],
        "score_within_class": _rounded(cells),
    }


def _overlap(shown: _Shown) -> tuple[Figure, Numbers]:
    """Jaccard overlap of the classes' top-k sets. A class with itself is left out, so that colors tell others apart."""
    jaccard = _jaccard(shown)
    others = jaccard[jaccard >= 0]
    mean, most = (float(others.mean()), float(others.max())) if len(others) else (0.0, 1.0)
    by_chance = shown.top_k / (2 * shown.num_neurons - shown.top_k)
    cells, per_cell = _largest_of_blocks(jaccard, MAX_OVERLAP_CELLS, MAX_OVERLAP_CELLS)
    figure = new_figure(9.5, 8.5)
    axes = figure.add_subplot(facecolor="lightgray")
    image = axes.imshow(
        np.ma.masked_less(cells, 0),
        vmin=0,
        vmax=most or 1,
        cmap="viridis",
        interpolation="nearest",
        extent=_extent(shown.num_classes, shown.num_classes),
    )
    axes.set_title(
        f"Overlap of the classes' top-{shown.top_k} sets of {shown.num_neurons} neurons ({shown.origin})\n"
        f"mean of two classes {mean:.2f}, most {most:.2f}; random sets would have {by_chance:.2f}"
        + _each_cell(per_cell, "classes", "classes"),
    )
    _name_classes(axes, shown.names, "y")
    _name_classes(axes, shown.names, "x")
    if shown.num_classes <= 12:
        _write_values(axes, jaccard, most)
    bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02)
    bar.set_label("Jaccard index: shared neurons / neurons of both sets (1 = the same set)")
    return figure, {
        "classes": shown.names,
        "mean_of_two_classes": round(mean, 4),
        "random_sets": round(by_chance, 4),
        "most_alike": _most_alike(jaccard, shown.names),
        "classes_per_cell": per_cell[0],
        "jaccard": [[None if value < 0 else value for value in row] for row in _rounded(cells)],
    }


def _jaccard(shown: _Shown) -> Array:
    """[C, C]; -1 for a class with itself."""
    common = shown.masks @ shown.masks.T
    jaccard: Array = common / (2 * shown.top_k - common)
    np.fill_diagonal(jaccard, -1)
    return jaccard


def _decay(shown: _Shown) -> tuple[Figure, Numbers]:
    """Each class's scores from its most to its least important neuron; of many classes, their spread."""
    curves = -np.sort(-shown.relative, axis=1)
    shares = curves[:, : shown.top_k].sum(axis=1) / np.maximum(curves.sum(axis=1), 1e-12)
    ranks = np.arange(1, shown.num_neurons + 1)
    figure = new_figure(10, 6)
    axes = figure.add_subplot()
    numbers: Numbers = {
        "classes": shown.names,
        "share_of_the_top_k": _rounded(shares),
        "median_share_of_the_top_k": round(float(np.median(shares)), 4),
    }
    if shown.num_classes <= MAX_CURVES:
        for name, curve in zip(shown.names, curves, strict=True):
            axes.plot(ranks, curve, label=_short(name), linewidth=1.5)
        numbers["score_within_class"] = _rounded(curves)
    else:
        numbers["percentiles"] = _plot_spread(axes, curves)
        for which, c, color in (("most", shares.argmax(), "tab:red"), ("least", shares.argmin(), "tab:green")):
            label = f"{which} in its top {shown.top_k} ({shares[c]:.0%}):\n{_short(shown.names[c])}"
            axes.plot(ranks, curves[c], color=color, linewidth=1.2, label=label)
    _mark_k(axes, shown)
    axes.set_title(
        f"Decay of the score over each class's {shown.num_neurons} neurons ({shown.origin})\n"
        f"the top {shown.top_k} hold {np.median(shares):.0%} of a class's score (median of {shown.num_classes} classes)"
    )
    _label_decay(axes, shown)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    return figure, numbers


def _label_decay(axes: Axes, shown: _Shown) -> None:
    axes.set_xscale("log")
    axes.set_xlim(1, max(2, shown.num_neurons))
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("rank of the neuron within the class (1 = most important, log scale)")
    axes.set_ylabel("score within the class (0 least, 1 most important)")
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.xaxis.set_minor_formatter("{x:.0f}" if shown.num_neurons < 10 else NullFormatter())
    axes.grid(alpha=0.3, which="both")


def _mark_k(axes: Axes, shown: _Shown) -> None:
    right_half = shown.top_k**2 > shown.num_neurons  # of the log scale
    axes.axvline(shown.top_k, color="black", linestyle="--", linewidth=1.2)
    axes.annotate(
        f" k = {shown.top_k} ",
        (shown.top_k, 0.985),
        xycoords=("data", "axes fraction"),
        va="top",
        ha="right" if right_half else "left",
        fontweight="bold",
    )


def _plot_spread(axes: Axes, curves: Array) -> Numbers:
    """Percentiles over the classes."""
    levels, ranks = (0, 10, 50, 90, 100), np.arange(1, curves.shape[1] + 1)
    lowest, low, median, high, highest = percentiles = np.percentile(curves, levels, axis=0)
    axes.fill_between(ranks, lowest, highest, color="tab:blue", alpha=0.12, label="all classes", linewidth=0)
    axes.fill_between(ranks, low, high, color="tab:blue", alpha=0.3, label="80% of the classes", linewidth=0)
    axes.plot(ranks, median, color="tab:blue", linewidth=2, label="median of the classes")
    return {str(level): _rounded(curve) for level, curve in zip(levels, percentiles, strict=True)}


def _most_alike(jaccard: Array, names: list[str], most: int = 20) -> list[Numbers]:
    rows, columns = np.triu_indices(len(names), k=1)
    first = np.argsort(-jaccard[rows, columns], kind="stable")[:most]
    return [
        {"classes": [names[rows[i]], names[columns[i]]], "jaccard": round(float(jaccard[rows[i], columns[i]]), 4)}
        for i in first
    ]


def _largest_of_blocks(matrix: Array, max_rows: int, max_columns: int) -> tuple[Array, tuple[int, int]]:
    """The matrix with blocks of cells replaced by their largest, and the (rows, columns) of a block.

    The largest, not the mean: one important neuron among four must stay visible.
    """
    rows, columns = -(-matrix.shape[0] // max_rows), -(-matrix.shape[1] // max_columns)
    by_rows = np.maximum.reduceat(matrix, np.arange(0, matrix.shape[0], rows), axis=0)
    return np.maximum.reduceat(by_rows, np.arange(0, matrix.shape[1], columns), axis=1), (rows, columns)


def _each_cell(per_cell: tuple[int, int], rows: str, columns: str) -> str:
    return "" if per_cell == (1, 1) else f"\na cell shows the highest of {per_cell[0]} {rows} x {per_cell[1]} {columns}"


def _extent(columns: int, rows: int) -> tuple[float, float, float, float]:
    # In classes and neurons, whatever number of them a cell stands for.
    return (-0.5, columns - 0.5, rows - 0.5, -0.5)


def _name_classes(axes: Axes, names: list[str], axis: str) -> None:
    step = 1 if len(names) <= MAX_NAMED else -(-len(names) // 20)
    ticks = list(range(0, len(names), step))
    labels = [_short(names[c]) if step == 1 else f"{c} {_short(names[c], 16)}" for c in ticks]
    if axis == "y":
        axes.set_yticks(ticks, labels, fontsize=9)
        axes.set_ylabel("class" if step == 1 else f"class (1 in {step} is named)")
    else:
        axes.set_xticks(ticks, labels, fontsize=9, rotation=90 if len(names) > 5 else 0)


def _write_values(axes: Axes, matrix: Array, most: float) -> None:
    for (row, column), value in np.ndenumerate(matrix):
        if value >= 0:
            color = "black" if value > 0.6 * most else "white"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=color, fontsize=9)


def _short(name: str, most: int = 24) -> str:
    shown = name if len(name) <= most else f"{name[: most - 1]}…"
    return shown.replace("$", r"\$")  # not the beginning of a formula


def _rounded(values: Array) -> Any:
    return np.round(values.astype(np.float64), 4).tolist()
