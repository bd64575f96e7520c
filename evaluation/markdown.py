"""The report as Markdown."""

from collections.abc import Sequence
from typing import Any

from defense.datasets import OWN_PROBE_SET

Report = dict[str, Any]
_PRECISION = {
    "float32": "gradients in float32",
    "bfloat16": "gradients in bfloat16",
    "bfloat16-queries": "gradients and queries in bfloat16",
}
SEEN = "**These are the probe images: the ranking has seen them. Pass other images with --data.**"


def markdown_of(report: Report, plots: Sequence[str]) -> str:
    """What ``report.json`` says, to read."""
    settings = report["run"]["settings"]
    budget, effort = settings["budget"], settings["effort"]
    parts = [
        "# Robustness",
        f"{report['n']} images of {report['run']['dataset']}, {budget['norm']} epsilon {budget['epsilon']:.4g}, "
        f"{len(settings['attacks'])} attacks, {settings['redraws']} noise draws judge each image, seeds "
        f"{', '.join(map(str, settings['seeds']))}. Effort: {effort['steps']} steps, {effort['eot']} gradients a step "
        f"where noise is averaged, {effort['targets']} target classes, {effort['queries']} queries of Square; "
        f"{_PRECISION[effort['precision']]}, verdicts in float32.",
        *([SEEN] if report["run"]["dataset"] == OWN_PROBE_SET else []),
        verdicts(report),
        targets_table(report),
        "*Clean*: mean over noise draws. *Worst case*: right in every draw of every adversarial image found, with "
        "Wilson's 95% interval. *One draw*: the mean share of right draws of each image's worst adversarial image: "
        "what a caller meets who asks once. *Noise known*: worst case if the attack knew the noise. *Calls*: images "
        "through a model with and without gradient, for each image of the table.",
        "## Against the controls, on the same images",
        differences_table(report),
        "Intervals: paired bootstrap, 95%. p: McNemar's exact test.",
        "## Signs of masked gradients and other mistakes",
        sanity_table(report),
        "## Attack by attack",
        *[attacks_table(name, rows) for name, rows in report["attacks"].items()],
        *[f"![{plot}]({plot})" for plot in plots],
        "## What each attack looks for",
        *[f"- `{name}`: {text}" for name, text in report["looks_for"].items()],
    ]
    return "\n\n".join(parts) + "\n"


def verdicts(report: Report) -> str:
    """A sentence for each defense: its gain in the worst case over the undefended model."""
    lines = []
    for row in report["differences"]:
        if row["control"] == report["targets"][0]["target"]:
            sure = "distinguishable" if row["distinguishable_from_zero"] else "**not distinguishable**"
            lines.append(
                f"Worst-case gain of {row['defense']} over {row['control']}: {points(row['mean'])} points "
                f"({points(row['low'])} to {points(row['high'])}, p = {row['p']:.2g}): {sure} from zero."
                + ("" if row["wins"] or row["losses"] else _hidden(report["n"]))
            )
    return "\n".join(lines)


def _hidden(n: int) -> str:
    # A bootstrap of equal outcomes has an interval of no width, which would claim too much: the rule of three.
    return f" No image differs; a difference of up to {percent(3 / n)} points could be hidden in {n} images."


def targets_table(report: Report) -> str:
    """Accuracies by target."""
    rows = [
        [
            row["target"],
            percent(row["clean"]),
            percent(row["clean_every_draw"]),
            f"{percent(row['robust'])} ({percent(row['robust_low'])} to {percent(row['robust_high'])})",
            percent(row["robust_one_draw"]),
            percent(row["robust_noise_known"]) if "robust_noise_known" in row else "",
            f"{row['gradient_calls_an_image']:,.0f} / {row['forward_calls_an_image']:,.0f}",
        ]
        for row in report["targets"]
    ]
    header = ["target", "clean %", "clean, every draw", "worst case % (95%)", "one draw", "noise known", "calls"]
    return table(header, rows)


def differences_table(report: Report) -> str:
    """Each defense minus each control, in percentage points."""
    rows = [
        [
            f"{row['defense']} - {row['control']}",
            f"{points(row['mean'])} ({points(row['low'])} to {points(row['high'])})",
            f"{row['wins']} / {row['losses']}",
            f"{row['p']:.2g}",
            f"{points(row['one_draw']['mean'])} ({points(row['one_draw']['low'])} to "
            f"{points(row['one_draw']['high'])})",
        ]
        for row in report["differences"]
    ]
    return table(["", "worst case, points", "images won / lost", "p", "one draw, points"], rows)


def sanity_table(report: Report) -> str:
    """What the checks found, the suspicious first."""
    found = sorted(report["sanity"], key=lambda finding: not finding["suspicious"])
    rows = [["**look**" if f["suspicious"] else "ok", f["target"], f["check"], f["text"]] for f in found]
    checks = report["run"]["checks"]
    if "two_passes_without_masks" in checks:
        text = f"largest difference of a logit to the undefended model: {checks['two_passes_without_masks']:.1e}"
        rows.append(
            ["ok" if checks["two_passes_without_masks"] < 1e-3 else "**look**", "two passes, no masks", "", text]
        )
    return table(["", "target", "check", "found"], rows)


def attacks_table(name: str, rows: Sequence[dict[str, Any]]) -> str:
    """What each attack broke on one target."""
    cells = [
        [
            row["attack"],
            str(row["tried_on"]),
            str(row["broke_first"]),
            f"{percent(row['left'])} ({percent(row['left_low'])} to {percent(row['left_high'])})",
            percent(row["left_one_draw"]),
            f"{row['gradient_calls_an_image_tried']:,.0f} / {row['forward_calls_an_image_tried']:,.0f}",
        ]
        for row in rows
    ]
    header = ["attack", "tried on", "broke first", "left %, every draw", "one draw", "calls an image tried"]
    return f"**{name}**\n\n" + table(header, cells)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def percent(share: float) -> str:
    """A share in percent, one digit."""
    return f"{100 * share:.1f}"


def points(share: float) -> str:
    """A difference of shares in percentage points, with its sign."""
    return f"{100 * share:+.1f}"
