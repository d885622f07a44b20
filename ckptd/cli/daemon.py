"""``ckptd daemon``."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from ckptd.config import daemon_config
from ckptd.daemon.process import main, set_up_log
from ckptd.wire.address import runtime_directory


def command(
    *,
    socket: Annotated[
        str, typer.Option(help="Absolute path of the socket.", envvar="CKPTD_SOCKET")
    ] = "",
    is_on_demand: Annotated[
        bool, typer.Option("--on-demand", help="Exit when nobody needs the daemon any more.")
    ] = False,
    workers: Annotated[
        int,
        typer.Option(
            help="Threads that code; 0: half the cores, at most 4.", envvar="CKPTD_WORKERS", min=0
        ),
    ] = 0,
    metrics: Annotated[
        str, typer.Option(help="Serve Prometheus metrics on HOST:PORT.", envvar="CKPTD_METRICS")
    ] = "",
) -> None:
    """Run the node daemon in the foreground, until SIGTERM.

    Trainers start one by themselves; run it by hand where it is to be a service, and give trainers
    its socket in CKPTD_SOCKET.
    """
    path = socket or os.path.join(runtime_directory(os.environ), "service.sock")
    asked = {"CKPTD_METRICS": metrics, "CKPTD_WORKERS": str(workers or "")}
    env = {**os.environ, **{name: value for name, value in asked.items() if value}}
    config = daemon_config(env, socket=os.path.abspath(path), is_on_demand=is_on_demand)
    set_up_log(config.log_level)
    raise typer.Exit(main(config, os.environ))
