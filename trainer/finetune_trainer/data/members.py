"""The members of rows with their tokens: what one example is made of, before it is a tree."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from finetune_trainer.data.examples import TokenRun
from finetune_trainer.data.kinds import conversations_of, member_names, members_of
from finetune_trainer.data.problems import Broken, Drop
from finetune_trainer.data.reading import Checked
from finetune_trainer.data.rows import Conversation, Row
from finetune_trainer.data.tokens import Tokens

Batch = list[Checked]


class Member(NamedTuple):
    """A row that is rendered or tokenised, by itself or as one of another's, and its sequences."""

    row: Row
    sequences: list[Tokens]


Example = list[Member]  # as a rule one; the two answers of a pair


class Shorter(NamedTuple):
    """An example as it is learned, and how it was made shorter, if it was."""

    example: Example
    change: str = ""


class Asked(NamedTuple):
    """A conversation to render, and the place of its row in the batch."""

    row: int
    conversation: Conversation


def asked_of(batch: Batch) -> list[Asked]:
    """Return the conversations of a batch's rows, in order."""
    return [Asked(index, each) for index, item in enumerate(batch) for each in conversations_of(item.row)]


def divided(batch: Batch, conversations: int) -> tuple[Batch, Batch]:
    """Return the rows before the first conversation that is not among the first `conversations`, and the others."""
    asked = asked_of(batch)
    cut = asked[conversations].row if conversations < len(asked) else len(batch)
    return batch[:cut], batch[cut:]


def examples_of(row: Row, sequences: Sequence[list[Tokens]]) -> list[Example]:
    """Return the examples of a row. sequences: of each of its members."""
    members = [Member(member, each) for member, each in zip(members_of(row), sequences, strict=True)]
    size = len(member_names(row))
    return [members[begin : begin + size] for begin in range(0, len(members), size)]


def of_member(row: Row, member: int, broken: Broken) -> Broken:
    """Return what is wrong with a row one of whose members is broken; of several, the field says which."""
    names = member_names(row)
    if len(names) == 1:
        return broken
    name = names[member % len(names)]
    return replace(broken, field=f"{name}.{broken.field}" if broken.field else name)


def longest(example: Example) -> int:
    """Return the tokens of an example's longest sequence."""
    return max(len(each.ids) for member in example for each in member.sequences)


def runs_of(example: Example) -> list[TokenRun]:
    """Return all sequences of an example, in order."""
    return [TokenRun(each.ids, each.labels) for member in example for each in member.sequences]


def useless(example: Example, limit: int) -> Drop | None:
    """Return why an example cannot be learned, if so. limit: the tokens that a sequence may have."""
    if longest(example) > limit:
        return Drop.TOO_LONG
    if not all(any(each.labels.any() for each in member.sequences) for member in example):
        return Drop.NO_LABEL
    if len(example) == 1:
        return None
    said = {tuple(each.ids.tobytes() for each in member.sequences) for member in example}
    return Drop.IDENTICAL_TOKENS if len(said) < len(example) else None
