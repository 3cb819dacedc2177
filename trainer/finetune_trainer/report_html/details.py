"""What stages tell of the data beside rows, such as languages and personal data: each a section of tables. Pure."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

from finetune_api.redact import shortened

MAX_TABLES = 8  # of a section
MAX_TABLE_ROWS = 20
MAX_COLUMNS = 8
_MAX_CELL_CHARS = 200

# The key in report.json, its heading, and what it says. A report without one has no such section.
SECTIONS = {
    "quality": ("Quality", "What was measured of the words, and which thresholds they passed."),
    "languages": ("Languages", "In which languages the rows are, as far as it is told from their words."),
    "duplicates": ("Duplicates", "Rows that say the same, or nearly the same, and the largest groups of them."),
    "leaks": ("Leaks", "Rows that say what an evaluation set says, which are left out, and how far sets can be found."),
    "pii": ("Personal data", "What was found, by its type; never what it was."),
    "licenses": ("Licences", "Under which terms the rows come."),
}


class Table(NamedTuple):
    """A table: its title, the names of its columns, and its rows."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    left_off: int  # rows


class Details(NamedTuple):
    """A section."""

    key: str
    heading: str
    text: str
    tables: Sequence[Table]


def details_of(report: Mapping[str, Any]) -> Iterator[Details]:
    """Yield the sections that a report has."""
    for key, (heading, text) in SECTIONS.items():
        tables = list(_tables("", report[key]))[:MAX_TABLES] if report.get(key) else []
        if tables:
            yield Details(key, heading, text, tables)


def _tables(title: str, value: object) -> Iterator[Table]:
    """Yield what a value says: single values in one table, lists of objects and objects of objects in their own."""
    if isinstance(value, list):
        yield from _of_list(title, cast(list[object], value))
        return
    fields = cast(dict[str, object], value) if isinstance(value, dict) else {title or "value": value}
    if fields and all(isinstance(each, dict) and not _is_deep(each) for each in fields.values()):
        yield from _of_list(title, [{"": name, **cast(dict[str, object], each)} for name, each in fields.items()])
        return
    said = {name: each for name, each in fields.items() if each not in ("", None)}
    single = [(_words(name), each) for name, each in said.items() if not isinstance(each, dict | list)]
    if single:
        yield _table(title, (), single)
    for name, each in fields.items():
        if isinstance(each, dict | list) and each:
            yield from _tables(_words(name), cast(object, each))


def _of_list(title: str, values: Sequence[object]) -> Iterator[Table]:
    objects = [cast(dict[str, object], each) for each in values if isinstance(each, dict)]
    if not objects:
        if values:
            yield _table(title, (), [(_said(each),) for each in values])
        return
    names = list(dict.fromkeys(name for each in objects for name in each))[:MAX_COLUMNS]
    rows = [[_said(each.get(name, "")) for name in names] for each in objects]
    yield _table(title, [_words(name) for name in names], rows)


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    return Table(title, columns, rows[:MAX_TABLE_ROWS], max(0, len(rows) - MAX_TABLE_ROWS))


def _is_deep(value: object) -> bool:
    return isinstance(value, dict) and any(isinstance(each, dict) for each in cast(dict[str, object], value).values())


def _said(value: object) -> object:
    """Return a value for one cell."""
    if isinstance(value, dict):
        fields = cast(dict[str, object], value).items()
        return shortened(", ".join(f"{_words(name)}: {_said(each)}" for name, each in fields), _MAX_CELL_CHARS)
    if isinstance(value, list):
        said = ", ".join(str(_said(each)) for each in cast(list[object], value))
        return shortened(said, _MAX_CELL_CHARS)
    return shortened(value, _MAX_CELL_CHARS) if isinstance(value, str) else value


def _words(name: str) -> str:
    return shortened(name.replace("_", " "), _MAX_CELL_CHARS)
