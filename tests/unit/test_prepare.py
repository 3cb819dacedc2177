"""The prepare stage from files in a folder to plan.json: every row is accounted for, every end has a name."""

import csv
import hashlib
import io
import json
import os
import resource
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as NativeTokenizer
from tokenizers import models, pre_tokenizers

from data_run import (
    CHATML,
    LFS_POINTER,
    accounted,
    byte_bpe,
    chat,
    chats,
    context,
    gz,
    jsonl,
    prepare_run,
    put,
    write_model,
)
from finetune_api.errors import StageError
from finetune_api.reasons import Fault
from finetune_api.run import MAX_RESULT_BYTES, Progress
from finetune_trainer import prepare, serve
from finetune_trainer.data import accounts, partition_work
from finetune_trainer.data.encoders import FAST, FastDiffersError
from finetune_trainer.data.pipeline import Pipeline
from finetune_trainer.data.renderer import Renderer
from finetune_trainer.data.tokenizer import Tokenizer
from hand_clock import Clock
from waiting import PATIENCE_S

CPT: dict[str, Any] = {"method": {"type": "CPT"}}
QUARANTINE: dict[str, Any] = {"preprocessing": {"onBadRow": "Quarantine", "maxBrokenFraction": 0.5}}
BPE = byte_bpe()
KEEP_COPIES = {"preprocessing": {"deduplication": {"exact": "Report"}}}


def text_of(ids: list[int]) -> str:
    return BPE.decode(ids, skip_special_tokens=False)


def learned(row: tuple[list[int], list[int]]) -> str:
    return text_of([token for token, label in zip(*row, strict=True) if label])


def fails(tmp: Path, spec: dict[str, Any] | None = None) -> StageError:
    with pytest.raises(StageError) as caught:
        prepare_run(tmp, spec)
    assert "secret" not in str(caught.value)
    return caught.value


def test_conversations_become_rows_whose_answers_are_learned(tmp_path: Path) -> None:
    put(tmp_path, a_jsonl=jsonl(chats(30)), b_jsonl_gz=gz(jsonl(chats(15, 30))))
    pq.write_table(pa.table({"messages": [row["messages"] for row in chats(5, 45)]}), tmp_path / "data" / "c.parquet")
    (tmp_path / "data" / "notes.txt").write_text("not a data file")
    prepared = prepare_run(tmp_path)
    accounted(prepared)
    assert prepared.plan.held_out is not None
    both = prepared.train + prepared.rows(prepared.plan.held_out)
    assert sorted(learned(row) for row in both) == sorted(f"the answer is {i + 1}.<|im_end|>" for i in range(50))
    assert all(text_of(ids).startswith("<|im_start|>user\nwhat is") for ids, _ in both)
    assert prepared.plan.stop_token_ids == [BPE.token_to_id("<|im_end|>")]
    assert prepared.plan.chat_template == CHATML
    assert [name.rpartition("/")[2] for name in prepared.report["ignored_files"]] == ["notes.txt"]
    assert prepared.report["ignored_files_total"] == 1
    assert all(record.sha256 for record in prepared.plan.inputs)


def test_the_plan_is_whole_and_its_essence_fits_the_termination_message(tmp_path: Path) -> None:
    put(tmp_path, a_jsonl=jsonl(chats(60)))
    prepared = prepare_run(tmp_path)
    plan, status = prepared.plan, prepared.result.plan
    assert status is not None
    assert status.digest == plan.digest()
    assert len(plan.resolved) == len(status.resolved) <= 20
    assert len(prepared.result.to_message()) <= MAX_RESULT_BYTES
    batches = safetensors.numpy.load_file(plan.batches.uri.removeprefix("file://"))
    assert len(batches["tokens"]) == plan.hyperparameters.total_steps == status.steps
    assert batches["label_tokens"].min() >= 1
    assert (status.rows, status.distinct_rows) == (len(batches["examples"]), len(set(batches["examples"].tolist())))
    assert batches["label_tokens"].sum() == plan.label_tokens == status.label_tokens
    lengths = np.array([len(ids) for ids, _ in prepared.train])
    assert lengths[batches["examples"]].sum() == batches["tokens"].sum() == plan.train_tokens
    assert plan.train.longest_row == lengths.max() == plan.hyperparameters.max_sequence_length
    assert plan.sample_prompts[0].text.endswith("<|im_start|>assistant\n")


def test_datasets_are_mixed_by_their_weights_and_their_real_shares_are_told(tmp_path: Path) -> None:
    put(tmp_path, a_jsonl=jsonl(chats(40)), b_jsonl=jsonl(chats(20, 40)))
    data = (tmp_path / "data").as_uri()
    datasets = [{"uri": f"{data}/a.jsonl", "weight": 0.5}, {"uri": f"{data}/b.jsonl", "weight": 3}]
    spec = {"datasets": datasets, "hyperparameters": {"epochs": 2}, "evaluation": {"holdoutFraction": 0}}
    prepared = prepare_run(tmp_path, spec)
    accounted(prepared)
    first, second = prepared.report["datasets"]
    assert (first["examples"], first["reads"], first["reads_share"]) == (40, 40, 0.25)
    assert (second["examples"], second["reads"], second["reads_share"]) == (20, 120, 0.75)
    assert first["tokens"] + second["tokens"] == prepared.plan.train_tokens
    assert prepared.result.plan is not None
    assert (prepared.result.plan.rows, prepared.result.plan.distinct_rows) == (160, 60)
    (told,) = [each for each in prepared.report["resolved"] if each["field"] == "datasets[].weight"]
    assert told["value"] == "0.25, 0.75"
    assert prepare_run(tmp_path, spec, attempt=2).plan == prepared.plan


def test_the_weight_of_rows_is_kept_through_every_notation_and_told_in_plan_and_report(tmp_path: Path) -> None:
    rows = [chat(f"what is {i}?", f"it is {i}") for i in range(6)]
    put(
        tmp_path,
        a_jsonl=jsonl([{**rows[0], "weight": 0.5}, {**rows[1], "weight": 0}, rows[2]]),
        b_csv=b"question,answer,weight\nwhat?,this,2\nhow?,so,\n",
        c_tsv=b"question\tanswer\tweight\nwho?\the\t0.25\n",
    )
    half = pa.array([Decimal("1.5"), Decimal("1")], pa.decimal128(5, 2))
    table = pa.table({"messages": [row["messages"] for row in rows[3:5]], "weight": half})
    pq.write_table(table, tmp_path / "data" / "d.parquet")
    datasets = [
        {"uri": f"{(tmp_path / 'data').as_uri()}/{each}"} for each in ("a.jsonl", "b.csv", "c.tsv", "d.parquet")
    ]
    found = prepare_run(tmp_path, {"datasets": datasets, "evaluation": {"holdoutFraction": 0}})
    accounted(found)
    columns = found.examples(found.plan.train).columns
    assert columns["weight"].tolist() == [0.5, 1, 2, 1, 0.25, 1.5, 1]
    (dropped,) = found.decisions
    assert (dropped["row"], dropped["reason"], dropped["detail"]) == (2, "no_label", "weight")
    assert found.report["weights"] == {"examples": 4, "least": 0.25, "most": 2.0}
    (told,) = [each for each in found.plan.resolved if each.field == "rows' weight"]
    assert told.value == "0.25 to 2"
    batches = safetensors.numpy.load_file(found.plan.batches.uri.removeprefix("file://"))
    labels = [sum(row_labels) for _, row_labels in found.train]
    expected = sum(weight * count for weight, count in zip(columns["weight"], labels, strict=True))
    assert batches["denominators"].sum() == pytest.approx(expected * found.plan.label_tokens / sum(labels))
    folder = tmp_path / "out" / "bot-1a2b3" / ".job"
    assert json.loads((folder / "plan.json").read_bytes())["denominator"] == "label_tokens"


def test_a_row_that_is_held_out_is_not_learned_with_another_weight(tmp_path: Path) -> None:
    rows = chats(40)
    put(tmp_path, a_jsonl=jsonl([*rows, *({**row, "weight": 3} for row in rows)]))
    found = prepare_run(tmp_path, {**KEEP_COPIES, "evaluation": {"holdoutFraction": 0.25}})
    accounted(found)
    held_out = sum(each["action"] == "hold_out" for each in found.decisions)
    assert held_out == found.report["dropped"]["duplicate_of_held_out"] == 10


