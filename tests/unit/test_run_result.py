"""A result always fits into the termination message, in bytes as written, and says what the operator decides by."""

import json
import operator
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_api.layout import join
from finetune_api.names import Stage
from finetune_api.reasons import Fault
from finetune_api.run import MAX_ARG_CHARS, MAX_ARGS, MAX_RESULT_BYTES, RunResult
from finetune_api.status import (
    Artifact,
    CheckpointStatus,
    DataStatus,
    DroppedRows,
    MetricsStatus,
    PlanStatus,
    ResolvedValue,
)
from finetune_operator.observed import parse_result
from finetune_trainer import results

DIGEST = "sha256:" + "0" * 64
WORST = ["a", "é", "目", "😀", "\\", '"', "\n", "\x7f", "\u2028"]
MAX_RUN_URI_CHARS = 512 + 1 + 46  # output.uri/NAME-UID5


def texts(max_size: int) -> st.SearchStrategy[str]:
    """Short and long ones, also of letters that need four bytes or an escape."""
    repeated = st.builds(operator.mul, st.sampled_from(WORST), st.integers(0, max_size))
    return st.text(max_size=max_size) | repeated


COUNTS = st.integers(0, 2**53 - 1)


@st.composite
def any_result(draw: st.DrawFn) -> RunResult:
    run_uri = "s3://b/" + draw(texts(MAX_RUN_URI_CHARS - 7))
    values = texts(MAX_ARG_CHARS) | COUNTS | st.floats(allow_nan=False, allow_infinity=False)
    resolved = st.builds(ResolvedValue, field=texts(64), value=texts(64), reason=texts(160))
    dropped = st.builds(DroppedRows, reason=texts(64), rows=COUNTS)
    plan = st.builds(
        PlanStatus,
        uri=st.just(join(run_uri, ".job/plan.json")),
        digest=st.just(DIGEST),
        steps=COUNTS,
        train_tokens=COUNTS,
        label_tokens=COUNTS,
        memory_bytes=COUNTS,
        disk_bytes=COUNTS,
        resolved=st.lists(resolved, max_size=20),
    )
    data = st.builds(
        DataStatus,
        files=COUNTS,
        rows_in=COUNTS,
        rows_used=COUNTS,
        rows_held_out=COUNTS,
        dropped=st.lists(dropped, max_size=10),
        digest=st.just(DIGEST),
        reportUri=st.just(join(run_uri, ".job/report.json")),  # by its alias, or hypothesis makes up another one
        reportPageUri=st.just(join(run_uri, ".job/report.html")),
    )
    checkpoint = CheckpointStatus(
        step=draw(COUNTS), uri=join(run_uri, ".job/checkpoints/00000012-1/manifest.json"), digest=DIGEST
    )
    artifact = Artifact(
        type="Adapter",
        uri=join(run_uri, "adapter/"),
        digest=DIGEST,
        manifest_uri=join(run_uri, "adapter/manifest.json"),
        base_digest=DIGEST,
        rank=16,
    )
    return RunResult(
        stage=draw(st.sampled_from(Stage)),
        attempt=draw(st.integers(1, 999)),
        fault=draw(st.sampled_from(Fault)),
        args=draw(st.dictionaries(texts(64), values, max_size=MAX_ARGS)),
        exit_code=draw(st.integers(0, 255)),
        plan=draw(st.none() | plan),
        data=draw(st.none() | data),
        metrics=draw(st.none() | st.builds(MetricsStatus, train_loss=st.floats(allow_nan=False), loss=texts(64))),
        checkpoint=draw(st.none() | st.just(checkpoint)),
        artifact=draw(st.none() | st.just(artifact)),
        step=draw(st.none() | COUNTS),
        log_uri=draw(st.none() | st.just(join(run_uri, ".job/logs/train-1.jsonl"))),
    )


@settings(max_examples=150, deadline=None)
@given(any_result())
def test_every_result_fits_in_bytes_and_the_operator_reads_what_it_decides_by(result: RunResult) -> None:
    message = result.to_message()
    assert len(message) <= MAX_RESULT_BYTES
    kept, bad = parse_result(message.decode())
    assert not bad
    assert kept is not None
    for field in ("stage", "attempt", "fault", "exit_code", "artifact", "step"):
        assert getattr(kept, field) == getattr(result, field), field
    assert (kept.plan and kept.plan.digest) == (result.plan and result.plan.digest)
    assert (kept.plan and kept.plan.uri) == (result.plan and result.plan.uri)
    if result.data is not None:
        assert kept.data is not None
        assert kept.data.report_uri == result.data.report_uri
        assert kept.data.report_page_uri == result.data.report_page_uri
        assert sum(drop.rows for drop in kept.data.dropped) == sum(drop.rows for drop in result.data.dropped)


@pytest.mark.parametrize("letter", ["é", "目", "😀"])
def test_a_committed_adapter_of_the_longest_uri_is_told_whole(letter: str) -> None:
    run_uri = "s3://b/" + letter * (MAX_RUN_URI_CHARS - 7)
    artifact = Artifact(
        type="Adapter",
        uri=join(run_uri, "adapter/"),
        digest=DIGEST,
        manifest_uri=join(run_uri, "adapter/manifest.json"),
        rank=16,
    )
    result = RunResult(
        stage=Stage.TRAIN,
        attempt=1,
        fault=Fault.COMMITTED,
        args={"uri": artifact.uri[:MAX_ARG_CHARS]},
        exit_code=0,
        checkpoint=CheckpointStatus(step=12, uri=join(run_uri, ".job/checkpoints/1-1/manifest.json"), digest=DIGEST),
        artifact=artifact,
        log_uri=join(run_uri, ".job/logs/train-1.jsonl"),
    )
    message = result.to_message()
    assert len(message) <= MAX_RESULT_BYTES
    assert RunResult.model_validate_json(message).artifact == artifact


def test_a_short_result_is_plain_json_that_earlier_operators_read_too() -> None:
    result = RunResult(stage=Stage.TRAIN, attempt=1, fault=Fault.STOPPED, exit_code=30, log_uri="s3://b/目/x")
    assert json.loads(result.to_message())["log_uri"] == "s3://b/目/x"


def test_a_name_that_is_no_text_and_arguments_without_end_still_make_a_result() -> None:
    from finetune_api.errors import StageError

    args: dict[str, str | int | float] = {f"a{number}": "x" * 1000 for number in range(20)}
    error = StageError(Fault.DISK_FULL, what="a\udcff", needed_gib=float("inf"), **args)
    result = results.failed(Stage.TRAIN, 1, error, None, None)
    assert (result.args["what"], result.args["needed_gib"]) == ("a\ufffd", "inf")
    assert RunResult.model_validate_json(result.to_message()).fault is Fault.DISK_FULL
    assert results.trouble(error, datetime.now(UTC).timestamp()).fault is Fault.DISK_FULL
