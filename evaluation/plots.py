"""Pictures of a run: accuracies, attacks, which attack broke which image, accuracy over epsilon, adversarial images."""

from collections.abc import Sequence
from itertools import cycle, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray
from torch import Tensor, nn

from evaluation.attacks import first_pass, undefended
from evaluation.figures import new_figure
from evaluation.outcomes import BlockFile, Outcomes
from evaluation.protocol import seed_of
from evaluation.statistics import wilson_interval

if TYPE_CHECKING:
    from evaluation.report import Curves, Result
    from evaluation.run import Evaluation

DPI = 130
MAX_EXAMPLES = 8
CAPTION_DRAWS = 11
_STYLES = ("o-", "s--", "^-.", "D:")  # curves may lie on each other
_CLEAN, _ROBUST = "#9ecae1", "#08519c"


def write_plots(evaluation: "Evaluation", results: Sequence["Result"], curves: "Curves") -> list[Path]:
    """Write the plots that there are data for; their paths."""
    figures = {"targets": _targets(results), "attacks": _attacks(results), "broken-by": _broken_by(results)}
    if curves:
        figures["curve"] = _curve(curves)
    examples = _examples(evaluation, results)
    if examples is not None:
        figures["images"] = examples
    paths = []
    for name, figure in figures.items():
        paths.append(evaluation.folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=DPI, bbox_inches="tight", pad_inches=0.15)
    return paths


