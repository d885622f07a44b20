import pytest
from typer.testing import CliRunner

from ckptd.cli.main import app


@pytest.fixture
def ckptd():
    """Run a command line; returns its result, of which nothing but exit codes may be an exception."""

    def run(*args):
        result = CliRunner().invoke(app, [str(arg) for arg in args])
        assert result.exception is None or isinstance(result.exception, SystemExit), (
            result.exception
        )
        assert "Traceback" not in result.output
        return result

    return run
