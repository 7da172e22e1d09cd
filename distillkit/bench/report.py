"""Markdown of what was measured, from nothing but the JSON of it; and where in a file it stands."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- distillkit bench: begin -->", "<!-- distillkit bench: end -->"

TITLES = {
    "step": "step: what a training step costs over its ideal",
    "kernels": "kernels: the losses and regions, against the forms they are usually written in",
    "invariance": "invariance: the same pictures, several times or on several processes",
    "syncs": "syncs: what a step makes the host wait for, holds, and runs",
    "behaviour": "behaviour: faults provoked in every toolkit",
    "accuracy": "accuracy: does it learn more",
}


def markdown(report: dict[str, Any]) -> str:
    """The text of a report as `distillkit.bench.command.bench` makes it, and as it is read back from its file."""
    made_with = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    peers = ", ".join(f"{peer['name']} {peer['version'] or '(' + peer['absent'] + ')'}" for peer in report["peers"])
    parts = [
        f"`{report['command']}`",
        f"{report['date']}, {report['machine']}, {report['threads']} thread; {made_with}. Peers: {peers}.",
    ]
    for name, suite in report["suites"].items():
        parts += [f"## {TITLES.get(name, name)}", suite["asks"]]
        for shown in suite["tables"]:
            title = "<details><summary>{}</summary>" if shown["folded"] else "### {}"
            parts += [part for part in (title.format(shown["title"]), shown["note"]) if part]
            parts += [table(shown["head"], shown["rows"]), *(["</details>"] if shown["folded"] else [])]
        wrong = [[check["name"], check["said"]] for check in suite["checks"] if not check["ok"]]
        if suite["checks"]:
            parts.append(f"{len(suite['checks']) - len(wrong)} of {len(suite['checks'])} checks passed.")
        if wrong:
            parts += ["### Checks that failed", table(["check", "found"], wrong)]
    return "\n\n".join(parts)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; columns of numbers right, but never the first."""
    cells = [[_plain(cell) for cell in row] for row in [head, *rows]]
    columns = list(zip(*cells[1:], strict=True)) if rows else [()] * len(head)
    rule = ["---:" if i and _numbers(column) else "---" for i, column in enumerate(columns)]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join(rule) + "|", *lines[1:]])


def _plain(cell: str) -> str:
    """In one line; no table and no tag begins in it."""
    return cell.replace("|", "\\|").replace("<", "\\<").replace("\n", " ")


def _numbers(column: Sequence[str]) -> bool:
    """Some are, and the others say why there is none."""
    none = [not cell or cell == "-" or cell.startswith(("absent", "fails")) for cell in column]
    number = [cell.lstrip("+-")[:1].isdigit() for cell in column]
    return any(number) and all(a or b for a, b in zip(none, number, strict=True))


def check_place(path: Path) -> None:
    """Raises ValueError where a file is there and has no one place for the tables, before anything is measured."""
    if path.exists():
        _outside(path)


def write_between(path: Path, text: str) -> None:
    """Replaces what stands between the two marks of a file, and nothing else; makes the file where there is none."""
    before, after = _outside(path) if path.exists() else ("", "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    new.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")
    new.replace(path)


def _outside(path: Path) -> tuple[str, str]:
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(
            f"{path}: the tables would stand between the lines {BEGIN} and {END}, which are not there, one of each in "
            "this order; add them, or name a new file"
        )
    return text[: text.index(BEGIN)], text[text.index(END) + len(END) :]
