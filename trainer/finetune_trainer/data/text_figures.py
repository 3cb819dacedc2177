"""The figures of texts that rules of quality are about: words, lines, marks, repetition; of many texts at once."""

from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import re2

from finetune_trainer.data.repetition import Floats, Repeated, WordRuns, repeated
from finetune_trainer.data.spans import MAX_TEXTS, Block, Bools, Ints, Spans, blocks

_SHORT_LINE = 30  # characters, as FineWeb has it
_STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")  # Gopher's
_BULLETS = ("-", "*", "•", "‣", "▪", "●", "○", "◦")
_ELLIPSES = ("...", "…")
_ENDS = (".", "!", "?", '"', "'", ":", ";", "…", "”", "\u2019", "»", "。", "\uff01", "\uff1f", "؟", "।")
_LOREM = re2.compile(rb"(?i)lorem ipsum")
# C4's, without what texts about programs say as well.
_BOILERPLATE = re2.compile(
    rb"(?i)terms of use|terms of service|privacy policy|cookie policy|uses? cookies|use of cookies|"
    rb"accept (?:all )?cookies|"
    rb"all rights reserved|enable javascript|javascript is (?:disabled|required)|subscribe to our newsletter"
)
_MANY = 3  # one of so many letters in scripts without spaces, and words cannot be told by spaces


class _Figures:
    """The figures of the texts of one block, each counted once it is asked for."""

    def __init__(self, block: Block, is_english: Bools) -> None:
        self._block, self._is_english = block, is_english

    @cached_property
    def words(self) -> Floats:
        spoken = self._block.per_text(self._block.words.texts[self._block.is_spoken])
        return np.where(self._without_spaces, self._block.letters_without_spaces / 2, spoken)

    @cached_property
    def _without_spaces(self) -> Bools:
        block = self._block
        if block.is_ascii:
            return np.zeros(len(block), dtype=bool)
        characters = block.per_text(block.words.texts, block.characters(block.words))
        return block.letters_without_spaces * _MANY > characters

    @cached_property
    def mean_word_length(self) -> Floats:
        spoken = self._block.words.of(self._block.is_spoken)
        characters = self._block.per_text(spoken.texts, self._block.characters(spoken))
        return self._by_words(characters)

    @cached_property
    def alphabetic_words(self) -> Floats:
        return self._by_words(self._block.per_text(self._block.words.texts[self._block.has_letter]))

    @cached_property
    def symbols_per_word(self) -> Floats:
        block = self._block
        signs = block.per_text(block.text_of(np.flatnonzero(block.bytes == ord("#"))))
        ellipses = block.per_text(block.text_of(_ellipses(block)))
        return self._by_words(np.maximum(signs, ellipses))

    def _by_words(self, amounts: Floats) -> Floats:
        """Return an amount for each word; what is no number where words cannot be told, or there are none."""
        return np.divide(
            amounts, self.words, out=np.full(len(amounts), np.nan), where=(self.words > 0) & ~self._without_spaces
        )

    @cached_property
    def stop_words(self) -> Floats:
        block, found = self._block, np.zeros(len(self._block))
        hashes = block.hashes(block.words)
        own = Block(_STOP_WORDS)
        for stop_word in own.hashes(own.words):
            found[np.unique(block.words.texts[hashes == stop_word])] += 1
        return np.where(self._is_english, found, np.nan)

    @cached_property
    def bullet_lines(self) -> Floats:
        return self._of_lines(_begin_with(self._block, self._block.lines, _BULLETS))

    @cached_property
    def ellipsis_lines(self) -> Floats:
        return self._of_lines(_end_with(self._block, self._block.lines, _ELLIPSES))

    @cached_property
    def line_punctuation(self) -> Floats:
        return self._of_lines(_end_with(self._block, self._block.lines, _ENDS))

    @cached_property
    def short_lines(self) -> Floats:
        return self._of_lines(self._block.characters(self._block.lines) <= _SHORT_LINE)

    @cached_property
    def boilerplate_lines(self) -> Floats:
        lines, found = self._block.lines, _places(self._block, _BOILERPLATE)
        said = np.zeros(len(lines), dtype=bool)
        if len(found):
            said[np.searchsorted(lines.begins, found, side="right") - 1] = True
        return self._of_lines(said)

    def _of_lines(self, chosen: Bools) -> Floats:
        """Return the share of each text's lines; what is no number where it has none."""
        lines = self._block.lines
        every = self._block.per_text(lines.texts)
        return np.divide(
            self._block.per_text(lines.texts[chosen]), every, out=np.full(len(every), np.nan), where=every > 0
        )

    @cached_property
    def placeholders(self) -> Floats:
        return self._block.per_text(self._block.text_of(_places(self._block, _LOREM)))

    @cached_property
    def lines_again(self) -> Repeated:
        return repeated(self._block, self._block.lines)

    @cached_property
    def paragraphs_again(self) -> Repeated:
        return repeated(self._block, self._block.paragraphs)

    @cached_property
    def runs(self) -> WordRuns:
        return WordRuns(self._block)