def test_how_far_reading_has_come_is_told_while_it_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, a_jsonl=jsonl(chats(600)), b_jsonl=jsonl(chats(600)))
    ctx, heard = context(tmp_path, {}), list[Progress]()
    update = ctx.reporter.update

    def update_and_listen(**fields: object) -> None:
        update(**fields)
        heard.append(ctx.reporter.progress())

    monkeypatch.setattr(ctx.reporter, "update", update_and_listen)
    prepare.run(ctx)
    total = sum(path.stat().st_size for path in (tmp_path / "data").iterdir())
    reading = [each for each in heard if each.activity == "Reading" and each.bytes_read]
    assert len({each.bytes_read for each in reading}) >= 4
    assert all(each.bytes_total == total and each.eta_seconds is not None for each in reading)
    read = [each.bytes_read for each in heard]
    assert read == sorted(read)
    assert (read[-1], heard[-1].eta_seconds) == (total, None)


def test_running_again_gives_the_same_plan(tmp_path: Path) -> None:
    put(tmp_path, a_jsonl=jsonl(chats(60)))
    first = prepare_run(tmp_path)
    again = prepare_run(tmp_path, attempt=2)
    assert first.plan == again.plan
    assert (first.result.plan, first.result.data) == (again.result.plan, again.result.data)


def test_a_folder_of_another_job_is_left_alone(tmp_path: Path) -> None:
    put(tmp_path, a_jsonl=jsonl(chats(3)))
    prepare_run(tmp_path)
    ctx = context(tmp_path, {}, attempt=1)
    job = ctx.config.job.model_copy(update={"uid": "1a2b3fff"})
    other = ctx.config.model_copy(update={"job": job})
    with pytest.raises(StageError) as caught:
        prepare.run(replace(ctx, config=other))
    assert caught.value.fault is Fault.OUTPUT_CONFLICT


def test_prompts_and_completions_may_be_strings_or_messages(tmp_path: Path) -> None:
    as_messages = {
        "prompt": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"},
                   {"role": "user", "content": "r"}],
        "completion": [{"role": "assistant", "content": "last"}],
    }  # fmt: skip
    put(tmp_path, a_jsonl=jsonl([{"prompt": "the quick", "completion": " fox"}, as_messages]))
    plain, chatted = prepare_run(tmp_path).train
    assert (text_of(plain[0]), learned(plain)) == ("the quick fox<|im_end|>", " fox<|im_end|>")
    assert learned(chatted) == "last<|im_end|>"


def test_strings_need_no_chat_template(tmp_path: Path) -> None:
    write_model(tmp_path / "model", template=None)
    put(tmp_path, a_jsonl=jsonl([{"prompt": "q", "completion": "a"}]))
    assert prepare_run(tmp_path).plan.chat_template is None


def test_all_tokens_are_learned_when_asked(tmp_path: Path) -> None:
    put(tmp_path, a_jsonl=jsonl(chats(3)))
    prepared = prepare_run(tmp_path, {"method": {"type": "SFT", "sft": {"lossOn": "All"}}})
    assert all(labels == [0] + [1] * (len(ids) - 1) for ids, labels in prepared.train)
    assert prepared.plan.sample_prompts[0].text.endswith("<|im_start|>assistant\n")


def test_a_base_model_without_a_template_may_use_the_plain_one(tmp_path: Path) -> None:
    write_model(tmp_path / "model", template=None)
    put(tmp_path, a_jsonl=jsonl([chat("hello", "hi")]))
    assert fails(tmp_path).fault is Fault.NO_CHAT_TEMPLATE
    (row,) = prepare_run(tmp_path, {"preprocessing": {"chatTemplate": "plain"}}).train
    assert text_of(row[0]) == "### User:\nhello\n\n### Assistant:\nhi<|im_end|>\n\n"
    assert learned(row) == "hi<|im_end|>"


def test_copies_of_few_rows_make_no_step_that_reads_one_of_them_twice_unasked(tmp_path: Path) -> None:
    put(tmp_path, a_jsonl=jsonl(chats(3) * 20))
    prepared = prepare_run(tmp_path, KEEP_COPIES)
    assert prepared.plan.train.examples == 60
    assert prepared.plan.hyperparameters.global_batch_size == 3
    assert "a step reads none of the 3 twice" in json.dumps(prepared.report["resolved"])


def test_a_batch_larger_than_the_data_is_said_in_plan_and_report(tmp_path: Path) -> None:
    put(tmp_path, a_jsonl=jsonl(chats(3)))
    prepared = prepare_run(tmp_path, {"hyperparameters": {"globalBatchSize": 30, "epochs": 10}})
    assert prepared.result.plan is not None
    assert prepared.result.plan.steps == 1
    for resolved in (prepared.result.plan.model_dump_json(), json.dumps(prepared.report["resolved"])):
        assert "of 3 distinct rows, each step reads some up to 10 times" in resolved


def test_texts_are_split_and_no_token_is_lost(tmp_path: Path) -> None:
    texts = [
        "".join(f"the quick brown fox {at}\n" for at in range(40)),
        "a",
        "".join(f"jumps over the lazy dog {at} " for at in range(50)),
    ]
    put(tmp_path, a_jsonl=jsonl({"text": text} for text in texts))
    prepared = prepare_run(tmp_path, {**CPT, "preprocessing": {"maxSequenceLength": 64}})
    accounted(prepared)
    assert prepared.plan.train.longest_row <= 64
    assert prepared.plan.stop_token_ids == [BPE.token_to_id("<|im_end|>")], "the end of a text is trained"
    documents: list[list[int]] = []
    for ids, labels in prepared.train:
        assert labels == [0] + [1] * (len(ids) - 1)
        if documents and documents[-1][-1] != BPE.token_to_id("<|im_end|>"):
            assert ids[0] == documents[-1][-1]
            documents[-1] += ids[1:]
        else:
            documents.append(list(ids))
    assert [text_of(ids) for ids in documents] == [text + "<|im_end|>" for text in texts]
    assert prepared.plan.sample_prompts[0].text == text_of(documents[0][:32])


def test_few_long_conversations_are_dropped_and_reported_and_not_cut_unasked(tmp_path: Path) -> None:
    put(tmp_path, a_jsonl=jsonl([*chats(5), chat("q", "long " * 200), *chats(15, 5)]))
    prepared = prepare_run(tmp_path, {"preprocessing": {"maxSequenceLength": 64}})
    accounted(prepared)
    (decision,) = prepared.decisions
    assert (decision["row"], decision["stage"], decision["action"]) == (6, "length", "drop")
    assert decision["reason"] == "too_long"
    assert decision["detail"].endswith(" tokens")
    assert '"preprocessing.tooLong", "value": "Drop"' in json.dumps(prepared.report["resolved"])
    assert decision["file"].endswith("data/a.jsonl")


@pytest.mark.parametrize(
    ("preprocessing", "words"),
    [
        ({}, "raise preprocessing.maxTooLongFraction, which allows 5 % of the rows"),
        ({"tooLong": "Drop", "maxTooLongFraction": 0.1}, "which allows 10 % of the rows"),
        ({"tooLong": "Fail"}, "or write preprocessing.tooLong: Truncate or Drop"),
    ],
)
def test_more_long_rows_than_allowed_end_the_job_with_the_remedy(
    tmp_path: Path, preprocessing: dict[str, Any], words: str
) -> None:
    long = [chat("secret", "long " * count) for count in (200, 300)]
    put(tmp_path, a_jsonl=jsonl([*chats(5), long[0], *chats(5, 5), long[1]]))
    error = fails(tmp_path, {"preprocessing": {"maxSequenceLength": 64, **preprocessing}})
    assert error.fault is Fault.TOO_MANY_LONG_ROWS
    assert (error.args_by_name["row"], error.args_by_name["limit"]) == (6, 64)
    assert words in str(error)
    assert "raise preprocessing.maxSequenceLength" in str(error)
    report = json.loads((tmp_path / "out" / "bot-1a2b3" / ".job" / "report.json").read_bytes())
    assert report["state"] == "failed"


