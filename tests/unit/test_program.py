"""A script is identified by the name and the contents of its file, a module by its name."""

from __future__ import annotations

import importlib.machinery
import sys
import zipfile
import zipimport
from pathlib import Path
from typing import Any

import pytest

from agentperf_redis.program import as_script, module_name, module_of, program_digest, program_of


def script(path: Path | str, **more: Any) -> dict[str, Any]:
    return {"__name__": "__main__", "__file__": str(path), **more}


def spec(name: str) -> importlib.machinery.ModuleSpec:
    return importlib.machinery.ModuleSpec(name, None)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "job.py"
    path.write_text("users = 1")
    return path


def test_modules_are_identified_by_name() -> None:
    variables = {"__name__": "app.caches", "__file__": "/app/caches.py"}
    assert (module_name(variables), program_digest(variables)) == ("app.caches", b"")
    assert (module_of(Path), program_of(Path)) == (Path.__module__, b"")
    assert (module_of(str.upper), program_of(str.upper)) == ("builtins", b"")


@pytest.mark.parametrize("name", ["__main__", "__mp_main__", "<run_path>"])
def test_scripts_are_identified_by_file_name_and_contents(path: Path, tmp_path: Path, name: str) -> None:
    variables = script(path, __name__=name)
    assert (module_name(variables), len(program_digest(variables))) == ("job", 8)
    (tmp_path / "other").mkdir()
    copy = tmp_path / "other" / "job.py"
    copy.write_text("users = 1")
    assert program_digest(script(copy)) == program_digest(variables)
    different = tmp_path / "different.py"
    different.write_text("users = 2")
    assert program_digest(script(different)) != program_digest(variables)


def test_modules_run_with_m_are_identified_by_name(path: Path) -> None:
    variables = script(path, __spec__=spec("app.job"))
    assert (module_name(variables), program_digest(variables)) == ("app.job", b"")


def test_folders_and_archives_are_named_after_themselves(tmp_path: Path) -> None:
    folder = tmp_path / "tool" / "__main__.py"
    folder.parent.mkdir()
    folder.write_text("users = 1")
    with zipfile.ZipFile(tmp_path / "app.zip", "w") as archive:
        archive.writestr("__main__.py", "users = 1")
    importer = zipimport.zipimporter(str(tmp_path / "app.zip"))
    as_folder = script(folder, __spec__=spec("__main__"))
    as_archive = script(tmp_path / "app.zip" / "__main__.py", __spec__=spec("__main__"), __loader__=importer)
    assert [module_name(each) for each in (as_folder, as_archive)] == ["tool", "app"]
    assert program_digest(as_folder) == program_digest(as_archive) != b""


@pytest.mark.parametrize("variables", [{"__name__": "__main__"}, script("<stdin>")])
def test_typed_code_has_no_program(variables: dict[str, Any]) -> None:
    assert (module_name(variables), program_digest(variables)) == ("__main__", b"")


def test_unreadable_script_is_identified_by_file_name() -> None:
    variables = script("/nowhere/frozen.py")
    assert (module_name(variables), program_digest(variables)) == ("frozen", b"")


def test_modules_can_count_as_scripts(path: Path) -> None:
    variables = as_script({"__name__": "plugin", "__file__": str(path), "__spec__": spec("plugin")})
    assert (module_name(variables), program_digest(variables)) == ("job", program_digest(script(path)))


def test_functions_of_the_script_get_its_identity(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Main:
        __name__ = "__main__"
        __file__ = str(path)

    def work() -> None:
        """A function of the script."""

    work.__module__ = "__main__"
    main = Main()
    vars(main).update(script(path))
    monkeypatch.setitem(sys.modules, "__main__", main)
    assert (module_of(work), program_of(work)) == ("job", program_digest(script(path)))
