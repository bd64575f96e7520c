"""Connections are accepted all at once, whatever loop it is."""

import asyncio
import errno
import socket

import pytest
import uvloop

from service import listener as listener_module
from service.listener import Listener

LOOPS = pytest.mark.parametrize("new_loop", [uvloop.new_event_loop, asyncio.new_event_loop])


class Greeter(asyncio.Protocol):
    """Tells the turn of the loop that it was made in."""

    def __init__(self, turns):
        self._turns = turns

    def connection_made(self, transport):
        transport.write(b"turn %d" % self._turns[0])
        transport.close()


async def count_turns(turns):
    while True:
        turns[0] += 1
        await asyncio.sleep(0)


def run(new_loop, main):
    with asyncio.Runner(loop_factory=new_loop) as runner:
        return runner.run(main())


def connect(port):
    connection = socket.create_connection(("127.0.0.1", port), timeout=20)
    connection.setblocking(True)
    return connection


def answer(connection):
    with connection:
        connection.settimeout(20)
        return connection.recv(100)


@LOOPS
def test_all_that_wait_are_accepted_in_one_turn_of_the_loop(new_loop):
    async def main():
        turns = [0]
        listener = Listener("127.0.0.1", 0, lambda: Greeter(turns))
        waiting = [connect(listener.sockets[0].getsockname()[1]) for _ in range(100)]
        counting = asyncio.create_task(count_turns(turns))
        listener.start()
        answers = await asyncio.gather(*(asyncio.to_thread(answer, c) for c in waiting))
        counting.cancel()
        listener.close()
        await listener.wait_closed()
        return {int(a.split()[1]) for a in answers}

    turns = run(new_loop, main)
    assert max(turns) - min(turns) <= 2


@LOOPS
def test_what_is_closed_is_refused(new_loop):
    async def main():
        listener = Listener("127.0.0.1", 0, lambda: Greeter([0]))
        port = listener.sockets[0].getsockname()[1]
        listener.start()
        assert await asyncio.to_thread(answer, await asyncio.to_thread(connect, port)) == b"turn 0"
        listener.close()
        await listener.wait_closed()
        with pytest.raises(ConnectionRefusedError):
            connect(port)

    run(new_loop, main)


def test_every_address_of_the_host_is_listened_at():
    listener = Listener("localhost", 0, lambda: Greeter([0]))
    addresses = socket.getaddrinfo("localhost", 0, type=socket.SOCK_STREAM)
    assert {s.family for s in listener.sockets} == {family for family, *_ in addresses}
    listener.close()


def test_an_address_that_is_taken_is_an_error():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="in use"):
        Listener("127.0.0.1", taken.getsockname()[1], lambda: Greeter([0]))


def test_without_file_descriptors_it_says_so_and_goes_on_later(monkeypatch, caplog):
    monkeypatch.setattr(listener_module, "RETRY_S", 0.05)

    class Exhausted(socket.socket):
        left = 2

        def accept(self):
            if self.left:
                self.left -= 1
                raise OSError(errno.EMFILE, "Too many open files")
            return super().accept()

    async def main():
        listener = Listener("127.0.0.1", 0, lambda: Greeter([0]))
        listener.sockets = [Exhausted(fileno=s.detach()) for s in listener.sockets]
        listener.start()
        port = listener.sockets[0].getsockname()[1]
        assert await asyncio.to_thread(lambda: answer(connect(port))) == b"turn 0"
        listener.close()

    run(uvloop.new_event_loop, main)
    assert [r.message for r in caplog.records if "Too many open files" in r.message]
    assert len(caplog.records) == 2
