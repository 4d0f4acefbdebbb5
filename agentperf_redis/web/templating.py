"""The templates, and the paths that they link to."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from starlette.requests import Request
from starlette.templating import Jinja2Templates

FOLDER = Path(__file__).parent
templates = Jinja2Templates(directory=FOLDER / "templates")
"""All templates. Those whose names end in .html are escaped automatically. ``url_for`` in them is `path_for`."""


def path_for(request: Request, name: str, /, **params: str) -> str:
    """Return the path of a route, with the path under which the application is mounted.

    In contrast to ``request.url_for``, the result has no scheme and no host: behind a proxy, the application may not
    know them.
    """
    path: str = request.app.url_path_for(name, **params)
    return quote(root_path(request) + path, safe="/~")


def root_path(request: Request) -> str:
    """Return the path under which the application is mounted; empty if it is not."""
    root: str = request.scope.get("root_path", "")
    return root.rstrip("/")


def _url_for(context: dict[str, Any], name: str, /, **params: str) -> str:
    return path_for(context["request"], name, **params)


# Replaces Starlette's `url_for`. If this application is mounted on another one, Starlette's function looks for the
# route in the outer application.
templates.env.globals["url_for"] = jinja2.pass_context(_url_for)