TRUNCATE = {"preprocessing": {"maxSequenceLength": 48, "tooLong": "Truncate", "maxTooLongFraction": 0.5}}


def test_long_conversations_lose_their_oldest_turns_and_keep_whole_answers(tmp_path: Path) -> None:
    talk = [text for i in range(9) for text in (f"what is {i}?", f"the answer is {i}.")]
    system = {"messages": [{"role": "system", "content": "be kind"}, *chat(*talk)["messages"]]}
    put(tmp_path, a_jsonl=jsonl([chat(*talk), system, chat("q", "long " * 200), *chats(3)]))
    prepared = prepare_run(tmp_path, TRUNCATE)
    accounted(prepared)
    first, second, *_ = prepared.train
    for row, begin in ((first, "<|im_start|>user\n"), (second, "<|im_start|>system\nbe kind<|im_end|>\n")):
        text = text_of(row[0])
        assert text.startswith(begin)
        kept = [i for i in range(9) if f"what is {i}?" in text]
        assert 0 < len(kept) < 9
        assert kept == list(range(kept[0], 9))
        assert learned(row) == "".join(f"the answer is {i}.<|im_end|>" for i in kept)
        assert len(row[0]) <= 48
        one_more = BPE.encode(
            "<|im_start|>user\nwhat is 0?<|im_end|>\n<|im_start|>assistant\nthe answer is 0.<|im_end|>\n"
        )
        assert len(row[0]) + len(one_more.ids) > 48, "no more is left out than must be"
    assert [(d["row"], d["action"]) for d in prepared.decisions] == [(1, "change"), (2, "change"), (3, "drop")]
    left_out = 2 * sum(f"what is {i}?" not in text_of(first[0]) for i in range(9))
    assert prepared.decisions[0]["detail"] == f"the oldest {left_out} messages are left out"


def test_long_prompts_lose_their_beginning_and_long_texts_their_end(tmp_path: Path) -> None:
    rows = [{"prompt": "the quick brown " * 40 + "end of", "completion": " the fox"},
            {"prompt": "q", "completion": " long" * 200}, {"prompt": "q", "completion": " a"}]  # fmt: skip
    put(tmp_path, a_jsonl=jsonl(rows))
    prepared = prepare_run(tmp_path, TRUNCATE)
    accounted(prepared)
    first, second = prepared.train
    assert text_of(first[0]).endswith("brown end of the fox<|im_end|>")
    assert (len(first[0]), learned(first)) == (48, " the fox<|im_end|>")
    assert learned(second) == " a<|im_end|>"
    put(
        tmp_path,
        a_jsonl=jsonl(
            [{"text": "the quick brown fox the " + "".join(f"{n} foxes " for n in range(50))}, {"text": "a"}]
        ),
    )
    prepared = prepare_run(tmp_path, {**CPT, **TRUNCATE}, attempt=2)
    accounted(prepared)
    assert [len(ids) for ids, _ in prepared.train] == [48, 2]
    assert text_of(prepared.train[0][0]).startswith("the quick brown fox the")


def test_an_answer_that_the_template_leaves_out_is_refused_by_its_field(tmp_path: Path) -> None:
    source = "{% for m in messages %}{{ m.content if m.role == 'user' else '<|im_end|>' }}{% endfor %}"
    write_model(tmp_path / "model", template=source)
    put(tmp_path, a_jsonl=jsonl(chats(3)))
    error = fails(tmp_path)
    assert error.fault is Fault.PART_VANISHES
    assert "row 1: messages[1].content is not in what the chat template makes of the row" in str(error)


def test_equal_rows_stay_on_one_side_and_are_counted(tmp_path: Path) -> None:
    put(tmp_path, a_jsonl=jsonl(chats(60)), b_jsonl=jsonl(chats(60)))
    prepared = prepare_run(tmp_path, {**KEEP_COPIES, "evaluation": {"holdoutFraction": 0.1}})
    accounted(prepared)
    assert prepared.plan.held_out is not None
    held = [text_of(ids) for ids, _ in prepared.rows(prepared.plan.held_out)]
    assert len(held) == len(set(held)) == 6
    assert not set(held) & {text_of(ids) for ids, _ in prepared.train}
    told = prepared.report["duplicates"]
    assert (told["distinct_rows"], told["dropped_as_copies_of_held_out"]) == (60, 6)
    assert (told["exact"]["copies"], told["exact"]["groups"], told["exact"]["rows"]) == (60, 60, 120)


def test_every_held_out_row_is_a_decision_and_a_copy_names_the_row_it_is_of(tmp_path: Path) -> None:
    put(tmp_path, a_jsonl=jsonl(chats(60)), b_jsonl=jsonl(chats(60)))
    prepared = prepare_run(tmp_path, {**KEEP_COPIES, "evaluation": {"holdoutFraction": 0.5}})
    accounted(prepared)
    held, copies = ([d for d in prepared.decisions if d["action"] == action] for action in ("hold_out", "drop"))
    assert len(held) == len(copies) == 30
    assert {(d["stage"], d["reason"]) for d in held} == {("split", "evaluation")}
    assert prepared.plan.held_out is not None
    rows = prepared.examples(prepared.plan.held_out).columns["row"].tolist()
    assert rows == [d["row"] for d in held]
    assert {d["ref"] for d in copies} == {f"{d['file']}#{d['row']}" for d in held}
    assert all(d["file"].endswith("b.jsonl") for d in copies)


def test_a_fraction_of_which_no_row_comes_is_said(tmp_path: Path) -> None:
    put(tmp_path, a_jsonl=jsonl(chats(6)))
    prepared = prepare_run(tmp_path, {"evaluation": {"holdoutFraction": 0.01}})
    assert prepared.plan.held_out is None
    assert "of 6 distinct rows it is none, so nothing is measured" in json.dumps(prepared.report["resolved"])


def test_a_broken_row_fails_the_job_naming_it_and_how_many_there_are(tmp_path: Path) -> None:
    rows = b'{"messages": "secret"}\n' * 3
    put(tmp_path, a_jsonl=jsonl(chats(20)) + b"\n" + rows + jsonl(chats(10)))
    error = fails(tmp_path)
    assert error.fault is Fault.BROKEN_ROW
    words = "a.jsonl row 22, field messages: has the wrong type: must be a list of messages, or the JSON text of one. "
    assert words + "3 of 33 rows" in str(error)
    folder = tmp_path / "out" / "bot-1a2b3" / ".job"
    assert json.loads((folder / "report.json").read_bytes())["state"] == "failed"
    assert len((folder / "decisions.jsonl").read_bytes().splitlines()) == 3


def test_counting_broken_rows_ends_after_a_thousand(tmp_path: Path) -> None:
    put(tmp_path, a_jsonl=jsonl(chats(1)) + b"{\n" * 5000)
    assert fails(tmp_path).args_by_name["broken"] == 1000


def test_broken_rows_are_put_aside_when_asked(tmp_path: Path) -> None:
    bad = b'not json\n{"messages": [{"role": "user", "content": "secret"}]}\n[1]\n'
    put(tmp_path, a_jsonl=jsonl(chats(3)) + bad + jsonl(chats(4, 3)))
    prepared = prepare_run(tmp_path, QUARANTINE)
    accounted(prepared)
    assert [(each["row"], each["reason"], each.get("detail")) for each in prepared.decisions] == [
        (4, "not_json", None),
        (5, "no_assistant_message", "messages"),
        (6, "not_an_object", None),
    ]
    assert "secret" not in json.dumps(prepared.decisions) + json.dumps(prepared.report)


def test_too_many_broken_rows_fail_the_job_even_when_put_aside(tmp_path: Path) -> None:
    put(tmp_path, a_jsonl=jsonl(chats(90)) + b"{\n" * 10)
    error = fails(tmp_path, {"preprocessing": {"onBadRow": "Quarantine"}})
    assert (error.fault, error.args_by_name["broken"], error.args_by_name["rows"]) == (Fault.BROKEN_ROW, 10, 100)


