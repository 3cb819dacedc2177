"""Licences: which rows a dataset takes by their own, by which names they are counted, and which names SPDX has."""

from collections.abc import Sequence
from difflib import get_close_matches
from functools import cache, lru_cache
from typing import Any, NamedTuple, cast

from license_expression import get_spdx_licensing

from finetune_api.errors import StageError
from finetune_api.reasons import Fault
from finetune_api.redact import shortened
from finetune_api.run import MAX_ARG_CHARS
from finetune_api.spdx import MAX_EXPRESSION_CHARS, NotAnExpressionError, may_use, names_in
from finetune_trainer.data.problems import Drop

# Names in the report for what has none there: what a row says may be data.
NONE, SEVERAL, OTHER = "(none)", "(several)", "(other)"
_OWN = ("licenseref-", "documentref-")
_MAX_REMEMBERED = 1024  # different values of rows
_MAX_TOGETHER = 64  # licences of one row
_MAX_SHOWN = 40  # characters of a name that SPDX does not have


class RowLicense(NamedTuple):
    """What a row says of its licence, by the name that it is counted under, and why the row is left out, if it is."""

    name: str
    drop: Drop | None = None


class RowLicenses:
    """Reads the licence of rows. wanted: by which of them rows are chosen; none: all are taken."""

    def __init__(self, field: str, wanted: Sequence[str]) -> None:
        self.field = field
        names = {name.casefold(): name for name in wanted}
        self._chooses = bool(names)

        def read(said: tuple[str, ...]) -> RowLicense:
            return _judged(said, names)

        self._read = lru_cache(_MAX_REMEMBERED)(read)

    def take(self, row: dict[str, Any]) -> RowLicense:
        """Take the licence out of a row, which says nothing to learn, and return it."""
        said = row.pop(self.field, None)
        values = cast(list[object], said) if isinstance(said, list) else [said]
        texts = dict.fromkeys(
            each.strip()[: MAX_EXPRESSION_CHARS + 1] if isinstance(each, str) else "" for each in values
        )
        if len(texts) > _MAX_TOGETHER:
            return RowLicense(SEVERAL, Drop.OTHER_LICENSE if self._chooses else None)
        return self._read(tuple(texts))


def _judged(said: tuple[str, ...], wanted: dict[str, str]) -> RowLicense:
    """Return what is said of a licence, by one text or by several that all apply."""
    if not said or not all(said):
        return RowLicense(NONE, Drop.UNKNOWN_LICENSE if wanted else None)
    name = _counted_as(said[0].casefold(), wanted) if len(said) == 1 else SEVERAL
    is_wanted = not wanted or all(_is_wanted(each, wanted) for each in said)
    return RowLicense(name, None if is_wanted else Drop.OTHER_LICENSE)


def _counted_as(said: str, wanted: dict[str, str]) -> str:
    return wanted.get(said) or _spdx_names().get(said, OTHER)


def _is_wanted(said: str, wanted: dict[str, str]) -> bool:
    return said.casefold() in wanted or may_use(said, wanted)


@cache
def _spdx_names() -> dict[str, str]:
    """Return the names of SPDX by how they, or their earlier names, are written in lower case.

    Those of other lists, which the library knows too, are none."""
    known = cast(dict[str, Any], get_spdx_licensing().known_symbols)  # pyright: ignore[reportUnknownMemberType]
    names = {name: symbol.aliases for name, symbol in known.items() if not name.casefold().startswith(_OWN)}
    earlier = {alias.casefold(): name for name, aliases in names.items() for alias in aliases}
    return {**earlier, **{name.casefold(): name for name in names}}


def license_problem(expression: str) -> str | None:
    """Return what is wrong with the licence of a dataset, and what to write; None for one that SPDX knows."""
    try:
        said = names_in(expression)
    except NotAnExpressionError:
        return "its parentheses do not match; write such as (MIT OR Apache-2.0) AND CC-BY-4.0"
    known = _spdx_names()
    unknown = [name for name in said if not name.casefold().startswith(_OWN) and name.casefold() not in known]
    if not unknown:
        return None
    name = shortened(unknown[0], _MAX_SHOWN)
    by_letters = {_letters(each): full for each, full in known.items()}
    near = dict.fromkeys(by_letters[each] for each in get_close_matches(_letters(name), by_letters, n=3, cutoff=0.75))
    meant = f"write {' or '.join(near)}, or " if near else "write "
    return f"SPDX has no licence {name}; {meant}LicenseRef-{name} for one of your own"


def _letters(name: str) -> str:
    """Return what a name has in common with one whose dashes and dots are written otherwise."""
    return name.casefold().replace("-", "").replace(".", "")


def check_license(expression: str | None, index: int) -> None:
    """Refuse the licence of a dataset in the spec that SPDX does not know. Raises CONFIG_UNREADABLE."""
    problem = None if expression is None else license_problem(expression)
    if problem is not None:
        field = f"spec.datasets[{index}].license"
        raise StageError(Fault.CONFIG_UNREADABLE, field=field, problem=shortened(problem, MAX_ARG_CHARS))
