"""Where the project's files lie, said once: a test that moves to another folder finds them all the same."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
LUA = ROOT / "lua"
DATA = ROOT / "tests" / "data"