@pytest.mark.parametrize(
    ("rows", "spec", "words"),
    [
        ([{"text": "a"}], {}, "method SFT needs rows with `messages`, or .*; found the fields text"),
        (chats(3), CPT, "method CPT needs rows with `text`; this one fits method.type SFT; found the fields messages"),
        ([{"chosen": "a", "rejected": "b"}], {}, "found the fields chosen, rejected"),
        (
            [{**chat("q", "a"), "prompt": "q", "completion": "a"}],
            {},
            "1 fit Messages .+, 1 PromptCompletion .+; set datasets",
        ),
        ([{"not an identifier, but secret": 1, "id": 2}], {}, "found the fields id and 1 more"),
    ],
)
def test_data_of_another_format_is_told_before_anything_else(
    tmp_path: Path, rows: list[dict[str, Any]], spec: dict[str, Any], words: str
) -> None:
    put(tmp_path, a_jsonl=jsonl(rows))
    error = fails(tmp_path, spec)
    assert error.fault is Fault.WRONG_FORMAT
    with pytest.raises(StageError, match=words):
        raise error


def test_a_parquet_file_without_a_fitting_column_is_of_another_format(tmp_path: Path) -> None:
    put(tmp_path)
    pq.write_table(pa.table({"questions": ["q"], "answers": ["a"]}), tmp_path / "data" / "a.parquet")
    assert "found the fields answers, questions" in str(fails(tmp_path))


def test_every_row_of_a_parquet_file_without_a_fitting_column_is_counted_as_dropped(tmp_path: Path) -> None:
    put(tmp_path, a_jsonl=jsonl(chats(300)))
    pq.write_table(pa.table({"question": ["q"] * 200}), tmp_path / "data" / "b.parquet")
    prepared = prepare_run(tmp_path, QUARANTINE)
    accounted(prepared)
    assert prepared.report["files"][1]["rows_in"] == 200
    assert prepared.report["files"][1]["dropped"] == {"missing_field": 200}
    spec = {"preprocessing": {"onBadRow": "Quarantine", "maxBrokenFraction": 0.05}}
    error = fails(tmp_path, spec)
    assert error.fault is Fault.BROKEN_ROW
    assert "raise preprocessing.maxBrokenFraction, which allows 0.05 of all rows" in str(error)


def test_a_format_that_does_not_fit_the_method_is_refused_by_the_field(tmp_path: Path) -> None:
    put(tmp_path, a_jsonl=jsonl(chats(1)))
    spec = {"datasets": [{"uri": (tmp_path / "data").as_uri() + "/", "format": "Text"}]}
    assert "spec.datasets[0].format cannot be used: Text does not fit method SFT" in str(fails(tmp_path, spec))


def test_a_row_of_another_format_in_the_middle_is_a_broken_row(tmp_path: Path) -> None:
    put(tmp_path, a_jsonl=jsonl([*chats(30), {"prompt": "a", "completion": "b"}]))
    error = fails(tmp_path)
    assert (error.fault, error.args_by_name["row"]) == (Fault.BROKEN_ROW, 31)


def test_a_row_of_another_shape_behind_those_that_tell_it_is_named_with_both_shapes(tmp_path: Path) -> None:
    put(tmp_path, a_jsonl=jsonl(chats(1100)), b_jsonl=jsonl([{"instruction": "q", "output": "a"}]))
    error = fails(tmp_path)
    assert (error.fault, error.args_by_name["row"]) == (Fault.BROKEN_ROW, 1)
    said = str(error)
    assert (
        "data/b.jsonl row 1: has another shape than the rows of its dataset; make a dataset of the rows of each" in said
    )
    assert "it is Alpaca, not Messages, which row 1 of a.jsonl has" in said
    prepared = prepare_run(tmp_path, QUARANTINE, attempt=2)
    (dropped,) = [each for each in prepared.decisions if each["action"] == "drop"]
    assert (dropped["reason"], dropped["words"]) == (
        "other_shape",
        "it is Alpaca, not Messages, which row 1 of a.jsonl has",
    )


def test_several_datasets_may_have_several_formats(tmp_path: Path) -> None:
    put(tmp_path, a_jsonl=jsonl(chats(3)), b_jsonl=jsonl([{"prompt": "q", "completion": "a"}]))
    uris = [(tmp_path / "data" / name).as_uri() for name in ("a.jsonl", "b.jsonl")]
    prepared = prepare_run(tmp_path, {"datasets": [{"uri": uri} for uri in uris]})
    assert prepared.plan.formats == ["Messages", "PromptCompletion"]
    assert prepared.plan.train.examples == 4


def test_rows_of_all_usual_shapes_are_learned_and_the_report_says_what_was_taken_and_changed(tmp_path: Path) -> None:
    files: dict[str, list[dict[str, Any]]] = {
        "alpaca": [{"instruction": "q", "input": "i", "output": "a"}],
        "dolly": [{"instruction": "r", "context": "", "response": "b", "category": "qa"}],
        "asked": [{"Q": "s", "A": "c"}],
        "sharegpt": [{"conversations": [{"from": "human", "value": "t"}, {"from": "gpt", "value": "d"}], "id": "x"}],
        "masked": [
            {
                "messages": [
                    *chat("u", "bad")["messages"][:1],
                    {"role": "assistant", "content": "bad", "weight": 0},
                    *chat("v", "e", "w")["messages"],
                ]
            }
        ],
        "nothing": [
            {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "x", "train": False}]}
        ],
    }
    put(tmp_path, **{f"{name}_jsonl": jsonl(rows) for name, rows in files.items()})
    datasets: list[dict[str, Any]] = [{"uri": (tmp_path / "data" / f"{name}.jsonl").as_uri()} for name in files]
    datasets[2]["columns"] = {"question": "Q", "answer": "A"}
    prepared = prepare_run(tmp_path, {"datasets": datasets})
    accounted(prepared)
    assert prepared.plan.formats == ["Alpaca", "Dolly", "QuestionAnswer", "ShareGPT", "Messages", "Messages"]
    assert sorted(learned(row) for row in prepared.train) == [f"{answer}<|im_end|>" for answer in "abcde"]
    assert any("q\n\ni" in text_of(ids) for ids, _ in prepared.train)
    assert prepared.report["changed"] == {"end_left_out": 1}
    assert prepared.report["ignored_fields"] == {"category": 1, "id": 1}
    assert [(each["row"], each["action"], each["reason"]) for each in prepared.decisions] == [
        (1, "change", "end_left_out"),
        (1, "drop", "no_label"),
    ]


CALLING = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALLED: dict[str, Any] = {
    "messages": [
        {"role": "user", "content": "weather in Oslo?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c1", "function": {"name": "weather", "arguments": '{"town": "Oslo"}'}}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
        {"role": "assistant", "content": "It rains."},
    ],
    "tools": [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}],
}


def test_calls_are_learned_and_what_tools_give_back_is_not(tmp_path: Path) -> None:
    write_model(tmp_path / "model", template=CALLING)
    put(tmp_path, a_jsonl=jsonl([CALLED]))
    (row,) = prepare_run(tmp_path).train
    assert (
        learned(row) == '<call>{"name": "weather", "arguments": {"town": "Oslo"}}</call><|im_end|>It rains.<|im_end|>'
    )
    assert '"parameters": {"type": "object"}' in text_of(row[0])
    assert "rain<|im_end|>" in text_of(row[0])


def test_calls_that_the_template_leaves_out_are_refused_by_name(tmp_path: Path) -> None:
    put(tmp_path, a_jsonl=jsonl([CALLED]))
    error = fails(tmp_path)
    assert error.fault is Fault.PART_VANISHES
    assert error.args_by_name["row"] == 1


