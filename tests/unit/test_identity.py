"""Equal bytes are the same file, whatever their time or ETag; other bytes never are, unless it is said."""

import base64
import json
import logging
import os
import zlib
from collections.abc import Generator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from data_run import CHATML, chats, context, jsonl, prepare_run, put, write_model
from finetune_api.errors import StageError
from finetune_api.job import DatasetSpec, FineTuneJobSpec
from finetune_api.layout import CHECKPOINTS, DECISIONS, PLAN, REPORT, join
from finetune_api.reasons import Fault
from finetune_api.run import StorageConfig
from finetune_api.status import ResolvedValue
from finetune_trainer import identity, inputs, prepare, reading_steps, sizing, train
from finetune_trainer.commit import raise_epoch
from finetune_trainer.data.listing import changed_files
from finetune_trainer.data.model_facts import Model, read_model
from finetune_trainer.data.structure import Judge
from finetune_trainer.identity import Evidence, evidence, is_other, sample_of, sample_places
from finetune_trainer.inputs import fetch_examples
from finetune_trainer.runplan import (
    FIRST_TO_CHANGE,
    PLAN_VERSION,
    FileRecord,
    plan_digest,
    plan_uri,
    read_plan,
)
from finetune_trainer.stop import StopFlag
from finetune_trainer.store import ObjectInfo, Store, open_store
from stub_s3 import StubS3, Trouble, stub_s3
from tiny_run import TinyRun, make_run
from tiny_run import context as train_context

A, B = "sha256:" + "a" * 64, "sha256:" + "b" * 64
READ = FileRecord(uri="s3://b/f", size_bytes=9, sha256=A, etag="1")
SAMPLED = FileRecord(uri="s3://b/f", size_bytes=9, sample=A, checksum="CRC32:x", etag="1")
OLD = FileRecord(uri="s3://b/f", size_bytes=9, sample=A, etag="1")


def info(etag: str = "2", checksum: str | None = None, size_bytes: int = 9) -> ObjectInfo:
    return ObjectInfo("s3://b/f", size_bytes, etag, checksum)


@pytest.mark.parametrize(
    ("planned", "sha256", "sample", "found", "expected"),
    [
        (READ, A, A, info("2"), Evidence.SHA256),
        (READ, A, A, None, Evidence.SHA256),
        (READ, B, A, info("1"), None),  # the ETag is the same, the bytes are not: a store may do as it likes
        (SAMPLED, B, A, info("2", "CRC32:x"), Evidence.CHECKSUM),
        (SAMPLED, B, A, info("1", "CRC32:y"), None),
        (SAMPLED, B, B, info("1", "CRC32:x"), None),
        (SAMPLED, B, A, info("1", "SHA1:x"), Evidence.ETAG),  # of another algorithm: says nothing
        (SAMPLED, B, A, info("2", "SHA1:x"), Evidence.SAMPLE),
        (OLD, B, A, info("1"), Evidence.ETAG),
        (OLD, B, A, info("2"), Evidence.SAMPLE),
        (OLD, B, A, None, Evidence.SAMPLE),
        (OLD, B, B, info("2"), None),
        (FileRecord(uri="s3://b/f", size_bytes=9), B, A, info("2"), None),  # nothing is known of it
    ],
)
def test_the_best_evidence_decides(
    planned: FileRecord, sha256: str, sample: str, found: ObjectInfo | None, expected: Evidence | None
) -> None:
    assert evidence(planned, sha256, lambda: sample, found) is expected


def test_another_size_or_checksum_is_told_before_anything_is_read() -> None:
    assert is_other(READ, info(size_bytes=8))
    assert is_other(SAMPLED, info("1", "CRC32:y"))
    assert not any(is_other(SAMPLED, found) for found in (info("2", "CRC32:x"), info("2", "SHA1:y"), info("2")))


