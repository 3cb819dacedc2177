"""Answers that say nothing, refuse, or hold the place of what somebody was to write."""

from collections.abc import Sequence

import re2

from finetune_trainer.data.prose import parts

_MARK = "['\u2019]"
_CANNOT = f"(?:cannot|can{_MARK}t|am unable to|am not able to)"
_REFUSAL = re2.compile(
    "(?i)as an? (?:ai|artificial intelligence)(?: language)? (?:model|assistant)|as a (?:large )?language model|"
    f"\\bi(?:{_MARK}m| am) (?:just |only )?an ai\\b|"
    f"\\bi {_CANNOT} (?:assist|help|fulfil|comply|answer|provide)|\\bsorry,? (?:but )?i {_CANNOT}|"
    f"\\bi{_MARK}m unable to (?:assist|help|fulfil|comply)"
)
_PLACEHOLDER = re2.compile(
    "\\b(?:TODO|FIXME|TBD)\\b|(?i:lorem ipsum)|"
    "(?i:\\[(?:insert|enter|add|placeholder|name of|your (?:name|e-?mail|address|company|title|phone))\\b"
    "[^\\]\\n]{0,60}\\])|"
    "(?i:<(?:insert|enter|your)[ _-][^>\\n]{0,40}>)"
)
_SAY_NOTHING = frozenset(("n/a", "null", "nan", "undefined", "[deleted]", "[removed]"))
_COUNTED = 200  # characters of an answer: who says that much says something


def refusals(answers: Sequence[str]) -> int:
    """Return how many of the answers refuse, or speak of a model instead."""
    return sum(1 for answer in answers if _REFUSAL.search(answer))


def placeholders(answers: Sequence[str]) -> int:
    """Return how many of the answers hold the place of others, outside of code."""
    return sum(1 for answer in answers if _PLACEHOLDER.search(answer) and _in_prose(answer))


def _in_prose(answer: str) -> bool:
    return any(not part.is_code and _PLACEHOLDER.search(part.text) for part in parts(answer))


def fewest_letters(answers: Sequence[str]) -> float:
    """Return the letters and digits of the answer that has the fewest; NaN where there is none."""
    return min(map(_letters, answers), default=float("nan"))


def _letters(answer: str) -> float:
    if answer.strip().lower() in _SAY_NOTHING:
        return 0
    return sum(map(str.isalnum, answer[:_COUNTED])) or float(any(map(str.isalnum, answer)))
