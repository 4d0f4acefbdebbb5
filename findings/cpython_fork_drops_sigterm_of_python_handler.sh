#!/usr/bin/env bash
# CPython 3.11 to 3.13: a signal with a handler in Python that reaches a forked child before its first line of Python code
# is dropped, because the child clears the pending signals. With the default action, the signal would have ended the
# child. So if a program installs a handler for SIGTERM, even one that ends the process, multiprocessing.Pool.terminate
# may wait without end for a worker that was just forked. (A signal that is blocked during the fork stays pending.)
# Seen: "default action: all ended; Python handler: some went on; blocked during the fork: all ended".
set -euo pipefail
seen=$(python3 - <<'PY'
import os
import signal
import time

os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # so that the parent usually runs before the child


def went_on(forks=100, block=False):
    """Return how many of the children go on after a SIGTERM that was sent directly after the fork."""
    count = 0
    for _ in range(forks):
        if block:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        child = os.fork()
        if block:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        if child == 0:
            time.sleep(0.05)
            os._exit(7)
        os.kill(child, signal.SIGTERM)
        count += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    return count


def end(number, frame):
    os._exit(1)


by_default = went_on()
signal.signal(signal.SIGTERM, end)
handled, blocked = went_on(), went_on(block=True)
words = ["some went on" if each else "all ended" for each in (by_default, handled, blocked)]
print("default action: {}; Python handler: {}; blocked during the fork: {}".format(*words))
PY
)
echo "$(python3 --version): $seen"
[ "$seen" = "default action: all ended; Python handler: some went on; blocked during the fork: all ended" ]
