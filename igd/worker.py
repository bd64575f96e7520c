"""``igd worker``: run ranking jobs, beside the server or elsewhere."""

import logging
from typing import Annotated

import typer

from igd.options import DataDir, Model, RedisUrl, settings_of
from service.worker import work


def worker(
    model: Model = None,
    redis_url: RedisUrl = None,
    data_dir: DataDir = None,
    parent: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Run ranking jobs of a model. 'igd serve' starts one unless --no-worker is given."""
    settings = settings_of(model, redis_url, data_dir)
    logging.getLogger().setLevel(settings.log_level.upper())
    work(settings, parent=parent)
