"""The page: what report.json says, in the order in which a person asks, as HTML without scripts and without network."""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from finetune_api.printable import printable_lines
from finetune_api.redact import shortened
from finetune_api.row_words import row_words
from finetune_trainer.data.accounts import most_first
from finetune_trainer.report_html.charts import Bar, bars, histogram
from finetune_trainer.report_html.details import details_of
from finetune_trainer.report_html.warnings import warnings

if TYPE_CHECKING:
    from finetune_trainer.shown import ShownRow

MAX_PAGE_BYTES = 2 * 2**20
MAX_FILES = 100
MAX_LINES = 30  # of any other table
MAX_ROWS = 60  # that are shown as they are learned, where they are asked for
MAX_ROW_CHARS = 4_000  # of one of them
_MAX_TEXT_CHARS = 400  # of any one thing that is named
_BEFORE = ("extract", "license", "read")  # stages before the chain, and behind it
_BEHIND = ("render", "tokenise", "length", "duplicates", "pair", "split")
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")

Report = Mapping[str, Any]


def report_page(report: Report, rows: Sequence["ShownRow"] = ()) -> bytes:
    """Return the page, the same bytes for the same report. rows: some of the data, where their owner asks for them."""
    values = {
        "report": report,
        "headline": _headline(report),
        "warnings": warnings(report),
        "funnel": _funnel(report),
        "drops": _drops(report),
        "changes": [(f"it {row_words(code)}", code, n) for code, n in _most_first(report["changed"])[:MAX_LINES]],
        "lengths": _lengths(report),
        "shares": _shares(report),
        "files": _largest(report["files"]),
        "max_lines": MAX_LINES,
        "most_first": _most_first,
    }
    values |= {"rows": rows[:MAX_ROWS], "details": list(details_of(report))}
    for left_out in ({}, {"rows": ()}, {"rows": (), "details": ()}):  # what may be long goes first
        page = _template().render({**values, **left_out}).encode()
        if len(page) <= MAX_PAGE_BYTES:
            return page
    raise AssertionError(f"all that a page names is bounded, and it is {len(page)} bytes")


@cache
def _template() -> Template:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_said
    )
    environment.filters |= {"number": _number, "percent": _percent, "size": _size, "name": _name}
    return environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))


def _said(value: object) -> object:
    """Return what may stand on the page: of a text, its printable characters, and not more than can be read."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return shortened(printable_lines(value), MAX_ROW_CHARS)


def _number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.2f}"


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.1 or not share else f"{share:.1%}" if share >= 0.001 else "< 0.1%"


def _size(size_bytes: float) -> str:
    for unit in _UNITS[:-1]:
        if size_bytes < 1024:
            return f"{size_bytes:,.0f} {unit}" if unit == "B" else f"{size_bytes:,.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:,.1f} {_UNITS[-1]}"


def _name(uri: str) -> str:
    """Return the end of a URI, which tells files apart."""
    return uri if len(uri) <= _MAX_TEXT_CHARS else f"…{uri[-_MAX_TEXT_CHARS:]}"


def _most_first(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return list(most_first(counts).items())


def _headline(report: Report) -> str:
    """Return in a sentence what became of the data."""
    rows, dropped = int(report["rows_in"]), sum(report["dropped"].values())
    used, held_out = (sum(file[name] for file in report["files"]) for name in ("rows_used", "rows_held_out"))
    files = len(report["files"])
    read = f"{_number(rows)} rows in {_number(files)} {'file' if files == 1 else 'files'}"
    if report["state"] == "prepared":
        return f"{read}: {_number(used)} to train on, {_number(held_out)} held out, {_number(dropped)} left out."
    return f"{read} were read, {_number(dropped)} of them are left out."


def _stages(report: Report) -> dict[str, int]:
    """Return how many rows each stage left out, in the order of the way of a row."""
    found: dict[str, int] = {}
    for file in report["files"]:
        for stage, rows in file["dropped_by_stage"].items():
            found[stage] = found.get(stage, 0) + rows
    order = [*_BEFORE, *report["chain"], *_BEHIND]
    return dict(sorted(found.items(), key=lambda each: order.index(each[0]) if each[0] in order else len(order)))


def _funnel(report: Report) -> Markup:
    """Return the way of the rows: how many there are, and how many each stage leaves."""
    left = int(report["rows_in"])
    steps = [Bar("rows read", left, said=_number(left))]
    for stage, rows in _stages(report).items():
        left -= rows
        steps.append(Bar(f"after {stage}", left, rows, f"{_number(left)}, {_number(rows)} fewer"))
    if report["state"] == "prepared":
        used = sum(file["rows_used"] for file in report["files"])
        steps.append(Bar("to train on", used, left - used, f"{_number(used)}, {_number(left - used)} held out"))
    return bars("How many rows each stage leaves", steps)


class _Dropped(NamedTuple):
    """Rows that are left out for one reason, and where the first of them are."""

    reason: str
    words: str
    rows: int
    share: float
    places: Sequence[Mapping[str, Any]]


def _drops(report: Report) -> list[_Dropped]:
    nothing_more = dict.fromkeys(("detail", "words", "shape"), "")
    found: list[_Dropped] = []
    for reason, rows in _most_first(report["dropped"])[:MAX_LINES]:
        places = [nothing_more | place for place in report["drop_places"].get(reason, ())]
        found.append(_Dropped(reason, f"it {row_words(reason)}", rows, rows / max(1, report["rows_in"]), places))
    return found


def _lengths(report: Report) -> dict[str, Any] | None:
    lengths = report.get("lengths")
    if lengths is None:
        return None
    told = lengths["histogram"]
    marks = {name: float(tokens) for name, tokens in lengths["percentiles"].items() if name != "p100"}
    learned, tokens = lengths["label_tokens"], lengths["tokens"]
    share = Bar("learned", learned, tokens - learned, _percent(lengths["label_share"]))
    return {
        **lengths,
        "histogram": histogram("Examples by length", told["edges"], told["examples"], "tokens of an example", marks),
        "share": bars("The share of tokens that are learned", [share]),
    }


def _shares(report: Report) -> Markup | None:
    """Return how much of what is read is of each dataset, where there are several."""
    datasets = report.get("datasets", ())
    if len(datasets) < 2:
        return None
    return bars(
        "The share of each dataset in what is read",
        [
            Bar(f"datasets[{index}]", each["reads_share"], said=_percent(each["reads_share"]))
            for index, each in enumerate(datasets[:MAX_LINES])
        ],
    )


def _largest(files: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the files that are named: those with rows left out first, then the largest."""
    return sorted(files, key=lambda file: (-sum(file["dropped"].values()), -file["size_bytes"]))[:MAX_FILES]
