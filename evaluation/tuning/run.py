"""A tuning from a model directory to the files of its result."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from defense import load_classifier, read_config
from evaluation.test_images import TestImages, open_data
from evaluation.tuning.inputs import rankings_of, splits_of, values_of
from evaluation.tuning.kept import KeptResults
from evaluation.tuning.report import write_tuning
from evaluation.tuning.settings import Setting
from evaluation.tuning.tune import Plan, Report, tune


def tune_directory(
    directory: Path,
    data: str,
    n: int,
    files: Mapping[str, Path],
    plan: Plan,
    out: Path,
    command: str,
    report: Report,
) -> list[Path]:
    """Tune the model of a directory; the paths of what was written.

    Args:
        data, n: test images, and how many. files: rankings by name, beside those of the plan's methods.
        plan: its values are those to try; where there are none of a field, the default ones are, and model.toml's
            always. Its methods are ranked at each of its layers on the model directory's probe set.
        out: folder of the results; candidates that an earlier run there attacked are taken over.
        command: what repeats it. report: called with what is under way and how far it is.
    """
    torch.set_flush_denormal(True)  # denormal numbers slow a CPU down many times
    config = read_config(directory)
    splits = splits_of(load_classifier(directory), [config.defense.layer, *plan.values["layer"]])
    rankings = rankings_of(directory, splits, plan.values["method"], files, report)
    methods = list(dict.fromkeys(name for name, _ in rankings))
    plan = replace(
        plan,
        values=values_of(
            config.defense,
            {**plan.values, "method": methods, "layer": list(splits)},
            num_neurons=min(split.num_neurons for split in splits.values()),
            epsilon=plan.budget.epsilon,
        ),
    )
    shown = TestImages(open_data(data, config.labels, directory), config.input, n)
    current = Setting(**{name: choices[0] for name, choices in plan.values.items()})
    found = tune(splits, rankings, current, shown.images, shown.labels, plan, report, kept=KeptResults(out / "kept"))
    facts = {
        "title": f"Tuning of {config.name} at {plan.budget.norm} {plan.budget.epsilon:.4g}",
        "model": config.name,
        "model_digest": next(iter(splits.values())).model_digest,
        "data": {"name": shown.name, "images": len(shown)},
        "command": command,
    }
    return write_tuning(found, plan, facts, out)
