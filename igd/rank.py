"""``igd rank``: compute an importance and publish it; ``torchrun --nproc-per-node 4 -m igd rank`` in many processes."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.markup import escape

from defense import DefenseError, NeuronImportance, check_servable, open_probe_set, rank_neurons
from defense.shards import rank_and_world
from igd.options import DataDir, Model, RedisUrl, settings_of
from igd.progress import console_of, progress_bar
from service.settings import Settings
from service.stores import store_of

PATIENCE = timedelta(days=30)  # with processes that have more to do; torch's own half an hour ends long evaluations


class Method(StrEnum):
    """How neurons are ranked."""

    LO_IR = "lo-ir"
    LO_IR_SIGNED = "lo-ir-signed"
    CD_IR = "cd-ir"


def rank(
    method: Annotated[
        Method, typer.Option(help="lo-ir (absolute, as the official code), lo-ir-signed, or cd-ir (needs a CLIP).")
    ] = Method.LO_IR,
    dataset: Annotated[str, typer.Option(help="'probe', or a name from IGD_DATASETS.")] = "probe",
    layer: Annotated[str | None, typer.Option(help="Split layer; model.toml's by default.")] = None,
    images_per_class: Annotated[int | None, typer.Option(min=1, help="A seeded balanced draw; default: all.")] = None,
    activate: Annotated[bool, typer.Option(help="Serve it at once, on every replica.")] = True,
    force: Annotated[bool, typer.Option(help="Activate it even if it cannot tell classes apart.")] = False,
    output: Annotated[Path | None, typer.Option(help="Write a safetensors file instead of publishing.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="File to go on from after an interruption.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images a batch.")] = 128,
    model: Model = None,
    redis_url: RedisUrl = None,
    data_dir: DataDir = None,
) -> None:
    """Rank the model's neurons on a probe set and publish the importance."""
    settings = settings_of(model, redis_url, data_dir)
    probe = open_probe_set(dataset, settings.model, datasets_file=settings.datasets, images_per_class=images_per_class)
    if not output:
        store_of(settings).close()  # a store that is away is better known before the ranking than after it
    with processes() as device:
        number, count = rank_and_world()
        if checkpoint and count > 1:
            checkpoint = checkpoint.with_name(f"{checkpoint.name}.{number}-of-{count}")
        console = console_of(number)
        with progress_bar(console) as bar:
            task = bar.add_task("ranking")
            importance = rank_neurons(
                settings.model,
                probe,
                method=method,
                layer=layer,
                batch_size=batch_size,
                device=device,
                checkpoint=checkpoint,
                cache_dir=settings.data_dir / "clip-features",
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
        for skip in probe.skipped:
            console.print(f"[yellow]skipped[/] {escape(str(skip))}", highlight=False)
        if number == 0:
            _deliver(importance, settings, console, output=output, activate=activate, force=force)
    if checkpoint:
        checkpoint.unlink(missing_ok=True)


@contextmanager
def processes() -> Iterator[str]:
    """Join the other processes under torchrun; the device of this one."""
    cuda = torch.cuda.is_available()
    if not dist.is_torchelastic_launched():
        yield "cuda" if cuda else "cpu"
        return
    dist.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE)
    try:
        device = torch.device("cuda", dist.get_node_local_rank()) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
        yield str(device)
    finally:
        dist.destroy_process_group()


def _deliver(
    importance: NeuronImportance,
    settings: Settings,
    console: Console,
    *,
    output: Path | None,
    activate: bool,
    force: bool,
) -> None:
    for warning in importance.warnings:
        console.print(f"[yellow]warning:[/] {escape(warning)}", highlight=False)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_bytes(importance.to_bytes())
        typer.echo(output)
        return
    if activate and importance.degenerate and not force:
        console.print(
            f"[yellow]not activated, the ranking is degenerate:[/] {escape(importance.degenerate)}; see --force"
        )
        activate = False
    if activate:
        try:
            check_servable(settings.model, importance)
        except DefenseError as error:
            console.print(f"[yellow]not activated, it cannot be served:[/] {escape(str(error))}", highlight=False)
            activate = False
    with store_of(settings) as store:
        version = store.publish(importance, activate=activate)
    console.print(f"published {'and activated ' if activate else ''}{importance.method} at {importance.layer}:")
    typer.echo(version)
