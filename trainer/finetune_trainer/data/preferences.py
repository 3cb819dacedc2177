"""Rows that say which answers people prefer: pairs of answers to one prompt, and answers that are found good or bad.

Each answer becomes what is learned alone: a conversation whose last message it is, or a plain prompt that it completes.
"""

import re
from dataclasses import dataclass, replace
from typing import Any, cast

from finetune_api.row_words import MAX_MESSAGES
from finetune_trainer.data.field_names import CONTENT, CONVERSATION, ROLE, says_nothing
from finetune_trainer.data.messages import Said, text
from finetune_trainer.data.problems import Change, Problem, RefusedError
from finetune_trainer.data.row_reader import NUMBER, RowReader, is_text_of_messages
from finetune_trainer.data.rows import Answered, Completion, Conversation, Pair, Thumb

ASKED = ("question", "query", "input")  # names of a question that a template renders; `prompt` may be plain text
LABEL = ("label", "kto_tag")
RATING = ("rating", "score")
RATES = (
    "if it says whether the answer is good, method.type KTO learns from it, and DPO and ORPO from pairs of such rows"
)
_GOOD = frozenset(("true", "1", "good", "desirable", "up", "like", "chosen"))
_BAD = frozenset(("false", "0", "-1", "bad", "undesirable", "down", "dislike", "rejected"))
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")  # as Anthropic's HH writes conversations
_NO_PROMPT = "say what is answered there, or make each answer a list of all messages of its conversation"
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_TELLING = ("system", "developer")


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a row says before its answers. plain: a text that is no message where the answer is plain text too."""

    said: list[Said]
    plain: str | None = None


def pair(reading: RowReader) -> Pair:
    """Return the two answers to one prompt that a row has as `chosen` and `rejected`."""
    prompt = prompt_of(reading)
    chosen, rejected = (answered(reading, prompt, reading.row.get(name), name) for name in ("chosen", "rejected"))
    if isinstance(chosen, Conversation) and isinstance(rejected, Conversation):
        return Pair(chosen, after_the_same(chosen, rejected, "rejected"), reading.weight())
    if type(chosen) is not type(rejected):
        raise RefusedError(Problem.WRONG_TYPE, "rejected", "must be a text where chosen is one, else messages too")
    return Pair(chosen, rejected, reading.weight())


def thumb(reading: RowReader, answer: Answered) -> Thumb:
    """Return an answer, which another shape reads, and what the row says of it."""
    if Change.END_LEFT_OUT in reading.changes:
        raise RefusedError(Problem.LAST_NOT_ASSISTANT)
    if isinstance(answer, Conversation):
        if not answer.learned[-1]:
            raise RefusedError(Problem.MASKED_ANSWER)
        answer = replace(answer, learned=(*(False,) * (len(answer.messages) - 1), True))
    return Thumb(replace(answer, weight=1.0), _is_good(reading), reading.weight())


def _is_good(reading: RowReader) -> bool:
    """Return what the row says of its answer: its label, or else its rating where the job says what is good."""
    name = reading.one_of(LABEL)
    if name is None:
        return _is_rated_good(reading)
    value = reading.row[name]
    if isinstance(value, str) and NUMBER.fullmatch(value.strip()):
        value = float(value)
    whole = int(value) if isinstance(value, float) and value.is_integer() else value
    said = str(whole).strip().lower() if isinstance(whole, bool | int | str) else ""
    if said not in _GOOD | _BAD:
        raise RefusedError(Problem.WRONG_TYPE, name, "must be true or false, 1 or 0, good or bad, up or down")
    is_good, rated = said in _GOOD, reading.one_of(RATING)
    if reading.choices.preference.good_from is not None and rated is not None and _is_rated_good(reading) != is_good:
        raise RefusedError(Problem.TWO_FIELDS, rated, f"{name} says otherwise, by datasets[].preference.goodFrom")
    return is_good


def _is_rated_good(reading: RowReader) -> bool:
    name, good_from = reading.one_of(RATING), reading.choices.preference.good_from
    if name is None:
        raise RefusedError(Problem.MISSING_FIELD, LABEL[0])
    if good_from is None:
        detail = "or say from which rating on an answer is good by datasets[].preference.goodFrom"
        raise RefusedError(Problem.MISSING_FIELD, LABEL[0], detail)
    reading.also_read.update(RATING)
    return number(reading.row[name], name) >= good_from


def number(value: object, field: str) -> float:
    """Return a number, or that which a text says, as a table of texts has it. Raises RefusedError."""
    if isinstance(value, str) and NUMBER.fullmatch(value.strip()):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise RefusedError(Problem.WRONG_TYPE, field, "must be a number")
    return float(value)


def prompt_of(reading: RowReader) -> Prompt:
    """Return the prompt by the first of its spellings that the row has; another one is a field that is not read."""
    row, read = reading.row, reading.also_read
    if not says_nothing(row.get("instruction")):
        read.update(("instruction", "input", "history"))
        return Prompt([*reading.history(), _of_user(reading.instruction("input"))])
    talked = reading.one_of(CONVERSATION if _is_again_the_chosen(reading) else ("messages", *CONVERSATION))
    if talked is not None:
        read.update(("messages", *CONVERSATION))
        return Prompt(reading.messages.read(row[talked], talked))
    asked = reading.one_of(("prompt", *ASKED))
    if asked is None:
        return Prompt([])
    read.update(("prompt", *ASKED))
    given = row[asked]
    if isinstance(given, list | dict) or is_text_of_messages(given):
        return Prompt(reading.messages.read(given, asked))
    words = text(given, asked)
    if asked == "prompt" and says_nothing(row.get("history")):
        return Prompt([_of_user(words)], words)
    read.add("history")
    return Prompt([*reading.history(), _of_user(words)])


def _is_again_the_chosen(reading: RowReader) -> bool:
    """Whether `messages` says once more what is chosen, as UltraFeedback's rows have it."""
    given = reading.row.get("messages")
    if given is None or given != reading.row.get("chosen"):
        return False
    reading.also_read.add("messages")
    return True


