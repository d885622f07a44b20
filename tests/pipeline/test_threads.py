from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from ckptd.pipeline.threads import submit


def test_work_runs_on_the_pool_as_long_as_it_takes_any() -> None:
    with ThreadPoolExecutor(1, thread_name_prefix="pool") as pool:
        assert submit(pool, lambda: threading.current_thread().name).result().startswith("pool")


def test_work_runs_on_this_thread_once_the_pool_is_closed() -> None:
    pool = ThreadPoolExecutor(1)
    pool.shutdown()
    assert submit(pool, lambda a, b: (a, b, threading.current_thread()), 1, b=2).result() == (
        1, 2, threading.current_thread()
    )  # fmt: skip


@pytest.mark.parametrize("is_closed", [False, True])
def test_what_the_work_raises_is_raised_by_the_future(is_closed: bool) -> None:
    pool = ThreadPoolExecutor(1)
    if is_closed:
        pool.shutdown()

    def fail() -> None:
        raise RuntimeError("not the pool's")

    future = submit(pool, fail)
    with pytest.raises(RuntimeError, match="not the pool's"):
        future.result()
    pool.shutdown()


def test_work_is_done_in_atexit_when_python_has_closed_all_pools() -> None:
    script = """
import atexit
from concurrent.futures import ThreadPoolExecutor
from ckptd.pipeline.threads import submit
pool = ThreadPoolExecutor(1)
pool.submit(int).result()
atexit.register(lambda: print(submit(pool, lambda: "done").result()))
"""
    found = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=True
    )
    assert found.stdout == "done\n"
