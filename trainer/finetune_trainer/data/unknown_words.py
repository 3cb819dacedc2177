"""Counts the tokens of rows, and those among them that stand for words which the tokenizer does not know.

Such a token, often `<unk>`, says nothing of the word: where it is learned, the model is taught to answer with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from finetune_trainer.data.tokens import Tokens

MAX_UNKNOWN_SHARE = 0.001  # of a dataset's tokens, beyond which the plan says so


@dataclass
class TokenCount:
    """Tokens of rows: all, those of unknown words, those of them that are learned, and the rows that have any."""

    tokens: int = 0
    unknown: int = 0
    unknown_learned: int = 0
    unknown_rows: int = 0

    def add(self, other: "TokenCount") -> None:
        """Add what was counted of other rows."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))

    @property
    def is_much_unknown(self) -> bool:
        """Whether more words are unknown than in rows that the tokenizer was made for."""
        return self.unknown > MAX_UNKNOWN_SHARE * self.tokens

    def report(self) -> dict[str, Any]:
        """Return the counts of unknown words for report.json."""
        return {"tokens": self.unknown, "learned": self.unknown_learned, "rows": self.unknown_rows}


def counted(sequences: Sequence[Tokens], unknown_id: int | None) -> TokenCount:
    """Count the tokens of one row. unknown_id: None where no token stands for unknown words."""
    found = TokenCount(tokens=sum(len(each.ids) for each in sequences))
    if unknown_id is None:
        return found
    for each in sequences:
        is_unknown = each.ids == unknown_id
        if is_unknown.any():
            found.unknown += int(is_unknown.sum())
            found.unknown_learned += int(each.labels[is_unknown].sum())
            found.unknown_rows = 1
    return found
