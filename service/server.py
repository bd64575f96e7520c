"""uvicorn, with our start banner and exit code."""

import gc
import logging
import os
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import uvicorn

from service.connection import Connection
from service.listener import Listener
from service.middleware import RequestContext
from service.runtime import Runtime

CLOSING_S, CLOSING = 3.0, 0.4  # the end of drain_s, or of a short one so much: to refuse what is left, and to close
AT_ONCE_S = 1.0
SWITCH_INTERVAL_S = 0.00005
# A thousand requests in flight are many young objects, and next to none is garbage that only the collector finds.
GC_THRESHOLDS = (100_000, 20, 100)

logger = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """Serves until SIGTERM or SIGINT, then answers what is in flight."""

    def __init__(self, config: uvicorn.Config, runtime: Runtime, context: RequestContext) -> None:
        super().__init__(config)
        self._runtime, self._context = runtime, context
        self._told_to_stop_at: float | None = None

    def serve_until_stopped(self) -> int:
        """Run; returns the process's exit code: 0 after an orderly stop, 1 if it could not start or died of a bug."""
        with suppress(SystemExit):  # uvicorn's way to say that the port is taken
            self.run()
        return self._exit_code

    @property
    def _exit_code(self) -> int:
        return 0 if self.started and self._runtime.fatal is None else 1

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start everything, listen, and say so."""
        # Not left to the lifespan: what is raised here becomes one sentence of the command line, there a traceback.
        await self._runtime.start()
        # What is here now stays; the collector need not look through all of torch again and again.
        gc.collect()
        # The device thread takes the Python lock a few times a batch: by default the busy event loop gives it up after
        # 5 ms each time, which doubled a small model's batches.
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)
        await super().startup(sockets or [])
        if sockets is None:
            await self._listen()
        if self.started:
            self._runtime.address = self._address()
            print(banner(self._runtime), flush=True)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop in order on a signal; uvicorn's own would raise it again afterwards, and the exit code would be its."""
        handled = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in handled}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Told to stop: readiness first, then new requests, the socket last. Told again: at once."""
        self._end_after(self._runtime.settings.drain_s if self._told_to_stop_at is None else AT_ONCE_S)
        if self._told_to_stop_at is not None:
            self.config.timeout_graceful_shutdown = 0
            super().handle_exit(sig, frame)
        self._told_to_stop_at = time.monotonic()
        self._runtime.leaving, self._runtime.draining = True, self._runtime.settings.drain_delay_s == 0

    def _end_after(self, seconds: float) -> None:
        """End the process by then, whatever hangs: Python itself waits for its threads for ever."""

        def end() -> None:
            logger.error("ending without waiting for what is still at work")
            logging.shutdown()
            os._exit(self._exit_code)

        last_resort = threading.Timer(seconds, end)
        last_resort.daemon = True
        last_resort.start()

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to stop listening, which is when all that was admitted is answered.

        For ``drain_delay_s`` new requests are answered although readiness says 503: a load balancer needs that long to
        notice. After that they get 503, too.
        """
        if self._told_to_stop_at is not None:
            since_s, settings = time.monotonic() - self._told_to_stop_at, self._runtime.settings
            self._runtime.draining = since_s >= settings.drain_delay_s
            answered = not self._runtime.batcher.in_flight and since_s >= settings.drain_delay_s
            left_s, closing_s = settings.drain_s - since_s, min(CLOSING_S, CLOSING * settings.drain_s)
            if left_s < closing_s:
                await self._runtime.batcher.drain(0)  # what is left gets its 503
                answered = True
            self.should_exit = self.should_exit or answered
            for_connections_s = max(0.0, left_s - closing_s / 2)
            if for_connections_s < (self.config.timeout_graceful_shutdown or 0):
                self.config.timeout_graceful_shutdown = for_connections_s  # type: ignore[assignment] # asyncio's timeout
        return await super().on_tick(counter)

    async def _listen(self) -> None:
        config = self.config

        def protocol() -> Connection:
            state = {"server_state": self.server_state, "app_state": self.lifespan.state}
            return Connection(self._context, self._runtime, config=config, **state)

        try:
            listener = Listener(config.host, config.port, protocol)
        except OSError as error:
            reason = (error.strerror or str(error)).partition(" (")[0].lower()  # what follows is the address again
            logger.error(
                "cannot listen at %s port %d: %s; end what listens there, or set another IGD_HOST or IGD_PORT",
                config.host,
                config.port,
                reason,
            )
            self.started = False
            await self.lifespan.shutdown()
            sys.exit(1)
        listener.start()
        self.servers.append(listener)  # type: ignore[arg-type]

    def _address(self) -> str:
        listening = [s for server in self.servers for s in server.sockets]
        host, port = listening[0].getsockname()[:2] if listening else (self.config.host, self.config.port)
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def banner(runtime: Runtime) -> str:
    """Where it listens, what it serves, and a line to try it with."""
    config, served, settings = runtime.predictor.config, runtime.served, runtime.settings
    address = runtime.address
    serving = (
        f"importance {served.version} ({served.importance.method} at {served.importance.layer})"
        if served
        else f"NOT READY: {runtime.problem}"
    )
    sample = next(iter(sorted((settings.model / "samples").glob("*"))), "image.png")
    kind = {".jpg": "jpeg"}.get(str(sample)[-4:], str(sample).rpartition(".")[2])
    key = " -H 'Authorization: Bearer YOUR_KEY'" if settings.api_keys else ""
    return f"""
IG-Defense listens on {address}, docs at {address}/docs
  model       {config.name}: {len(config.labels)} classes, from {settings.model}
  serving     {serving}
  store       {"Redis at IGD_REDIS_URL" if settings.redis_url else f"embedded, in {settings.data_dir}"}
  admin       {"on" if settings.admin_key else "off (set IGD_ADMIN_KEY to activate versions over HTTP)"}
Try it:
  curl{key} -H 'Content-Type: image/{kind}' --data-binary @{shlex.quote(str(sample))} {address}/classify
"""
