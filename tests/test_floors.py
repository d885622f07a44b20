"""What may be imported where: the daemon and the commands run without torch, and start quickly."""

from __future__ import annotations

import os
import pkgutil
import subprocess
import sys

import pytest

import ckptd

_SHOW = "import sys; print(*sorted(m for m in {0!r} if m in sys.modules))"


def modules_after(code: str, *suspects: str) -> set[str]:
    """Return which of `suspects` are loaded in a new interpreter that ran `code`."""
    found = subprocess.run(
        [sys.executable, "-c", f"{code}\n{_SHOW.format(suspects)}"],
        capture_output=True, text=True, check=True, env={**os.environ, "PYTHONSAFEPATH": "1"},
    )  # fmt: skip
    return set(found.stdout.splitlines()[-1].split())


def modules_of(*packages: str) -> list[str]:
    """Return all modules of some packages of ckptd."""
    prefixes = tuple(f"ckptd.{package}" for package in packages)
    walked = pkgutil.walk_packages(ckptd.__path__, "ckptd.")
    return [
        m.name for m in walked if m.name.startswith(prefixes) and not m.name.endswith("__main__")
    ]


def test_import_ckptd_is_lazy() -> None:
    heavy = ("torch", "numpy", "zstandard", "fsspec", "s3fs", "msgspec", "typer", "rich")
    assert modules_after("import ckptd", *heavy) == set()


def test_every_public_name_is_there() -> None:
    for name in ckptd.__all__:
        assert getattr(ckptd, name) is not None
    assert ckptd.errors.CkptdError
    with pytest.raises(AttributeError, match="nothing_here"):
        _ = ckptd.nothing_here


def test_nothing_but_the_trainer_imports_torch() -> None:
    found = modules_of(
        "daemon", "config", "engine", "pipeline", "plan", "codec", "store", "shm", "wire", "model",
        "errors", "units", "failpoints", "cli",
    )  # fmt: skip
    assert len(found) > 50
    code = "\n".join(f"import {name}" for name in found)
    assert modules_after(code, "torch", "ckptd.trainer") == set()


def test_the_trainer_is_where_torch_is() -> None:
    assert modules_after("import ckptd.trainer.checkpointer", "torch") == {"torch"}


def test_the_daemon_loads_no_command_line_and_no_object_store() -> None:
    suspects = ("torch", "typer", "rich", "fsspec", "s3fs", "aiobotocore", "hypothesis", "pytest")
    code = "import ckptd.daemon.process, ckptd.daemon.server, ckptd.engine.runner"
    assert modules_after(code, *suspects) == set()


def test_help_loads_nothing_that_works_on_bytes() -> None:
    code = """
import sys
from ckptd.cli.main import main
sys.argv = ["ckptd", "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code
"""
    suspects = ("torch", "numpy", "zstandard", "msgspec", "fsspec", "prometheus_client")
    assert modules_after(code, *suspects) == set()


def test_no_module_runs_anything_when_it_is_imported() -> None:
    """No threads, no files, no environment: whoever imports is not surprised."""
    found = modules_of("daemon", "engine", "pipeline", "store", "shm", "wire", "cli")
    code = "import os, sys, threading\nbefore = set(os.listdir('/proc/self/fd'))\n"
    code += "\n".join(f"import {name}" for name in found)
    code += "\nassert threading.active_count() == 1"
    code += "\nassert set(os.listdir('/proc/self/fd')) == before"
    modules_after(code, "torch")