@pytest.mark.parametrize(
    ("files", "fault", "words"),
    [
        ({"a_txt": b"x"}, Fault.NO_FILES_MATCH, "data/"),
        ({"a_jsonl": b""}, Fault.NO_TRAINING_DATA, "0 rows read"),
        ({"a_jsonl": b"{\n"}, Fault.BROKEN_ROW, "row 1: is not valid JSON"),
        ({"a_jsonl": b"[1]\n2\n"}, Fault.BROKEN_ROW, "row 1: is not a JSON object. 2 of 2"),
        ({"a_jsonl_gz": gz(jsonl(chats(50)))[:-10]}, Fault.BROKEN_FILE, "gzip stream is cut off"),
        ({"a_jsonl_gz": b""}, Fault.BROKEN_FILE, "gzip stream is cut off"),
        ({"a_jsonl_gz": gz(b"")}, Fault.NO_TRAINING_DATA, "0 rows read"),
        ({"a_parquet": b"PAR1 no"}, Fault.BROKEN_FILE, "Parquet cannot be decoded"),
        ({"a_parquet": LFS_POINTER}, Fault.WRONG_FILE, "is a Git LFS pointer"),
        ({"a_jsonl_gz": LFS_POINTER}, Fault.WRONG_FILE, "is a Git LFS pointer"),
        ({"a_csv": b"messages\n"}, Fault.NO_TRAINING_DATA, "0 rows read"),
        ({"a_csv": b"subject,year\nq,1\n"}, Fault.WRONG_FORMAT, "found the fields"),
    ],
)
def test_files_that_hold_no_rows_are_told_by_name(
    tmp_path: Path, files: dict[str, bytes], fault: Fault, words: str
) -> None:
    put(tmp_path, **files)
    error = fails(tmp_path)
    assert error.fault is fault
    assert words in str(error)


def test_files_passed_over_are_counted_however_many_and_files_of_long_names_are_read(tmp_path: Path) -> None:
    deep = tmp_path / "data" / Path(*["x" * 200] * 6)
    deep.mkdir(parents=True)
    (deep / "a.jsonl").write_bytes(jsonl(chats(5)))
    for number in range(120):
        (tmp_path / "data" / f"{number}.txt").touch()
    prepared = prepare_run(tmp_path)
    assert prepared.plan.inputs[0].uri == f"file://{deep}/a.jsonl"
    assert len(prepared.report["ignored_files"]) == 100
    assert prepared.report["ignored_files_total"] == 120


def test_fields_that_are_not_read_are_told_with_the_rows_that_have_them(tmp_path: Path) -> None:
    rows = [row | {"source": "web", "tools": [], "a secret": 1} for row in chats(3)]
    put(tmp_path, a_jsonl=jsonl([*rows, *chats(2, start=3)]))
    columns = {"messages": [row["messages"] for row in chats(4, start=5)], "id": ["c"] * 4, "text": ["t"] * 4}
    pq.write_table(pa.table(columns), tmp_path / "data" / "b.parquet")
    datasets = [{"uri": (tmp_path / "data").as_uri() + "/", "ignoreFields": ["a secret", "text"]}]
    found = prepare_run(tmp_path, {"datasets": datasets}).report["ignored_fields"]
    assert found == {"source": 3, "(other)": 3, "id": 4, "text": 4}


def test_a_table_is_told_by_its_content_and_not_by_its_name(tmp_path: Path) -> None:
    """The columns of Parquet fill in nulls for what a row does not have."""
    write_model(tmp_path / "model", template=CALLING)
    rows = [CALLED, {**CALLED, "tools": [{"type": "function", "function": {"name": "weather", "strict": True}}]}]
    for name in ("a.parquet", "b.jsonl", "c"):
        (tmp_path / "data" / name).parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({key: [row[key] for row in rows] for key in CALLED}), tmp_path / "data" / name)
    found = {
        name: prepare_run(tmp_path, {"datasets": [{"uri": (tmp_path / "data" / name).as_uri()}]}, attempt)
        for attempt, name in enumerate(("a.parquet", "b.jsonl", "c"), 1)
    }
    for each in found.values():
        accounted(each)
        assert each.train == found["a.parquet"].train
        assert each.report["changed"] == {"nulls_left_out": 2}


def test_damaged_files_fail_the_job_even_when_broken_rows_are_put_aside(tmp_path: Path) -> None:
    put(tmp_path, a_jsonl_gz=gz(jsonl(chats(50)))[:-10])
    assert fails(tmp_path, QUARANTINE).fault is Fault.BROKEN_FILE


def test_a_git_lfs_pointer_among_many_rows_is_never_put_aside_as_a_few_broken_ones(tmp_path: Path) -> None:
    put(tmp_path, a_jsonl=jsonl(chats(50)), b_jsonl=LFS_POINTER)
    error = fails(tmp_path, QUARANTINE)
    assert error.fault is Fault.WRONG_FILE
    assert "run git lfs pull" in str(error)


def test_files_of_every_notation_and_packing_give_the_same_tokens_and_are_known_by_their_digests(
    tmp_path: Path,
) -> None:
    rows = [{"prompt": f"what is {i}", "completion": f' {i},\n"two"'} for i in range(40)]
    columns = {name: [row[name] for row in rows] for name in ("prompt", "completion")}
    written = io.StringIO(newline="")
    writer = csv.DictWriter(written, list(columns))
    writer.writeheader()
    writer.writerows(rows)
    table = io.BytesIO()
    pq.write_table(pa.table(columns), table)
    contents = {
        "a.JSONL": jsonl(rows),
        "a.json": json.dumps(rows, indent=2).encode(),
        "b.json.zst": pa.compress("\n".join(json.dumps(row, indent=2) for row in rows).encode(), "zstd", asbytes=True),
        "a.csv": written.getvalue().encode(),
        "a.csv.GZ": gz(written.getvalue().encode()),
        "a.parquet": table.getvalue(),
    }
    (tmp_path / "data").mkdir()
    found: dict[str, list[Any]] = {}
    for attempt, (name, content) in enumerate(contents.items(), start=1):
        path = tmp_path / "data" / name
        path.write_bytes(content)
        prepared = prepare_run(tmp_path, attempt=attempt)
        accounted(prepared)
        found[name] = prepared.train
        (record,) = prepared.plan.inputs
        assert record.sha256 == "sha256:" + hashlib.sha256(content).hexdigest()
        assert record.size_bytes == len(content)
        path.unlink()
    assert all(each == found["a.JSONL"] for each in found.values())


# Marks the last answer alone, as templates do that keep reasoning in it alone.
LAST_DIFFERS = CHATML.replace(
    "message['content']", "('!' if loop.last and message.role == 'assistant' else '') + message['content']"
)


def test_every_change_of_a_row_is_a_decision(tmp_path: Path) -> None:
    write_model(tmp_path / "model", template=LAST_DIFFERS)
    question, answer = chat("what?", "this")["messages"]
    parts = [{"type": "text", "text": "wh"}, {"type": "text", "text": "at?"}]
    rows = [
        [question, answer],
        [{"role": "developer", "content": "Be brief."}, question, answer, question],
        [{**question, "content": parts}, answer],
        [answer, question, {**answer, "content": "that"}],
        [question, question, answer],
        [question, answer, question, answer],
    ]
    put(tmp_path, a_jsonl=jsonl({"messages": row} for row in rows))
    found = prepare_run(tmp_path, KEEP_COPIES)
    accounted(found)
    assert [(each["row"], each["stage"], each["action"], each["reason"]) for each in found.decisions] == [
        (2, "read", "change", "developer_as_system"),
        (2, "read", "change", "end_left_out"),
        (3, "read", "change", "parts_joined"),
        (4, "read", "change", "greeting_not_learned"),
        (5, "read", "change", "neighbours_kept"),
        (6, "render", "change", "unrolled"),
    ]
    assert found.report["answers"]["notes"] == {"unrolled": 1}


def test_a_template_that_rewrites_earlier_answers_is_learned_in_one_sequence_for_each(tmp_path: Path) -> None:
    write_model(tmp_path / "model", template=LAST_DIFFERS)
    put(tmp_path, a_jsonl=jsonl([chat("q", "a"), chat("q", "the", "r", "b")]))
    prepared = prepare_run(tmp_path)
    accounted(prepared)
    assert sorted(learned(row) for row in prepared.train) == ["!a<|im_end|>", "!b<|im_end|>", "!the<|im_end|>"]
    (last,) = (text_of(ids) for ids, _ in prepared.train if text_of(ids).endswith("!b<|im_end|>"))
    question = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nthe<|im_end|>\n<|im_start|>user\nr<|im_end|>\n"
    assert last == question + "<|im_start|>assistant\n!b<|im_end|>", "answers before it are as a server sends them"
    answers = prepared.report["answers"]
    assert answers["notes"] == {"unrolled": 1}
    assert (answers["conversations"], answers["sequences"]) == (2, 3)
    plan = {each.field: each for each in prepared.plan.resolved}
    assert plan["answers"].value == "whole conversations, or one sequence for each answer"
    assert "repeated beginnings" in plan["answers"].reason
    assert plan["answers.unrolled"].value == "1 of 2 conversations"


