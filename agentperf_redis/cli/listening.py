"""Finds out at once that nothing listens at an address.

The library retries a refused connection until its deadline, because a server may be restarting. A person who gave the
wrong address should not have to wait so long.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

from agentperf_redis.transport.address import Address, ServerKind
from agentperf_redis.transport.connector import Connector
from agentperf_redis.transport.delivery import unavailable

_MAX_ATTEMPT_S = 1.0
"""Maximum duration of one attempt. A host that neither accepts nor refuses in this time is left to the library."""


def check(address: Address, timeout_s: float, *, defaulted: bool = False) -> None:
    """Try each node once, up to the first one that does not refuse the connection.

    Args:
        address: the address of the server.
        timeout_s: maximum seconds for one attempt.
        defaulted: whether the address is the default address; see `Connector`.

    Raises:
        BackendUnavailable: every node refuses the connection, has an unknown host name, or is a Unix socket that does
            not exist.
    """
    refused = []
    for name, target in _targets(address):
        try:
            with (
                contextlib.closing(socket.socket(socket.AF_UNIX))
                if isinstance(target, str)
                else _tcp(target, timeout_s) as made
            ):
                if isinstance(target, str):
                    made.settimeout(min(timeout_s, _MAX_ATTEMPT_S))
                    made.connect(target)
        except (ConnectionRefusedError, FileNotFoundError):
            refused.append(f"nothing listens on {name}")
        except socket.gaierror as error:
            if error.errno != socket.EAI_NONAME:
                return
            refused.append(f"there is no host {name.rpartition(':')[0]}")
        except OSError:
            return
        else:
            return
    if refused:
        advice = Connector(address, defaulted=defaulted).advice
        raise unavailable(address.masked, maybe_applied=False, reason=f"{' and '.join(refused)}; {advice}")


def _tcp(target: tuple[str, int], timeout_s: float) -> contextlib.closing[socket.socket]:
    return contextlib.closing(socket.create_connection(target, timeout=min(timeout_s, _MAX_ATTEMPT_S)))


def _targets(address: Address) -> Iterator[tuple[str, str | tuple[str, int]]]:
    if address.kind is ServerKind.UNIX:
        yield address.path, address.path
    else:
        for host, port in address.nodes:
            yield f"{host}:{port}", (host, port)
