"""``igd serve``: the HTTP server."""

import logging
import os
import sys
import threading
import time

import typer
import uvicorn
from pydantic import ValidationError

from igd.options import describe
from service.app import DirectClassify, create_app
from service.logs import configure_logging
from service.server import Server
from service.settings import Settings

# pydantic-settings reads the flags itself, so that they are the variables' names and texts.
PASS_THROUGH = {"ignore_unknown_options": True, "allow_extra_args": True}
# Longer than proxies keep idle connections, usually 60 s: else they send requests on one that is just being closed.
KEEP_ALIVE_S = 75
THREADS_END_S = 0.5

logger = logging.getLogger(__name__)


def serve(context: typer.Context) -> None:
    """Serve the model over HTTP. 'igd serve --help' lists the settings."""
    try:
        settings = Settings(_cli_parse_args=context.args, _cli_prog_name="igd serve")
    except ValidationError as error:
        raise typer.BadParameter(describe(error)) from error
    configure_logging(settings.log_level, settings.log_format)
    app = create_app(settings)
    config = uvicorn.Config(
        DirectClassify(app),
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        proxy_headers=False,  # nothing here depends on who the client is
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=max(1, round(settings.drain_s)),
    )
    code = Server(config, app.state.runtime, app.state.direct_classify).serve_until_stopped()
    _end_stuck_threads(code)
    sys.exit(code)


def _end_stuck_threads(code: int) -> None:
    """End the process if a thread does not end by itself: Python would wait for a device that hangs for ever."""
    give_up = time.monotonic() + THREADS_END_S
    others = [thread for thread in threading.enumerate() if not thread.daemon and thread is not threading.main_thread()]
    for thread in others:
        thread.join(max(0, give_up - time.monotonic()))
    if stuck := [thread.name for thread in others if thread.is_alive()]:
        logger.error("ending without waiting for %s", ", ".join(stuck))
        logging.shutdown()
        sys.stdout.flush()
        os._exit(code)
