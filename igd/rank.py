"""``igd rank``: compute an importance and publish it."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from defense import (
    NeuronImportance,
    SplitClassifier,
    leave_one_out_importance,
    load_classifier,
    load_probe_set,
    read_config,
)
from igd.options import DataDir, Model, RedisUrl, settings_of, store_of


class Method(StrEnum):
    """How neurons are ranked."""

    LO_IR = "lo-ir"
    LO_IR_SIGNED = "lo-ir-signed"


def rank(
    method: Annotated[
        Method, typer.Option(help="lo-ir (absolute, as the official code) or lo-ir-signed.")
    ] = Method.LO_IR,
    layer: Annotated[str | None, typer.Option(help="Split layer; model.toml's by default.")] = None,
    activate: Annotated[bool, typer.Option(help="Serve it at once, on every replica.")] = True,
    output: Annotated[Path | None, typer.Option(help="Write a safetensors file instead of publishing.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images a batch.")] = 256,
    model: Model = None,
    redis_url: RedisUrl = None,
    data_dir: DataDir = None,
) -> None:
    """Rank the model's neurons on its probe set and publish the importance."""
    console = Console(stderr=True)
    settings = settings_of(model, redis_url, data_dir)
    importance = _rank(settings.model, layer, batch_size, signed=method is Method.LO_IR_SIGNED, console=console)
    for warning in importance.warnings:
        console.print(f"[yellow]warning:[/] {warning}", highlight=False)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_bytes(importance.to_bytes())
        typer.echo(output)
        return
    with store_of(settings) as store:
        version = store.publish(importance, activate=activate)
    console.print(f"published {'and activated ' if activate else ''}{importance.method} at {importance.layer}:")
    typer.echo(version)


def _rank(directory: Path, layer: str | None, batch_size: int, *, signed: bool, console: Console) -> NeuronImportance:
    config, probe = read_config(directory), load_probe_set(directory)
    split = SplitClassifier(load_classifier(directory), layer or config.defense.layer)
    columns = (TextColumn("ranking"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("ranking", total=len(probe))
        return leave_one_out_importance(
            split,
            probe.batches(batch_size),
            signed=signed,
            class_names=config.labels,
            probe_set=probe.name,
            progress=lambda done: progress.update(task, completed=done),
        )