_SIZES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
_FIGURES: dict[str, Callable[[_Figures], Floats]] = {
    "min_words": lambda each: each.words,
    "max_words": lambda each: each.words,
    "min_mean_word_length": lambda each: each.mean_word_length,
    "max_mean_word_length": lambda each: each.mean_word_length,
    "min_alphabetic_words": lambda each: each.alphabetic_words,
    "max_symbols_per_word": lambda each: each.symbols_per_word,
    "max_bullet_lines": lambda each: each.bullet_lines,
    "max_ellipsis_lines": lambda each: each.ellipsis_lines,
    "min_stop_words": lambda each: each.stop_words,
    "max_placeholders": lambda each: each.placeholders,
    "max_boilerplate_lines": lambda each: each.boilerplate_lines,
    "min_line_punctuation": lambda each: each.line_punctuation,
    "max_short_lines": lambda each: each.short_lines,
    "max_repeated_lines": lambda each: each.lines_again.pieces,
    "max_repeated_line_characters": lambda each: each.lines_again.characters,
    "max_repeated_paragraphs": lambda each: each.paragraphs_again.pieces,
    "max_repeated_paragraph_characters": lambda each: each.paragraphs_again.characters,
    **{
        f"max_most_said_{word}_words": lambda each, size=size: each.runs.most_said(size)
        for word, size in _SIZES.items()
        if size < 5
    },
    **{
        f"max_repeated_{word}_words": lambda each, size=size: each.runs.repeated(size)
        for word, size in _SIZES.items()
        if size >= 5
    },
}
OF_TEXTS: Collection[str] = _FIGURES.keys()  # the thresholds whose figure is one of these


def figures(texts: Sequence[str], is_english: Bools, thresholds: Collection[str]) -> dict[str, Floats]:
    """Return the figure that each threshold is about, of each text; NaN where a text has none."""
    found = {name: np.full(len(texts), np.nan) for name in thresholds}
    for each in blocks(texts, MAX_TEXTS - 1):
        place = slice(each.start, each.stop)
        of_block = _Figures(Block(texts[place]), is_english[place])
        for name in thresholds:
            found[name][place] = _FIGURES[name](of_block)
    return found


def _places(block: Block, pattern: Any) -> Ints:
    """Return where a pattern is said."""
    return np.fromiter((found.start() for found in pattern.finditer(block.data)), dtype=np.int64)


def _ellipses(block: Block) -> Ints:
    """Return where three dots or more, or the character for them, begin."""
    is_dot = block.bytes == ord(".")
    dots = is_dot[1:-2] & is_dot[2:-1] & is_dot[3:] & ~is_dot[:-3]
    is_one = (block.bytes[1:-2] == 0xE2) & (block.bytes[2:-1] == 0x80) & (block.bytes[3:] == 0xA6)
    return np.flatnonzero(dots | is_one) + 1


def _begin_with(block: Block, spans: Spans, marks: Sequence[str]) -> Bools:
    return np.logical_or.reduce([_have(block, spans.begins, spans, mark.encode()) for mark in marks])


def _end_with(block: Block, spans: Spans, marks: Sequence[str]) -> Bools:
    every = (mark.encode() for mark in marks)
    return np.logical_or.reduce([_have(block, spans.ends - len(mark), spans, mark) for mark in every])


def _have(block: Block, places: Ints, spans: Spans, mark: bytes) -> Bools:
    """Return which spans have the mark from these places on."""
    if block.is_ascii and not mark.isascii():
        return np.zeros(len(spans), dtype=bool)
    at = np.maximum(places, 0)
    found = (places >= spans.begins) & (at + len(mark) <= spans.ends)
    for more, byte in enumerate(mark):
        found &= block.bytes[np.minimum(at + more, len(block.bytes) - 1)] == byte
    return found
