"""``igd worker``: run ranking jobs, beside the server or elsewhere."""

from typing import Annotated

import typer

from igd.options import DataDir, Model, RedisUrl, settings_of
from service.logs import configure_logging
from service.worker import work


def worker(
    model: Model = None,
    redis_url: RedisUrl = None,
    data_dir: DataDir = None,
    parent: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Run ranking jobs of a model. 'igd serve' starts one unless --no-worker is given."""
    settings = settings_of(model, redis_url, data_dir)
    configure_logging(settings.log_level, settings.log_format)
    work(settings, parent=parent)
