"""Special tokens that stand in a row's own words, where the tokenizer reads them as what they are to the model.

They are no error: a prompt may be written with them. But `<|im_end|>` in a question ends it there, for this model and
for everybody who serves it.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from finetune_api.redact import shortened
from finetune_trainer.data.kinds import texts
from finetune_trainer.data.rows import Row

MAX_NAMED = 16  # tokens in the report
_MAX_SHOWN = 48  # characters of a token
_BEGIN = 2  # characters by which most rows are told to have none


class SpecialWords:
    """Counts rows by the special tokens in their words. tokens: all that the tokenizer has."""

    def __init__(self, tokens: Iterable[str]) -> None:
        longest_first = sorted({token for token in tokens if token}, key=lambda token: (-len(token), token))
        self._firsts = tuple({token[0] for token in longest_first})
        self._begins = tuple({token[:_BEGIN] for token in longest_first})
        self._any = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
        self.rows: Counter[str] = Counter()  # by token

    def count(self, members: Sequence[Row]) -> None:
        """Count a row once for each special token in the words of its members."""
        if self._any is None:
            return
        found: set[str] = set()
        for words in (words for member in members for words in texts(member).values()):
            if _has_any(words, self._firsts) and _has_any(words, self._begins):
                found.update(self._any.findall(words))
        self.rows.update(sorted(found))

    @property
    def report(self) -> dict[str, int]:
        """Rows by token, those of most rows first."""
        return {shortened(token, _MAX_SHOWN): count for token, count in self.rows.most_common(MAX_NAMED)}


def _has_any(words: str, parts: Iterable[str]) -> bool:
    for part in parts:  # noqa: SIM110 (a generator takes as long as the search itself)
        if part in words:
            return True
    return False