def test_a_sample_spans_the_file_and_tells_a_change_of_every_block(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    size = 3 * identity.SAMPLE_BYTES + 7
    content = bytearray(os.urandom(size))
    path.write_bytes(content)
    before = sample_of(path)
    places = sample_places(size)
    assert (places[0][0], sum(places[-1])) == (0, size)
    assert len(places) == identity.BLOCKS
    for offset, length in places:
        for at in (offset, offset + length - 1):
            content[at] ^= 1
            path.write_bytes(content)
            assert sample_of(path) != before
            content[at] ^= 1
    path.write_bytes(content)
    os.utime(path, (1, 1))
    assert sample_of(path) == before
    path.write_bytes(content[: size - 1])
    assert sample_of(path) != before


@pytest.fixture
def server() -> Generator[StubS3]:
    with stub_s3() as made:
        made.random_etags = True
        yield made


@pytest.fixture
def storage(server: StubS3, monkeypatch: pytest.MonkeyPatch) -> StorageConfig:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    return StorageConfig(endpoint=server.endpoint, path_style=True)


def upload(server: StubS3, folder: Path, prefix: str) -> None:
    for path in folder.iterdir():
        server.write(f"bucket/{prefix}/{path.name}", path.read_bytes())


def test_a_part_of_an_object_is_read_at_one_version_and_a_cut_is_resumed(
    server: StubS3, storage: StorageConfig
) -> None:
    store = open_store(storage)
    content = os.urandom(100_000)
    server.write("bucket/f", content)
    server.troubles = [Trouble("GET", cut_after=1000)]
    assert store.read_range("s3://bucket/f", 5000, 3000) == content[5000:8000]
    assert server.requests == ["GET bucket/f bytes=5000-7999", "GET bucket/f bytes=6000-7999"]
    server.troubles = [Trouble("GET", cut_after=1000, then_write=content)]
    for fails in (
        lambda: store.read_range("s3://bucket/f", 0, 3000),
        lambda: store.read_range("s3://bucket/f", 0, 100_001),
    ):
        with pytest.raises(StageError) as caught:
            fails()
        assert caught.value.fault is Fault.INPUT_CHANGED


def test_the_stores_own_checksum_is_told_where_it_is_of_the_whole_object(
    server: StubS3, storage: StorageConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(storage)
    server.write("bucket/f", b"content")
    assert store.head("s3://bucket/f") == ObjectInfo("s3://bucket/f", 7, server.tag("bucket/f"), None)
    server.tells_checksums = True
    found = store.head("s3://bucket/f")
    assert found is not None
    assert found.checksum == "CRC32:" + base64.b64encode(zlib.crc32(b"content").to_bytes(4, "big")).decode()
    server.checksum_type = "COMPOSITE"
    found = store.head("s3://bucket/f")
    assert found is not None
    assert found.checksum is None


def prepared(tmp_path: Path, storage: StorageConfig, attempt: int, model: str = "model") -> Any:
    """The result of a prepare stage over the bucket."""
    uris = {"model": {"uri": f"s3://bucket/{model}"}, "datasets": [{"uri": "s3://bucket/data/"}]}
    ctx = context(tmp_path, {**uris, "output": {"uri": "s3://bucket/out"}}, attempt)
    config = ctx.config.model_copy(update={"storage": storage, "run_uri": "s3://bucket/out/bot-1a2b3"})
    return prepare.run(replace(ctx, config=config, store=open_store(storage)))


def test_two_prepares_give_the_same_plan_though_every_object_was_written_again(
    tmp_path: Path, server: StubS3, storage: StorageConfig
) -> None:
    write_model(tmp_path / "model")
    upload(server, tmp_path / "model", "model")
    server.write("bucket/data/a.jsonl", jsonl(chats(60)))
    first = prepared(tmp_path, storage, 1)
    server.retag()
    assert prepared(tmp_path, storage, 2).plan == first.plan
    server.write("bucket/data/a.jsonl", jsonl(chats(61)))
    assert prepared(tmp_path, storage, 3).plan.digest != first.plan.digest
    server.write("bucket/data/a.jsonl", jsonl(chats(60)))
    weights = bytearray(server.objects["bucket/model/model.safetensors"])
    weights[-1] ^= 1
    server.write("bucket/model/model.safetensors", bytes(weights))
    assert prepared(tmp_path, storage, 4).plan.digest != first.plan.digest


def test_two_prepares_give_the_same_plan_though_every_file_has_another_time(tmp_path: Path) -> None:
    put(tmp_path, a_jsonl=jsonl(chats(60)))
    first = prepare_run(tmp_path)
    for path in tmp_path.rglob("*"):
        os.utime(path, (1, 1))
    assert prepare_run(tmp_path, attempt=2).result.plan == first.result.plan


def test_a_file_that_is_written_again_between_list_and_read_is_read_as_it_is(
    tmp_path: Path, server: StubS3, storage: StorageConfig
) -> None:
    write_model(tmp_path / "model")
    upload(server, tmp_path / "model", "model")
    content = jsonl(chats(60))
    server.write("bucket/data/a.jsonl", content)
    server.retags_after_list = True
    assert prepared(tmp_path, storage, 1).exit_code == 0


def test_training_goes_on_with_equal_bytes_of_another_etag(
    tmp_path: Path, server: StubS3, storage: StorageConfig
) -> None:
    run = make_run(tmp_path, steps=2, rows=12)
    upload(server, tmp_path / "model", "model")
    rows = [{"text": "the answer is always the same, again and again. " * 3 + str(i)} for i in range(60)]
    server.write("bucket/data/a.jsonl", jsonl(rows))
    spec = {
        "method": {"type": "CPT"},
        "model": {"uri": "s3://bucket/model"},
        "datasets": [{"uri": "s3://bucket/data/"}],
        "hyperparameters": {"maxSteps": 2},
        "output": {"uri": "s3://bucket/out"},
    }
    ctx = context(tmp_path, spec)
    config = ctx.config.model_copy(update={"storage": storage, "run_uri": "s3://bucket/out/bot-1a2b3"})
    plan = prepare.run(replace(ctx, config=config, store=open_store(storage))).plan
    assert plan is not None
    server.retag()
    given = replace(train_context(run), config=config, store=open_store(storage), plan_digest=plan.digest)
    assert train.run(given, StopFlag(60)).fault is Fault.COMMITTED


def weights_of(run: TinyRun) -> Path:
    return run.folder / "model" / "model.safetensors"


def planned_by_sample(run: TinyRun, **more: Any) -> None:
    """Plan as prepare does for weights that it does not read whole."""
    path = weights_of(run)
    found = run.store.head(path.as_uri())
    assert found is not None
    facts = {"sha256": None, "sample": sample_of(path), "etag": found.etag, **more}
    files = [
        record.model_copy(update=facts) if record.uri == path.as_uri() else record for record in run.plan.model.files
    ]
    run.write_plan(run.plan.model_copy(update={"model": run.plan.model.model_copy(update={"files": files})}))


def test_training_goes_on_with_files_that_were_touched(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=2, rows=12)
    for path in tmp_path.rglob("*"):
        os.utime(path, (1, 1))
    assert train.run(train_context(run), StopFlag(60)).fault is Fault.COMMITTED
    manifest = json.loads(run.local("adapter", "manifest.json").read_text())
    assert set(manifest["base"]["known_by"].values()) == {"sha256"}


def test_weights_known_by_a_sample_alone_are_trained_with_a_warning_and_named_in_the_lineage(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "BLOCK_BYTES", 64)
    monkeypatch.setattr(identity, "SAMPLE_BYTES", 64 * identity.BLOCKS)
    run = make_run(tmp_path, steps=2, rows=12)
    planned_by_sample(run)
    os.utime(weights_of(run), (1, 1))
    with caplog.at_level(logging.WARNING):
        assert train.run(train_context(run), StopFlag(60)).fault is Fault.COMMITTED
    assert "model.safetensors was written since the job was prepared" in caplog.text
    manifest = json.loads(run.local("adapter", "manifest.json").read_text())
    assert manifest["base"]["known_by"]["model.safetensors"] == "sample"
    assert "compared by its size and a sample alone" in run.local("adapter", "README.md").read_text()


def test_weights_changed_between_two_blocks_of_their_sample_end_the_next_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "BLOCK_BYTES", 64)
    monkeypatch.setattr(identity, "SAMPLE_BYTES", 64 * identity.BLOCKS)
    run = make_run(tmp_path, steps=2, rows=12)
    planned_by_sample(run)
    sample = sample_of(weights_of(run))
    stop = StopFlag(60)
    monkeypatch.setattr("finetune_trainer.session.Session.run", _saved_and_stopped(stop))
    with pytest.raises(StageError) as caught:
        train.run(train_context(run), stop)
    assert caught.value.fault is Fault.INTERRUPTED
    assert run.store.list(join(run.run_uri, CHECKPOINTS))
    content = bytearray(weights_of(run).read_bytes())
    content[len(content) - 64 - 9] ^= 1
    weights_of(run).write_bytes(content)
    assert sample_of(weights_of(run)) == sample
    with pytest.raises(StageError) as caught:
        train.run(train_context(run, attempt=2), StopFlag(60))
    assert (caught.value.fault, caught.value.args_by_name["uri"]) == (
        Fault.MODEL_CHANGED,
        "model.safetensors of the base model",
    )


def _saved_and_stopped(stop: StopFlag) -> Any:
    """A session that takes one step, saves and is asked to stop."""

    def run(session: Any) -> bool:
        session.stepper.run(0)
        session.position = session.position.model_copy(update={"step": 1})
        session.checkpointer.start(session._snapshot())
        session.checkpointer.wait()
        stop.set()
        return False

    return run


def test_a_file_that_is_written_while_it_is_downloaded_is_begun_again(
    tmp_path: Path, server: StubS3, storage: StorageConfig
) -> None:
    write_model(tmp_path / "model")
    upload(server, tmp_path / "model", "model")
    store = open_store(storage)
    plan = read_model(store, "s3://bucket/model").facts
    name = "bucket/model/model.safetensors"
    same = server.objects[name]
    server.troubles = [Trouble("GET", cut_after=1000, then_write=same)] * 2
    record = next(file for file in plan.files if file.uri.endswith("model.safetensors"))
    file = inputs._fetch(store, record, tmp_path / "copy", Fault.MODEL_CHANGED)  # pyright: ignore[reportPrivateUsage]
    assert file.known_by is Evidence.SHA256
    server.troubles = [Trouble("GET", cut_after=1000, then_write=same[:-1] + b"x")]
    with pytest.raises(StageError) as caught:
        inputs._fetch(store, record, tmp_path / "copy", Fault.MODEL_CHANGED)  # pyright: ignore[reportPrivateUsage]
    assert caught.value.fault is Fault.MODEL_CHANGED


def test_data_that_was_only_written_again_has_not_changed(tmp_path: Path) -> None:
    put(tmp_path, a_jsonl=jsonl(chats(60)), b_jsonl=jsonl(chats(5)))
    read = prepare_run(tmp_path).plan.inputs
    store: Store = open_store(StorageConfig())
    datasets = [DatasetSpec.model_validate({"uri": (tmp_path / "data").as_uri() + "/"})]
    for path in (tmp_path / "data").iterdir():
        os.utime(path, (1, 1))
    assert changed_files(store, datasets, read) == []
    put(tmp_path, b_jsonl=jsonl(chats(5)).replace(b"5", b"6"))
    assert changed_files(store, datasets, read) == [(tmp_path / "data" / "b.jsonl").as_uri()]


DATED = "{{ strftime_now('%d %b %Y %H:%M:%S %f') }}" + CHATML


def test_two_prepares_at_different_times_give_the_same_plan_though_the_template_tells_the_time(tmp_path: Path) -> None:
    write_model(tmp_path / "model", template=DATED)
    put(tmp_path, a_jsonl=jsonl(chats(30)))
    ctx = context(tmp_path, {})
    job = ctx.config.job.model_copy(update={"created_at": datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)})
    given = replace(ctx, config=ctx.config.model_copy(update={"job": job}))
    first, again = prepare.run(given), prepare.run(replace(given, work_dir=_another(tmp_path)))
    assert first.plan == again.plan
    assert first.plan is not None
    plan = read_plan(ctx.store, ctx.config.run_uri, first.plan.digest).plan
    assert "02 Jan 2026 03:04:05" in plan.sample_prompts[0].text


