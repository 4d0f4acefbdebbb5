"""The login form. It exchanges the token for a cookie."""

from __future__ import annotations

from http import HTTPStatus

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from agentperf_redis.web.security import cookie, is_inside
from agentperf_redis.web.sessions import SESSION_S, Sessions
from agentperf_redis.web.templating import root_path, templates


async def login(request: Request) -> Response:
    """Show the form, or check the token and go to the page that the user wanted."""
    form, sessions = request.state.form, request.app.state.sessions
    wanted = form.get("next", request.query_params.get("next", "/"))
    there = root_path(request) + (wanted if is_inside(wanted) else "/")
    if request.app.state.settings.token is None:
        return RedirectResponse(there, HTTPStatus.SEE_OTHER)
    if request.method == "POST" and sessions.is_token(form.get("token", "").strip()):
        return _with_session(RedirectResponse(there, HTTPStatus.SEE_OTHER), request, sessions)
    refused = request.method == "POST"
    status = HTTPStatus.UNAUTHORIZED if refused else HTTPStatus.OK
    return templates.TemplateResponse(request, "login.html", {"next": wanted, "refused": refused}, status)


async def logout(request: Request) -> Response:
    """Delete the cookie of the browser."""
    answer = RedirectResponse(root_path(request) + "/login", HTTPStatus.SEE_OTHER)
    answer.headers.append("Set-Cookie", cookie(request, request.app.state.sessions.cookie_name, "", 0))
    return answer


def _with_session(answer: Response, request: Request, sessions: Sessions) -> Response:
    answer.headers.append("Set-Cookie", cookie(request, sessions.cookie_name, sessions.new(), SESSION_S))
    return answer


def routes() -> list[Route]:
    """Return the routes of the login."""
    return [
        Route("/login", login, methods=["GET", "POST"], name="login"),
        Route("/logout", logout, methods=["POST"], name="logout"),
    ]
