"""The picture of a tuning: clean against worst-case accuracy of every setting, and of those attacked themselves."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evaluation.figures import new_figure
from evaluation.statistics import wilson_interval
from evaluation.tuning.tune import Candidate, Tuning

_COLORS = {"undefended": "black", "current": "tab:orange", "front": "tab:red", "varied": "tab:purple"}


def pareto_plot(tuning: Tuning, title: str) -> Figure:
    """Gray: the sweep on fixed attacks. Colored: the same settings when they are attacked themselves, lower."""
    figure = new_figure(10, 7)
    axes = figure.add_subplot()
    axes.scatter(
        [100 * s.clean_accuracy() for s in tuning.scores],
        [100 * s.worst_case() for s in tuning.scores],
        s=12,
        color="silver",
        label=f"{len(tuning.scores)} settings, fixed attacks only",
    )
    axes.plot(
        [100 * s.clean_accuracy() for s in tuning.front],
        [100 * s.worst_case() for s in tuning.front],
        "o-",
        color="gray",
        markersize=4,
        label="their Pareto front",
    )
    for candidate in reversed(tuning.candidates):
        _draw_candidate(axes, candidate, chosen=candidate.setting == tuning.chosen)
    _legend(axes)
    axes.set_xlabel("clean accuracy, %")
    axes.set_ylabel("worst-case accuracy, %")
    axes.set_title(
        f"{title}, selection half\narrows: from fixed attacks to attacks on the setting itself (95% intervals)"
    )
    axes.grid(alpha=0.3)
    return figure


def _draw_candidate(axes: Axes, candidate: Candidate, *, chosen: bool) -> None:
    found, color = candidate.found, _COLORS[candidate.roles[0]]
    clean, fixed = 100 * float(found.clean.mean()), 100 * float(found.fixed.float().mean())
    worst = 100 * float(found.robust.float().mean())
    low, high = wilson_interval(int(found.robust.sum()), len(found.robust))
    axes.annotate("", (clean, worst), (clean, fixed), arrowprops={"arrowstyle": "->", "color": color, "alpha": 0.5})
    axes.errorbar(
        clean,
        worst,
        yerr=[[worst - 100 * low], [100 * high - worst]],
        fmt="s" if candidate.setting is None else "*" if chosen else "o",
        markersize=15 if chosen else 8,
        color=color,
        capsize=3,
        alpha=0.9 if chosen or candidate.setting is None else 0.6,
        label="chosen" if chosen else candidate.roles[0],
    )
    if chosen or candidate.setting is None:
        axes.axhline(worst, color=color, linewidth=0.8, linestyle=":")


def _legend(axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    first = {label: handle for handle, label in zip(handles, labels, strict=True)}  # several candidates share a label
    axes.legend(first.values(), first.keys(), fontsize=9)
