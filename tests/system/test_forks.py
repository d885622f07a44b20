"""Data loaders fork while a thread of ckptd finds its daemon."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytestmark = pytest.mark.system

FORKING = textwrap.dedent(
    """
    import json, os, signal, sys, threading, time
    from ckptd.trainer.ports import start_daemon

    def run():
        start_daemon(sys.argv[1], os.environ)
        took.append(time.monotonic() - began)

    children, took, began = [], [], time.monotonic()
    thread = threading.Thread(target=run)
    thread.start()
    # Each child lives until the end, as the workers of a data loader do.
    while thread.is_alive() and len(children) < 300 and not took:
        pid = os.fork()
        if pid == 0:
            signal.pause()
        children.append(pid)
        time.sleep(0.001)
    thread.join(30)
    print(json.dumps({"is_over": not thread.is_alive(), "children": len(children)}))
    for pid in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    sys.stdout.flush()
    os._exit(0)
    """
)


def test_p3_children_that_are_forked_meanwhile_do_not_hold_up_the_start_of_a_daemon(
    tmp_path: Path,
) -> None:
    """`subprocess` would wait until all of them have ended."""
    runtime = tmp_path / "rt"
    runtime.mkdir(0o700)
    env = {**os.environ, "CKPTD_RUNTIME_DIR": str(runtime), "CKPTD_LINGER_S": "0.1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKING, str(runtime / "d.sock")],
        env=env, capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads(done.stdout)
    assert seen["children"] > 10, "the test is void"
    assert seen["is_over"]


def test_a_daemon_takes_no_modules_from_the_folder_of_the_job(tmp_path: Path) -> None:
    """A job may run beside a file that is called like one of the standard library."""
    (tmp_path / "logging.py").write_text("raise SystemExit(77)")
    runtime = tmp_path / "rt"
    runtime.mkdir(0o700)
    script = "import os, sys; sys.path[:1] = []; from ckptd.trainer.ports import start_daemon;"
    script += "start_daemon(sys.argv[1], os.environ)"
    done = subprocess.run(
        [sys.executable, "-c", script, str(runtime / "d.sock")],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "CKPTD_RUNTIME_DIR": str(runtime), "CKPTD_LINGER_S": "0.1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
