"""Limits that hold for all requests together."""

import asyncio

from service.metrics import Metrics
from service.middleware import BodyLimit, RequestContext


def test_bodies_under_way_share_one_budget_and_give_it_back():
    go_on = asyncio.Event()

    async def app(scope, receive, send):
        await receive()
        await go_on.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    limit = BodyLimit(max_body_bytes=100, max_total_bytes=150)
    context = RequestContext(app, Metrics(), limit)

    async def request():
        statuses = []

        async def receive():
            return {"type": "http.request", "body": b"x" * 100, "more_body": False}

        async def send(message):
            if message["type"] == "http.response.start":
                statuses.append((message["status"], dict(message["headers"]).get(b"retry-after")))

        await context({"type": "http", "path": "/classify", "headers": []}, receive, send)
        return statuses

    async def scenario():
        first = asyncio.create_task(request())
        await asyncio.sleep(0)
        second = await request()
        go_on.set()
        return await first, second, await request()

    first, second, third = asyncio.run(scenario())
    assert first == third == [(200, None)]
    assert second == [(429, b"1")]
    assert limit.held_bytes == 0