def answered(reading: RowReader, prompt: Prompt, value: object, field: str) -> Answered:
    """Return the prompt with one answer. value: a text, a message, messages, or a whole conversation."""
    if isinstance(value, str) and not is_text_of_messages(value):
        if prompt.plain is not None:
            return Completion(prompt.plain, text(value, field))
        answer = [Said({"role": "assistant", "content": text(value, field)})] if prompt.said else _turns(value, field)
    else:
        answer = reading.messages.read([value] if _is_message(value) else value, field)
    said = answer
    if not _holds(answer, prompt.said):
        if prompt.said and any(each.message["role"] == "user" for each in answer):
            detail = "it has a user's messages, but not those of the row's prompt; write all of the conversation in it"
            raise RefusedError(Problem.TWO_FIELDS, field, detail)
        said = [*prompt.said, *answer]
    if said[-1].message["role"] != "assistant":
        raise RefusedError(Problem.LAST_NOT_ASSISTANT, field)
    if said[-1].learned is False:
        raise RefusedError(Problem.MASKED_ANSWER, field)
    if len(said) == 1:
        raise RefusedError(Problem.MISSING_FIELD, "prompt", _NO_PROMPT)
    context = [Said(each.message, False, each.continues) for each in said[:-1]]
    return replace(reading.conversation([*context, said[-1]], field), weight=1.0)


def after_the_same(chosen: Conversation, rejected: Conversation, field: str) -> Conversation:
    """Return the second conversation with the first one's own messages before its answer. Raises RefusedError."""
    one, other = chosen.messages[:-1], rejected.messages[:-1]
    if one == other:
        return replace(rejected, messages=[*one, rejected.messages[-1]])
    pairs = enumerate(zip(one, other, strict=False))
    same = next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))
    raise RefusedError(Problem.PROMPTS_DIFFER, field, f"they differ from message {same + 1} on")


def _holds(said: list[Said], prompt: list[Said]) -> bool:
    """Whether the messages of an answer are a whole conversation, which begins with those of the prompt, be it behind
    system messages, or ends with them before the answer: in its middle they would be one question among others."""
    before, sought = [each.message for each in said[:-1]], [each.message for each in prompt]
    told = next((at for at, each in enumerate(before) if each["role"] not in _TELLING), len(before))
    begins = any(before[at : at + len(sought)] == sought for at in range(told + 1))
    return bool(sought) and (begins or before[-len(sought) :] == sought)


def _is_message(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    message = cast(dict[str, Any], value)
    contents = [message[name] for name in CONTENT if name in message]
    return any(isinstance(message.get(name), str) for name in ROLE) and bool(contents)


def _turns(value: str, field: str) -> list[Said]:
    """Return the messages of a conversation that is one text, as Anthropic's HH has them. Raises RefusedError."""
    before, *parts = _TURN.split(value.strip())
    if before or not parts:
        raise RefusedError(Problem.MISSING_FIELD, "prompt", _NO_PROMPT)
    if len(parts) > 2 * MAX_MESSAGES:
        raise RefusedError(Problem.TOO_MANY_MESSAGES, field)
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [Said({"role": _SPEAKERS[speaker], "content": text(words.strip(), field)}) for speaker, words in turns]


def _of_user(words: str) -> Said:
    return Said({"role": "user", "content": words})
