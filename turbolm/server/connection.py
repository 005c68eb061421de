"""Work for a client that waits for its end, and may go away before."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from turbolm.errors import DeadlineError
from turbolm.server.failures import timed_out

T = TypeVar("T")


async def while_connected(
    request: Request, work: Coroutine[Any, Any, T], limit: float, timeout: float | None = None
) -> T:
    """The result of `work`, which ends with the connection, or with its time. `limit`: seconds that the server gives
    a request, 0: any; `timeout`: that the request gives itself."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_hang_up(request))
    shortest = min([seconds for seconds in (limit, timeout) if seconds], default=None)
    try:
        await asyncio.wait({task, gone}, timeout=shortest, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if gone.done():
            raise ClientDisconnect
        if timeout is not None and shortest == timeout:
            raise DeadlineError(f"the request was not done within its timeout of {timeout:g} s")
        raise timed_out(limit)
    finally:
        for pending in (task, gone):
            pending.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _hang_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
