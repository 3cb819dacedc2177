"""What becomes of each small dataset of tests/cases, which are made after the essence of public reports."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, processors

from data_run import CHATML, byte_bpe, context, gz, jsonl, prepare_run, write_model
from finetune_api.errors import StageError
from finetune_api.reasons import Fault
from finetune_trainer.shown import check_unrendered

FOLDER = Path(__file__).parents[1] / "cases"
CALLING = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STOP = "<|im_end|>"


def ended(*answers: str) -> set[str]:
    return {answer + STOP for answer in answers}


NUMBERS = ended(*(f"number {number}" for number in range(6)))


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is learned, sequence by sequence; shown: what else stands in every sequence; fault: what ends the job
    instead. changed: what `decisions.jsonl` says of every row that is learned."""

    learned: set[str] = field(default_factory=set[str])
    rows: int
    shown: str = ""
    changed: tuple[str, ...] = ()
    fault: Fault | None = None
    preprocessing: dict[str, Any] = field(default_factory=dict[str, Any])
    template: str = CHATML  # unless one lies with the data
    trims_offsets: bool = False
    passed_over: tuple[str, ...] = ()


CASES = {
    "alpaca": [Case(rows=5, learned=ended(*"23456"), shown="user\nAdd two numbers\n\n")],
    "assistant-first": [
        Case(rows=3, learned=ended("hello"), shown="assistant\nWelcome!", changed=("greeting_not_learned",))
    ],
    "code-indent-trim": [Case(rows=4, learned=ended("    return x + 1\n"), trims_offsets=True)],
    "completion-ends-with-eos": [Case(rows=2, learned=ended(" hello"))],
    "content-parts": [Case(rows=3, learned=ended("hello"), shown="user\nhi<|im_end|>")],
    "developer-role": [
        Case(rows=3, learned=ended("hello"), shown="system\nBe brief", changed=("developer_as_system",))
    ],
    "hidden-ipynb": [Case(rows=6, learned=NUMBERS, passed_over=("train-checkpoint.jsonl", ".train.jsonl.swp.jsonl"))],
    "json-array-pretty": [Case(rows=6, learned=NUMBERS)],
    "msg-loss": [Case(rows=3, learned=ended("good answer"), shown="assistant\nBAD ANSWER<|im_end|>")],
    "msg-training": [Case(rows=3, learned=ended("good answer"), shown="assistant\nBAD ANSWER<|im_end|>")],
    "openai-toolcalls-null-content": [
        Case(rows=3, learned=ended('<call>{"name": "weather", "arguments": {}}</call>'), template=CALLING),
        Case(rows=0, fault=Fault.PART_VANISHES),
    ],
    "openai-tools": [
        Case(
            rows=3,
            learned={f'<call>{{"name": "weather", "arguments": {{"town": "Oslo"}}}}</call>{STOP}It rains.{STOP}'},
            shown="tool\nrain<|im_end|>",
            template=CALLING,
        )
    ],
    "pq-json-string": [Case(rows=6, learned=NUMBERS)],
    "reasoning-lost": [
        Case(rows=0, fault=Fault.PART_VANISHES),
        Case(
            rows=6,
            learned=ended(*"123456"),
            changed=("vanishes",),
            preprocessing={"acceptVanishing": ["Reasoning"]},
        ),
    ],
    "row-level-system": [Case(rows=4, learned=ended("Ahoy"), shown="system\nAnswer like a pirate.")],
    "sharegpt": [Case(rows=5, learned=ended("hello"), shown="user\nhi")],
    "think-in-last-only": [
        Case(
            rows=6,
            learned=ended("<think>\n\n</think>\n\nhello", "<think>\n\n</think>\n\nsee you"),
            changed=("unrolled",),
        )
    ],
    "think-prefilled": [
        Case(
            rows=6,
            learned=ended("greet\n</think>\nhello"),
            shown="<|im_start|>assistant\n<think>\n",
            changed=("reasoning_placed",),
        )
    ],
    "toolcalls-empty-list": [Case(rows=3, learned=ended("hello"))],
    "tpl-generation-tag": [Case(rows=3, learned=ended("(final) b", "(final) d"), changed=("unrolled",))],
    "tpl-no-eos": [
        Case(rows=0, fault=Fault.NO_STOP_TOKEN),
        Case(rows=6, learned=NUMBERS, changed=("end_added",), preprocessing={"addEndToken": True}),
    ],
    "trailing-user": [Case(rows=3, learned=ended("hello"), changed=("end_left_out",))],
    "two-users": [
        Case(rows=3, learned=ended("hello"), shown="hi<|im_end|>\n<|im_start|>user\n", changed=("neighbours_kept",)),
        Case(
            rows=3,
            learned=ended("hello"),
            shown="hi\n\nare you there?",
            changed=("neighbours_joined",),
            preprocessing={"sameRoleMessages": "Join"},
        ),
    ],
    "upper-ext": [Case(rows=6, learned=NUMBERS)],
    "weight-0": [Case(rows=3, learned=ended("hello 2"), shown="assistant\nhello<|im_end|>")],
}


