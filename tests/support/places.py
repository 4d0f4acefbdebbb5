"""The locations of the project's files, defined once, so that a test may move to another folder."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
LUA = ROOT / "lua"
DATA = ROOT / "tests" / "data"