def test_more_repetition_than_allowed_ends_the_job_before_it_costs_anything(tmp_path: Path) -> None:
    write_model(tmp_path / "model", template=LAST_DIFFERS)
    put(tmp_path, a_jsonl=jsonl([chat("q", "secret", "r", "b")]))
    error = fails(tmp_path, {"preprocessing": {"maxUnrolledFraction": 0.1}})
    assert error.fault is Fault.UNROLLED_TOO_MUCH
    assert "allows 0.1 of all tokens" in str(error)


# Opens reasoning in the generation prompt, and writes none before a finished answer, as DeepSeek-R1-Distill's does.
OPENS_REASONING = CHATML.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n")
# Ends answers with nothing.
ENDLESS = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}" + (
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.mark.parametrize(
    ("template", "row", "fault", "words"),
    [
        (OPENS_REASONING, chat("q", "secret"), Fault.NO_REASONING, "prompt for message 2 opens a block of reasoning"),
        (
            ENDLESS,
            chat("q", "secret"),
            Fault.NO_STOP_TOKEN,
            "which are <|im_end|>, so that a server would never end its answers; if the template has an end token",
        ),
        (
            CHATML,
            {
                "messages": [
                    {"role": "user", "content": "q"},
                    {**chat("q", "a")["messages"][1], "reasoning_content": "secret"},
                ]
            },
            Fault.PART_VANISHES,
            "messages[1].reasoning_content is not in what the chat template makes of the row, so that it would be "
            "lost; accept that by preprocessing.acceptVanishing: [Reasoning]",
        ),
    ],
    ids=["no reasoning", "no stop", "lost reasoning"],
)
def test_what_cannot_be_learned_as_served_is_refused_or_put_aside(
    tmp_path: Path, template: str, row: dict[str, Any], fault: Fault, words: str
) -> None:
    write_model(tmp_path / "model", template=template)
    put(tmp_path, a_jsonl=jsonl([row]), b_jsonl=jsonl({"prompt": f"a{n}", "completion": "b"} for n in range(3)))
    datasets = [{"uri": (tmp_path / "data" / name).as_uri()} for name in ("a.jsonl", "b.jsonl")]
    error = fails(tmp_path, {"datasets": datasets})
    assert error.fault is fault
    assert words in str(error)
    prepared = prepare_run(tmp_path, QUARANTINE | {"datasets": datasets})
    accounted(prepared)
    assert len(prepared.decisions) == 1


def test_reasoning_goes_into_the_block_that_the_prompt_opens(tmp_path: Path) -> None:
    write_model(tmp_path / "model", template=OPENS_REASONING)
    put(tmp_path, a_jsonl=jsonl([chat("q", "<think>\nthe fox\n</think>\nhello")]))
    (row,) = prepare_run(tmp_path).train
    assert text_of(row[0]).startswith("<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n<think>\n")
    assert learned(row) == "the fox\n</think>\nhello<|im_end|>"


def test_what_is_accepted_to_be_lost_is_counted(tmp_path: Path) -> None:
    message = {"role": "assistant", "content": "a", "reasoning_content": "the fox"}
    put(tmp_path, a_jsonl=jsonl([{"messages": [{"role": "user", "content": "q"}, message]}]))
    prepared = prepare_run(tmp_path, {"preprocessing": {"acceptVanishing": ["Reasoning"]}})
    assert [learned(row) for row in prepared.train] == ["a<|im_end|>"]
    assert prepared.report["answers"]["vanished"] == {"Reasoning": 1}
    (lost,) = prepared.decisions
    assert (lost["stage"], lost["action"], lost["reason"], lost["detail"]) == (
        "render",
        "change",
        "vanishes",
        "Reasoning",
    )
    (noted,) = (each for each in prepared.plan.resolved if each.field == "answers.vanished.Reasoning")
    assert noted.value == "1 of 1 conversations"


WITH_NAMES = CHATML.replace("message['role'] +", "(message.name if message.name else message['role']) +")
NAMED = [{"role": "user", "name": "Ada", "content": "Ada asks"}, {"role": "assistant", "content": "a"}]
RESULT_WITH_NAME: list[dict[str, Any]] = [
    {"role": "user", "content": "rain?"},
    {"role": "assistant", "content": "I look.", "tool_calls": [{"function": {"name": "w", "arguments": {}}}]},
    {"role": "tool", "content": "yes", "name": "weather_of_a_town"},
    {"role": "assistant", "content": "a"},
]


def test_the_name_of_who_speaks_is_rendered_or_refused_and_where_that_is_accepted_counted(tmp_path: Path) -> None:
    put(tmp_path, a_jsonl=jsonl([{"messages": NAMED}]))
    error = fails(tmp_path)
    assert error.fault is Fault.PART_VANISHES
    assert "row 1: messages[0].name is not in what the chat template makes of the row" in str(error)
    assert "acceptVanishing: [Name]" in str(error)
    prepared = prepare_run(tmp_path, {"preprocessing": {"acceptVanishing": ["Name"]}}, attempt=2)
    assert prepared.report["answers"]["vanished"] == {"Name": 1}
    assert [each["detail"] for each in prepared.decisions] == ["Name"]
    write_model(tmp_path / "model", template=WITH_NAMES)
    ((ids, _),) = prepare_run(tmp_path, attempt=3).train
    assert text_of(ids).startswith("<|im_start|>Ada\nAda asks<|im_end|>")


def test_a_result_that_names_its_function_loses_nothing_as_the_call_before_it_names_it(tmp_path: Path) -> None:
    put(tmp_path, a_jsonl=jsonl([{"messages": RESULT_WITH_NAME}]))
    prepared = prepare_run(tmp_path, {"preprocessing": {"acceptVanishing": ["ToolCalls"]}})
    assert prepared.report["answers"]["vanished"] == {"ToolCalls": 1}


def leaving_out(condition: str) -> str:
    """Return a template that leaves out messages."""
    return CHATML.replace("in messages %}", f"in messages if not ({condition}) %}}")


SYSTEM_ROW = {"messages": [{"role": "system", "content": "be brief"}, *chat("q", "a")["messages"]]}
TOOLS_ROW = {"tools": [{"type": "function", "function": {"name": "weather", "parameters": {}}}], **chat("q", "a")}
UNLEARNED_CALL: list[dict[str, Any]] = [
    {"role": "user", "content": "rain?"},
    {
        "role": "assistant",
        "content": "I look.",
        "weight": 0,
        "tool_calls": [{"function": {"name": "weather", "arguments": {"town": "Bern"}}}],
    },
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "a"},
]


@pytest.mark.parametrize(
    ("template", "row", "field", "part"),
    [
        (leaving_out("message.role == 'system'"), SYSTEM_ROW, "messages[0].content", "System"),
        (CHATML, TOOLS_ROW, "tools[0]", "Tools"),
        (CHATML, {"messages": UNLEARNED_CALL}, "messages[1].tool_calls", "ToolCalls"),
        (CHATML, {"messages": RESULT_WITH_NAME}, "messages[1].tool_calls", "ToolCalls"),
    ],
    ids=["system", "tools", "calls that are not learned", "calls"],
)
def test_each_part_that_a_template_leaves_out_is_named_and_counted_where_that_is_accepted(
    tmp_path: Path, template: str, row: dict[str, Any], field: str, part: str
) -> None:
    write_model(tmp_path / "model", template=template)
    put(tmp_path, a_jsonl=jsonl([row]))
    error = fails(tmp_path)
    assert error.fault is Fault.PART_VANISHES
    assert f"row 1: {field} is not in what the chat template makes of the row" in str(error)
    assert f"acceptVanishing: [{part}]" in str(error)
    prepared = prepare_run(tmp_path, {"preprocessing": {"acceptVanishing": [part]}}, attempt=2)
    assert prepared.report["answers"]["vanished"] == {part: 1}


