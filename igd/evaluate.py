"""``igd evaluate``: robustness under attack, with controls; ``torchrun --nproc-per-node 4 -m igd evaluate`` in many."""

import shlex
import sys
from enum import StrEnum
from math import ceil
from pathlib import Path
from typing import Annotated

import torch.distributed as dist
import typer

from defense.shards import rank_and_world
from igd.options import Epsilon, Model, Norm, NormName, TestData, items_of, named_files, settings_of
from igd.progress import console_of, progress_bar
from igd.rank import processes


class PresetName(StrEnum):
    """Which attacks, and how hard they try."""

    QUICK = "quick"
    STANDARD = "standard"
    ADAPTIVE = "adaptive"


class Precision(StrEnum):
    """Of the attacks' gradients, and of their queries."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    BFLOAT16_QUERIES = "bfloat16-queries"


def evaluate(
    epsilon: Epsilon,
    data: TestData = "probe",
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder of outcomes and report; continues there.")] = Path(
        "evaluation-report"
    ),
    norm: Norm = NormName.LINF,
    n: Annotated[int | None, typer.Option("-n", min=1, help="Images; default: the preset's.")] = None,
    preset: Annotated[PresetName, typer.Option(help="Which attacks, and how hard they try.")] = PresetName.QUICK,
    attacks: Annotated[str | None, typer.Option(help="Names with commas in place of the preset's.")] = None,
    seeds: Annotated[str, typer.Option(help="The whole protocol once for each, with commas.")] = "0",
    importance: Annotated[
        list[str] | None, typer.Option(help="NAME=FILE of a ranking, repeatable; default: the model directory's.")
    ] = None,
    controls: Annotated[
        str, typer.Option(help="Beside the undefended model, with commas.")
    ] = "noise only,random masks,without noise",
    random_masks: Annotated[int, typer.Option(min=0, help="How many random rankings.")] = 1,
    factory: Annotated[str | None, typer.Option(help="module:function that makes the model(s), not --model.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Gradient steps of a run.")] = None,
    eot: Annotated[int | None, typer.Option(min=1, help="Gradients averaged in a step.")] = None,
    targets: Annotated[int | None, typer.Option(min=1, help="Classes of targeted attacks.")] = None,
    queries: Annotated[int | None, typer.Option(min=1, help="Of Square.")] = None,
    redraws: Annotated[int, typer.Option(min=1, help="Noise draws that judge an image; the worst counts.")] = 10,
    precision: Annotated[
        Precision, typer.Option(help="Of gradients, or also of queries without; verdicts are float32.")
    ] = Precision.FLOAT32,
    block_size: Annotated[int, typer.Option(min=1, help="Images attacked together.")] = 100,
    keep_images: Annotated[bool, typer.Option(help="Keep the adversarial images.")] = True,
    curve: Annotated[int, typer.Option(min=0, help="Images of the accuracy-over-epsilon curve; 0 for none.")] = 30,
    model: Model = None,
) -> None:
    """Attack a defended model and its controls on the same images, and report what they withstand."""
    from evaluation.attacks import Budget
    from evaluation.run import Evaluation, Job  # torch's and matplotlib's imports are slow
    from evaluation.settings import RunSettings, with_effort
    from evaluation.settings import preset as preset_of

    chosen = preset_of(preset.value)
    settings = RunSettings(
        budget=Budget(epsilon, norm.value),
        attacks=tuple(items_of(attacks, str)) if attacks else chosen.attacks,
        effort=with_effort(
            chosen.effort,
            {"steps": steps, "eot": eot, "targets": targets, "queries": queries, "precision": precision.value},
        ),
        redraws=redraws,
        seeds=tuple(items_of(seeds, int)),
        block_size=block_size,
    )
    job = Job(
        model=None if factory else settings_of(model).model,
        factory=factory,
        data=data,
        n=n or chosen.n,
        n_given=n is not None,
        importances=named_files(importance),
        controls=tuple(items_of(controls, str)),
        random_masks=random_masks,
        curve_images=curve,
        keep_adversarial=keep_images,
    )
    with processes() as _device:
        process, count = rank_and_world()
        evaluation = Evaluation(job, settings, out, command=shlex.join(["igd", *sys.argv[1:]]))
        with progress_bar(console_of(process)) as bar:
            task = bar.add_task("", total=ceil(evaluation.num_steps / count))
            evaluation.run(lambda step: bar.update(task, advance=1, description=step))
        if dist.is_initialized():
            dist.barrier()
        if process == 0:
            for path in evaluation.report():
                typer.echo(path)
