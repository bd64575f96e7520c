"""``igd importance``: the versions in the store."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from defense import DefendedClassifier, NeuronImportance, SplitClassifier, load_classifier, read_config
from igd.options import DataDir, Model, RedisUrl, settings_of, store_of
from importance_store import LoadedImportance
from service.settings import Settings

app = typer.Typer(no_args_is_help=True, help="Look at, activate, export and import importance versions.")
Version = Annotated[str, typer.Argument(help="A version; 'active' for the active one.")]


@app.command("list")
def list_versions(model: Model = None, redis_url: RedisUrl = None, data_dir: DataDir = None) -> None:
    """List the versions in the store, newest first."""
    with store_of(settings_of(model, redis_url, data_dir)) as store:
        versions = store.versions()
    table = Table("version", "active", "method", "layer", "images", "created", "warnings")
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
    names = importance.class_names or read_config(settings.model).labels
    for name, neurons, scores in zip(names, top.indices.tolist(), top.values.tolist(), strict=True):
        table.add_row(name, "  ".join(f"{n}: {s:.3g}" for n, s in zip(neurons, scores, strict=True)))
    console.print(table)


@app.command()
def activate(version: str, model: Model = None, redis_url: RedisUrl = None, data_dir: DataDir = None) -> None:
    """Serve a version on every replica, or roll back to it."""
    settings = settings_of(model, redis_url, data_dir)
    _check_fits(settings, _load(settings, version).importance)
    with store_of(settings) as store:
        store.activate(version)
    typer.echo(version)


@app.command()
def export(
    version: Version, output: Path, model: Model = None, redis_url: RedisUrl = None, data_dir: DataDir = None
) -> None:
    """Write a version as a safetensors file."""
    output.write_bytes(_load(settings_of(model, redis_url, data_dir), version).importance.to_bytes())
    typer.echo(output)


@app.command("import")
def import_file(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="What 'export' wrote.")],
    activate: Annotated[bool, typer.Option(help="Serve it at once, on every replica.")] = False,
    model: Model = None,
    redis_url: RedisUrl = None,
    data_dir: DataDir = None,
) -> None:
    """Publish an importance from a file; one made for other weights or classes is refused."""
    settings = settings_of(model, redis_url, data_dir)
    importance = NeuronImportance.from_bytes(file.read_bytes())
    _check_fits(settings, importance)
    with store_of(settings) as store:
        typer.echo(store.publish(importance, activate=activate))


def _load(settings: Settings, version: str) -> LoadedImportance:
    with store_of(settings) as store:
        return store.load(None if version == "active" else version)


def _check_fits(settings: Settings, importance: NeuronImportance) -> None:
    config = read_config(settings.model).defense
    split = SplitClassifier(load_classifier(settings.model), config.layer)
    DefendedClassifier(split, importance, **config.model_dump(exclude={"layer"}))