def _another(tmp_path: Path) -> Path:
    folder = tmp_path / "work" / "another"
    folder.mkdir(parents=True)
    return folder


def test_a_template_that_asks_for_chance_is_refused_as_no_server_sends_what_would_be_learned(tmp_path: Path) -> None:
    write_model(tmp_path / "model", template="{{ range(99999) | random }}" + CHATML)
    put(tmp_path, a_jsonl=jsonl(chats(30)))
    with pytest.raises(StageError) as refused:
        prepare_run(tmp_path)
    assert refused.value.fault is Fault.TEMPLATE_RANDOM


def test_a_late_prepare_never_replaces_a_plan_in_use(tmp_path: Path) -> None:
    """An attempt of prepare that was given up finishes after training began, over data that has changed since."""
    put(tmp_path, a_jsonl=jsonl(chats(30)))
    told = prepare_run(tmp_path).result.plan
    assert told is not None
    put(tmp_path, a_jsonl=jsonl(chats(40)))
    late = prepare_run(tmp_path, attempt=2)
    assert late.result.plan is not None
    assert late.result.plan.digest != told.digest
    ctx = context(tmp_path, {})
    in_use = read_plan(ctx.store, ctx.config.run_uri, told.digest)
    assert (in_use.digest, in_use.plan.digest()) == (told.digest, told.digest)
    assert told.uri.endswith(f"/.job/plans/{told.digest.removeprefix('sha256:')}.json")
    assert read_plan(ctx.store, ctx.config.run_uri, None).digest == late.result.plan.digest
    fetch_examples(ctx.store, in_use.plan.train, tmp_path / "rows")