def test_every_folder_is_a_case() -> None:
    assert CASES.keys() == {path.name for path in FOLDER.iterdir()}


def spec_of(name: str, case: Case) -> dict[str, Any]:
    folder = FOLDER / name / "d" if (FOLDER / name / "d").is_dir() else FOLDER / name
    return {
        "datasets": [{"uri": f"{folder.as_uri()}/"}],
        "evaluation": {"holdoutFraction": 0},
        "preprocessing": {"maxUnrolledFraction": 1, "deduplication": {"exact": "Off"}, **case.preprocessing},
    }


def tokenizer_of(case: Case) -> Tokenizer:
    tokenizer = byte_bpe()
    if case.trims_offsets:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)  # type: ignore[assignment]
    return tokenizer


@pytest.mark.parametrize(
    ("name", "case"),
    [
        pytest.param(name, case, id=f"{name}-{place}" if place else name)
        for name, cases in CASES.items()
        for place, case in enumerate(cases)
    ],
)
def test_each_case_ends_as_it_must(tmp_path: Path, name: str, case: Case) -> None:
    own = FOLDER / name / "chat_template.jinja"
    tokenizer = tokenizer_of(case)
    write_model(tmp_path / "model", own.read_text() if own.exists() else case.template, tokenizer)
    if case.fault is not None:
        with pytest.raises(StageError) as caught:
            prepare_run(tmp_path, spec_of(name, case))
        assert caught.value.fault is case.fault
        return
    found = prepare_run(tmp_path, spec_of(name, case))
    assert found.report["rows_in"] == found.plan.train.examples == case.rows
    for ids, labels in found.train:
        text = tokenizer.decode(ids, skip_special_tokens=False)
        learned = [token for token, label in zip(ids, labels, strict=True) if label]
        assert tokenizer.decode(learned, skip_special_tokens=False) in case.learned
        assert case.shown in text
        assert text.count(STOP + STOP) == 0
    assert len(found.train) == case.rows * (len(case.learned) if "unrolled" in case.changed else 1)
    assert {
        tokenizer.decode([t for t, label in zip(ids, labels, strict=True) if label], skip_special_tokens=False)
        for ids, labels in found.train
    } == case.learned
    changes = Counter(each["reason"] for each in found.decisions if each["action"] == "change")
    assert changes == dict.fromkeys(case.changed, case.rows)
    ignored = [each.rpartition("/")[2] for each in found.report["ignored_files"]]
    assert sorted(each for each in ignored if each != "chat_template.jinja") == sorted(case.passed_over)


def test_rows_that_gzip_packs_to_less_than_a_hundredth_are_read(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be brief. " * 700}, {"role": "user", "content": "hi"}]
    content = jsonl({"messages": [*messages, {"role": "assistant", "content": str(n)}]} for n in range(3000))
    packed = gz(content)
    assert len(content) > 136 * len(packed)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl.gz").write_bytes(packed)
    found = check_unrendered(context(tmp_path, {}))
    assert (found.report["rows_in"], found.report["dropped"], found.error) == (3000, {}, None)


def test_rows_that_are_long_are_learned_where_the_model_was_made_for_their_length(tmp_path: Path) -> None:
    """95 of 100 rows have more than 2,048 tokens; the model's context is 32k."""
    write_model(tmp_path / "model", config={"max_position_embeddings": 32768})
    answers = ["yes " * (2500 if number < 95 else 5) + str(number) for number in range(100)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_bytes(
        jsonl({"prompt": f"{number}?", "completion": answer} for number, answer in enumerate(answers))
    )
    found = prepare_run(tmp_path, {"evaluation": {"holdoutFraction": 0}})
    assert found.report["dropped"] == {}
    assert sum(len(ids) > 2048 for ids, _ in found.train) == 95
