"""What Prometheus and the answers say of each phase, as rows and as a picture."""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray

from monitored.client import Answers
from monitored.prometheus import Prometheus

matplotlib.use("Agg")
from matplotlib import pyplot as plt

WINDOW_S = 300  # of the recorded ratios
DRAWS = 10_000  # of random windows

# Column, recorded series, alert, title.
SIGNS = (
    ("changed", "job:igd_defense_changed:ratio_rate5m", "IgdDefenseChangesMany", "changed by the defense"),
    (
        "disagrees",
        "job:igd_pseudo_label_disagreement:ratio_rate5m",
        "IgdPseudoLabelsDisagree",
        "noisy first pass disagrees",
    ),
    ("small margin", "job:igd_defended_margin_small:ratio_rate5m", "IgdMarginsSmall", "margin of 0.1 or less"),
)


@dataclass(frozen=True)
class Phase:
    """A time of one kind of traffic.

    Attributes:
        began, ended: Unix times.
        labels: [n], what the n images answered show; None for queries, of which each is one of many for an image.
    """

    name: str
    began: float
    ended: float
    answers: Answers
    labels: NDArray[np.int64] | None

    @property
    def title(self) -> str:
        return self.name.replace("\n", " ")


def row_of(phase: Phase, clean: Phase, prometheus: Prometheus, speed_up: float) -> dict[str, Any]:
    """A phase's figures: accuracies, and of each sign its shares in 5 minutes and what the alert did."""
    row: dict[str, Any] = {"phase": phase.title, "images": len(phase.answers.defended)}
    for name, said in (("undefended", phase.answers.undefended), ("defended", phase.answers.defended)):
        row[f"{name} accuracy"] = "-" if phase.labels is None else f"{np.mean(said == phase.labels):.1%}"
    for column, series, alert, title in SIGNS:
        # Windows that lie in the phase, wholly.
        _, shares = prometheus.over_time(series, phase.began + WINDOW_S / speed_up, phase.ended)
        flags, flags_of_clean = (each.answers.signs()[column].mean() for each in (phase, clean))
        row[title] = _shares_of(shares) + _fires(alert, phase, prometheus, speed_up)
        if flags > (threshold := prometheus.threshold(alert)):
            row[title] += f"; from {(threshold - flags_of_clean) / (flags - flags_of_clean):.0%} of the traffic"
    return row


def clean_windows(
    clean: Phase, num_classes: int, sizes: tuple[int, ...] = (100, 300, 1000, 6000)
) -> list[dict[str, Any]]:
    """How large a share of clean images becomes by chance, in windows of some images of all classes or of the worst."""
    assert clean.labels is not None
    rows = []
    for column, flags in clean.answers.signs().items():
        by_class = [flags[clean.labels == number] for number in range(num_classes)]
        worst = max(by_class, key=np.mean)
        for name, some in (("all", flags), ("the worst", worst)):
            shares = {f"{n} images": _largest(some, n) for n in sizes}
            rows.append({"sign": column, "classes": name, "mean": f"{some.mean():.2%}"} | shares)
    return rows


def write_series(phases: list[Phase], prometheus: Prometheus, speed_up: float, path: Path) -> None:
    """What the picture shows, as JSON: the phases and the signs over time, in minutes."""
    start, end = phases[0].began, phases[-1].ended
    minutes = partial(_minutes, start, speed_up)
    shown: dict[str, Any] = {"phases": [[phase.title, minutes(phase.began), minutes(phase.ended)] for phase in phases]}
    for column, series, alert, _ in SIGNS:
        times, shares = prometheus.over_time(series, start, end)
        points = np.stack([minutes(times), shares], 1).round(4).tolist()
        shown[column] = {"threshold": prometheus.threshold(alert), "minutes and shares": points}
    path.write_text(json.dumps(shown) + "\n")


def plot(phases: list[Phase], prometheus: Prometheus, speed_up: float, path: Path) -> None:
    """The three signs over time, one above the other."""
    figure, axes = plt.subplots(len(SIGNS), figsize=(13, 8.5), sharex=True, layout="constrained")
    start, end = phases[0].began, phases[-1].ended
    minutes = partial(_minutes, start, speed_up)
    for axis, (_, series, alert, title) in zip(axes, SIGNS, strict=True):
        times, shares = prometheus.over_time(series, start, end)
        threshold = 100 * prometheus.threshold(alert)
        top = 1.25 * max(100 * shares.max(initial=0), threshold)
        axis.plot(minutes(times), 100 * shares, color="black", linewidth=1.3)
        axis.axhline(threshold, color="tab:red", linestyle="--", linewidth=1)
        axis.text(0.3, threshold, f"{alert}: {threshold:g}%", color="tab:red", fontsize=8, va="bottom")
        firing, _ = prometheus.over_time(_firing(alert), start, end)
        axis.plot(minutes(firing), np.full(len(firing), 0.96 * top), "s", color="tab:red", markersize=4)
        for number, phase in enumerate(phases):
            axis.axvspan(
                *minutes(np.array([phase.began, phase.ended])), color="tab:blue", alpha=0.08 * (number % 2), lw=0
            )
        axis.set(xlim=(0, minutes(end)), ylim=(0, top), ylabel=f"% of 5 minutes' images:\n{title}")
        axis.grid(alpha=0.25)
    for phase in phases:
        middle = minutes((phase.began + phase.ended) / 2)
        axes[0].text(middle, 1.02 * axes[0].get_ylim()[1], phase.name, fontsize=8, ha="center", va="bottom")
    axes[-1].set_xlabel("minutes (red squares: the alert fires)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _minutes(start: float, speed_up: float, times: Any) -> Any:
    return (times - start) * speed_up / 60


def _firing(alert: str) -> str:
    return f'ALERTS{{alertname="{alert}",alertstate="firing"}}'


def _shares_of(shares: NDArray[np.float64]) -> str:
    return f"{shares.min():.1%} to {shares.max():.1%}" if len(shares) else "no window"


def _fires(alert: str, phase: Phase, prometheus: Prometheus, speed_up: float) -> str:
    """When in the phase the alert fires first, if it does and did not from before."""
    times, _ = prometheus.over_time(_firing(alert), phase.began, phase.ended)
    minutes = _minutes(phase.began, speed_up, times[0]) if len(times) else 0.0
    return f"; fires after {minutes:.1f} min" if minutes > 1 else ""


def _largest(flags: NDArray[np.bool_], images: int) -> str:
    """The share that one window in a thousand exceeds."""
    counts = np.random.default_rng(0).binomial(images, flags.mean(), DRAWS)
    return f"{np.quantile(counts / images, 0.999):.2%}"
