"""``igd analyze``: what an attack does to the neurons that matter, and to those that do not."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from torch import Tensor

from defense import (
    DefendedClassifier,
    NeuronImportance,
    SplitClassifier,
    load_classifier,
    load_importance,
    load_probe_set,
    rank_neurons,
    read_config,
)
from igd.options import Epsilon, Model, Norm, NormName, TestData, settings_of
from igd.progress import progress_bar

if TYPE_CHECKING:
    from evaluation.attacks import Budget
    from evaluation.test_images import TestImages


def analyze(
    epsilon: Epsilon,
    data: TestData = "probe",
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder of the pictures.")] = Path("analysis"),
    attack: Annotated[str, typer.Option(help="Name of an attack, as in igd evaluate.")] = "apgd-ce",
    norm: Norm = NormName.LINF,
    n: Annotated[int, typer.Option("-n", min=1, help="Images.")] = 500,
    layer: Annotated[str | None, typer.Option(help="Split layer; model.toml's by default.")] = None,
    importance: Annotated[
        Path | None, typer.Option(help="Importance file; default: the model directory's, or LO-IR on its probe set.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Important neurons of a class; default: model.toml's.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Gradient steps of the attack.")] = 50,
    image: Annotated[int | None, typer.Option(help="Show this image's neurons; default: one of each outcome.")] = None,
    seed: Annotated[int, typer.Option(help="Of the attack.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images a batch.")] = 128,
    model: Model = None,
) -> None:
    """Attack the undefended model and show how groups of neurons change: the observation of the paper's Fig. 2.

    An untargeted attack's class is the class that the attacked image is taken for; where the attack failed, the wrong
    class with the highest logit. Images that were misclassified before the attack are left out.
    """
    from evaluation.analysis import analyze as analyze_neurons
    from evaluation.analysis_plots import write_analysis
    from evaluation.attacks import Budget
    from evaluation.test_images import TestImages, open_data

    torch.set_flush_denormal(True)  # denormal numbers slow a CPU down many times
    directory = settings_of(model).model
    config = read_config(directory)
    split = SplitClassifier(load_classifier(directory).requires_grad_(False), layer or config.defense.layer)
    ranking = importance_at(directory, split, importance)
    top_k = top_k or min(config.defense.top_k, split.num_neurons)
    masks = DefendedClassifier(split, ranking, top_k=top_k).masks  # which checks that the ranking fits
    shown = TestImages(open_data(data, config.labels, directory), config.input, n)
    adversarial = _attacked(attack, steps, split, shown, Budget(epsilon, norm.value), seed, batch_size)
    found = analyze_neurons(split, masks, shown.images, adversarial, shown.labels, batch_size=batch_size)
    facts = {
        "title": f"{config.name}: neurons of {split.layer} under {attack}, {norm.value} {epsilon:.4g} "
        f"({ranking.method}, top {top_k} of {split.num_neurons})",
        "command": shlex.join(["igd", *sys.argv[1:]]),
        "model_digest": split.model_digest,
        "layer": split.layer,
        "ranking": ranking.metadata(),
        "top_k": top_k,
        "attack": {"name": attack, "epsilon": epsilon, "norm": norm.value, "steps": steps, "seed": seed},
        "data": {"name": shown.name, "images": len(shown), "correct_before": len(found.indices)},
        "attack_class": "the prediction of the attacked image; of failed attacks, the wrong class of the highest logit",
    }
    for path in write_analysis(found, out, facts=facts, class_names=config.labels, image=image):
        typer.echo(path)


def _attacked(
    name: str, steps: int, split: SplitClassifier, shown: "TestImages", budget: "Budget", seed: int, batch_size: int
) -> Tensor:
    """The images' attacked copies, [n, C, H, W]."""
    from evaluation.attacks import Effort, attack_by_name

    attack, adversarial = attack_by_name(name, Effort(steps=steps)), []
    with progress_bar() as bar:
        task = bar.add_task(name, total=len(shown))
        for block in shown.blocks(batch_size):
            adversarial.append(attack(split, block.images, block.labels, budget, seed=seed + block.start))
            bar.advance(task, len(block.labels))
    return torch.cat(adversarial)


def importance_at(directory: Path, split: SplitClassifier, file: Path | None) -> NeuronImportance:
    """The importance of a file; else the model directory's, if it is of this layer; else LO-IR on its probe set."""
    if file:
        return NeuronImportance.from_bytes(file.read_bytes())
    shipped = load_importance(directory)
    if shipped and (shipped.layer, shipped.model_digest) == (split.layer, split.model_digest):
        return shipped
    with progress_bar() as bar:
        task = bar.add_task("ranking")
        return rank_neurons(
            directory,
            load_probe_set(directory),
            layer=split.layer,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
