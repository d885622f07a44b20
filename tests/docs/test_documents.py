"""Documents say what the code does: links, test files, deadlines, variables, exit codes, floors."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import pytest

import ckptd
from ckptd import errors
from ckptd.cli.main import COMMANDS, EXIT_CODES
from ckptd.config import daemon_config

PROJECT = Path(__file__).parents[2]
DOCUMENTS = sorted([*PROJECT.glob("*.md"), *(PROJECT / "docs").glob("*.md")])
DESIGN = (PROJECT / "docs/design.md").read_text()
OPERATIONS = (PROJECT / "docs/operations.md").read_text()


def section(text: str, title: str) -> str:
    """Return a part of a document, from its heading to the next of that level."""
    return re.split(r"^## ", text.split(f"{title}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


def rows(text: str) -> list[list[str]]:
    """Return the cells of the tables in a text, headings and lines left out."""
    found = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in found]


def anchors(text: str) -> set[str]:
    """Return the anchors of a document's headings, as hosts of repositories make them."""
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)]+)\)", path.read_text()):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text()), target


def test_files_that_hold_a_promise_are_there():
    promised = section(DESIGN, "## 10. Promises")
    named = set(re.findall(r"`([a-z]+/[a-z_]+\.py)`", promised))
    assert named
    assert [name for name in sorted(named) if not (PROJECT / "tests" / name).exists()] == []


def test_every_promise_has_its_row():
    numbers = [row[0] for row in rows(section(DESIGN, "## 10. Promises")) if row[0]]
    expected = [f"{letter}{n}" for letter, count in (("D", 11), ("R", 5), ("G", 10), ("P", 7), ("S", 9))
                for n in range(1, count + 1)]  # fmt: skip
    assert numbers == expected


def value_of(name: str) -> object:
    """Return the seconds that a name in the table of deadlines stands for."""
    if argument := re.fullmatch(r"Checkpointer\((\w+)\)", name):
        return inspect.signature(ckptd.Checkpointer).parameters[argument[1]].default
    if name.startswith("CKPTD_"):
        config = daemon_config({}, socket="/s", is_on_demand=True)
        return getattr(config, name.removeprefix("CKPTD_").lower())
    module, _, attribute = name.rpartition(".")
    if module.endswith(".Options"):
        options = importlib.import_module(module.removesuffix(".Options")).Options
        return options._field_defaults[attribute]
    found = getattr(importlib.import_module(module), attribute)
    return found.keywords["total_s"] if attribute == "_retrying" else found


def test_deadlines_are_those_of_the_code():
    table = [row for row in rows(section(DESIGN, "## 13. Deadlines")) if row[1] != "seconds"]
    assert len(table) > 15
    for _, seconds, where in table:
        names = re.findall(r"`([^`]+)`", where)
        assert [value_of(name) for name in names] == [float(s) for s in seconds.split(",")], where


def test_variables_of_the_environment_are_documented():
    sources = "".join(path.read_text() for path in (PROJECT / "ckptd").rglob("*.py"))
    in_code = set(re.findall(r"\bCKPTD_[A-Z_]+\b", sources))
    in_table = {row[0].strip("`") for row in rows(section(OPERATIONS, "## Environment"))}
    assert in_table - {"variable"} == in_code


def test_exit_codes_are_documented_and_in_the_help():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    in_code = {str(kind.exit_code) for kind in kinds if issubclass(kind, errors.CkptdError)}
    in_table = {row[0] for row in rows(section(OPERATIONS, "## Exit codes"))}
    assert in_code <= in_table
    assert in_code == set(re.findall(r"\b\d+\b", EXIT_CODES)) - {"0"}


def test_commands_stand_in_the_readme():
    text = (PROJECT / "README.md").read_text()
    assert [
        name for name in COMMANDS if f"ckptd {name}" not in text and f"`{name}`" not in text
    ] == []


@pytest.mark.parametrize("name", ["docs/design.md", "CONTRIBUTING.md"])
def test_the_floors_are_those_that_are_enforced(name):
    settings = (PROJECT / "pyproject.toml").read_text()
    layers = re.findall(r'"(.*)"', re.findall(r"layers = \[(.*?)\]", settings, re.DOTALL)[0])
    assert len(layers) == 9
    assert " > ".join(layers) in (PROJECT / name).read_text()