@pytest.mark.parametrize(("more", "fault"), [(b"", Fault.SUPERSEDED), (b"{", Fault.BROKEN_ROW)])
def test_a_prepare_that_ends_after_training_began_leaves_what_tells_of_the_plan_in_use(
    more: bytes, fault: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, a_jsonl=jsonl(chats(30)))
    prepare_run(tmp_path)
    ctx = context(tmp_path, {})
    uris = [join(ctx.config.run_uri, name) for name in (PLAN, REPORT, DECISIONS)]
    told = [ctx.store.read(uri)[0] for uri in uris]
    _begin_to_train_meanwhile(ctx.config.run_uri, monkeypatch)
    put(tmp_path, a_jsonl=jsonl(chats(40)) + more)
    with pytest.raises(StageError) as caught:
        prepare_run(tmp_path, attempt=2)
    assert caught.value.fault is fault
    assert [ctx.store.read(uri)[0] for uri in uris] == told


def _begin_to_train_meanwhile(run_uri: str, patch: pytest.MonkeyPatch) -> None:
    """Let an attempt to train begin after the next prepare stage has begun."""
    original = reading_steps.read_model

    def begin_to_train(store: Store, uri: str, judge: Judge) -> Model:
        raise_epoch(store, run_uri, 1, "the training pod")
        return original(store, uri, judge)

    patch.setattr(reading_steps, "read_model", begin_to_train)


