"""Runs a program in a terminal of its own, and reads its screen."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import pyte

_TIMEOUT_S = 60.0


class Terminal:
    """A terminal in which a program runs.

    Args:
        process: the program.
        master: the file descriptor of the terminal's other side.
        columns: width.
        rows: height.

    Attributes:
        output: everything that the program has written to the terminal.
    """

    def __init__(self, process: subprocess.Popen[bytes], master: int, columns: int, rows: int) -> None:
        self.process = process
        self._master = master
        self._screen = pyte.Screen(columns, rows)
        self._stream = pyte.ByteStream(self._screen)
        self.output = b""

    @property
    def text(self) -> str:
        """The screen as text."""
        return "\n".join(line.rstrip() for line in self._screen.display)

    def press(self, keys: str) -> None:
        """Type keys, or send the escape sequence of a key."""
        os.write(self._master, keys.encode())

    def click(self, column: int, row: int) -> None:
        """Click with the left button; columns and rows count from 1."""
        self.press(f"\x1b[<0;{column};{row}M\x1b[<0;{column};{row}m")

    def shows(self, *words: str, absent: bool = False) -> None:
        """Wait until a line of the screen contains all words. With `absent`, wait until no line does."""
        self._until(
            lambda: any(all(word in line for word in words) for line in self.text.splitlines()) is not absent, words
        )

    def ends(self) -> int:
        """Wait for the end of the program, and return its exit code."""
        self._until(lambda: self.process.poll() is not None, ("the end",))
        assert self.process.returncode is not None
        return self.process.returncode

    def _until(self, condition: object, what: Sequence[str]) -> None:
        assert callable(condition)
        deadline = time.monotonic() + _TIMEOUT_S
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited for {what}; the screen:\n{self.text}")
            self._read()

    def _read(self) -> None:
        if select.select([self._master], [], [], 0.05)[0]:
            try:
                data = os.read(self._master, 65_536)
            except OSError:  # the program has ended
                return
            self.output += data
            self._stream.feed(data)


@contextmanager
def terminal(words: Sequence[str], env: Mapping[str, str], columns: int = 80, rows: int = 24) -> Iterator[Terminal]:
    """Run a program in a terminal."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    process = subprocess.Popen(
        words, env={**env, "TERM": "xterm-256color"}, stdin=slave, stdout=slave, stderr=slave, start_new_session=True
    )
    os.close(slave)
    try:
        yield Terminal(process, master, columns, rows)
    finally:
        process.kill()
        process.wait()
        os.close(master)