def test_the_result_of_a_tool_that_a_template_leaves_out_is_named(tmp_path: Path) -> None:
    write_model(tmp_path / "model", template=leaving_out("message.role == 'tool'"))
    put(tmp_path, a_jsonl=jsonl([{"messages": RESULT_WITH_NAME}]))
    error = fails(tmp_path, {"preprocessing": {"acceptVanishing": ["ToolCalls"]}})
    assert error.fault is Fault.PART_VANISHES
    assert "row 1: messages[2].content is not in" in str(error)
    accepted = {"preprocessing": {"acceptVanishing": ["ToolCalls", "ToolResults"]}}
    assert prepare_run(tmp_path, accepted, attempt=2).report["answers"]["vanished"] == {
        "ToolCalls": 1,
        "ToolResults": 1,
    }


def test_a_part_that_a_template_leaves_out_of_some_rows_alone_is_found_in_those(tmp_path: Path) -> None:
    write_model(tmp_path / "model", template=leaving_out("message.content == 'please forget'"))
    third = {"messages": [*chat("please forget", "a")["messages"], *chat("q", "b")["messages"]]}
    put(tmp_path, a_jsonl=jsonl([chat("q", "a"), chat("q", "b"), third]))
    error = fails(tmp_path)
    assert error.fault is Fault.PART_VANISHES
    assert "row 3: messages[0].content is not in" in str(error)


def test_the_models_end_token_is_added_where_that_was_asked_for(tmp_path: Path) -> None:
    write_model(tmp_path / "model", template=ENDLESS)
    put(tmp_path, a_jsonl=jsonl([chat("q", "a"), chat("q", "the", "r", "b")]))
    prepared = prepare_run(tmp_path, {"preprocessing": {"addEndToken": True}})
    texts = sorted(text_of(ids) for ids, _ in prepared.train)
    assert texts == [
        "[user] q\n[assistant] a<|im_end|>",
        "[user] q\n[assistant] the\n[user] r\n[assistant] b<|im_end|>",
        "[user] q\n[assistant] the<|im_end|>",
    ]
    assert all(learned(row).endswith("<|im_end|>") for row in prepared.train)
    assert prepared.plan.stop_token_ids == [BPE.token_to_id("<|im_end|>")]
    assert prepared.report["answers"]["notes"] == {"unrolled": 1, "end_added": 2}


def test_a_stop_that_the_tokenizer_reads_as_other_tokens_is_refused(tmp_path: Path) -> None:
    """As where generation_config.json names a token of the vocabulary that is no added one, and merges otherwise."""
    stop, end = BPE.token_to_id("er"), "er"
    template = CHATML.replace("<|im_end|>", end)
    write_model(tmp_path / "model", template=template, config={"eos_token_id": stop})
    put(tmp_path, a_jsonl=jsonl([chat("who?", "it is us")]))
    error = fails(tmp_path)
    assert error.fault is Fault.STOP_TOKEN_SPLIT
    assert "row 1: message 2 ends in the text of a token at which the model stops" in str(error)


@pytest.mark.parametrize("row", [{"prompt": "q", "completion": " a"}])
def test_completions_that_end_in_a_token_at_which_the_model_does_not_stop_are_refused(
    tmp_path: Path, row: dict[str, Any]
) -> None:
    write_model(tmp_path / "model", config={"eos_token_id": [BPE.token_to_id("<|endoftext|>")]})
    put(tmp_path, a_jsonl=jsonl([row]))
    error = fails(tmp_path)
    assert error.fault is Fault.END_TOKEN_NO_STOP
    assert "ends completions with <|im_end|>, at which the model does not stop, as it stops at <|endoftext|>" in str(
        error
    )


def test_rows_put_aside_for_such_a_prompt_are_reported_as_that(tmp_path: Path) -> None:
    write_model(tmp_path / "model", template=OPENS_REASONING)
    strings = [{"prompt": f"what is {i}", "completion": f" {i}."} for i in range(40)]
    message = [{"role": "user", "content": "q"}], [{"role": "assistant", "content": "a"}]
    put(tmp_path, a_jsonl=jsonl([*strings, {"prompt": message[0], "completion": message[1]}]))
    prepared = prepare_run(tmp_path, QUARANTINE)
    accounted(prepared)
    assert [each["reason"] for each in prepared.decisions] == ["no_reasoning"]


def test_answers_are_seen_to_end_where_all_is_learned_and_the_prompt_is_no_part_of_the_whole(tmp_path: Path) -> None:
    write_model(tmp_path / "model", template=OPENS_REASONING)
    put(tmp_path, a_jsonl=jsonl(chats(40)))
    prepared = prepare_run(tmp_path, {"method": {"type": "SFT", "sft": {"lossOn": "All"}}})
    assert prepared.plan.stop_token_ids == [BPE.token_to_id("<|im_end|>")]
    assert all(labels == [0] + [1] * (len(ids) - 1) for ids, labels in prepared.train)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('only short questions') }}", "a.jsonl row 1: only short questions"),
        ("{{ raise_exception(messages[0].content) }}", "a.jsonl row 1: TemplateError"),
    ],
)
def test_a_template_that_fails_is_told_with_the_row(tmp_path: Path, template: str, words: str) -> None:
    write_model(tmp_path / "model", template=template)
    put(tmp_path, a_jsonl=jsonl([chat("secret", "a")]))
    error = fails(tmp_path)
    assert error.fault is Fault.TEMPLATE_FAILED
    assert words in str(error)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% if %}", "TemplateSyntaxError in line 1: Expected an expression"),
        ("{{ tool_list.names }}", "UndefinedError: 'tool_list' is undefined"),
        ("{{ messages[0].content.text.x }}", "UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
    ],
)
@pytest.mark.parametrize("spec", [{}, QUARANTINE])
def test_a_template_that_fails_on_any_conversation_is_not_blamed_on_a_row(
    tmp_path: Path, template: str, words: str, spec: dict[str, Any]
) -> None:
    write_model(tmp_path / "model", template=template)
    put(tmp_path, a_jsonl=jsonl([chat("secret", "a")]))
    error = fails(tmp_path, spec)
    assert error.fault is Fault.TEMPLATE_INVALID
    assert words in str(error)
    assert "row 1" not in str(error)
    assert "secret" not in str(error)


def test_a_template_that_needs_too_much_for_many_rows_is_told_with_one_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partition_work, "Renderer", partial(Renderer, row_cpu_s=0.2))
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    write_model(tmp_path / "model", template="{% if messages[0].content == 'much' %}" + loop + "{% endif %}" + CHATML)
    put(tmp_path, a_jsonl=jsonl([*chats(20), *[chat("much", "a")] * 5, *chats(20, 20)]))
    assert prepare_run(tmp_path, QUARANTINE).report["dropped"] == {"template_failed": 5}
    put(tmp_path, a_jsonl=jsonl([*chats(20), *[chat("much", "a")] * 6, *chats(20, 20)]))
    error = fails(tmp_path, QUARANTINE)
    assert error.args_by_name["row"] == 26
    assert "5 rows before it" in str(error)


def test_decisions_that_are_very_many_are_counted_and_no_longer_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accounts, "MAX_DECISIONS_BYTES", 2000)
    put(tmp_path, a_jsonl=jsonl(chats(5)) + b"1\n" * 90 + b'{"a": 1}\n' * 10)
    prepared = prepare_run(tmp_path, {"preprocessing": {"onBadRow": "Quarantine", "maxBrokenFraction": 1}})
    *listed, last = prepared.decisions
    assert 5 < len(listed) < 40
    assert last == {"not_listed": {"missing_field": 10, "not_an_object": 90 - len(listed)}}
    assert prepared.report["dropped"] == {"missing_field": 10, "not_an_object": 90}


