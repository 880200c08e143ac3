"""Tables of the documentation against the code: arguments, choices, statistics, packages."""

from __future__ import annotations

import configparser
import dataclasses
import re

import pytest
from support.pages import text_of
from support.programs import ROOT

from torch_eplb import Config, Stats
from torch_eplb.policies.registry import POLICIES
from torch_eplb.values.choices import DISPATCHES, REPLICA_CHOICES

PACKAGE = ROOT / "torch_eplb"


def table(page: str, first: str) -> list[dict[str, str]]:
    """The rows of the table whose first column is called ``first``, by the columns' names."""
    lines = text_of(page).splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith(f"| {first} |")]
    assert len(starts) == 1, f"{page} has {len(starts)} tables of {first}"
    rows = []
    for line in lines[starts[0] :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    header, _, *rest = rows
    return [dict(zip(header, row, strict=True)) for row in rest]


def quoted(cell: str) -> list[str]:
    """What a cell says in backticks, without quotation marks."""
    return [text.strip('"') for text in re.findall(r"`([^`]*)`", cell)]


# ---- arguments and statistics -------------------------------------------------------------------


def test_the_arguments_of_wrap_are_those_of_the_config_with_their_defaults() -> None:
    rows = table("docs/arguments.md", "argument")
    fields = dataclasses.fields(Config)
    assert [quoted(row["argument"])[0] for row in rows] == [field.name for field in fields]
    for row, field in zip(rows, fields, strict=True):
        default = row["default"].partition(":")[0].strip("`")
        assert default == str(field.default) or default == f'"{field.default}"', field.name


def test_the_statistics_are_those_of_the_code() -> None:
    named = [name for row in table("docs/api.md", "field") for name in quoted(row["field"])]
    assert sorted(named) == sorted(field.name for field in dataclasses.fields(Stats))


@pytest.mark.parametrize(
    ("page", "column", "names"),
    [
        ("README.md", "`dispatch=`", DISPATCHES),
        ("README.md", "`replica_choice=`", REPLICA_CHOICES),
        ("README.md", "`policy=`", POLICIES),
        ("docs/dispatch.md", "dispatch", DISPATCHES),
        ("docs/dispatch.md", "replica_choice", REPLICA_CHOICES),
        ("docs/policies.md", "policy", POLICIES),
    ],
)
def test_every_choice_has_its_line(page: str, column: str, names: dict[str, object]) -> None:
    named = [name for row in table(page, column) for name in quoted(row[column])]
    assert sorted(named) == sorted(names)


@pytest.mark.parametrize("others", ["vLLM-Ascend", "vLLM", "SGLang", "DeepSeek EPLB"])
def test_settings_of_others_are_explained_by_ours(others: str) -> None:
    page = f"docs/from_{others.removesuffix(' EPLB').lower().replace('-', '_')}.md"
    arguments = {field.name: field.type for field in dataclasses.fields(Config)}
    for row in table(page, others):
        for said in quoted(row["here"]):
            name = said.partition("=")[0]
            known = name in arguments or "(" in said or "." in name or name in Stats.__annotations__
            assert known or said in ("wrap", "with", "import torch_eplb as eplb"), said


# ---- models -------------------------------------------------------------------------------------


def test_the_models_that_were_tried_are_those_of_the_pinned_transformers() -> None:
    pinned = re.findall(r"^    transformers==(\S+)$", text_of("tox.ini"), re.MULTILINE)
    page = text_of("docs/models.md")
    assert re.findall(r"^transformers (\S+), torch", page, re.MULTILINE) == pinned
    rows = table("docs/models.md", "model")
    assert len(rows) > 80
    assert not any("WRONG" in row.values() for row in rows)
    assert page.count("\n1. ") == 1
    assert len(re.findall(r"^\d+\. ", page, re.MULTILINE)) == sum(bool(r["note"]) for r in rows)


# ---- packages -----------------------------------------------------------------------------------


def contracts() -> dict[str, dict[str, list[str]]]:
    """The contracts in setup.cfg, by name; of each its lists, without ``torch_eplb.``."""
    config = configparser.ConfigParser(interpolation=None)
    config.read(ROOT / "setup.cfg")
    start = "importlinter:contract:"
    return {
        section.removeprefix(start): {
            key: [line.removeprefix("torch_eplb.") for line in text.split("\n") if line]
            for key, text in config[section].items()
        }
        for section in config.sections()
        if section.startswith(start)
    }


def allowed() -> dict[str, set[str]]:
    """What the contracts let each package import: of the package, and torch.

    A forbidden contract also forbids the detour over a third package, so that a package which must
    not import torch can import none that may.
    """
    by_name = contracts()
    lines = [line.split(" | ") for line in by_name["layers"]["layers"]]
    may: dict[str, set[str]] = {}
    for number, line in enumerate(lines):
        below = {name for lower in lines[number + 1 :] for name in lower}
        may.update({name: below | {"torch"} for name in line})
    for contract in by_name.values():
        if contract["type"] == ["forbidden"]:
            for name in contract["source_modules"]:
                may[name] -= set(contract["forbidden_modules"])
    without_torch = {name for name in may if "torch" not in may[name]} | {"version"}
    for name in without_torch:
        may[name] &= without_torch
    return may


def test_the_table_of_packages_agrees_with_the_contracts() -> None:
    may = allowed()
    rows = {quoted(row["package"])[0]: row for row in table("docs/architecture.md", "package")}
    assert set(rows) == set(may) - {"__main__"}
    for name, row in rows.items():
        if name in ("version", "testing"):
            continue
        # The version may be imported by all.
        assert set(quoted(row["may import"])) == may[name] - {"torch", "version"}, name
        assert row["torch"] == ("yes" if "torch" in may[name] else "no"), name
    assert rows["testing"]["may import"] == "anything"
    assert may["testing"] == {*may, "torch"} - {"testing", "__main__"}


def test_the_table_of_packages_names_every_file() -> None:
    for row in table("docs/architecture.md", "package"):
        folder = PACKAGE / quoted(row["package"])[0]
        files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
        assert set(quoted(row["files"])) == files, folder.name
        if not files:
            assert folder.with_suffix(".py").is_file()
        # Files that the text names are of this package, too.
        words = {word for word in quoted(row["what it holds"]) if word.islower()}
        assert words - {"wrap"} <= files, folder.name


def test_what_the_contracts_allow_is_computed_as_the_linter_reads_them() -> None:
    may = allowed()
    assert may["values"] == {"version"}
    assert may["schedule"] == {"values", "version"}  # neither policies nor files
    assert "policies" not in may["migration"]
    assert {"torch", "planner"} <= may["runtime"]
    plans = {"planner", "schedule", "policies", "files", "values", "version"}
    assert may["offline"] == plans | {"exporters"}  # whose tables it shows
