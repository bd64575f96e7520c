"""``igd serve``: the HTTP server."""

import sys

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
    sys.exit(Server(config, app.state.runtime, app.state.direct_classify).serve_until_stopped())