def test_a_job_can_be_prepared_again_after_an_attempt_to_train(tmp_path: Path) -> None:
    put(tmp_path, a_jsonl=jsonl(chats(30)))
    first = prepare_run(tmp_path)
    ctx = context(tmp_path, {})
    for attempt in (1, 2):
        raise_epoch(ctx.store, ctx.config.run_uri, attempt, "the training pod")
    assert prepare_run(tmp_path, attempt=2).result.plan == first.result.plan
    put(tmp_path, a_jsonl=jsonl(chats(40)) + b"{")
    with pytest.raises(StageError):
        prepare_run(tmp_path, attempt=3)
    assert json.loads(ctx.store.read(join(ctx.config.run_uri, REPORT))[0])["state"] == "failed", "of the new data"


def as_of_the_release_before(run: TinyRun) -> str:
    """Leave the plan as contract 1 did, with steps that this run has; return the digest that was told."""
    path = Path(__file__).parents[1] / "support" / "contract_1" / "plan.json"
    run.local(PLAN).write_bytes(path.read_bytes())
    return "sha256:" + "9" * 64


def test_a_plan_of_another_release_is_prepared_again_while_no_step_is_finished(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=2, rows=12)
    told = as_of_the_release_before(run)
    # Where a stop came before the first step.
    run.store.put(join(run.run_uri, CHECKPOINTS, "00000000-1", "manifest.json"), b"{}")
    words = f"version 1, and this trainer follows plans of version {PLAN_VERSION}"
    with pytest.raises(StageError, match=words) as caught:
        train.run(replace(train_context(run), plan_digest=told), StopFlag(60))
    assert (caught.value.fault, caught.value.exit_code) == (Fault.PLAN_OUTDATED, 36)
    for version in (PLAN_VERSION + 1, None, "2"):
        run.local(PLAN).write_text(json.dumps({"version": version}))
        with pytest.raises(StageError) as caught:
            read_plan(run.store, run.run_uri, told)
        assert caught.value.fault is Fault.PLAN_OUTDATED


