"""What a tuning found: numbers with intervals, a plain conclusion, and the block for model.toml."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from evaluation.markdown import percent, points, table
from evaluation.statistics import Difference, bootstrap_interval, paired_difference, wilson_interval
from evaluation.tuning.adaptive import pseudo_label_table
from evaluation.tuning.plots import pareto_plot
from evaluation.tuning.settings import Setting, defense_block
from evaluation.tuning.sweep import Score
from evaluation.tuning.tune import Candidate, Plan, Tuning

Numbers = dict[str, Any]
JSON_FILE, MARKDOWN_FILE, BLOCK_FILE, PLOT_FILE = "tuning.json", "tuning.md", "defense.toml", "pareto.png"


def write_tuning(tuning: Tuning, plan: Plan, facts: Numbers, directory: Path) -> list[Path]:
    """Write ``tuning.json``, ``tuning.md``, ``defense.toml`` and ``pareto.png``.

    Args:
        facts: about the run: model, dataset, command, versions.

    Returns:
        The four paths.
    """
    directory.mkdir(parents=True, exist_ok=True)
    numbers = facts | to_numbers(tuning, plan)
    pareto_plot(tuning, str(facts["title"])).savefig(directory / PLOT_FILE, dpi=150, bbox_inches="tight")
    written = {
        JSON_FILE: json.dumps(numbers, indent=1, allow_nan=False) + "\n",
        MARKDOWN_FILE: to_markdown(numbers),
        BLOCK_FILE: numbers["defense_block"],
    }
    for name, text in written.items():
        (directory / name).write_text(text, encoding="utf-8")
    return [directory / name for name in (*written, PLOT_FILE)]


def to_numbers(tuning: Tuning, plan: Plan) -> Numbers:
    """All that was found, ready for JSON."""
    undefended = tuning.final[0]
    verdict = conclusion(tuning)
    return {
        "plan": asdict(plan) | {"values": {name: list(values) for name, values in plan.values.items()}},
        "sweep": {
            "images": len(tuning.undefended_score.clean),
            "undefended": _accuracies(tuning.undefended_score),
            "settings": [asdict(s.setting) | _accuracies(s) for s in tuning.scores],
            "front": [asdict(s.setting) | _accuracies(s) for s in tuning.front],
        },
        "attacked_themselves": [_candidate(c, tuning.candidates[0]) for c in tuning.candidates],
        "chosen": asdict(tuning.chosen),
        "final": [_candidate(c, undefended) for c in tuning.final],
        "conclusion": verdict,
        "defense_block": defense_block(tuning.chosen, [*verdict, *_ranking_comment(tuning.chosen)]),
    }


def conclusion(tuning: Tuning) -> list[str]:
    """Sentences on the final half: what the chosen setting gains, or that the gain cannot be told from zero."""
    undefended, chosen = tuning.final[0], tuning.final[1]
    gain = _gain(chosen, undefended)
    gained = (
        f"{_points(gain.mean, gain.low, gain.high)} of worst-case accuracy against undefended, on "
        f"{len(chosen.found.robust)} images that chose nothing"
    )
    if not gain.is_distinguishable_from_zero:
        verdict = f"NO GAIN that can be told from zero: {gained}. By this the second pass is not worth its cost"
    elif gain.mean < 0:
        verdict = f"A LOSS: {gained}. Leave the model undefended"
    else:
        verdict = f"A gain: {gained}"
    clean = (chosen.found.clean - undefended.found.clean).double().numpy()
    return [f"{verdict}.", f"Clean accuracy: {_points(float(clean.mean()), *bootstrap_interval(clean))}."]


def _ranking_comment(setting: Setting) -> list[str]:
    return [f"For the ranking '{setting.method}' at '{setting.layer}'."]


def _points(mean: float, low: float, high: float) -> str:
    return f"{points(mean)} points (95% interval {points(low)} to {points(high)})"


def _accuracies(score: Score) -> Numbers:
    return {"clean": round(score.clean_accuracy(), 4), "worst_case": round(score.worst_case(), 4)}


def _candidate(candidate: Candidate, undefended: Candidate) -> Numbers:
    found = candidate.found
    return {
        "setting": asdict(candidate.setting) if candidate.setting else None,
        "name": str(candidate.setting or "undefended"),
        "roles": list(candidate.roles),
        "images": len(found.robust),
        "clean": round(float(found.clean.mean()), 4),
        "worst_case_of_fixed_attacks": _rate(found.fixed),
        "worst_case": _rate(found.robust),
        "gain_over_undefended": asdict(_gain(candidate, undefended)) if candidate.setting else None,
        "pseudo_label": pseudo_label_table(found) if candidate.setting else None,
    }


def _gain(candidate: Candidate, undefended: Candidate) -> Difference:
    return paired_difference(candidate.found.robust.numpy(), undefended.found.robust.numpy())


def _rate(holds: Tensor) -> Numbers:
    count = int(holds.sum())
    low, high = wilson_interval(count, len(holds))
    return {"mean": round(count / len(holds), 4), "low": round(low, 4), "high": round(high, 4)}


def to_markdown(numbers: Numbers) -> str:
    """Tables of the candidates, of the final half, and of what became of wrong pseudo-labels."""
    sweep = numbers["sweep"]
    candidates, final = (_with_short_names(numbers[part], numbers["plan"]) for part in ("attacked_themselves", "final"))
    lines = [
        f"# {numbers['title']}",
        "",
        *numbers["conclusion"],
        "",
        f"{len(sweep['settings'])} settings were swept on {sweep['images']} images. Undefended: clean "
        f"{sweep['undefended']['clean']:.1%}, under the fixed attacks {sweep['undefended']['worst_case']:.1%}.",
        "",
        "## Attacked themselves, selection half",
        "",
        _candidate_table(candidates),
        "",
        "## Final half",
        "",
        _candidate_table(final),
        "",
        "## When the pseudo-label is wrong (selection half, over images and redraws)",
        "",
        _pseudo_table(candidates),
        "",
    ]
    return "\n".join(lines)


def _with_short_names(candidates: Sequence[Numbers], plan: Numbers) -> list[Numbers]:
    """Without the layer, where only one was tried."""
    layers = plan["values"]["layer"]
    return [
        c | {"name": c["name"].replace(f" at {layers[0]}", "") if len(layers) == 1 else c["name"]} for c in candidates
    ]


def _candidate_table(candidates: Sequence[Numbers]) -> str:
    header = ["setting", "why", "clean", "fixed attacks", "attacked itself", "gain over undefended"]
    rows = []
    for c in candidates:
        worst, gain = c["worst_case"], c["gain_over_undefended"]
        rows.append(
            [
                c["name"],
                ", ".join(c["roles"]),
                f"{c['clean']:.1%}",
                f"{c['worst_case_of_fixed_attacks']['mean']:.1%}",
                f"{worst['mean']:.1%} ({percent(worst['low'])} to {percent(worst['high'])})",
                f"{points(gain['mean'])} ({points(gain['low'])} to {points(gain['high'])})" if gain else "",
            ]
        )
    return table(header, rows)


def _pseudo_table(candidates: Sequence[Numbers]) -> str:
    columns = ("pseudo_label_wrong", "defended_if_right", "defended_if_wrong", "undefended_if_wrong")
    header = ["setting", "images", "pseudo-label wrong", "right defended if it is right", "if it is wrong"]
    rows = [
        [c["name"], row["images"], *("" if row[name] is None else f"{row[name]:.1%}" for name in columns)]
        for c in candidates
        for row in c["pseudo_label"] or []
    ]
    return table([*header, "right undefended if it is wrong"], rows)
