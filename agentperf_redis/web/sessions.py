"""Logins, and the CSRF tokens of forms."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable
from typing import Final

SESSION_S: Final = 7 * 86_400
"""A login ends after this time, s."""
_MASK = 32


class Sessions:
    """The cookies of logins, and the CSRF tokens that belong to them.

    A cookie holds the time at which it ends, and an authentication code whose key is derived from the token. So the
    server stores nothing, a login outlives a restart, and a change of the token ends all logins.

    Args:
        token: the token; None if there is no login. Without a login, a cookie only ties forms to a browser.
        seed: a text from which the key is derived if there is no token. All processes of an application need the same
            seed, so that each process accepts the forms of the others. The seed need not be secret, because the Origin
            header of each form is checked too.
        clock: time, s since 1970.

    Attributes:
        cookie_name: the name of the cookie. Each seed gives a different name.
    """

    def __init__(self, token: str | None, seed: str = "", clock: Callable[[], float] = time.time) -> None:
        self._token = None if token is None else token.encode()
        purpose = "agentperf seed" if token is None else "agentperf session"
        self._key = hashlib.sha256(f"{purpose}\0{seed if token is None else token}".encode()).digest()
        self._clock = clock
        # A browser sends the cookies of a host to all ports of the host. If the cookies of two namespaces on one
        # machine had the same name, a page of one namespace would replace the cookie of the other namespace.
        self.cookie_name = f"agentperf_session_{hashlib.sha256(seed.encode()).hexdigest()[:8]}"

    def is_token(self, given: str) -> bool:
        """Whether a text is the token."""
        return self._token is not None and hmac.compare_digest(given.encode(errors="replace"), self._token)

    def new(self) -> str:
        """Return the value of a new cookie."""
        text = f"{int(self._clock()) + SESSION_S}.{secrets.token_hex(16)}"
        return f"{text}.{self._code('session', text).hex()}"

    def is_valid(self, cookie: str) -> bool:
        """Whether `new` made this cookie with the present token less than `SESSION_S` seconds ago."""
        text, _, code = cookie.rpartition(".")
        if not hmac.compare_digest(code.encode(errors="replace"), self._code("session", text).hex().encode()):
            return False
        return int(text.partition(".")[0]) > self._clock()

    def csrf(self, cookie: str) -> str:
        """Return the CSRF token of a cookie, a different text on each call.

        Without the random mask, the size of a compressed page would reveal the token (the BREACH attack).
        """
        mask = secrets.token_bytes(_MASK)
        return (mask + _xor(self._code("csrf", cookie), mask)).hex()

    def is_csrf(self, given: str, cookie: str) -> bool:
        """Whether `csrf` made this token for this cookie."""
        try:
            data = bytes.fromhex(given)
        except ValueError:
            return False
        mask, masked = data[:_MASK], data[_MASK:]
        return len(masked) == _MASK and hmac.compare_digest(_xor(masked, mask), self._code("csrf", cookie))

    def _code(self, purpose: str, text: str) -> bytes:
        return hmac.digest(self._key, f"{purpose}\0{text}".encode(errors="replace"), "sha256")


def _xor(one: bytes, other: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(one, other, strict=True))
