"""Every kind of row is hashed, walked for its texts and kept as Arrow columns by one registry, and so is a new one."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import orjson
import pyarrow as pa
import pytest

from data_run import byte_bpe, context, jsonl, prepare_run, put
from finetune_api.job import DatasetFormat, MethodType
from finetune_trainer.data.kind import Kind, Members, SaidText, Untemplated
from finetune_trainer.data.kinds import (
    CHAT,
    COMPLETION,
    KINDS,
    PAIR,
    RANKING,
    TEXT,
    THUMB,
    content_hash,
    from_arrow,
    texts,
    with_texts,
)
from finetune_trainer.data.problems import Broken, Drop, Problem
from finetune_trainer.data.rows import Completion, Conversation, Pair, RankedPair, Ranking, Row, Text, Thumb
from finetune_trainer.data.shapes import SHAPES, Shape
from finetune_trainer.data.special_words import SpecialWords
from finetune_trainer.data.tokens import of_document
from finetune_trainer.methods import method_of
from finetune_trainer.shown import Segment, Wanted, show_unrendered

BPE = byte_bpe()

USER: dict[str, Any] = {"role": "user", "content": "Rain in Oslo?"}
CALLING: dict[str, Any] = {
    "role": "assistant",
    "content": "",
    "reasoning_content": "I look.",
    "tool_calls": [
        {
            "id": "c1",
            "type": "function",
            "function": {"name": "weather", "arguments": {"town": "Oslo", "days": [1, "x"]}},
        }
    ],
}
RESULT: dict[str, Any] = {"role": "tool", "content": "rain", "tool_call_id": "c1"}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "weather", "parameters": {"z": 1, "a": {"type": "string"}}}}
]
CHATS = [
    Conversation([USER, {"role": "assistant", "content": "Yes."}], (False, True)),
    Conversation([USER, CALLING, RESULT, {"role": "assistant", "content": "é\U0001f600"}], (False, True, False, False)),
    Conversation(
        [USER, {"role": "assistant", "tool_calls": []}], (False, True), TOOLS, {"enable_thinking": False}, 0.1
    ),
    Conversation([{"content": "q", "role": "user"}, {"role": "assistant", "content": None}], (False, True), []),
]
ROWS: dict[str, tuple[Kind[Any], list[Any]]] = {
    "chat": (CHAT, CHATS),
    "completion": (COMPLETION, [Completion("q", "a"), Completion("", "\n", 2.5)]),
    "text": (TEXT, [Text("Oslo\r\n"), Text("b", 1e-6)]),
    "pair": (
        PAIR,
        [
            Pair(Completion("q", "a"), Completion("q", "b"), 2.0),
            Pair(CHATS[0], Conversation([USER, CALLING], (False, True), TOOLS)),
        ],
    ),
    "thumb": (THUMB, [Thumb(CHATS[0], True), Thumb(Completion("q", "a"), False, 0.5)]),
    "ranking": (
        RANKING,
        [
            Ranking((Completion("q", "a"), Completion("q", "b")), (1.5, 2.0), (RankedPair(1, 0),)),
            Ranking((CHATS[0],), (1.0,), ()),
        ],
    ),
    "no row": (CHAT, []),
}


@pytest.mark.parametrize(("kind", "rows"), ROWS.values(), ids=ROWS)
def test_rows_go_into_arrow_columns_and_come_back_equal_in_the_order_of_their_fields(
    kind: Kind[Any], rows: list[Any]
) -> None:
    batch = kind.to_arrow(rows)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    (read,) = pa.ipc.open_stream(sink.getvalue())
    found = from_arrow(read)
    assert found == rows
    assert orjson.dumps(found) == orjson.dumps(rows)
    assert [content_hash(each) for each in found] == [content_hash(each) for each in rows]


def test_the_texts_of_a_row_are_named_by_their_path_and_keys_that_may_be_data_by_their_place() -> None:
    arguments = {"town": "Oslo", "a b@c.de": "x"}
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    row = Conversation([USER, {"role": "assistant", "tool_calls": [call]}], (False, True), TOOLS, {"style": "brief"})
    call_path = "messages[1].tool_calls[0]"
    assert texts(row) == {
        "messages[0].content": "Rain in Oslo?",
        f"{call_path}.id": "c1",
        f"{call_path}.type": "function",
        f"{call_path}.function.name": "weather",
        f"{call_path}.function.arguments.town": "Oslo",
        f"{call_path}.function.arguments.#1": "x",
        "tools[0].type": "function",
        "tools[0].function.name": "weather",
        "tools[0].function.parameters.a.type": "string",
        "chat_template_kwargs.style": "brief",
    }


@pytest.mark.parametrize("row", [each for _, rows in ROWS.values() for each in rows if each is not CHATS[3]])
def test_every_text_of_a_row_can_be_replaced_and_nothing_else_changes(row: Row) -> None:
    given = texts(row)
    assert with_texts(row, {}) == row
    for path in given:
        changed = with_texts(row, {path: "other"})
        assert texts(changed) == {**given, path: "other"}
        assert with_texts(changed, {path: given[path]}) == row
    with pytest.raises(KeyError, match="no text is at messages"):
        with_texts(row, {"messages[9].content": "other"})


def test_the_texts_of_a_pair_say_which_answer_they_are_of() -> None:
    row = Pair(Completion("q", "a"), Completion("q", "b"))
    assert texts(row) == {
        "chosen.prompt": "q",
        "chosen.completion": "a",
        "rejected.prompt": "q",
        "rejected.completion": "b",
    }
    assert with_texts(row, {"rejected.completion": "c"}) == Pair(Completion("q", "a"), Completion("q", "c"))


def test_pairs_that_say_the_same_are_copies_whatever_they_weigh_and_the_order_of_the_answers_counts() -> None:
    one, other = Completion("q", "a"), Completion("q", "b")
    same = content_hash(Pair(one, other))
    assert same == content_hash(Pair(one, other, 2.0))
    assert same != content_hash(Pair(other, one))
    assert content_hash(Thumb(one, True)) != content_hash(Thumb(one, False))


def test_a_row_itself_is_never_changed_when_its_texts_are_replaced() -> None:
    before = orjson.dumps(CHATS[1])
    with_texts(CHATS[1], dict.fromkeys(texts(CHATS[1]), "other"))
    assert orjson.dumps(CHATS[1]) == before


def test_a_method_takes_the_shapes_that_become_its_kinds() -> None:
    assert method_of(MethodType.CPT).formats == (DatasetFormat.TEXT,)
    of_sft = set(method_of(MethodType.SFT).formats)
    assert of_sft == {each for kind in (CHAT, COMPLETION) for each in kind.formats}


@dataclass(frozen=True, slots=True)
class Verse:
    """A toy kind: lines that are learned together."""

    lines: list[str]
    weight: float = 1.0


def _with_lines(row: Verse, given: Mapping[str, str]) -> Verse:
    return replace(row, lines=[given.get(f"lines[{at}]", line) for at, line in enumerate(row.lines)])


VERSE = Kind[Verse](
    name="verse",
    formats=frozenset(),
    texts=lambda row: {f"lines[{at}]": line for at, line in enumerate(row.lines)},
    with_texts=_with_lines,
    content=lambda row: row.lines,
    unlearnable=lambda row: None if row.lines else Drop.NO_LABEL,
    columns=pa.schema([("lines", pa.list_(pa.string())), ("weight", pa.float64())]),
    to_columns=lambda row: {"lines": row.lines, "weight": row.weight},
    from_columns=lambda columns: Verse(**columns),
    said=lambda row: [SaidText("\n".join(row.lines), True)],
    untemplated=Untemplated(
        tokens=lambda model, rows, _: [
            of_document(ids) for ids in model.tokenizer.texts(["\n".join(row.lines) for row in rows])
        ],
        cut=lambda tokens, limit, _: of_document(tokens.ids[:limit]),
    ),
)


def _as_chat(row: Verse) -> Conversation:
    answer = {"role": "assistant", "content": "\n".join(row.lines[1:])}
    return Conversation([{"role": "user", "content": row.lines[0]}, answer], (False, True))


RENDERED_VERSE = replace(VERSE, untemplated=None, conversation=_as_chat)
OF_VERSES = Shape(
    needs=(("lines",),),
    reads=frozenset(("lines", "weight")),
    to_row=lambda reading: cast(Row, Verse(reading.row["lines"], reading.weight())),
    meaning="Lines of a verse.",
    examples=(),
)


def calling(number: int) -> Conversation:
    call = {"type": "function", "function": {"name": "pay", "arguments": {"to": [True, number]}}}
    return Conversation([USER, {"role": "assistant", "tool_calls": [call]}], (False, True))


@pytest.mark.parametrize(
    ("row", "field"),
    [
        (calling(2**64), "messages[1].tool_calls[0].function.arguments.to[1]"),
        (calling(-(2**63) - 1), "messages[1].tool_calls[0].function.arguments.to[1]"),
        (Conversation([USER], (False,), [{"maximum": 10**30, "a b": 1}]), "tools[0].maximum"),
        (Conversation([USER], (False,), [{"a secret": 10**30}]), "tools[0].#0"),
        (Conversation([USER], (False,), None, {"most": 10**30}), "chat_template_kwargs.most"),
        (calling(2**64 - 1), None),
        (calling(-(2**63)), None),
    ],
)
def test_a_number_that_a_server_would_not_give_back_is_refused_by_its_place(row: Row, field: str | None) -> None:
    found = content_hash(row)
    if field is None:
        assert isinstance(found, bytes)
        return
    assert isinstance(found, Broken)
    assert (found.problem, found.field) == (Problem.OUT_OF_RANGE, field)
    assert "beyond 64 bits" in found.words


@pytest.mark.parametrize(
    ("kind", "method", "format_", "begins"),
    [
        (VERSE, "CPT", DatasetFormat.TEXT, "Roses 3\nViolets"),
        (
            RENDERED_VERSE,
            "SFT",
            DatasetFormat.MESSAGES,
            "<|im_start|>user\nRoses 3<|im_end|>\n<|im_start|>assistant\nViolets",
        ),
    ],
    ids=["tokenised as it is", "rendered"],
)
def test_a_job_with_rows_of_a_new_kind_is_prepared_and_shown_by_its_entry_and_shape_alone(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: Kind[Verse],
    method: str,
    format_: DatasetFormat,
    begins: str,
) -> None:
    monkeypatch.setitem(KINDS, Verse, kind)
    monkeypatch.setitem(SHAPES, format_, OF_VERSES)
    rows = [{"lines": [f"Roses {n}", "Violets"], "weight": n + 1} for n in range(8)]
    long = {"lines": ["a", *(f"the quick brown fox {n}" for n in range(300))]}
    put(tmp_path, a_jsonl=jsonl([*rows, long, {"lines": ["b", "c"], "mood": "sad"}]))
    put_aside = {"onBadRow": "Quarantine", "maxBrokenFraction": 0.5}
    limits = {"maxSequenceLength": 128, "tooLong": "Truncate", "maxTooLongFraction": 1}
    spec: dict[str, Any] = {"method": {"type": method}, "preprocessing": put_aside | limits}
    prepared = prepare_run(tmp_path, spec)
    texts = [BPE.decode(ids, skip_special_tokens=False) for ids, _ in prepared.train]
    assert any(begins in each for each in texts)
    assert prepared.report["weights"]["most"] == 8
    reasons = {each["row"]: each["reason"] for each in prepared.decisions}
    assert reasons == {9: "too_long", 10: "unknown_field"}
    ctx = context(tmp_path, spec, attempt=2)
    assert show_unrendered(ctx, Wanted(1))[0].segments == [Segment("Roses 0\nViolets", True)]


def test_a_kind_may_be_learned_as_several_rows_of_a_simpler_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    voices = Members(rows=_two_voices, names=lambda _: ("first", "second"))
    monkeypatch.setitem(KINDS, Verse, replace(VERSE, untemplated=None, members=voices))
    monkeypatch.setitem(SHAPES, DatasetFormat.MESSAGES, OF_VERSES)
    put(tmp_path, a_jsonl=jsonl([{"lines": ["Roses", "red", "Violets", "blue"]}]))
    prepared = prepare_run(tmp_path, {"evaluation": {"holdoutFraction": 0}})
    texts = [BPE.decode(ids, skip_special_tokens=False) for ids, _ in prepared.train]
    assert [text.split("\n")[1] for text in texts] == ["Roses<|im_end|>", "Violets<|im_end|>"]
    found = show_unrendered(context(tmp_path, {}, attempt=2), Wanted(1))
    assert [each.answer for each in found] == ["first", "second"]


def _two_voices(row: Verse) -> list[Row]:
    return [_as_chat(Verse(row.lines[:2])), _as_chat(Verse(row.lines[2:]))]


def test_a_new_kind_is_served_by_its_entry_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, Verse, VERSE)
    verse: Row = cast(Row, Verse(["Roses are <|red|>", "Violets"], 0.5))
    rows = Verse(["a", "b"]), Verse(["a", "b"], 2.0), Verse(["ab"])
    one, copy, other = (content_hash(cast(Row, each)) for each in rows)
    assert one == copy != other
    assert texts(with_texts(verse, {"lines[1]": "Pansies"}))["lines[1]"] == "Pansies"
    assert from_arrow(VERSE.to_arrow([cast(Verse, verse)])) == [verse]
    words = SpecialWords(["<|red|>"])
    words.count([verse])
    assert words.report == {"<|red|>": 1}
