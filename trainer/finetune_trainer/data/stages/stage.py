"""A stage that rows go through between reading and rendering: a pure map, and what it gives back besides the rows."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from finetune_trainer.data.accounts import Action, FieldPlace
from finetune_trainer.data.reading import Checked


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What a stage did to a row. detail: a path or figures, never the data; ref: FILE#ROW of a row that it copies."""

    file: int
    row: int
    action: Action
    reason: str
    ref: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Staged:
    """What a stage made of a batch: the rows that go on, in order, its decisions, and what else it counted.

    places: where there are examples of something, by its name, in the order of the rows; the first few are reported."""

    rows: list[Checked]
    decisions: list[Decision] = field(default_factory=list[Decision])
    counters: Counter[str] = field(default_factory=Counter[str])
    places: dict[str, list[FieldPlace]] = field(default_factory=dict[str, list[FieldPlace]])

    def decide(self, item: Checked, action: Action, reason: str, detail: str = "") -> None:
        """Say what was done to a row."""
        self.decisions.append(Decision(file=item.file, row=item.number, action=action, reason=reason, detail=detail))

    def count(self, reason: str, where: FieldPlace) -> None:
        """Count a row for a reason, and that it is an example of it."""
        self.counters[reason] += 1
        self.places.setdefault(reason, []).append(where)


@dataclass(frozen=True, slots=True)
class Stage:
    """A pure map from some rows of one kind; each row that it does not pass on has a decision that says so.

    run: a function of a module, a `functools.partial` of one, or a frozen dataclass that is called, so that a worker
    process can have the stage too."""

    name: str
    description: str  # the end of a sentence that begins with its name
    run: Callable[[Sequence[Checked]], Staged]


def dropping(rows: Sequence[Checked], why: Callable[[Checked], str | None], detail: str = "") -> Staged:
    """Return the rows without those that are to be dropped. why: the reason, None for a row that goes on."""
    staged = Staged([])
    for item in rows:
        reason = why(item)
        if reason is None:
            staged.rows.append(item)
        else:
            staged.decide(item, Action.DROP, reason, detail)
    return staged
