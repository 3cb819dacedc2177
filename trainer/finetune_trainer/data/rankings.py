"""Rows with several answers to one prompt, in the order of their scores or ranks."""

from typing import Any, cast

from finetune_api.row_words import MAX_ANSWERS
from finetune_trainer.data import toolcalls
from finetune_trainer.data.field_names import CONVERSATION, says_nothing
from finetune_trainer.data.kinds import kind_of
from finetune_trainer.data.pair_choices import PairChoices, pairs_of
from finetune_trainer.data.preferences import ASKED, after_the_same, answered, number, prompt_of
from finetune_trainer.data.problems import Problem, RefusedError
from finetune_trainer.data.row_reader import RowReader
from finetune_trainer.data.rows import Answered, Conversation, Ranking

ANSWERS = ("responses", "completions", "answers")
SCORES = ("scores", "ratings")
RANKS = ("ranks", "rank", "ranking")  # 1 is the best
PROMPTS = ("prompt", "instruction", "messages", *CONVERSATION, *ASKED)
_WORDS = ("response", "completion", "answer", "text")  # of an answer that is an object, and no message
_OWN_SCORE = ("score", "rating", "overall_score")


def ranking(reading: RowReader) -> Ranking:
    """Return the answers of a row with their scores, and the pairs that they make. Raises RefusedError."""
    name = reading.one_of(ANSWERS) or ANSWERS[0]
    items = _listed(reading, name)
    if len(items) > MAX_ANSWERS:
        raise RefusedError(Problem.TOO_MANY_ANSWERS, name)
    prompt = prompt_of(reading)
    answers = [answered(reading, prompt, _said(item), f"{name}[{at}]") for at, item in enumerate(items)]
    reading.also_read.update(ANSWERS)
    first = answers[0]
    for at, each in enumerate(answers):
        if isinstance(first, Conversation) and isinstance(each, Conversation):
            answers[at] = after_the_same(first, each, f"{name}[{at}]")
        elif type(first) is not type(each):
            raise RefusedError(Problem.WRONG_TYPE, f"{name}[{at}]", "the answers must be all texts, or all messages")
    scores = _scores(reading, items, name)
    pairs = pairs_of(scores, [_content(each) for each in answers], PairChoices.of(reading.choices.preference))
    return Ranking(tuple(answers), tuple(scores), tuple(pairs), reading.weight())


def _listed(reading: RowReader, name: str) -> list[object]:
    """Return the list under a name, or the JSON text of one."""
    found = toolcalls.from_json(reading.row.get(name), name, "a list")
    if not isinstance(found, list):
        raise RefusedError(Problem.WRONG_TYPE, name, "must be a list, or the JSON text of one")
    if not found:
        raise RefusedError(Problem.EMPTY, name)
    return cast(list[object], found)


def _said(item: object) -> object:
    """Return what an answer says: of an object with a text and a score, its text."""
    if isinstance(item, dict):
        own = cast(dict[str, Any], item)
        name = next((name for name in _WORDS if not says_nothing(own.get(name))), None)
        return item if name is None else own[name]
    return item


def _scores(reading: RowReader, items: list[object], name: str) -> list[float]:
    """Return a score for each answer, of which the highest is the best."""
    scored, ranked = reading.one_of(SCORES), reading.one_of(RANKS)
    if scored is not None or ranked is not None:
        field = scored or ranked or ""
        reading.also_read.update(SCORES if scored is not None else RANKS)
        values = _listed(reading, field)
        if len(values) != len(items):
            raise RefusedError(Problem.WRONG_TYPE, field, f"must have as many values as {name}")
        return [(1 if scored is not None else -1) * number(each, f"{field}[{at}]") for at, each in enumerate(values)]
    return [_own_score(item, f"{name}[{at}]") for at, item in enumerate(items)]


def _own_score(item: object, field: str) -> float:
    own = cast(dict[str, Any], item) if isinstance(item, dict) else {}
    name = next((name for name in _OWN_SCORE if own.get(name) is not None), None)
    if name is None:
        raise RefusedError(Problem.MISSING_FIELD, SCORES[0])
    return number(own[name], f"{field}.{name}")


def _content(row: Answered) -> object:
    return kind_of(row).content(row)
