"""`finetune describe`: everything the operator knows of a job, for people."""

from typing import Any

from rich.console import Console
from rich.markup import escape

from finetune_api.quality import FIGURE_WORDS
from finetune_api.row_words import row_words
from finetune_cli.screen import table
from finetune_cli.show import count_files
from finetune_cli.wait import line, say_concern


def describe(job: dict[str, Any], console: Console) -> None:
    """Where the job is, why, what was chosen, what became of the rows, what was tried, and what came out."""
    status: dict[str, Any] = job.get("status") or {}
    console.print(f"[bold]{job['metadata']['name']}[/]  {escape(line(job))}", soft_wrap=True)
    say_concern(job, console)
    _table(
        console,
        ("condition", "is", "reason", "message"),
        [[one["type"], one["status"], one["reason"], one["message"]] for one in status.get("conditions") or []],
    )
    plan: dict[str, Any] = status.get("plan") or {}
    if plan:
        rows = f" read {plan['rows']:,} rows ({plan['distinctRows']:,} different ones)" if "rows" in plan else ""
        learned = f", {plan['labelTokens']:,} of them learned from" if "labelTokens" in plan else ""
        tokens = f"{plan['trainTokens']:,} tokens{learned}"
        console.print(f"\n[bold]Plan[/]  {plan['steps']:,} steps{rows}, {tokens}; {plan['uri']}", soft_wrap=True)
        _table(
            console,
            ("chosen for you", "value", "because"),
            [[one["field"], one["value"], one["reason"]] for one in plan.get("resolved") or []],
        )
    _table(console, ("dataset", *_ORIGIN.values()), _origins(job.get("spec") or {}))
    data: dict[str, Any] = status.get("data") or {}
    if data:
        report = data.get("reportPageUri", data["reportUri"])
        console.print(
            f"\n[bold]Data[/]  {data['rowsIn']:,} rows in {count_files(data['files'])}: "
            f"{data['rowsUsed']:,} to train on, {data['rowsHeldOut']:,} held out; {report}",
            soft_wrap=True,
        )
        _table(
            console,
            ("dropped", "because each of them"),
            [[f"{one['rows']:,}", f"{row_words(one['reason'])} ({one['reason']})"] for one in data["dropped"]],
        )
    progress: dict[str, Any] = status.get("progress") or {}
    _table(
        console,
        ("in the last step", "is", "which means"),
        [[one["name"], one["value"], FIGURE_WORDS.get(one["name"], "")] for one in progress.get("figures") or []],
    )
    _table(
        console,
        ("attempt", "stage", "ended as", "reason", "exit code", "last step"),
        [
            [one["number"], one["stage"], one["class"], one.get("reason"), one.get("exitCode"), one.get("lastStep")]
            for one in status.get("attempts") or []
        ],
    )
    for artifact in status.get("artifacts") or []:
        console.print(f"\n[bold]{artifact['type']}[/]  {artifact['uri']}\n  {artifact['digest']}", soft_wrap=True)


_ORIGIN = {
    "license": "licence",
    "licenses": "of its rows",
    "source": "source",
    "confidentiality": "confidentiality",
    "copyrightHolder": "copyright holder",
}


def _origins(spec: dict[str, Any]) -> list[list[Any]]:
    """Return what is said of each dataset beside its rows; nothing where nothing is said of any."""
    datasets: list[dict[str, Any]] = spec.get("datasets") or []
    rows = [[each.get("name") or each["uri"], *(_listed(each.get(field)) for field in _ORIGIN)] for each in datasets]
    return rows if any(cell for row in rows for cell in row[1:]) else []


def _listed(said: str | list[str] | None) -> str:
    return ", ".join(said) if isinstance(said, list) else said or ""


def _table(console: Console, heading: tuple[str, ...], rows: list[list[Any]]) -> None:
    if not rows:
        return
    shown = table(*heading, header_style="dim")
    for row in rows:
        shown.add_row(*("" if cell is None else escape(str(cell)) for cell in row))
    console.print()
    console.print(shown)
