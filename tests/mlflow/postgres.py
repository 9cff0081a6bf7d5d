"""A private PostgreSQL server in a temporary folder, reached on this machine alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.mlflow.server import free_port

USER = "tester"


@contextmanager
def postgres() -> Iterator[str]:
    """Yields the address of an empty database; skips where PostgreSQL is not installed."""
    pytest.importorskip("psycopg2", reason="psycopg2 is not installed: pip install -e '.[dev]'")
    programs = {name: shutil.which(name) for name in ("initdb", "pg_ctl")}
    if None in programs.values():
        pytest.skip("PostgreSQL is not installed: initdb and pg_ctl are not on the path")
    # It refuses to run as root; a folder of pytest's own cannot be entered by others.
    other: dict[str, Any] = {"user": "nobody", "group": "nogroup"} if os.geteuid() == 0 else {}
    with tempfile.TemporaryDirectory(prefix="dpo-postgres-") as root:
        if other:
            shutil.chown(root, **other)
        data, port, log = Path(root, "data"), free_port(), Path(root, "log")

        def call(program: str, *arguments: str) -> None:
            done = subprocess.run(
                [str(programs[program]), "-D", str(data), *arguments],
                cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False, **other,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr

        call("initdb", "-U", USER, "-A", "trust", "-E", "UTF8", "--no-sync")
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={root} -c fsync=off"
        call("pg_ctl", "-w", "-l", str(log), "-o", options, "start")
        try:
            yield f"postgresql+psycopg2://{USER}@127.0.0.1:{port}/postgres"
        finally:
            call("pg_ctl", "-w", "-m", "immediate", "stop")
