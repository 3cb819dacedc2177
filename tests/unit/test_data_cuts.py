"""Where long texts are cut: at headings, paragraphs and sentences, every token learned once, headings repeated."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_run import byte_bpe, jsonl, prepare_run, put
from finetune_trainer.data.cuts import (
    FENCE,
    HEADING,
    MARK_TYPE,
    NEWLINE,
    PARAGRAPH,
    SENTENCE,
    SPACE,
    Piece,
    mark_of,
    marks_of,
    split,
)

TOKENIZER = byte_bpe()
MARKS = marks_of(TOKENIZER.get_vocab(with_added_tokens=True).items(), TOKENIZER.get_vocab_size())


def ids_of(text: str) -> Any:
    return np.array(TOKENIZER.encode(text).ids, dtype=np.uint32)


def text_of(ids: Any) -> str:
    return TOKENIZER.decode(ids.tolist())


def learned(piece: Piece) -> str:
    return text_of(piece.ids[piece.context :])


@pytest.mark.parametrize(
    ("token", "flags"),
    [
        ("Ċ", NEWLINE | SPACE), ("ĊĊ", NEWLINE | PARAGRAPH | SPACE), ("<0x0A>", NEWLINE | SPACE), ("##", HEADING),
        ("Ġ##", SPACE), ("#a", 0), (".", SENTENCE), ('."', SENTENCE), (".Ċ", SENTENCE * 0 | NEWLINE), ("▁The", SPACE),
        ("ãĢĤ", SENTENCE), ("```", FENCE), ("word", 0), ("", 0),
    ],
)  # fmt: skip
def test_a_token_is_marked_by_what_it_begins_or_ends(token: str, flags: int) -> None:
    assert mark_of(token) & 0xFF == flags


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from(["a", " b", "\n", "\n\n", "#", "##", ".", "```"]), min_size=1, max_size=120),
    st.integers(2, 40),
    st.booleans(),
)
def test_every_token_of_a_split_text_is_learned_once(parts: list[str], limit: int, with_headings: bool) -> None:
    ids = ids_of("".join(parts))
    pieces = split(ids, limit, MARKS, with_headings)
    assert all(1 <= len(piece.ids) <= limit for piece in pieces)
    first, *others = (piece.ids[piece.context :].tolist() for piece in pieces)
    assert [*ids[:1].tolist(), *first, *(token for each in others for token in each)] == ids.tolist()


def test_without_headings_a_piece_begins_with_the_last_token_of_the_one_before() -> None:
    pieces = split(ids_of("the quick brown fox jumps over the lazy dog " * 9), 20, MARKS)
    for before, piece in pairwise(pieces):
        assert (piece.context, piece.ids[0]) == (1, before.ids[-1])


WORDS = "fox dog " * 3
CASES = {
    "at a heading": (f"{WORDS}.\n\n# A\n\n{WORDS}. {WORDS}\n\n{WORDS}" * 4, "# A"),
    "at a paragraph": (f"{WORDS}. {WORDS}.\n\n{WORDS}\n{WORDS}" * 6, "fox dog"),
    "at a sentence": (f"{WORDS}. {WORDS}, {WORDS}" * 9, " fox dog"),
    "at a line": (f"{WORDS}, {WORDS}\n{WORDS}" * 9, "fox dog"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_text_is_cut_at_the_best_place_of_a_piece_s_second_half(case: str) -> None:
    text, begin = CASES[case]
    ends = {"at a heading": "\n\n", "at a paragraph": ".\n\n", "at a sentence": ".", "at a line": "\n"}
    pieces = [learned(piece) for piece in split(ids_of(text), 64, MARKS)]
    assert len(pieces) > 3
    for before, piece in pairwise(pieces):
        assert before.endswith(ends[case])
        assert piece.startswith(begin)


def test_a_comment_in_a_block_of_code_is_no_heading() -> None:
    code = "```\n" + "# fox\ndog\n" * 30 + "```\n\n# End\nfox"
    pieces = split(ids_of(code), 48, MARKS, with_headings=True)
    assert not any(text_of(piece.ids[: piece.context]).startswith("#") for piece in pieces)


def test_pieces_begin_with_the_headings_above_them_by_choice() -> None:
    text = f"# Animals\n\n## Dogs\n\n{WORDS * 8}\n\n{WORDS * 8}\n\n## Foxes\n\n{WORDS * 16}\n\n{WORDS * 16}"
    pieces = split(ids_of(text), 96, MARKS, with_headings=True)
    contexts = [text_of(piece.ids[: piece.context]) for piece in pieces[1:]]
    assert any("# Animals\n" in each and "## Dogs" in each for each in contexts)
    assert any("# Animals\n" in each and "## Foxes" in each and "Dogs" not in each for each in contexts)
    for piece, context in zip(pieces[1:], contexts, strict=True):
        if learned(piece).startswith("## Foxes"):
            assert "Dogs" not in context


def test_a_job_asks_for_headings_and_its_accounts_stay_exact(tmp_path: Any) -> None:
    text = "# Animals\n\n" + "\n\n".join(f"fox number {at} jumps over the lazy dog." for at in range(300))
    put(tmp_path, a_jsonl=jsonl([{"text": text}]))
    preprocessing = {"maxSequenceLength": 128, "documents": {"headingContext": True}}
    spec = {"method": {"type": "CPT"}, "preprocessing": preprocessing}
    prepared = prepare_run(tmp_path, spec)
    whole = len(ids_of(text)) + 1  # and the end token
    assert sum(sum(labels) for _, labels in prepared.train) == whole - 1
    assert all(text_of(np.array(ids)).startswith("# Animals") for ids, _ in prepared.train)
    (file,) = prepared.report["files"]
    assert (file["rows_in"], file["rows_used"]) == (1, 1)
    assert np.uint16 == MARK_TYPE
