"""/v1/adapters: the LoRA adapters of the model, which requests choose by giving their name as the model."""

from __future__ import annotations

import asyncio
from pathlib import Path

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from turbolm.errors import CapacityError, RequestError
from turbolm.server.body import read_body
from turbolm.server.failures import ApiError, JsonResponse
from turbolm.server.schema import Body
from turbolm.server.service import Service


class AdapterBody(Body):
    """POST /v1/adapters"""

    name: str = Field(description="What requests give as their model to get the adapter.", max_length=128)
    path: str = Field(description="A folder of the server's machine, as PEFT saves adapters.", max_length=4096)


async def adapters(request: Request) -> Response:
    """GET: those that are there. POST: adds one."""
    service: Service = request.app.state.service
    if request.method == "GET":
        return JsonResponse({"object": "list", "data": [_shown(name, service) for name in service.llm.adapters]})
    _check_may_change(service)
    body, _ = await read_body(request, AdapterBody, service.config.max_body_bytes)
    if body.name == service.name or body.name in service.llm.adapters:
        raise ApiError(
            409,
            f"'{body.name}' is the name of a model already: remove that adapter first, or choose another name",
            parameter="name",
            code="name_in_use",
        )
    # Nothing is fetched for a request: hubs' names are for the command line.
    if not await asyncio.to_thread(Path(body.path).is_dir):
        raise RequestError(f"path leads to no folder of the server's machine: {body.path[:200]!r}", "path")
    try:
        await asyncio.to_thread(service.llm.adapters.add, body.name, str(Path(body.path).absolute()))
    except CapacityError as error:
        raise ApiError(409, str(error), code="no_room") from None
    return JsonResponse(_shown(body.name, service))


async def remove_adapter(request: Request) -> Response:
    """No further request gets it; those at work with it go on to their ends."""
    service: Service = request.app.state.service
    _check_may_change(service)
    name = request.path_params["adapter"]
    if name not in service.llm.adapters:
        raise ApiError(404, f"no adapter '{name[:200]}'; GET /v1/adapters lists them", code="not_found")
    await asyncio.to_thread(service.llm.adapters.remove, name)
    return JsonResponse({"id": name, "object": "adapter", "deleted": True})


def _check_may_change(service: Service) -> None:
    if not service.keys and not service.config.adapter_changes:
        raise ApiError(
            403,
            "adapters are changed by requests only where the server asks for an API key (--api-key-file), or is "
            "started with --adapter-changes",
            kind="permission_error",
            code="forbidden",
        )


def _shown(name: str, service: Service) -> dict[str, str]:
    return {"id": name, "object": "adapter", "parent": service.name}
