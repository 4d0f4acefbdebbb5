"""Runs a function in a forked child process."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable
from typing import Final

LIMIT_S: Final = 60


def in_child(work: Callable[[], object]) -> None:
    """Run a function in a forked child. The test fails if the function raises an exception or takes over `LIMIT_S`.

    The traceback of the child is in the captured stderr of the test.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(LIMIT_S)  # ends a child that hangs
            work()
            code = 0
        except BaseException:  # noqa: BLE001  the exit code tells the parent
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
