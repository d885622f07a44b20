"""Builds the C loops of the codec into the package, where there is a C compiler.

Without one the package is pure Python: everything works, the codec at half its speed or less.
``CKPTD_NATIVE=0`` leaves them out, ``CKPTD_NATIVE=1`` makes their failure an error; ``CC`` names the
compiler.
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCES = ("planes.c", "huffman.c", "entropy.c")
LIBRARY = "libckptdcodec.so.1"
FLAGS = ("-O3", "-std=gnu11", "-shared", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")


class NativeBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Compiles with one call of the compiler; nothing links against Python."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002
        """Build the library, and say that the wheel is for this kind of machine."""
        wish = os.environ.get("CKPTD_NATIVE", "")
        folder = Path(self.root, "ckptd", "codec")
        (folder / LIBRARY).unlink(missing_ok=True)
        if wish == "0" or sys.byteorder != "little":  # its loops know little-endian words only
            return
        problem = compile_native(folder)
        if problem and wish == "1":
            raise RuntimeError(problem)
        if problem:
            self.app.display_warning(f"the codec goes without its C loops: {problem}")
            return
        build_data["artifacts"].append(f"ckptd/codec/{LIBRARY}")
        build_data["pure_python"] = False
        system = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{system}"


def compile_native(folder: Path, *flags: str) -> str | None:
    """Build the library in `folder`; return why that failed, None if it did not."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    new = folder / f".{LIBRARY}.{os.getpid()}"
    sources = [str(folder / name) for name in SOURCES]
    try:
        done = subprocess.run(
            [*compiler, *FLAGS, *flags, "-o", str(new), *sources],
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        if done.returncode == 0:
            new.replace(folder / LIBRARY)  # a daemon may have the old one mapped
            return None
        return f"{compiler[0]} on {platform.machine()}: {done.stderr.strip()[-400:]}"
    except (OSError, subprocess.SubprocessError) as error:
        return f"no C compiler ({error})"
    finally:
        new.unlink(missing_ok=True)
