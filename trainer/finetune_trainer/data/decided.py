"""What was decided of rows: how many by stage, action and reason, and where the first lie that are left out."""

from collections import Counter
from typing import Any, NamedTuple

import orjson

MAX_PLACES = 5  # that a report names of one thing
_STAGE, _REASON, _DROP = b'"stage":"', b'"reason":"', b'"action":"drop"'


class DecisionKind(NamedTuple):
    """What decisions of many rows have in common."""

    stage: str
    action: str
    reason: str


class Decided:
    """Counts lines of decisions.jsonl, in their order."""

    def __init__(self) -> None:
        self._rows: Counter[bytes] = Counter()
        self._places: dict[bytes, list[dict[str, Any]]] = {}

    def add(self, line: bytes) -> None:
        """Count one line. Its fields are in the order in which `Ledger.decide` writes them."""
        begin = line.find(_STAGE)  # within a text its quotes would be written otherwise
        if begin < 0:
            return  # the last line, on how many are not listed
        kind = line[begin : line.index(b'"', line.index(_REASON, begin) + len(_REASON))]
        self._rows[kind] += 1
        if _DROP in kind and self._rows[kind] <= MAX_PLACES:
            self._places.setdefault(kind, []).append(orjson.loads(line))

    @property
    def rows(self) -> dict[DecisionKind, int]:
        """How many rows each kind of decision was made of; may be asked from another thread."""
        return {_kind(kind): rows for kind, rows in self._rows.copy().items()}

    @property
    def drop_places(self) -> dict[str, list[dict[str, Any]]]:
        """The first rows that are left out, by reason, as decisions.jsonl has them."""
        found: dict[str, list[dict[str, Any]]] = {}
        for places in self._places.values():
            for place in places:
                of_reason = found.setdefault(place["reason"], [])
                if len(of_reason) < MAX_PLACES:
                    of_reason.append({name: value for name, value in place.items() if name not in _SAID_BY_REASON})
        return dict(sorted(found.items()))


_SAID_BY_REASON = ("action", "reason")


def _kind(found: bytes) -> DecisionKind:
    said = orjson.loads(b"{" + found + b'"}')
    return DecisionKind(said["stage"], said["action"], said["reason"])
