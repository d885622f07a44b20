"""Refuse files of ckptd over 400 lines and functions over 60: past that, look for the missing noun.

usage: sizes.py [FOLDER]
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


def too_long(path: Path) -> Iterator[str]:
    """Name what is too long in one file, in the form that editors jump to."""
    text = path.read_text(encoding="utf-8")
    lines = len(text.splitlines())
    if lines > MAX_FILE_LINES:
        yield f"{path}:1: {lines} lines, at most {MAX_FILE_LINES}"
    for node in ast.walk(ast.parse(text, str(path))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            span = (node.end_lineno or node.lineno) - node.lineno + 1
            if span > MAX_FUNCTION_LINES:
                yield f"{path}:{node.lineno}: {node.name} has {span} lines, at most {MAX_FUNCTION_LINES}"


def main() -> int:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "ckptd")
    found = [line for path in sorted(folder.rglob("*.py")) for line in too_long(path)]
    print("\n".join(found) if found else f"sizes: every file and function in {folder} is in bounds")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
