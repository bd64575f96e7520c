"""``igd classify``: what both passes say of image files, without a server."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from defense import ImportanceError, load_importance
from igd.options import DataDir, Model, RedisUrl, settings_of
from importance_store import LoadedImportance
from service.errors import ServiceError
from service.images import decode_image
from service.predictor import Predictor
from service.schemas import prediction_json
from service.settings import Settings
from service.stores import store_of


def classify(
    images: Annotated[list[Path], typer.Argument(help="Image files.", exists=True, dir_okay=False)],
    model: Model = None,
    redis_url: RedisUrl = None,
    data_dir: DataDir = None,
) -> None:
    """Classify image files: a table of undefended prediction, pseudo-label and defended prediction."""
    settings = settings_of(model, redis_url, data_dir)
    predictor = Predictor.of(settings, max_batch_size=1)
    defense = predictor.prepare(*_active_importance(settings, predictor.model_digest))
    labels = predictor.config.labels

    table = Table(
        Column("image", overflow="fold"),
        "undefended",
        "pseudo-label",
        "defended",
        caption=f"importance {defense.version}",
    )
    failed = False
    for path in images:
        try:
            pixels = decode_image(path.read_bytes(), predictor.config.input, max_pixels=settings.max_pixels)
        except ServiceError as error:
            table.add_row(str(path), f"[red]{error}[/]", "", "")
            failed = True
            continue
        row = prediction_json(predictor.predict(defense, [pixels])[0], labels, top=1)
        cells = (row["undefended"], row["pseudo_label"], row)
        table.add_row(str(path), *(f"{cell['label']} {cell['probability']:.3f}" for cell in cells))
    Console().print(table)
    raise typer.Exit(1 if failed else 0)


def _active_importance(settings: Settings, model_digest: str) -> LoadedImportance:
    """The store's active version; of an empty store, what the model directory ships."""
    with store_of(settings) as store:
        shipped = load_importance(settings.model) if store.active_version() is None else None
        if shipped is None:
            return store.load(model_digest=model_digest)
    if shipped.model_digest != model_digest:
        raise ImportanceError(f"the importance in {settings.model} was made for other weights; run 'igd rank'")
    return LoadedImportance("of the model directory", shipped)
