"""Listening sockets whose waiting connections are accepted all at once."""

import asyncio
import logging
import socket
from collections.abc import Callable

BACKLOG = 2048  # connections that wait to be accepted
RETRY_S = 1.0  # where there are no file descriptors left, as in asyncio

logger = logging.getLogger(__name__)


class Listener:
    """In place of ``loop.create_server``, for uvicorn's ``Server.servers``.

    libuv, and so uvloop's own servers, accept one connection in a turn of the event loop (libuv's pull request 3696).
    Under overload a turn takes some tenths of a second: of 2,000 connections that came at once, a third waited until
    the load was over, and a load balancer's probe would have waited behind them.

    Args:
        host, port: as for ``loop.create_server``; every address of the host is listened at.
        protocol: makes a connection's.

    Raises:
        OSError: one of the addresses cannot be had.
    """

    def __init__(self, host: str, port: int, protocol: Callable[[], asyncio.Protocol]) -> None:
        self.sockets: list[socket.socket] = []
        self._protocol = protocol
        self._tasks: set[asyncio.Task[object]] = set()
        passive = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        try:
            for family, _, _, _, address in dict.fromkeys(passive):
                self.sockets.append(socket.create_server(address, family=family, backlog=BACKLOG))
        except OSError:
            self.close()
            raise

    def start(self) -> None:
        """Accept from now on; to be called on the event loop."""
        for listening in self.sockets:
            listening.setblocking(False)
            self._watch(listening)

    def close(self) -> None:
        """Stop listening; to be called on the event loop, if it was started there."""
        for listening in self.sockets:
            if not listening.getblocking():
                asyncio.get_running_loop().remove_reader(listening)
            listening.close()
        self.sockets = []

    async def wait_closed(self) -> None:
        """Until what was accepted has its transport."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        try:
            for _ in range(BACKLOG):
                connection, _ = listening.accept()
                connection.setblocking(False)
                task = loop.create_task(loop.connect_accepted_socket(self._protocol, connection))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            logger.error("cannot accept connections (%s); trying again in %g s", error, RETRY_S)
            loop.remove_reader(listening)
            loop.call_later(RETRY_S, self._watch, listening)

    def _watch(self, listening: socket.socket) -> None:
        if listening in self.sockets:
            asyncio.get_running_loop().add_reader(listening, self._accept, listening)
