"""The ids of a job's first conversations are those of transformers' own `apply_chat_template`, or the job ends."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import normalizers

from data_run import CHATML, Prepared, byte_bpe, chat, chats, jsonl, prepare_run, put, use_own_process, write_model
from finetune_api.errors import StageError
from finetune_api.reasons import Fault
from finetune_trainer.data import child, same_ids
from finetune_trainer.data.same_ids import Cause, OwnIds, Probe, ProbedRow, Untold

RANDOM = "{{ ['a', 'b', 'c', 'd', 'e', 'f', 'g', 'h'] | random }}" + CHATML
DATED = "{{ strftime_now('%d %B %Y') + '\n' }}" + CHATML
UNROLLED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and not loop.last %}{{ 'old ' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Qwen3's: the prompt opens nothing, but a form without reasoning closes a block at once.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{{ '<think>\n' + m.reasoning_content | default('') + '\n</think>\n\n' }}"
    "{% endif %}"
    "{{ m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '\n</think>\n\n' }}{% endif %}{% endif %}"
)
PARTS = CHATML.replace("message['content']", "message['content'][0]['text']")
NULLS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['content'] is none %}{{ m['tool_calls'][0]['function'] | tojson }}{% else %}"
    "{{ m['content'] | trim }}{% endif %}{{ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
REASONED = {
    "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning_content": "hm"}]
}
CALLING = {
    "messages": [
        {"role": "user", "content": "rain?"},
        {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {}}}]},
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "yes"},
    ]
}


def compared(prepared: Prepared) -> tuple[dict[str, Any], str]:
    """Return what report and plan say."""
    assert prepared.plan.same_ids is not None
    report = dict(prepared.report["same_ids"])
    assert report.pop("words") == prepared.plan.same_ids
    return report, prepared.plan.same_ids


def test_every_chat_job_says_on_how_many_rows_its_ids_are_those_of_transformers(tmp_path: Path) -> None:
    use = OwnIds.begin, OwnIds.ask
    use_own_process()
    try:
        put(tmp_path, a_jsonl=jsonl(chats(50)))
        report, words = compared(prepare_run(tmp_path))
    finally:
        OwnIds.begin, OwnIds.ask = use
    assert report == {"rows": 32, "not_compared": {}, "tokenizer_class": "TokenizersBackend"}
    assert words == "equal on 32 rows to transformers' apply_chat_template by TokenizersBackend"


@pytest.mark.parametrize(
    ("template", "rows"),
    [
        (DATED, chats(3)),
        (UNROLLED, [chat("a", "b", "c", "d")]),
        (THINKING, [chat("a", "b"), REASONED]),
        (PARTS, chats(3)),
        ("{{ extra }}" + CHATML, [chat("a", "b") | {"chat_template_kwargs": {"extra": "x"}}]),
    ],
)  # fmt: skip
def test_ids_are_compared_in_whatever_way_an_answer_is_learned(
    tmp_path: Path, template: str, rows: list[dict[str, Any]]
) -> None:
    write_model(tmp_path / "model", template=template)
    put(tmp_path, a_jsonl=jsonl(rows))
    report, _ = compared(prepare_run(tmp_path))
    assert report["rows"] == len(rows)


def test_a_conversation_is_compared_as_it_was_shortened(tmp_path: Path) -> None:
    put(tmp_path, a_jsonl=jsonl([chat(*["a long turn of many words"] * 20), *chats(2)]))
    found = prepare_run(tmp_path, {"preprocessing": {"maxSequenceLength": 64, "tooLong": "Truncate"}})
    assert compared(found)[0]["rows"] == 3
    assert found.report["rows_in"] == 3


@pytest.mark.parametrize(
    ("template", "row", "untold", "words"),
    [
        (CHATML, chat("a", "b") | {"chat_template_kwargs": {"padding": True}}, "variable", "of its own names"),
        (NULLS, CALLING, "null", "must be null"),
    ],
)
def test_rows_that_transformers_cannot_be_handed_are_told_and_end_nothing(
    tmp_path: Path, template: str, row: dict[str, Any], untold: str, words: str
) -> None:
    write_model(tmp_path / "model", template=template)
    put(tmp_path, a_jsonl=jsonl([row, *chats(2)]))
    report, told = compared(prepare_run(tmp_path))
    assert (report["rows"], report["not_compared"]) == (2, {untold: 1})
    assert "equal on 2 of 3 rows" in told
    assert words in told


def test_where_transformers_renders_no_row_that_is_told_as_no_comparison(tmp_path: Path) -> None:
    write_model(tmp_path / "model", tokenizer_config={"extra_special_tokens": {"self": "<|im_end|>"}})
    put(tmp_path, a_jsonl=jsonl(chats(2)))
    report, told = compared(prepare_run(tmp_path))
    assert (report["rows"], report["not_compared"]) == (0, {"refused": 2})
    assert told.startswith("compared on no row")


X_LISTED = {"added_tokens_decoder": {str(byte_bpe().get_vocab_size()): {"content": "<x>", "special": True}}}


def test_a_token_that_only_tokenizer_config_names_is_learned_by_the_id_that_transformers_gives_it(
    tmp_path: Path,
) -> None:
    number = byte_bpe().get_vocab_size()
    write_model(tmp_path / "model", tokenizer_config=X_LISTED, config={"vocab_size": number + 1})
    put(tmp_path, a_jsonl=jsonl([chat("a <x>", "b <x> c"), *chats(2)]))
    found = prepare_run(tmp_path)
    assert compared(found)[0]["rows"] == 3
    assert found.report["special_tokens_in_words"] == {"<x>": 1}


def test_a_row_with_a_token_for_which_the_model_has_no_embedding_ends_the_job_by_its_name(tmp_path: Path) -> None:
    number = byte_bpe().get_vocab_size()
    write_model(tmp_path / "model", tokenizer_config=X_LISTED)
    put(tmp_path, a_jsonl=jsonl(chats(2)))
    assert compared(prepare_run(tmp_path))[0]["rows"] == 2, "what no row has is in nobody's way"
    put(tmp_path, a_jsonl=jsonl([*chats(2), chat("a", "b<x>")]))
    with pytest.raises(StageError, match=rf"reads '<x>' as id {number}, at row 3 of a\.jsonl, but it has") as caught:
        prepare_run(tmp_path, attempt=2)
    assert caught.value.fault is Fault.BROKEN_MODEL


def test_a_template_that_writes_otherwise_each_time_ends_the_job_with_the_row(tmp_path: Path) -> None:
    write_model(tmp_path / "model", template=RANDOM)
    put(tmp_path, a_jsonl=jsonl(chats(9)))
    with pytest.raises(StageError, match=r"a\.jsonl row \d differently each time") as caught:
        prepare_run(tmp_path)
    assert caught.value.fault is Fault.TEMPLATE_RANDOM
    assert "the answer is" not in str(caught.value)


@pytest.mark.parametrize(
    ("template", "config", "fault", "words"),
    [
        # Random words, which transformers gives to templates, and we do not.
        ("{% if lipsum is defined %}x{% endif %}" + CHATML, {}, Fault.OTHER_TEXT, "rendered otherwise than by transf"),
        # What is not written in tokenizer.json, which we read, and splits the tokens that end answers.
        (CHATML, {"split_special_tokens": True}, Fault.OTHER_IDS, "gave other ids than transformers"),
    ],
)
def test_a_base_that_transformers_renders_or_reads_otherwise_ends_the_job_with_the_row(
    tmp_path: Path, template: str, config: dict[str, Any], fault: Fault, words: str
) -> None:
    write_model(tmp_path / "model", template=template, tokenizer_config=config)
    put(tmp_path, a_jsonl=jsonl(chats(3)))
    with pytest.raises(StageError, match=words) as caught:
        prepare_run(tmp_path)
    assert caught.value.fault is fault
    assert "a.jsonl row 1 differs from token 1 of its sequence 1" in str(caught.value)
    assert "the answer is" not in str(caught.value)
    assert not (tmp_path / "out" / "bot-1a2b3" / ".job" / "plan.json").exists()


def test_a_class_that_reads_tokenizer_json_otherwise_ends_the_job_until_it_is_named_plainly(tmp_path: Path) -> None:
    tokenizer = byte_bpe()
    tokenizer.normalizer = normalizers.Lowercase()  # type: ignore[assignment]
    write_model(tmp_path / "model", tokenizer=tokenizer, tokenizer_config={"tokenizer_class": "GPT2Tokenizer"})
    put(tmp_path, a_jsonl=jsonl([chat("THE quick", "FOX"), *chats(2)]))
    with pytest.raises(StageError, match=r"GPT2Tokenizer, which transformers loads") as caught:
        prepare_run(tmp_path)
    assert caught.value.fault is Fault.TOKENIZER_CLASS_DIFFERS
    config = tmp_path / "model" / "tokenizer_config.json"
    named = json.loads(config.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config.write_text(json.dumps(named))
    assert compared(prepare_run(tmp_path, attempt=2))[0]["rows"] == 3


@pytest.mark.parametrize("in_own_process", [False, True])
def test_where_transformers_cannot_have_the_class_tokenizer_json_alone_is_compared(
    tmp_path: Path, in_own_process: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("begin", "ask"):
        monkeypatch.setattr(OwnIds, name, getattr(OwnIds, name))
    if in_own_process:
        use_own_process()
    write_model(tmp_path / "model", tokenizer_config={"tokenizer_class": "T5Tokenizer"})
    put(tmp_path, a_jsonl=jsonl(chats(3)))
    report, _ = compared(prepare_run(tmp_path))
    assert (report["rows"], report["tokenizer_class"]) == (3, "TokenizersBackend")


def test_where_ids_differ_row_sequence_and_token_are_told_and_why(tmp_path: Path) -> None:
    put(tmp_path, a_jsonl=jsonl(chats(2)))
    write_model(tmp_path / "model")
    seen: list[tuple[list[ProbedRow], dict[str, Any]]] = []
    compare = OwnIds.compare

    def see(self: OwnIds, rows: Sequence[ProbedRow], setup: Any, given: Any) -> Any:
        seen.append((list(rows), dict(setup)))
        return compare(self, rows, setup, given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OwnIds, "compare", see)
        prepare_run(tmp_path)
    ((rows, setup),) = seen
    files = {
        name: (tmp_path / "model" / name).read_bytes()
        for name in ("config.json", "tokenizer_config.json", "tokenizer.json")
    }
    own = OwnIds(files)
    rows[1].ids[0][7] += 1
    other = own.compare(rows, setup, {})
    assert other is not None
    assert other.difference is not None
    assert (other.equal, other.difference.row, other.difference.sequence, other.difference.token) == (1, 1, 1, 8)
    assert other.difference.cause is Cause.TOKENS
    renders_otherwise = setup | {"source": "{{ bos_token }}" + CHATML, "special_tokens": {"bos_token": "the"}}
    other = own.compare(rows[:1], renders_otherwise, {})
    assert other is not None
    assert other.difference is not None
    assert other.difference.cause is Cause.TEXT
    refused = own.compare(rows[:1], setup | {"source": "{{ raise_exception('no') }}"}, {})
    assert refused is not None
    assert refused.untold == {Untold.REFUSED: 1}


def test_a_process_that_gives_no_answer_is_told_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told_nothing(_self: OwnIds, _request: bytes, _files: Sequence[bytes]) -> None:
        return

    monkeypatch.setattr(OwnIds, "ask", told_nothing)
    put(tmp_path, a_jsonl=jsonl(chats(3)))
    report, words = compared(prepare_run(tmp_path))
    assert report["not_compared"] == {"no_answer": 3}
    assert words.startswith("not compared: transformers gave no answer within")


def test_rows_without_a_template_are_not_compared(tmp_path: Path) -> None:
    put(tmp_path, a_jsonl=jsonl([{"prompt": f"{n} and", "completion": " one"} for n in range(3)]))
    assert prepare_run(tmp_path).report["same_ids"] is None


def probed(number: int, tokens: int, chat: str = "{}") -> ProbedRow:
    return ProbedRow(0, number, chat, [[0] * tokens])


ROWS = [
    *(probed(1, 200), probed(2, 150), probed(3, 900), probed(4, 90), probed(5, 10, "x" * 9999), probed(6, 950)),
    *(probed(number, 100) for number in range(7, 50)),
]


def kept(rows: Sequence[ProbedRow]) -> list[ProbedRow]:
    probe = Probe()
    for row in rows:
        probe.add(row)
    return probe.rows


def test_the_first_short_rows_and_the_first_long_one_are_compared_wherever_partitions_begin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(same_ids, "MAX_ROW_TOKENS", 160)
    monkeypatch.setattr(same_ids, "MAX_LONG_ROW_TOKENS", 920)
    whole = kept(ROWS)
    assert [row.number for row in whole] == [1, 2, 4, *range(7, 37)]
    for cut in range(1, len(ROWS)):
        assert kept([*kept(ROWS[:cut]), *kept(ROWS[cut:])]) == whole, cut


def test_where_all_conversations_are_long_one_is_compared_all_the_same(tmp_path: Path) -> None:
    write_model(tmp_path / "model", config={"max_position_embeddings": 131072})
    put(
        tmp_path, a_jsonl=jsonl([chat("why? " * 12_000, "so"), chat("and? " * 12_000, "so"), chat("or? " * 9000, "so")])
    )
    report, _ = compared(prepare_run(tmp_path))
    assert report["rows"] == 1


@pytest.mark.parametrize(("kills", "words"), [(1, "equal on 3 rows"), (2, "not compared")])
def test_a_process_that_somebody_kills_is_asked_once_more(
    kills: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchange = child.exchange
    asked: list[child.Process] = []

    def killed(process: child.Process, *frames: bytes, timeout_s: float = 600, **limits: Any) -> list[bytes] | None:
        if timeout_s == same_ids._TIMEOUT_S:  # pyright: ignore[reportPrivateUsage]
            asked.append(process)
            if len(asked) <= kills:
                process.kill()  # as the kernel does where a pod's memory is full
                process.wait()
        return exchange(process, *frames, timeout_s=timeout_s, **limits)

    use = OwnIds.begin, OwnIds.ask
    use_own_process()
    try:
        monkeypatch.setattr(child, "exchange", killed)
        put(tmp_path, a_jsonl=jsonl(chats(3)))
        assert compared(prepare_run(tmp_path))[1].startswith(words)
    finally:
        OwnIds.begin, OwnIds.ask = use
    assert len(set(asked)) == len(asked) == 2