def test_changes_of_very_many_rows_leave_room_for_those_that_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accounts, "MAX_CHANGES_BYTES", 2000)
    changed = [chat("q", "a", f"and {number}?") for number in range(90)]
    put(tmp_path, a_jsonl=jsonl(changed), b_jsonl=jsonl(chats(5)) + b"1\n" * 3)
    spec = {
        "preprocessing": QUARANTINE["preprocessing"] | KEEP_COPIES["preprocessing"],
        "evaluation": {"holdoutFraction": 0},
    }
    prepared = prepare_run(tmp_path, spec)
    *listed, last = prepared.decisions
    assert Counter(each["action"] for each in listed)["drop"] == 3
    assert 5 < len(listed) < 40
    assert last == {"not_listed": {"end_left_out": 90 - (len(listed) - 3)}}
    assert prepared.report["changed"] == {"end_left_out": 90}


def test_reading_many_slow_rows_never_looks_like_standing_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, a_jsonl=jsonl(chats(1200)), b_jsonl=jsonl(chats(600)))
    ctx, clock, waited = context(tmp_path, {}), Clock(time.monotonic()), list[float]()
    original = Pipeline._sequences  # pyright: ignore[reportPrivateUsage]

    def slow(self: Pipeline, *args: Any) -> Any:
        clock.now_s += 1000.0
        waited.append(ctx.reporter.progress().seconds_since_step)
        return original(self, *args)

    monkeypatch.setattr(Pipeline, "_sequences", slow)
    monkeypatch.setattr(serve.time, "monotonic", clock)
    prepare.run(ctx)
    assert len(waited) >= 4
    assert max(waited) < 1001.0, "the time of one part, not that of all before it"


def test_broken_rows_end_the_job_only_once_their_share_cannot_recover(tmp_path: Path) -> None:
    spec = {**QUARANTINE, "datasets": [{"uri": (tmp_path / "data").as_uri() + "/", "format": "Messages"}]}
    broken, good = b"1\n" * 3000, jsonl(chats(3100))
    put(tmp_path, a_jsonl=broken + good)
    assert prepare_run(tmp_path, spec).report["dropped"] == {"not_an_object": 3000}
    put(tmp_path, a_jsonl=broken, b_jsonl=good)
    assert prepare_run(tmp_path, spec).report["dropped"] == {"not_an_object": 3000}
    put(tmp_path, a_jsonl=broken * 9 + jsonl(chats(10)), b_jsonl=b"")
    error = fails(tmp_path, spec)
    assert (error.args_by_name["broken"], error.args_by_name["rows"]) == (5000, 5000), "the others cannot outweigh them"


def test_a_tokenizer_that_knows_more_tokens_than_the_model_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "model", config={"vocab_size": 10})
    put(tmp_path, a_jsonl=jsonl(chats(1)))
    said = str(fails(tmp_path))
    assert "at row 1 of a.jsonl, but it has embeddings for 10 ids" in said


def test_a_tokenizer_without_an_end_token_cannot_end_texts(tmp_path: Path) -> None:
    write_model(tmp_path / "model", tokenizer_config={"eos_token": None})
    put(tmp_path, a_jsonl=jsonl([{"text": "a"}]))
    assert "names no eos_token" in str(fails(tmp_path, CPT))


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_damage_to_the_data_is_accounted_for_or_named(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    tmp = tmp_path_factory.mktemp("fuzz")
    content = bytearray(jsonl([*chats(6), {"prompt": "a", "completion": "b"}, {"text": "c"}]))
    for _ in range(data.draw(st.integers(0, 6))):
        place = data.draw(st.integers(0, len(content)))
        content[place : place + data.draw(st.integers(0, 30))] = data.draw(st.binary(max_size=8))
    put(tmp, a_jsonl=bytes(content))
    spec = {"preprocessing": {"onBadRow": "Quarantine", "maxBrokenFraction": 1}}
    try:
        prepared = prepare_run(tmp, spec)
    except StageError:
        return
    accounted(prepared)
    lines = [line for line in bytes(content).split(b"\n") if line.strip(b" \t\r\n\v\f")]
    assert prepared.report["rows_in"] == len(lines)


def test_memory_stays_flat_when_the_data_grows_eightfold(tmp_path: Path) -> None:
    row = json.dumps(chat("the quick brown fox " * 20, "jumps over the lazy dog. " * 20)).encode() + b"\n"
    peaks_mib: list[float] = []
    for times in (1, 8):
        folder = tmp_path / str(times)
        folder.mkdir()
        put(folder, a_jsonl=row * (1500 * times))
        code = (
            "import sys; from pathlib import Path; from data_run import LoadReport, prepare_run, structure\n"
            # Judged by its own tests, in a process of its own, which takes seconds of imports.
            "sizes = {'hidden_size': 32, 'num_hidden_layers': 2, 'vocab_size': 600, 'max_position_embeddings': 512}\n"
            "report = LoadReport(architecture='LlamaForCausalLM', sizes=sizes)\n"
            "structure.load_without_values = lambda _: report\n"
            "prepare_run(Path(sys.argv[1]))\n"
            "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])"
        )
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "support"), "RAYON_NUM_THREADS": "1"}
        command = [sys.executable, "-c", code, str(folder)]
        said = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, text=True, timeout=PATIENCE_S, check=True
        )
        peaks_mib.append(int(said.stdout) / 1024)
    assert peaks_mib[1] < peaks_mib[0] + 24, f"peak MiB of 1x and 8x: {peaks_mib}, {resource.getpagesize()} byte pages"


def test_a_job_whose_rows_the_faster_library_reads_otherwise_is_prepared_again_from_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, a_jsonl=jsonl(chats(600)))
    expected = prepare_run(tmp_path)
    asked: list[bool] = []
    tokens = Tokenizer._tokens  # pyright: ignore[reportPrivateUsage]

    def differs_at_the_second(self: Tokenizer, request: dict[str, Any]) -> Any:
        asked.append(self.choice.library == FAST)
        if len(asked) == 2:
            raise FastDiffersError
        return tokens(self, request)

    monkeypatch.setattr("finetune_trainer.data.tokenizer.FAST_AFTER", 1)
    monkeypatch.setattr(Tokenizer, "_tokens", differs_at_the_second)
    found = prepare_run(tmp_path, attempt=2)
    assert found.train == expected.train
    assert found.report["tokenizer"] == {
        "library": "tokenizers",
        "reason": "fastokens gave other ids for a row, so all rows were read again",
    }
    assert found.report["rows_in"] == expected.report["rows_in"]
    assert len(asked) > 3


def test_special_tokens_in_the_own_words_of_rows_are_counted_and_not_those_of_the_template(tmp_path: Path) -> None:
    rows = [chat("what does <|im_end|> mean? <|im_end|>", "the end"), chat("and <|im_start|>?", "not <|im_end|>")]
    put(tmp_path, a_jsonl=jsonl([*chats(20), *rows]))
    found = prepare_run(tmp_path)
    assert found.report["special_tokens_in_words"] == {"<|im_end|>": 2, "<|im_start|>": 1}


def knows_few_words() -> NativeTokenizer:
    """A tokenizer that reads other words than a few as `<unk>`."""
    words = ["<unk>", "what", "is", "and", "one", "?", "the", "answer", ".", "user", "assistant"]
    tokenizer: Any = NativeTokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return tokenizer


def test_words_that_the_tokenizer_does_not_know_are_counted_by_dataset_and_told_where_they_are_many(
    tmp_path: Path,
) -> None:
    write_model(tmp_path / "model", tokenizer=knows_few_words())
    known = [chat("what is one?", "the answer.") for _ in range(9)]
    put(tmp_path, a_jsonl=jsonl(known), b_jsonl=jsonl([chat("what is ζ?", "ξ is the answer ω."), *known]))
    spec = {"datasets": [{"uri": (tmp_path / "data" / name).as_uri()} for name in ("a.jsonl", "b.jsonl")]}
    found = prepare_run(tmp_path, spec)
    none = {"tokens": 0, "learned": 0, "rows": 0}
    some = {"tokens": 3, "learned": 2, "rows": 1}
    assert [each["unknown_words"] for each in found.report["datasets"]] == [none, some]
    (noted,) = [each for each in found.plan.resolved if "unknown words" in each.field]
    assert (noted.field, noted.value) == ("datasets[1]: unknown words", "1 rows")
    assert noted.reason.startswith("3 of ")
