"""The command ``ckptd``: finds the file of a command, and turns errors into exit codes."""

from __future__ import annotations

import importlib
import inspect
from typing import Annotated, Any

import typer
import typer.core
import typer.main

from ckptd import __version__
from ckptd.errors import CkptdError

# Name and summary. The module is `ckptd.cli.<name>`, its function `command`; it is imported only
# when the command runs, so that help is quick.
COMMANDS = {
    "ls": "List the checkpoints of a root, newest first.",
    "show": "Show what a checkpoint holds: tensors and values.",
    "daemon": "Run the node daemon in the foreground.",
    "status": "Show the daemons of this user on this machine.",
    "preempt": "Tell the jobs of this user on this machine to save and stop.",
    "verify": "Check that checkpoints are whole; with --data, re-read and re-hash every byte.",
}

# Lines are kept as they stand here, and fit 80 columns.
EXIT_CODES = """Exit codes:

0 done; 1 internal error; 2 usage or configuration; 3 not found;
4 damage found; 5 the store failed; 6 no daemon, or a drain left work;
7 layouts do not fit; 8 the ranks did not meet."""


class _Commands(typer.core.TyperGroup):
    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, found, rest = super().resolve_command(ctx, args)
        return name, found and _load(str(name)), rest

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except CkptdError as error:
            from ckptd.cli.console import plain  # noqa: PLC0415 - keeps help quick

            typer.echo(f"ckptd: {plain(str(error))}", err=True)
            raise typer.Exit(error.exit_code) from error


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    epilog=EXIT_CODES,
    help="Durable checkpoints of distributed training. SRC and ROOT are folders of roots.",
)


def _print_version(is_asked: bool) -> None:  # noqa: FBT001 - typer calls it so
    if is_asked:
        typer.echo(f"ckptd {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    *,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", is_eager=True, callback=_print_version
        ),
    ] = False,
) -> None:
    del version  # its callback did the work


def _placeholder() -> None:
    raise AssertionError("the command's own module runs instead")


for _name, _summary in COMMANDS.items():
    app.command(_name, help=_summary)(_placeholder)


def _load(name: str) -> Any:
    module = importlib.import_module(f"ckptd.cli.{name.replace('-', '_')}")
    one = typer.Typer(add_completion=False, rich_markup_mode="rich")
    one.command(name, epilog=EXIT_CODES, help=_unfolded(module.command.__doc__))(module.command)
    return typer.main.get_command(one)


def _unfolded(text: str) -> str:
    """Return a docstring with each paragraph on one line, to be folded to the screen's width."""
    return "\n\n".join(" ".join(part.split()) for part in inspect.cleandoc(text).split("\n\n"))


def main() -> None:
    """Run the command line of this process; ends it with a documented exit code."""
    app(prog_name="ckptd")
