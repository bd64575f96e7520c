"""``igd importance``: the versions in the store."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from defense import NeuronImportance, SplitClassifier, check_servable, load_classifier, read_config
from defense.official_format import read_official, write_official
from igd.options import DataDir, Model, RedisUrl, settings_of
from importance_store import LoadedImportance
from service.settings import Settings
from service.stores import store_of

app = typer.Typer(no_args_is_help=True, help="Look at, plot, activate, export and import importance versions.")
Version = Annotated[str, typer.Argument(help="A version; 'active' for the active one.")]


class Format(StrEnum):
    """What a version is written as."""

    SAFETENSORS = "safetensors"
    OFFICIAL = "official"


@app.command("list")
def list_versions(model: Model = None, redis_url: RedisUrl = None, data_dir: DataDir = None) -> None:
    """List the versions in the store, newest first."""
    with store_of(settings_of(model, redis_url, data_dir)) as store:
        versions = store.versions()
    table = Table(Column("version", no_wrap=True), "active", "method", "layer", "images", "created", "warnings")
    for v in versions:
        columns = ("method", "layer", "num_images", "created_at")
        warnings = v.metadata["warnings"]
        count = str(len(warnings)) if isinstance(warnings, list) and warnings else ""
        table.add_row(v.version, "*" if v.active else "", *(str(v.metadata[c]) for c in columns), count)
    Console().print(table if versions else "no versions; run 'igd rank'")


@app.command()
def show(
    version: Version = "active",
    top_k: Annotated[int, typer.Option(min=1, help="Neurons of each class to show.")] = 8,
    model: Model = None,
    redis_url: RedisUrl = None,
    data_dir: DataDir = None,
) -> None:
    """Show a version: where it came from, and the most important neurons of each class."""
    settings = settings_of(model, redis_url, data_dir)
    loaded = _load(settings, version)
    console, importance = Console(), loaded.importance
    console.print({"version": loaded.version} | importance.metadata())
    top = importance.scores.topk(min(top_k, importance.num_neurons), dim=1)
    table = Table("class", "neuron: score")
    names = importance.class_names or [str(c) for c in range(importance.num_classes)]
    for name, neurons, scores in zip(names, top.indices.tolist(), top.values.tolist(), strict=True):
        table.add_row(name, "  ".join(f"{n}: {s:.3g}" for n, s in zip(neurons, scores, strict=True)))
    console.print(table)


@app.command()
def activate(version: str, model: Model = None, redis_url: RedisUrl = None, data_dir: DataDir = None) -> None:
    """Serve a version on every replica, or roll back to it."""
    settings = settings_of(model, redis_url, data_dir)
    check_servable(settings.model, _load(settings, version).importance)
    with store_of(settings) as store:
        store.activate(version)
    typer.echo(version)


@app.command()
def plot(
    version: Version = "active",
    output: Annotated[Path, typer.Option(file_okay=False, help="Folder for the pictures.")] = Path("importance-plots"),
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Neurons kept of each class; model.toml's by default.")
    ] = None,
    model: Model = None,
    redis_url: RedisUrl = None,
    data_dir: DataDir = None,
) -> None:
    """Draw a version: scores of classes x neurons, overlap of the top-k sets, decay; PNG, and the numbers as JSON."""
    from evaluation.importance_plots import plot_importance  # matplotlib imports slowly

    settings = settings_of(model, redis_url, data_dir)
    importance, config = _load(settings, version).importance, read_config(settings.model)
    top_k = top_k or min(config.defense.top_k, importance.num_neurons)
    for path in plot_importance(importance, output, top_k=top_k, class_names=config.labels):
        typer.echo(path)


@app.command()
def export(
    version: Version,
    output: Annotated[Path, typer.Argument(help="A file; for the official format a folder.")],
    format_: Annotated[
        Format, typer.Option("--format", help="official: unit{k}.npy, as the paper's repository has them.")
    ] = Format.SAFETENSORS,
    model: Model = None,
    redis_url: RedisUrl = None,
    data_dir: DataDir = None,
) -> None:
    """Write a version as a safetensors file, or as the official repository's folder of unit files."""
    importance = _load(settings_of(model, redis_url, data_dir), version).importance
    if format_ is Format.OFFICIAL:
        write_official(importance, output)
    else:
        output.write_bytes(importance.to_bytes())
    typer.echo(output)


@app.command("import")
def import_(
    source: Annotated[
        Path, typer.Argument(exists=True, help="A file that 'export' wrote, or the official repository's folder.")
    ],
    activate: Annotated[bool, typer.Option(help="Serve it at once, on every replica.")] = False,
    model: Model = None,
    redis_url: RedisUrl = None,
    data_dir: DataDir = None,
) -> None:
    """Publish an importance from a file; one made for other weights or classes is refused.

    A folder of unit{k}.npy does not say what it was made for: it is taken as a ranking of this model at model.toml's
    layer, and only the numbers of classes and neurons are checked.
    """
    settings = settings_of(model, redis_url, data_dir)
    split = _split(settings)
    importance = _read_folder(settings, source, split) if source.is_dir() else _read_file(source)
    check_servable(settings.model, importance)
    with store_of(settings) as store:
        version = store.publish(importance, activate=activate)
    for warning in importance.warnings:
        Console(stderr=True).print(f"[yellow]warning:[/] {escape(warning)}", highlight=False)
    typer.echo(version)


def _read_file(file: Path) -> NeuronImportance:
    return NeuronImportance.from_bytes(file.read_bytes())


def _read_folder(settings: Settings, folder: Path, split: SplitClassifier) -> NeuronImportance:
    labels = read_config(settings.model).labels
    return read_official(folder, split.layer, model_digest=split.model_digest, class_names=labels)


def _load(settings: Settings, version: str) -> LoadedImportance:
    with store_of(settings) as store:
        return store.load(None if version == "active" else version)


def _split(settings: Settings) -> SplitClassifier:
    return SplitClassifier(load_classifier(settings.model), read_config(settings.model).defense.layer)
