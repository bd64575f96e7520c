"""Whether a batch is to wait for those who were just answered, because they send again at once."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

LONG_ITEM_S = 0.002  # what an item takes where clients are waited for
WAIT_SHARE, SOON_SHARE = 0.2, 0.1  # of a batch's time: for how long, and what is soon
MOST_MISSES = 5


class Waiting(Protocol):
    """An item of a request."""

    @property
    def request(self) -> object:
        """Which one."""

    @property
    def wanted(self) -> bool:
        """Whether anybody still waits for it."""

    @property
    def since(self) -> float:
        """When it came, on the event loop's clock."""


def requests_of(items: Iterable[Waiting]) -> int:
    """How many requests these belong to, but for those that nobody waits for."""
    return len({id(item.request) for item in items if item.wanted})


@dataclass(frozen=True, slots=True)
class _Window:
    """A wait.

    Attributes:
        until: when, on the loop's clock, it is over. requests: that are in the queue when all have come again.
        soon: until when, on the other clock, it was worth while.
    """

    until: float
    requests: int
    soon: float


class ReturningClients:
    """Those whom a batch was for, and who may send again before the next one is taken.

    Clients that wait for each answer before they send again would fall into two halves for ever, one in a batch, the
    other in the queue; where small batches are slower by the item than larger ones, that is a loss. So where items take
    long, the next batch is taken when as many requests have come as were answered, or after a fifth of the last one's
    time. That is tried ever more seldom where they do not come, or only after a tenth of that time; and not if more
    wait than were answered, or the batch would be larger than a quarter of the largest: there is little to gain then.

    ``begin``, ``forget`` and ``end`` are for the device thread; the others for the event loop, while the device rests.

    Args:
        max_batch_size: items in a batch. clock: seconds; like perf_counter, it may be asked on any thread.
    """

    def __init__(self, max_batch_size: int, clock: Callable[[], float]) -> None:
        self._largest, self._clock = max_batch_size / 4, clock
        self._began_at = 0.0
        self._batch: Sequence[Waiting] = ()  # under way; none if it was tried one by one
        self._window: _Window | None = None
        self._misses = self._skips = 0  # waits in vain, one after the other; batches after which none is tried

    def begin(self, batch: Sequence[Waiting]) -> None:
        """A batch is taken."""
        self._began_at, self._batch = self._clock(), batch

    def forget(self) -> None:
        """The batch is tried one by one: its time says nothing of others'."""
        self._batch = ()

    def end(self, waiting: int) -> float:
        """The batch is over, and so many items wait: the seconds that the next one is to wait, at most."""
        took_s, batch = self._clock() - self._began_at, self._batch
        self._batch = ()
        if took_s < LONG_ITEM_S * len(batch) or waiting > len(batch) or waiting + len(batch) > self._largest:
            return 0.0
        if not waiting and requests_of(batch) < 2:  # a client is alone
            return 0.0
        if self._skips:
            self._skips -= 1
            return 0.0
        return WAIT_SHARE * took_s

    def await_them(self, answered: int, queue: Iterable[Waiting], now_s: float, wait_s: float) -> None:
        """So many requests are answered now, of whom each may come again.

        Args:
            now_s: on the loop's clock. wait_s: what ``end`` said.
        """
        if answered:
            soon = self._clock() + wait_s * SOON_SHARE / WAIT_SHARE
            self._window = _Window(now_s + wait_s, answered + requests_of(queue), soon)

    def left_s(self, queue: Iterable[Waiting], now_s: float) -> float:
        """Seconds that are still to be waited; none if that is not more than 0."""
        if self._window is None or requests_of(queue) >= self._window.requests:
            return 0.0
        return self._window.until - now_s

    def learn(self, queue: Sequence[Waiting]) -> None:
        """The next batch begins, with the first of those in the queue: did those who were waited for come soon?"""
        window, self._window = self._window, None
        if window and queue[0].since <= window.until:  # else nobody has waited
            came = requests_of(queue) >= window.requests and self._clock() <= window.soon
            self._misses = 0 if came else min(MOST_MISSES, 1 + self._misses)
            self._skips = 2**self._misses - 1
