"""What was found, as the table of ``docs/models.md``."""

from __future__ import annotations

import importlib.metadata
import re
from dataclasses import dataclass

MARK = "<!-- written by tests/models -->\n"
CHECKS = ("all_to_all", "all_reduce", "generate", "state", "load", "bf16")
_CELLS = {"equal": "=", "has none": "-", "": " "}
_BEGINNINGS = {"refused: ": "refused", "the unwrapped model's raises ": "not run"}
_CONVERTED = re.compile(r"transformers makes it of \S+ by (.*?), which is")
_SENTENCE = 500


@dataclass(frozen=True)
class Outcome:
    """What was found of one model.

    Attributes:
        name: its class.
        experts: MoE layers and their experts.
        cells: by check.
        notes: sentences on what is not as it should be.
        is_wrong: it is not refused, and does something else than the unwrapped model.
    """

    name: str
    experts: str
    cells: tuple[str, ...]
    notes: tuple[str, ...]
    is_wrong: bool


def outcomes(found: dict[str, dict[str, str]]) -> list[Outcome]:
    """Of all models with experts, by class."""
    models = [_outcome(one) for one in found.values() if "none" not in one]
    return sorted(models, key=lambda outcome: outcome.name.lower())


def _outcome(one: dict[str, str]) -> Outcome:
    cells, notes, is_wrong = [], [], "ended" in one
    for check in CHECKS:
        said = one.get(check, "")
        if said in _CELLS or re.fullmatch(r"[\d.]+", said):
            cells.append(_CELLS.get(said, said))
            continue
        fits = [cell for start, cell in _BEGINNINGS.items() if said.startswith(start)]
        is_wrong |= not fits
        cells.append(fits[0] if fits else "WRONG")
        notes.append(f"{check}: {_sentence(said)}")
    notes += [
        f"{why}: {_sentence(one[why])}" for why in ("not built", "not run", "ended") if why in one
    ]
    return Outcome(one["kind"], one.get("experts", ""), tuple(cells), tuple(notes), is_wrong)


def _sentence(said: str) -> str:
    """The part of an error that says what it is about."""
    text = re.sub(r"^(refused: )?\w+: ", "", said)
    operations = sorted(set(_CONVERTED.findall(text)))
    if operations:
        return f"tensors of the checkpoint are converted by {', by '.join(operations)}"
    text = text.rpartition("torch_eplb.register_layer(cls, ...). ")[2]
    text = text.replace("|", "/").replace("<", "(").replace(">", ")").replace("*", r"\*")
    return text if len(text) <= _SENTENCE else f"{text[:_SENTENCE]} ..."


def written(found: list[Outcome], seconds: float) -> str:
    """What stands below the mark."""
    transformers, torch = map(importlib.metadata.version, ("transformers", "torch"))
    good = sum(not one.notes for one in found)
    lines = [
        f"transformers {transformers}, torch {torch.partition('+')[0]} on the CPU, two ranks on 2 "
        f"cores: {len(found)} models in {max(1, round(seconds / 60))} min, of which {good} "
        "have no note.",
        "",
        f"| model | experts | {' | '.join(CHECKS)} | note |",
        "| --- " * (len(CHECKS) + 3) + "|",
    ]
    notes: list[str] = []
    for one in found:
        number = ""
        if one.notes:
            number = str(len(notes) + 1)
            notes.append(f"{number}. {one.name}: {'; '.join(one.notes)}")
        lines.append(f"| {' | '.join([one.name, one.experts, *one.cells, number])} |")
    return "\n".join([*lines, "", "Notes:", "", *notes, ""])
