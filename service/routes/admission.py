"""What every request for a classification goes through, whatever its protocol."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from starlette.requests import ClientDisconnect, Request

from service.answers import Classified
from service.arrays import Pixels
from service.errors import DeadlineExceeded
from service.predictor import ServedDefense
from service.runtime import runtime_of


async def classified(
    request: Request, read_images: Callable[[], Awaitable[list[bytes] | Pixels]]
) -> tuple[ServedDefense, Classified]:
    """Admit a request, read its images, classify them, all within the deadline.

    Args:
        read_images: from the request's body: files, or pixels [n, H, W, C].

    Returns:
        The defense that it was admitted under, and what that says.

    Raises:
        NotReady, QueueFull, DeadlineExceeded: see ``service.errors``; and what reading raises.
        ClientDisconnect: the client left.
    """
    runtime = runtime_of(request)
    defense, deadline_s = runtime.defense, runtime.settings.deadline_s
    runtime.batcher.check_room()  # before anything is read: under overload, most of the work would be refusing
    remaining_s = deadline_s - (time.perf_counter() - request.state.arrived_at)
    try:
        async with asyncio.timeout(remaining_s) as limit:
            images = await read_images()
            async with while_connected(request):
                answers = await runtime.classify(defense, images)
    except TimeoutError as error:
        if not limit.expired():  # something else's
            raise
        raise deadline_exceeded(deadline_s) from error
    request.scope["state"]["classified"] = answers  # for the request's line in the log
    return defense, answers


def deadline_exceeded(deadline_s: float) -> DeadlineExceeded:
    """The answer to a request that took too long."""
    return DeadlineExceeded(f"no answer within {deadline_s:g} s; send fewer images, or raise IGD_DEADLINE_S")


@asynccontextmanager
async def while_connected(request: Request) -> AsyncIterator[None]:
    """Cancel what is awaited in the block when the client leaves: nobody would read it.

    Raises:
        ClientDisconnect: the client left.
    """
    task, left = asyncio.current_task(), False

    async def watch() -> None:
        nonlocal left
        while (await request.receive())["type"] != "http.disconnect":
            pass
        left = True
        if task:
            task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if left and task and task.uncancel() == 0:
            raise ClientDisconnect from None
        raise
    finally:
        watcher.cancel()
