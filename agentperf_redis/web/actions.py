"""The actions of the pages' forms. `Guard` has checked that actions are allowed and that a page here sent the form.

A form posts to the route ``action`` with the name of its action. Its fields are those that `ACTIONS` lists, and
``back``: the path and query of the page to return to. All fields are texts:

- ``silence``, ``unsilence``: ``rule``; ``silence`` also takes ``for``, such as ``2h``.
- ``drain``, ``undrain``, ``mark-healthy``, ``mark-unhealthy``: ``pool`` and ``instance``.
- ``delete-key``, ``invalidate-tag``, ``clear-cache``: ``cache``, ``service`` (``cache`` or ``tiered``) and
  ``confirmed`` (``yes`` if the user has ticked the box). ``delete-key`` also takes ``key``, and ``invalidate-tag`` also
  takes ``tag``.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import Final
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from agentperf_redis import arguments
from agentperf_redis.agentperf import AgentPerf
from agentperf_redis.cache.operator import SERVICES, ExistingCache, find
from agentperf_redis.errors import AgentPerfError, InvalidArgument
from agentperf_redis.web.security import MAX_NOTICE, NOTICE_COOKIE, cookie, is_inside, refusal
from agentperf_redis.web.templating import root_path

_log = logging.getLogger("agentperf_redis")
_NOTICE_S = 30

Fields = Mapping[str, str]


class NotThere(Exception):
    """The object of an action does not exist. The text names it."""


async def _silence(perf: AgentPerf, fields: Fields) -> str:
    await perf.alerts.aio.silence(fields["rule"], fields["for"])
    return f"{fields['rule']} is silenced for {fields['for']}."


async def _unsilence(perf: AgentPerf, fields: Fields) -> str:
    await perf.alerts.aio.unsilence(fields["rule"])
    return f"The silence of {fields['rule']} has ended."


async def _drain(perf: AgentPerf, fields: Fields) -> str:
    return _of_instance(await perf.balancer().aio.drain(*_instance(fields)), fields, "takes no new work")


async def _undrain(perf: AgentPerf, fields: Fields) -> str:
    return _of_instance(await perf.balancer().aio.undrain(*_instance(fields)), fields, "is no longer draining")


async def _mark_healthy(perf: AgentPerf, fields: Fields) -> str:
    return _of_instance(await perf.balancer().aio.mark_healthy(*_instance(fields)), fields, "is marked healthy")


async def _mark_unhealthy(perf: AgentPerf, fields: Fields) -> str:
    done = await perf.balancer().aio.mark_unhealthy(*_instance(fields))
    return _of_instance(done, fields, "takes no new work until it is marked healthy")


def _instance(fields: Fields) -> tuple[str, str]:
    return fields["pool"], fields["instance"]


def _of_instance(done: bool, fields: Fields, says: str) -> str:
    if not done:
        raise NotThere(f"instance {fields['instance']} in pool {fields['pool']}")
    return f"{fields['instance']} of {fields['pool']} {says}."


async def _delete_key(perf: AgentPerf, fields: Fields) -> str:
    cache = await _cache(perf, fields)
    if not await perf.backend.arun(cache.delete_many([fields["key"]])):
        raise NotThere(f"key {fields['key']} in cache {cache.name}")
    return f"Removed {fields['key']} from cache {cache.name}."


async def _invalidate_tag(perf: AgentPerf, fields: Fields) -> str:
    cache = await _cache(perf, fields)
    await perf.backend.arun(cache.invalidate_tags([fields["tag"]]))
    return f"Every entry of cache {cache.name} with the tag {fields['tag']} is a miss."


async def _clear_cache(perf: AgentPerf, fields: Fields) -> str:
    cache = await _cache(perf, fields)
    held = await perf.backend.arun(cache.clear())
    return f"Cleared cache {cache.name}, which held {held} {'entry' if held == 1 else 'entries'}."


async def _cache(perf: AgentPerf, fields: Fields) -> ExistingCache:
    service, name = fields["service"], arguments.name("cache", fields["cache"])
    if service not in SERVICES:
        raise InvalidArgument("service", service, " or ".join(SERVICES))
    found = await perf.backend.arun(find(perf.backend, service, name))
    if found is None:
        raise NotThere(f"cache {name}")
    return found


_OF_INSTANCE = ("pool", "instance")
ACTIONS: Final[Mapping[str, tuple[Callable[[AgentPerf, Fields], Awaitable[str]], tuple[str, ...]]]] = {
    "silence": (_silence, ("rule", "for")),
    "unsilence": (_unsilence, ("rule",)),
    "drain": (_drain, _OF_INSTANCE),
    "undrain": (_undrain, _OF_INSTANCE),
    "mark-healthy": (_mark_healthy, _OF_INSTANCE),
    "mark-unhealthy": (_mark_unhealthy, _OF_INSTANCE),
    "delete-key": (_delete_key, ("cache", "service", "key", "confirmed")),
    "invalidate-tag": (_invalidate_tag, ("cache", "service", "tag", "confirmed")),
    "clear-cache": (_clear_cache, ("cache", "service", "confirmed")),
}
"""Name of an action -> the function that performs it, and the fields that its form must have."""


async def action(request: Request) -> Response:
    """Perform the action of a form, and redirect to the form's page with a notice about the result."""
    name, form = request.path_params["name"], request.state.form
    if name not in ACTIONS:
        return refusal(HTTPStatus.NOT_FOUND, f"There is no action {name!r}.")
    does, fields = ACTIONS[name]
    missing = [field for field in fields if field not in form]
    if missing:
        return refusal(HTTPStatus.BAD_REQUEST, f"The form has no field {', '.join(missing)}.")
    if form.get("confirmed", "yes") != "yes":
        return refusal(HTTPStatus.BAD_REQUEST, "This action is not confirmed. Tick the box of the form.")
    try:
        notice = await does(request.app.state.perf, form)
        _log.info("web page: %s %s", name, {field: form[field] for field in fields})
        request.app.state.views.shared.forget()  # so that the page reads new data and shows the result
    except NotThere as missing_object:
        notice = f"Nothing was done. Not found: {missing_object}."
    except AgentPerfError as error:
        notice = f"Failed: {error}"
    back = form.get("back", "/")
    there = root_path(request) + (back if is_inside(back) else "/")
    answer = RedirectResponse(there, HTTPStatus.SEE_OTHER)
    text = quote(notice[:MAX_NOTICE], safe="")
    answer.headers.append("Set-Cookie", cookie(request, NOTICE_COOKIE, text, _NOTICE_S))
    return answer


def routes() -> list[Route]:
    """Return the route of the actions."""
    return [Route("/actions/{name}", action, methods=["POST"], name="action")]
