"""What a conversation becomes: texts to learn from, where in them its answers are, and what was done to it."""

from enum import StrEnum
from typing import NamedTuple

Span = tuple[int | None, int]  # begin (None where it is not known) and end, in characters


class Note(StrEnum):
    """What was done to a conversation, beside rendering it: counted in plan and report."""

    UNROLLED = "unrolled"
    WITH_REASONING = "with_reasoning"  # the template's form with reasoning, as the row has some
    WITHOUT_REASONING = "without_reasoning"  # the template's form without reasoning, as the row has none
    REASONING_PLACED = "reasoning_placed"  # into the block that the prompt opens, where the template drops it
    OPENING_ADDED = "opening_added"  # of reasoning that is only closed, as the prompt opens it
    EMPTY_BLOCK_SENT = "empty_block_sent"  # which the prompt ends in, and the template leaves out of the answer
    ANSWER_OF_SHORT = "answer_of_short"  # the answer as it is written after less than what comes before it
    END_OF_NEXT = "end_of_next"  # the answer ends with the token by which the template begins the next message
    END_ADDED = "end_added"
    MARKS_DIFFER = "marks_differ"  # {% generation %} marks another part than the rule


class RenderedSequence(NamedTuple):
    """A text to learn from, which is tokenised in one piece, and where in it the answers are, in characters."""

    text: str
    spans: list[Span]


class Place(NamedTuple):
    """Where an answer stands: of which message, in which sequence, from and to which character."""

    message: int
    sequence: int
    begin: int
    end: int


class Learnable(NamedTuple):
    """What a conversation becomes: its texts, where its answers are in them, and what was done."""

    texts: list[str]
    places: list[Place]
    notes: frozenset[Note]

    @property
    def sequences(self) -> list[RenderedSequence]:
        """Every text with the answers in it."""
        found = [RenderedSequence(text, []) for text in self.texts]
        for place in self.places:
            found[place.sequence].spans.append((place.begin, place.end))
        return found
