"""What was taught by conversations: counts for plan and report, and the words for those that are refused."""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune_api.errors import StageError
from finetune_api.job import Vanishing
from finetune_api.reasons import Fault
from finetune_api.redact import shortened
from finetune_trainer.data.containment import Part
from finetune_trainer.data.problems import Broken, Problem
from finetune_trainer.data.rows import Conversation
from finetune_trainer.data.sequences import Note
from finetune_trainer.runplan import ANSWERS_FIELD

_FAULTS = {
    Problem.GENERATION_PROMPT_NOT_KEPT: Fault.ANSWER_NOT_AS_SERVED,
    Problem.NO_REASONING: Fault.NO_REASONING,
}
# What was done with conversations, as ends of sentences about so many of them: "3 of 40 conversations, learned in …".
NOTE_WORDS: dict[str, str] = {
    Note.UNROLLED: "learned in one sequence for each answer, as the chat template writes an answer differently once "
    "others follow",
    Note.WITH_REASONING: "rendered by the template's form with reasoning, which a server must ask for",
    Note.WITHOUT_REASONING: "rendered by the template's form without reasoning (such as enable_thinking: false), which "
    "a server must ask for, as they have none",
    Note.REASONING_PLACED: "with their reasoning put into the block that the prompt opens, as the template drops it",
    Note.OPENING_ADDED: "whose reasoning is only closed, as in a model's raw output, and opened by the prompt",
    Note.EMPTY_BLOCK_SENT: "with answers after the empty block of reasoning that the prompt ends in, though the "
    "template leaves it out once there is an answer",
    Note.ANSWER_OF_SHORT: "with answers as they are written after their question alone or without earlier reasoning, "
    "as the template writes what comes before differently once there is an answer",
    Note.END_OF_NEXT: "with answers that end with the token by which the template begins the next message",
    Note.END_ADDED: "with the model's end token added to their answers (preprocessing.addEndToken)",
    Note.MARKS_DIFFER: "of which {% generation %} marks another part than what a server is to get back, which is "
    "learned",
}

_PARTS = frozenset(Part)


@dataclass
class Taught:
    """Counts of conversations that were rendered; those of several partitions can be added.

    tokens: of all their sequences; repeated_tokens: of these, what unrolling repeats."""

    conversations: int = 0
    sequences: int = 0
    tokens: int = 0
    repeated_tokens: int = 0
    notes: Counter[str] = field(default_factory=Counter[str])

    def add(self, notes: Collection[str], lengths: Sequence[int]) -> None:
        """Count one conversation. lengths: of its sequences, in tokens."""
        self.conversations += 1
        self.sequences += len(lengths)
        self.tokens += sum(lengths)
        self.repeated_tokens += sum(lengths) - max(lengths)
        self.notes.update(notes)

    def __iadd__(self, other: "Taught") -> "Taught":
        self.conversations += other.conversations
        self.sequences += other.sequences
        self.tokens += other.tokens
        self.repeated_tokens += other.repeated_tokens
        self.notes.update(other.notes)
        return self

    @property
    def repeated_fraction(self) -> float:
        return self.repeated_tokens / self.tokens if self.tokens else 0.0

    def require_at_most(self, fraction: float) -> None:
        """Raise UNROLLED_TOO_MUCH when more of all tokens is repeated."""
        if self.repeated_fraction > fraction:
            raise StageError(
                Fault.UNROLLED_TOO_MUCH,
                repeated=f"{self.repeated_tokens:,}",
                tokens=f"{self.tokens:,}",
                allowed=f"{fraction:g}",
            )

    @property
    def method(self) -> str:
        """How answers are learned, in words for the plan."""
        unrolled = self.notes[Note.UNROLLED]
        if not unrolled:
            return "whole conversations"
        each = "one sequence for each answer"
        return each if unrolled == self.conversations else f"whole conversations, or {each}"

    @property
    def cost(self) -> str:
        """What that costs, in words for the plan."""
        if not self.repeated_tokens:
            return "the text of each begins with what a server sends for every answer, and is to get back"
        return (
            f"{self.sequences:,} sequences of {self.conversations:,} conversations; {self.repeated_fraction:.0%} of "
            f"their {self.tokens:,} tokens are repeated beginnings"
        )

    def noted(self) -> Iterator[tuple[str, str, str]]:
        """Yield what was done or lost: its name, of how many conversations, and words."""
        for note, words in NOTE_WORDS.items():
            if self.notes[note]:
                yield f"{ANSWERS_FIELD}{note}", self._of_all(note), words
        for part in Part:
            if self.notes[part]:
                yield (
                    f"{ANSWERS_FIELD}vanished.{part}",
                    self._of_all(part),
                    "the template leaves it out, which was accepted",
                )

    def _of_all(self, name: str) -> str:
        return f"{self.notes[name]:,} of {self.conversations:,} conversations"

    def report(self) -> dict[str, Any]:
        """Return the counts for report.json."""
        return {
            "conversations": self.conversations,
            "sequences": self.sequences,
            "tokens": self.tokens,
            "repeated_tokens": self.repeated_tokens,
            "method": self.method,
            "notes": {note: self.notes[note] for note in Note if self.notes[note]},
            "vanished": {part: self.notes[part] for part in Part if self.notes[part]},
        }


def changes_of(notes: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield what was done to a conversation, beside rendering it, as reason and detail of its decisions."""
    for note in notes:
        yield (Problem.VANISHES, note) if note in _PARTS else (note, "")


def stop_is_split(row: Conversation) -> Broken:
    """Return what is wrong with a conversation whose answers end in the text of a stop token alone."""
    last = max(index for index, learned in enumerate(row.learned) if learned)
    return Broken(Problem.STOP_TOKEN_SPLIT, f"messages[{last}]")


def _message_of(field: str) -> int | str:
    """Return the number of a message, from 1, and which answer of a pair it is, by its field."""
    member, _, index = field.rpartition("messages[")
    number = int(index[:-1]) + 1
    return f"{number} of {member[:-1]}" if member else number


def named(stops: Sequence[str]) -> str:
    """Return tokens at which a model stops as the argument of a fault."""
    return shortened(", ".join(stops), 200)


def refused(broken: Broken, file: str, row: int, stops: Sequence[str]) -> StageError:
    """Return why a row that the template renders cannot be learned from, with what to do.

    Raises nothing itself: ANSWER_NOT_AS_SERVED, NO_REASONING, NO_STOP_TOKEN, STOP_TOKEN_SPLIT, PART_VANISHES."""
    if broken.problem is Problem.VANISHES:
        accepted = f"accept that by preprocessing.acceptVanishing: [{broken.detail}]"
        remedy = accepted if broken.detail in set(Vanishing) else "change the chat template beside the model"
        return StageError(Fault.PART_VANISHES, file=file, row=row, field=broken.field, remedy=remedy)
    message = _message_of(broken.field)
    if broken.problem is Problem.STOP_TOKEN_SPLIT:
        return StageError(Fault.STOP_TOKEN_SPLIT, file=file, row=row, message=message, stops=named(stops))
    if broken.problem is Problem.NO_STOP_TOKEN:
        added = shortened(stops[0], 64) if stops else "it, once the model names one"
        said = named(stops) or "none"
        return StageError(Fault.NO_STOP_TOKEN, file=file, row=row, message=message, stops=said, added=added)
    return StageError(_FAULTS[broken.problem], file=file, row=row, message=message)
