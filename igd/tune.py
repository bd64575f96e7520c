"""``igd tune``: choose the defense's settings for a model, and say honestly what they buy."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import TaskID

from defense import load_classifier, read_config
from igd.evaluate import NormName
from igd.options import Model, settings_of
from igd.progress import progress_bar


def tune(
    epsilon: Annotated[float, typer.Option(min=0, help="Radius of the attacks, in units of [0, 1] pixels.")],
    data: Annotated[
        str, typer.Option(help="Test images: tar or folder of class folders, arrays, CIFAR's or MNIST's folder.")
    ] = "probe",
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder of the results; continues there.")] = Path(
        "tuning"
    ),
    norm: Annotated[NormName, typer.Option(help="Of the perturbation.")] = NormName.LINF,
    n: Annotated[int, typer.Option("-n", min=4, help="Images: half of them select, half measure.")] = 500,
    method: Annotated[str, typer.Option(help="Of lo-ir, lo-ir-signed, cd-ir, with commas; may be empty.")] = "lo-ir",
    importance: Annotated[
        list[str] | None, typer.Option(help="NAME=FILE of a ranking to try, too; repeatable.")
    ] = None,
    layer: Annotated[str, typer.Option(help="Layers to try beside model.toml's, with commas.")] = "",
    top_k: Annotated[str, typer.Option(help="With commas; default: 1/16 to 1/2 of the neurons.")] = "",
    temperature: Annotated[str, typer.Option(help="With commas.")] = "0.01,0.1,1,10",
    sigma: Annotated[str, typer.Option(help="With commas; default: 0, 1/4, 1/2 and 1 epsilon.")] = "",
    noise_samples: Annotated[str, typer.Option(help="With commas.")] = "1,4",
    unimportant_weight: Annotated[str, typer.Option(help="With commas.")] = "0,0.25,0.5,0.75",
    limit: Annotated[int, typer.Option(min=1, help="Sweep a seeded choice of at most that many settings.")] = 3000,
    fixed_attacks: Annotated[str, typer.Option(help="Of the undefended model.")] = "transfer-ce,transfer-cw",
    attacks: Annotated[str, typer.Option(help="Of each candidate itself.")] = "eot-ce,bpda-cw",
    steps: Annotated[int, typer.Option(min=1, help="Gradient steps of an attack.")] = 20,
    eot: Annotated[int, typer.Option(min=1, help="Gradients averaged in a step, where there is noise.")] = 4,
    queries: Annotated[int, typer.Option(min=1, help="Of square, if it is among the attacks.")] = 500,
    candidates: Annotated[int, typer.Option(min=1, help="Settings of the front to attack themselves.")] = 3,
    max_clean_loss: Annotated[float, typer.Option(min=0, help="Of clean accuracy, that these may lose.")] = 0.02,
    vary: Annotated[
        str, typer.Option(help="Also attack variations of these, e.g. temperature,num_noise_samples.")
    ] = "",
    redraws: Annotated[int, typer.Option(min=1, help="Noise draws that judge an image; the worst counts.")] = 5,
    seed: Annotated[int, typer.Option(help="Of halves, noise and attacks.")] = 0,
    model: Model = None,
) -> None:
    """Sweep settings on images attacked beforehand, attack the best themselves, measure the best of those.

    A sweep on fixed attacks flatters every setting: the report has both columns. One half of the images selects, the
    final figures are of the other half. The result is a [defense] block for model.toml, and whether it gains anything.
    """
    from evaluation.attacks import Budget, Effort  # torch's and matplotlib's imports are slow
    from evaluation.test_images import TestImages, open_data
    from evaluation.tuning.inputs import rankings_of, splits_of, values_of
    from evaluation.tuning.kept import KeptResults
    from evaluation.tuning.report import write_tuning
    from evaluation.tuning.settings import Setting
    from evaluation.tuning.tune import Plan
    from evaluation.tuning.tune import tune as find_best

    torch.set_flush_denormal(True)  # denormal numbers slow a CPU down many times
    directory = settings_of(model).model
    config = read_config(directory)
    splits = splits_of(load_classifier(directory), [config.defense.layer, *_items(layer, str)])
    with progress_bar() as bar:
        tasks: dict[str, TaskID] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what)
            bar.update(tasks[what], completed=done, total=total)

        rankings = rankings_of(directory, splits, _items(method, str), dict(map(_pair, importance or [])), report)
        values = values_of(
            config.defense,
            {
                "method": list(dict.fromkeys(name for name, _ in rankings)),
                "layer": list(splits),
                "top_k": _items(top_k, int),
                "temperature": _items(temperature, float),
                "sigma": _items(sigma, float),
                "num_noise_samples": _items(noise_samples, int),
                "unimportant_weight": _items(unimportant_weight, float),
            },
            num_neurons=min(split.num_neurons for split in splits.values()),
            epsilon=epsilon,
        )
        plan = Plan(
            budget=Budget(epsilon, norm.value),
            values=values,
            fixed_attacks=_items(fixed_attacks, str),
            adaptive_attacks=_items(attacks, str),
            effort=Effort(steps=steps, eot=eot, queries=queries, draws=3),
            candidates=candidates,
            max_clean_loss=max_clean_loss,
            vary=_items(vary, str),
            redraws=redraws,
            limit=limit,
            seed=seed,
        )
        shown = TestImages(open_data(data, config.labels, directory), config.input, n)
        current = Setting(**{name: choices[0] for name, choices in values.items()})
        found = find_best(
            splits, rankings, current, shown.images, shown.labels, plan, report, kept=KeptResults(out / "kept")
        )
    facts = {
        "title": f"Tuning of {config.name} at {norm.value} {epsilon:.4g}",
        "model": config.name,
        "model_digest": next(iter(splits.values())).model_digest,
        "data": {"name": shown.name, "images": len(shown)},
        "command": shlex.join(["igd", *sys.argv[1:]]),
    }
    paths = write_tuning(found, plan, facts, out)
    Console().print((out / "defense.toml").read_text(), markup=False, highlight=False, soft_wrap=True)
    for path in paths:
        typer.echo(path)


def _items(text: str, kind: type) -> Sequence[Any]:
    return [kind(item.strip()) for item in text.split(",") if item.strip()]


def _pair(text: str) -> tuple[str, Path]:
    name, separator, file = text.partition("=")
    if not separator or not name or not file:
        raise typer.BadParameter(f"expected --importance NAME=FILE, got '{text}'")
    return name, Path(file)
