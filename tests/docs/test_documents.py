"""Documents say what the code does: links, test files, deadlines, variables, exit codes, floors."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import ckptd
from ckptd import errors
from ckptd.cli.main import COMMANDS, EXIT_CODES
from ckptd.config import daemon_config

PROJECT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    [p for part in ("*", "docs/*", "deploy/*/*") for p in PROJECT.glob(f"{part}.md")]
)
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


def test_files_that_hold_a_promise_have_tests_that_bear_its_number():
    missing = []
    for number, _, where in rows(section(DESIGN, "## 10. Promises")):
        for name in re.findall(r"`([a-z]+/[a-z_]+\.py)`", where):
            text = (PROJECT / "tests" / name).read_text()
            if not re.search(rf"def test_(\w+_)?{number.lower()}_", text):
                missing.append((number, name))
    assert missing == []


def test_every_promise_has_its_row():
    numbers = [row[0] for row in rows(section(DESIGN, "## 10. Promises")) if row[0]]
    expected = [f"{letter}{n}" for letter, count in (("D", 11), ("R", 5), ("G", 10), ("P", 7), ("S", 9))
                for n in range(1, count + 1)]  # fmt: skip
    assert numbers == expected


def resolve(name: str) -> object:
    """Return what a dotted name stands for."""
    parts = name.split(".")
    depth = next(n for n in range(len(parts), 0, -1) if is_module(parts[:n]))
    found: object = importlib.import_module(".".join(parts[:depth]))
    for part in parts[depth:]:
        found = getattr(found, part)
    return found


def is_module(parts: list[str]) -> bool:
    path = PROJECT.joinpath(*parts)
    return path.is_dir() or path.with_suffix(".py").exists()


def value_of(name: str) -> object:
    """Return the seconds that a name in the table of deadlines stands for."""
    if argument := re.fullmatch(r"([\w.]+)\((\w+)\)", name):
        is_ours = argument[1] == "Checkpointer"
        function = ckptd.Checkpointer if is_ours else resolve(argument[1])
        return inspect.signature(function).parameters[argument[2]].default
    if name.startswith("CKPTD_"):
        config = daemon_config({}, socket="/s", is_on_demand=True)
        return getattr(config, name.removeprefix("CKPTD_").lower())
    owner, _, attribute = name.rpartition(".")
    if owner.endswith(".Options"):
        return resolve(owner)._field_defaults[attribute]
    found = resolve(name)
    return found.keywords["total_s"] if attribute == "_retrying" else found


NOT_WAITED_FOR = {  # looks and limits only
    "ckptd.bars.QUIET_S",
    "ckptd.cli.console._HALF_A_YEAR_S",
    "ckptd.engine.clients.MAX_TIMEOUT_S",
}


def spans_in_code() -> Iterator[str]:
    """Give the names of all spans of time that are fixed in the code, as the table writes them."""
    for path in sorted((PROJECT / "ckptd").rglob("*.py")):
        module = ".".join(path.relative_to(PROJECT).with_suffix("").parts)
        tree = ast.parse(path.read_text())
        for node in tree.body:
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            for name in (n for t in targets if t is not None for n in ast.walk(t)):
                if isinstance(name, ast.Name) and re.fullmatch(r"_?[A-Z_]+_S", name.id):
                    yield f"{module}.{name.id}"
        for owner in (node for node in tree.body if isinstance(node, ast.ClassDef)):
            yield from defaults_of(owner, f"{module}.{owner.name}")


def defaults_of(owner: ast.ClassDef, prefix: str) -> Iterator[str]:
    """Give the fields and arguments of a class that are deadlines with a number as their default."""
    for node in owner.body:
        if isinstance(node, ast.AnnAssign) and is_deadline(node.target.id, node.value):
            yield f"{prefix}.{node.target.id}"
        if isinstance(node, ast.FunctionDef):
            known = node.args
            last = zip(reversed(known.args), reversed(known.defaults), strict=False)
            for arg, value in [*last, *zip(known.kwonlyargs, known.kw_defaults, strict=True)]:
                if is_deadline(arg.arg, value):
                    yield f"{prefix}.{node.name}({arg.arg})"


def is_deadline(name: str, default: ast.expr | None) -> bool:
    is_number = isinstance(default, ast.Constant) and isinstance(default.value, (int, float))
    return is_number and re.search(r"(timeout|deadline)_s$", name) is not None


def test_deadlines_are_those_of_the_code():
    table = [row for row in rows(section(DESIGN, "## 13. Deadlines")) if row[1] != "seconds"]
    assert len(table) > 15
    for _, seconds, where in table:
        names = re.findall(r"`([^`]+)`", where)
        values = [value_of(name) for name in names]
        flat = [s for value in values for s in (value if isinstance(value, tuple) else (value,))]
        assert flat == [float(s) for s in seconds.split(",")], where


def test_every_deadline_in_the_code_stands_in_the_table():
    listed = re.findall(r"`([^`]+)`", section(DESIGN, "## 13. Deadlines"))
    in_code = {
        name.replace("ckptd.trainer.checkpointer.Checkpointer.__init__", "Checkpointer")
        for name in spans_in_code()
    }
    assert len(in_code) > 20
    assert in_code - NOT_WAITED_FOR - set(listed) == set()


def test_the_map_names_every_module_of_the_trainer():
    rooms = re.findall(r"^    [a-z]+: +(.*)$", section(DESIGN, "## 14. Modules"), re.MULTILINE)
    named = [name for room in rooms for name in room.split(", ")]
    files = {path.stem for path in (PROJECT / "ckptd/trainer").glob("[a-z]*.py")}
    assert sorted(named) == sorted(files)


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


def test_the_table_of_layouts_is_what_the_matrix_tries():
    from tests.system.matrix_layouts import table

    assert table() in (PROJECT / "docs/layouts.md").read_text()
