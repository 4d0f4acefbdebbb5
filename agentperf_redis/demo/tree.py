"""The source files to review, and the folders in which their imports are looked up."""

from __future__ import annotations

import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from agentperf_redis.errors import InvalidArgument

EXCLUDED = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "node_modules"})
"""Folders not reviewed.

The standard library's tests are larger than the library itself. The other folders hold foreign code.
"""


@dataclass(frozen=True, slots=True)
class Tree:
    """A folder of source files.

    Attributes:
        root: the folder.
        files: paths relative to `root`, in POSIX form, sorted.
        top: folder from which absolute module names start: `root`, or a folder above it if `root` lies within a
            package.
    """

    root: Path
    files: tuple[str, ...]
    top: Path

    def module_name(self, file: str) -> str:
        """Return the dotted module name of a file."""
        parts = list((self.root / file).relative_to(self.top).with_suffix("").parts)
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @property
    def search(self) -> tuple[str, ...]:
        """Folders in which imports are looked up: the folder of the tree, then those of the running Python."""
        found = [str(self.top), sysconfig.get_path("stdlib"), *(path for path in sys.path if path)]
        return tuple(dict.fromkeys(found))


def standard_library() -> Path:
    """Return the folder of the running Python's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def find_tree(path: Path | None, limit: int | None) -> Tree:
    """Find the files to review.

    Args:
        path: a folder; None for the standard library.
        limit: maximum number of files, spread evenly over the tree; None takes all.

    Returns:
        The tree.

    Raises:
        InvalidArgument: the folder does not exist or has no Python file.
    """
    root = (standard_library() if path is None else path).resolve()
    if not root.is_dir():
        raise InvalidArgument("path", str(path), "an existing folder")
    files = sorted(
        relative.as_posix()
        for relative in (found.relative_to(root) for found in root.rglob("*.py"))
        if not EXCLUDED.intersection(relative.parts[:-1]) and not any(part.startswith(".") for part in relative.parts)
    )
    if not files:
        raise InvalidArgument("path", str(root), "a folder with Python files (test folders are excluded)")
    if limit is not None and limit < len(files):
        files = [files[index * len(files) // limit] for index in range(limit)]
    top = root
    while (top / "__init__.py").is_file() and top.parent != top:
        top = top.parent
    return Tree(root, tuple(files), top)