def test_a_plan_of_another_release_ends_a_job_with_finished_steps_by_name(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=2, rows=12)
    told = as_of_the_release_before(run)
    run.store.put(join(run.run_uri, CHECKPOINTS, "00000007-1", "manifest.json"), b"{}")
    with pytest.raises(StageError, match="7 steps are finished by the old plan") as caught:
        train.run(replace(train_context(run), plan_digest=told), StopFlag(60))
    assert (caught.value.fault, caught.value.exit_code) == (Fault.PLAN_OF_OTHER_RELEASE, 10)


def test_a_plan_keeps_its_digest_when_a_later_release_gives_it_a_field_with_a_default(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    content = json.loads(run.plan.model_dump_json())
    for record in content["model"]["files"]:
        del record["checksum"]  # as if this release had added the field
    digest = plan_digest(content)
    run.store.put(plan_uri(run.run_uri, digest), json.dumps(content).encode())
    assert read_plan(run.store, run.run_uri, digest).digest == digest
    content["of_the_future"] = 1
    digest = plan_digest(content)
    run.store.put(plan_uri(run.run_uri, digest), json.dumps(content).encode())
    with pytest.raises(StageError) as caught:
        read_plan(run.store, run.run_uri, digest)
    assert caught.value.fault is Fault.PLAN_OUTDATED


def test_the_status_holds_the_twenty_chosen_values_that_people_change_first_and_the_plan_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, a_jsonl=jsonl(chats(30)))
    many = [ResolvedValue(field=f"more.field{i}", value="1", reason="r") for i in range(40)]
    size = sizing.size

    def size_more(*args: Any) -> sizing.Sizing:
        sized = size(*args)
        return replace(sized, resolved=[*many, *sized.resolved])

    monkeypatch.setattr(sizing, "size", size_more)
    found = prepare_run(tmp_path)
    assert found.result.plan is not None
    assert {value.field for value in many} < {value.field for value in found.plan.resolved}
    assert found.result.plan.resolved == found.plan.resolved[:20]
    assert [value.field for value in found.plan.resolved[:4]] == [
        "hyperparameters.epochs",
        "hyperparameters.learningRate",
        "hyperparameters.globalBatchSize",
        "preprocessing.maxSequenceLength",
    ]


def test_the_values_that_people_change_first_are_fields_of_a_job() -> None:
    for path in FIRST_TO_CHANGE:
        model: Any = FineTuneJobSpec
        for name in path.replace("[]", "").split("."):
            fields = {field.alias or key: field for key, field in model.model_fields.items()}
            assert name in fields, path
            inner = [
                kind
                for kind in (fields[name].annotation, *get_args(fields[name].annotation))
                if isinstance(kind, type) and issubclass(kind, BaseModel)
            ]
            model = inner[0] if inner else None
