"""``igd tune``: choose the defense's settings for a model, and say honestly what they buy."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import TaskID

from igd.options import Epsilon, Model, Norm, NormName, TestData, items_of, named_files, settings_of
from igd.progress import progress_bar


def tune(
    epsilon: Epsilon,
    data: TestData = "probe",
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder of the results; continues there.")] = Path(
        "tuning"
    ),
    norm: Norm = NormName.LINF,
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
    final figures are of the other half. The result is a block "defense" for model.toml, and whether it gains anything.
    """
    from evaluation.attacks import Budget, Effort  # torch's and matplotlib's imports are slow
    from evaluation.tuning.run import tune_directory
    from evaluation.tuning.tune import Plan

    plan = Plan(
        budget=Budget(epsilon, norm.value),
        values={
            "method": items_of(method, str),
            "layer": items_of(layer, str),
            "top_k": items_of(top_k, int),
            "temperature": items_of(temperature, float),
            "sigma": items_of(sigma, float),
            "num_noise_samples": items_of(noise_samples, int),
            "unimportant_weight": items_of(unimportant_weight, float),
        },
        fixed_attacks=items_of(fixed_attacks, str),
        adaptive_attacks=items_of(attacks, str),
        effort=Effort(steps=steps, eot=eot, queries=queries, draws=3),
        candidates=candidates,
        max_clean_loss=max_clean_loss,
        vary=items_of(vary, str),
        redraws=redraws,
        limit=limit,
        seed=seed,
    )
    files, command = named_files(importance), shlex.join(["igd", *sys.argv[1:]])
    with progress_bar() as bar:
        tasks: dict[str, TaskID] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what)
            bar.update(tasks[what], completed=done, total=total)

        paths = tune_directory(settings_of(model).model, data, n, files, plan, out, command, report)
    Console().print((out / "defense.toml").read_text(), markup=False, highlight=False, soft_wrap=True)
    for path in paths:
        typer.echo(path)