def _targets(results: Sequence["Result"]) -> Figure:
    """Clean and worst-case accuracy of each target, with intervals."""
    figure, n = new_figure(9, 1.2 + 0.55 * len(results)), len(results[0].worst)
    axes = figure.add_subplot()
    for row, result in enumerate(results):
        for offset, right, color, label in (
            (-0.19, result.clean >= 1, _CLEAN, "clean"),
            (0.19, result.robust, _ROBUST, "worst case of all attacks"),
        ):
            _bar(axes, row + offset, int(right.sum()), n, color, label if row == 0 else None)
        axes.plot(result.worst.mean(), row + 0.19, "D", color="tab:orange", label=None if row else "one draw, attacked")
    axes.set_yticks(range(len(results)), [result.target.name for result in results])
    axes.invert_yaxis()
    _percent_axis(axes)
    axes.set_xlabel("images right in every noise draw, with Wilson's 95% intervals")
    axes.set_title(f"Accuracy of the defense and its controls, the same {n} images")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def _attacks(results: Sequence["Result"]) -> Figure:
    """What is left after each attack, in the order in which they ran, one panel for each target."""
    names = ["clean", *results[0].first.after]
    columns = min(3, len(results))
    rows = -(-len(results) // columns)
    figure = new_figure(4.2 * columns + 1, rows * (1.1 + 0.28 * len(names)))
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for axes, result in zip(panels, results, strict=False):
        n, steps = len(result.first), [result.first.clean, *result.first.after.values()]
        broke = [0, *(int(((a >= 1) & (b < 1)).sum()) for a, b in pairwise(steps))]
        for row, right in enumerate(steps):
            _bar(axes, row, int((right >= 1).sum()), n, _CLEAN if row == 0 else _ROBUST)
            if broke[row]:
                axes.annotate(f"-{broke[row]}", (1, row), ha="right", va="center", fontsize=8)
        axes.set_title(result.target.name, fontsize=10)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        _percent_axis(axes)
    panels[0].invert_yaxis()
    for axes in panels[len(results) :]:
        axes.set_visible(False)
    figure.suptitle(
        "Images that are still right in every noise draw after each attack and those above it\n"
        "(95% intervals; at the right edge: how many images the attack broke first)"
    )
    return figure


def _broken_by(results: Sequence["Result"]) -> Figure:
    """Attacks x images: the share of noise draws that an attack's image survived."""
    names = ["clean", *results[0].first.after]
    figure = new_figure(11, len(results) * (0.45 + 0.17 * len(names)) + 1.2)
    panels = figure.subplots(len(results), 1, squeeze=False).flatten()
    for axes, result in zip(panels, results, strict=True):
        cells = np.stack([result.first.clean, *result.first.alone.values()])
        order = _first_broken_order(result.first)
        axes.set_facecolor("#eeeeee")
        image = axes.imshow(
            np.ma.masked_invalid(cells[:, order]), cmap="RdYlBu", vmin=0, vmax=1, aspect="auto", interpolation="nearest"
        )
        axes.set_yticks(range(len(names)), names, fontsize=7)
        axes.set_title(
            f"{result.target.name}: {int(result.first.robust.sum())} of {len(order)} images stand", fontsize=9
        )
    panels[-1].set_xlabel("images, in the order in which they fell (gray: not attacked any more)")
    figure.colorbar(image, ax=list(panels), shrink=0.5, label="share of noise draws that are right")
    return figure


def _first_broken_order(outcomes: Outcomes) -> NDArray[np.int64]:
    steps = np.stack([outcomes.clean, *outcomes.after.values()]) < 1
    first = np.where(steps.any(axis=0), steps.argmax(axis=0), len(steps))
    return np.lexsort((outcomes.worst, first))


def _curve(curves: "Curves") -> Figure:
    """Robust accuracy over epsilon, with intervals."""
    figure = new_figure(9, 5)
    axes = figure.add_subplot()
    for style, (name, points) in zip(cycle(_STYLES), curves.items(), strict=False):
        epsilons = [point["epsilon"] for point in points]
        line = axes.plot(epsilons, [p["robust"] for p in points], style, markersize=5, label=name)[0]
        axes.fill_between(
            epsilons, [p["low"] for p in points], [p["high"] for p in points], color=line.get_color(), alpha=0.1
        )
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("epsilon, in units of [0, 1] pixels")
    axes.set_ylabel("images right in every noise draw")
    n = int(next(iter(curves.values()))[0]["n"])
    axes.set_title(f"Accuracy over epsilon under a few attacks, {n} images, 95% intervals")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def _examples(evaluation: "Evaluation", results: Sequence["Result"]) -> Figure | None:
    """Clean image, perturbation x10 and adversarial image, with what the three models say; of the first defense."""
    result = next((r for r in results if not r.target.is_control), results[0])
    found = _found_images(evaluation, result)
    if not found:
        return None
    shown = list(found)[:MAX_EXAMPLES]
    clean = evaluation.images.images[shown]
    adversarial = torch.stack([found[place][1] for place in shown])
    names = evaluation.class_names
    columns = ["clean", "change x 10", "adversarial"]
    figure = new_figure(1.7 * len(shown), 6.6)
    grid = figure.subplots(3, len(shown), squeeze=False)
    captions = [_captions(result.target.model, x, names) for x in (clean, adversarial)]
    for column, place in enumerate(shown):
        label = names[int(evaluation.images.labels[place])]
        pictures = (clean[column], (adversarial[column] - clean[column]) * 10 / 2 + 0.5, adversarial[column])
        texts = (captions[0][column], found[place][0], captions[1][column])
        for row, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
            _show(grid[row, column], picture, text)
        grid[0, column].set_title(label, fontsize=9, fontweight="bold")
    for row, title in enumerate(columns):
        grid[row, 0].set_ylabel(title)
    figure.suptitle(
        f"Images that break '{result.target.name}'. Above: the true class. Below: what the undefended model,\n"
        "the first pass and the defense say in most noise draws; under the change (gray is none): the attack"
    )
    return figure


def _found_images(evaluation: "Evaluation", result: "Result") -> dict[int, tuple[str, Tensor]]:
    """Adversarial images that every draw gets wrong, by place: the attack's name and the image."""
    found: dict[int, tuple[str, Tensor]] = {}
    outcomes, seed = result.first, result.first.seed
    for block in evaluation.images.blocks(evaluation.settings.block_size):
        folder = BlockFile.adversarial_of(evaluation.folder, result.target.name, seed, block.start, block.stop)
        for name, alone in outcomes.alone.items():
            path = folder / f"{name}.npz"
            if path.exists():
                with np.load(path) as arrays:
                    for place, image in zip(arrays["places"].tolist(), arrays["images"], strict=True):
                        if place < len(outcomes) and outcomes.clean[place] == 1 and alone[place] == 0:
                            found.setdefault(place, (name, torch.tensor(image)))
    return dict(sorted(found.items()))


@torch.no_grad()
def _captions(model: nn.Module, images: Tensor, names: Sequence[str]) -> list[str]:
    """What the undefended model, the first pass and the model itself say of each image in most noise draws."""
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(0, "captions", 0))
        answers = [
            torch.stack([m(images).argmax(dim=1) for _ in range(CAPTION_DRAWS)]).mode(dim=0).values.tolist()
            for m in (undefended(model), first_pass(model), model)
        ]
    return ["\n".join(names[c] for c in classes) for classes in zip(*answers, strict=True)]


def _show(axes: Axes, picture: Tensor, text: str) -> None:
    pixels = picture.clamp(0, 1).permute(1, 2, 0).numpy()
    axes.imshow(pixels if pixels.shape[2] == 3 else pixels[:, :, 0], cmap="gray", vmin=0, vmax=1)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel(text, fontsize=8)


def _bar(axes: Axes, row: float, right: int, n: int, color: str, label: str | None = None) -> None:
    low, high = wilson_interval(right, n)
    height = 0.36 if isinstance(row, float) else 0.75
    axes.barh(row, right / n, height=height, color=color, label=label)
    axes.hlines(row, low, high, color="black", linewidth=1.2)


def _percent_axis(axes: Axes) -> None:
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(axis="x", alpha=0.3)
