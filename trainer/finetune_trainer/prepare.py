"""The prepare stage: rows in object storage become prepared arrays, a batch plan and `plan.json`. No GPU, no torch.

Arrays and the plan that is trained on lie at names made of their content; report.json, decisions.jsonl and, last,
plan.json are replaced by the next prepare, until training begins. Running the stage again is safe at any point.
"""

import errno
import hashlib
import json
import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from finetune_api import defaults
from finetune_api.base import sha256_digest
from finetune_api.errors import StageError
from finetune_api.job import (
    DatasetFormat,
    DatasetSpec,
    EvaluationSpec,
    LossOn,
    MethodType,
    OnBadRow,
    PreprocessingSpec,
    SameRoleMessages,
    SystemMessages,
    TooLong,
)
from finetune_api.layout import DECISIONS, PLAN, PREPARED, REPORT, join
from finetune_api.reasons import Fault, Reason
from finetune_api.redact import shortened
from finetune_api.row_words import row_words
from finetune_api.run import MAX_ARG_CHARS, RunResult
from finetune_api.status import MAX_RESOLVED, DataStatus, PlanStatus
from finetune_trainer import batches, sizing
from finetune_trainer.batches import BatchPlan, Mix
from finetune_trainer.commit import Fence, before_training, claim
from finetune_trainer.context import StageContext
from finetune_trainer.data import report
from finetune_trainer.data.accounts import Action, Ledger
from finetune_trainer.data.answers import Ends
from finetune_trainer.data.detect import check_given
from finetune_trainer.data.encoders import FAST, FastDiffersError
from finetune_trainer.data.examples import Examples, open_examples
from finetune_trainer.data.listing import find_files
from finetune_trainer.data.model_facts import Model, read_model
from finetune_trainer.data.pipeline import TEXT_PROMPT_TOKENS, Pipeline, Timings, require_end_token
from finetune_trainer.data.problems import HELD_OUT, Drop, place
from finetune_trainer.data.progress import reading_figures
from finetune_trainer.data.reading import BadRows, checked_rows
from finetune_trainer.data.renderer import Renderer
from finetune_trainer.data.shapes import RowChoices
from finetune_trainer.data.spool import (
    Division,
    Spool,
    Written,
    divide,
    prepared_bytes,
    write_split,
)
from finetune_trainer.data.taught import Taught
from finetune_trainer.data.template import plain_template
from finetune_trainer.data.tokenizer import TokenizerFailedError
from finetune_trainer.data.too_long import SequenceLimit, TooLongRows
from finetune_trainer.patience import best_effort
from finetune_trainer.runplan import FileRecord, RunPlan, SamplePrompt, SplitFiles, first_to_change, plan_uri
from finetune_trainer.sizing import Choices, DataFacts
from finetune_trainer.standstill import ended_by_standstill

log = logging.getLogger(__name__)

_SAMPLES = 3
_MAX_SAMPLE_TOKENS = 4096
_MAX_SAMPLE_CHARACTERS = 4000


@dataclass
class _Stage:
    """What the steps of one prepare stage share."""

    ctx: StageContext
    model: Model
    limit: SequenceLimit
    choices: Choices
    ledger: Ledger
    loss_on: LossOn = LossOn.ALL
    template: str | None = None  # the chat template, if any conversation was rendered
    taught: Taught = field(default_factory=Taught)
    formats: list[DatasetFormat] = field(default_factory=list[DatasetFormat])
    first_files: list[int] = field(default_factory=list[int])  # of each dataset, as an index into the ledger
    ignored: list[str] = field(default_factory=list[str])
    timings: Timings = field(default_factory=Timings)

    @property
    def spool_dir(self) -> Path:
        return self.ctx.work_dir / "spool"

    @property
    def preprocessing(self) -> PreprocessingSpec:
        return self.ctx.config.spec.preprocessing or PreprocessingSpec()


def run(ctx: StageContext) -> RunResult:
    """Prepare one job; returns PREPARED with the plan's essence. Known ends are raised as StageError, but for
    NO_PROGRESS, which ends the process.

    Raises SUPERSEDED when training begins meanwhile: the report and plan.json tell of the plan that is trained on."""
    recovery = ctx.config.spec.recovery
    limit_s = defaults.given(recovery and recovery.progress_deadline_seconds, defaults.PROGRESS_DEADLINE_S)
    ctx = replace(ctx, store=ctx.store.telling(ctx.reporter.touch))
    try:
        with ended_by_standstill(ctx, limit_s):
            claim(ctx.store, ctx.config.run_uri, ctx.config.job.uid)
            return _prepare(ctx, before_training(ctx.store, ctx.config.run_uri))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StageError(Fault.DISK_FULL, what="the prepared data") from error
        raise


def _prepare(ctx: StageContext, fence: Fence) -> RunResult:
    spec = ctx.config.spec
    for index, dataset in enumerate(spec.datasets):
        check_given(dataset.format, spec.method.type, index)
    ctx.reporter.update(activity="Loading")  # judging the model takes longer than the data does where that is small
    model = read_model(ctx.store, spec.model.uri)
    ctx.reporter.update(activity="Reading")
    try:
        with closing(model.tokenizer):
            return _prepare_exactly(model, ctx, fence)
    except TokenizerFailedError as error:
        uri, architecture = place(spec.model.uri), shortened(model.facts.architecture, 64)
        problem = shortened(str(error), MAX_ARG_CHARS)
        raise StageError(Fault.UNSUPPORTED_MODEL, uri=uri, architecture=architecture, problem=problem) from error


def _prepare_exactly(model: Model, ctx: StageContext, fence: Fence) -> RunResult:
    """Prepare; once more from the start, by Hugging Face's library alone, where the faster one gave other ids."""
    try:
        return _prepare_with(model, ctx, fence)
    except FastDiffersError:
        reason = f"{FAST} gave other ids for a row, so all rows were read again"
        log.warning("%s", reason)
        model.tokenizer.start_slow(reason)
        return _prepare_with(model, ctx, fence)


def _prepare_with(model: Model, ctx: StageContext, fence: Fence) -> RunResult:
    limit = sizing.sequence_limit(ctx.config.spec, model.facts, model.family, ctx.config.resources)
    began_s = time.monotonic()

    def told(rows: int) -> None:
        seconds = time.monotonic() - began_s
        ctx.reporter.update(**reading_figures(ledger.files, ledger.file_read, rows, seconds))

    with Ledger(ctx.work_dir / "decisions.jsonl", told) as ledger:
        stage = _Stage(ctx, model, limit, Choices(), ledger)
        try:
            _read_datasets(stage)
            division = _divide(stage)
        except StageError as error:
            if error.reason is Reason.DATA_INVALID:
                _upload_failure(stage, fence)
            raise
    return _write(stage, division, fence)


def _loss_on(stage: _Stage) -> LossOn:
    method = stage.ctx.config.spec.method
    if method.type is MethodType.CPT:
        return LossOn.ALL
    given = method.sft.loss_on if method.sft else None
    reason = "the answers and the token that ends them"
    return stage.choices.pick("method.sft.lossOn", given, LossOn(defaults.LOSS_ON), reason)


def _bad_rows(stage: _Stage) -> BadRows:
    given, fraction = stage.preprocessing.on_bad_row, stage.preprocessing.max_broken_fraction
    policy = stage.choices.pick(
        "preprocessing.onBadRow", given, OnBadRow(defaults.ON_BAD_ROW), "no row is left out unasked"
    )
    if policy is OnBadRow.FAIL:
        return BadRows(stage.ledger, quarantine=False, max_broken_fraction=0.0)
    reason = "if more are broken, something else is wrong"
    fraction = stage.choices.pick("preprocessing.maxBrokenFraction", fraction, defaults.MAX_BROKEN_FRACTION, reason)
    return BadRows(stage.ledger, quarantine=True, max_broken_fraction=fraction)


def _message_choices(stage: _Stage) -> tuple[SystemMessages, SameRoleMessages]:
    """Choose what becomes of system messages and of neighbours of one role."""
    given = stage.preprocessing
    if stage.ctx.config.spec.method.type is MethodType.CPT:
        return SystemMessages(defaults.SYSTEM_MESSAGES), SameRoleMessages(defaults.SAME_ROLE_MESSAGES)
    return (
        stage.choices.pick(
            "preprocessing.systemMessages",
            given.system_messages,
            SystemMessages(defaults.SYSTEM_MESSAGES),
            "the chat template gets them as they are written",
        ),
        stage.choices.pick(
            "preprocessing.sameRoleMessages",
            given.same_role_messages,
            SameRoleMessages(defaults.SAME_ROLE_MESSAGES),
            "two messages are not one",
        ),
    )


def _row_choices(dataset: DatasetSpec, system_messages: SystemMessages, same_role: SameRoleMessages) -> RowChoices:
    columns = dataset.columns.model_dump(exclude_none=True) if dataset.columns else {}
    return RowChoices(
        columns={theirs: ours for ours, theirs in columns.items()},
        ignored=frozenset(dataset.ignore_fields or ()),
        system_messages=system_messages,
        same_role=same_role,
    )


def _too_long(stage: _Stage) -> TooLongRows:
    given, fraction = stage.preprocessing.too_long, stage.preprocessing.max_too_long_fraction
    cpt = stage.ctx.config.spec.method.type is MethodType.CPT
    policy = given or TooLong(defaults.CPT_TOO_LONG if cpt else defaults.SFT_TOO_LONG)
    return TooLongRows(policy, stage.limit, defaults.given(fraction, defaults.MAX_TOO_LONG_FRACTION), stage.ledger)


def _choose_too_long(stage: _Stage, too_long: TooLongRows) -> None:
    """Record what became of rows that are too long, where there are any. Raises TOO_MANY_LONG_ROWS."""
    too_long.check()
    if not too_long.met:
        return
    spec = stage.preprocessing
    stage.choices.pick("preprocessing.tooLong", spec.too_long, too_long.policy, "no answer is cut unasked")
    if too_long.dropped:
        reason = "if more are too long, the limit is wrong for the data"
        fraction = defaults.MAX_TOO_LONG_FRACTION
        stage.choices.pick("preprocessing.maxTooLongFraction", spec.max_too_long_fraction, fraction, reason)


def _renderer(stage: _Stage) -> tuple[str, Renderer] | None:
    """The chat template and the process that runs it; None when there is no template."""
    model = stage.model
    tokens, source = dict(model.special_tokens), model.chat_template
    if stage.preprocessing.chat_template == "plain":
        require_end_token(model)
        assert model.tokenizer.eos_id is not None
        tokens.setdefault("eos_token", model.tokenizer.decode([model.tokenizer.eos_id]))
        source = plain_template(begins_with_bos=bool(model.tokenizer.prefix_ids) and "bos_token" in tokens)
    if source is None:
        return None
    now = stage.ctx.config.job.created_at or datetime.now(UTC)
    ends = Ends(model.stops, model.stops[0] if stage.preprocessing.add_end_token and model.stops else None)
    accepted = stage.preprocessing.accept_vanishing or ()
    return source, Renderer(source, tokens, now, ends=ends, learn_all=stage.loss_on is LossOn.ALL, accepted=accepted)


def _require_taught(stage: _Stage, taught: Taught) -> None:
    """Say how conversations became sequences. Raises UNROLLED_TOO_MUCH."""
    stage.taught = taught
    if not taught.notes:
        return  # every conversation's text begins with all that a server sends, and is to get back
    stage.choices.note("answers", taught.method, taught.cost)
    for name, conversations, words in taught.noted():
        stage.choices.note(name, conversations, words)
    if not taught.repeated_tokens:
        return
    given, default = stage.preprocessing.max_unrolled_fraction, defaults.MAX_UNROLLED_FRACTION
    reason = "what one sequence for each answer may repeat, of all tokens"
    taught.require_at_most(stage.choices.pick("preprocessing.maxUnrolledFraction", given, default, reason))


def _read_datasets(stage: _Stage) -> None:
    """Read, check, render and tokenise all datasets into the spool."""
    ctx, spec, ledger = stage.ctx, stage.ctx.config.spec, stage.ledger
    method = spec.method.type
    stage.loss_on = _loss_on(stage)
    bad = _bad_rows(stage)
    system_messages, same_role = _message_choices(stage)
    if method is MethodType.CPT:
        require_end_token(stage.model)
    inputs = find_files(ctx.store, spec.datasets, ledger)
    stage.first_files = [each.files.start for each in inputs]
    stage.ignored = [uri for each in inputs for uri in each.ignored]
    with ExitStack() as stack:
        spool = stack.enter_context(Spool(stage.spool_dir))
        found = _renderer(stage) if method is MethodType.SFT else None
        source, renderer = found or (None, None)
        if renderer is not None:
            stack.callback(renderer.close)
        too_long = _too_long(stage)
        pipeline = Pipeline(stage.model, stage.loss_on, too_long, renderer, ledger, bad, spool, stage.timings)
        for dataset, files in zip(spec.datasets, inputs, strict=True):
            choices = _row_choices(dataset, system_messages, same_role)
            rows = checked_rows(
                ctx.store, ledger, bad, files, dataset.format, method, choices, ctx.work_dir, stage.formats
            )
            for _ in pipeline.run(rows):
                ctx.reporter.update(rows_read=ledger.rows_read)
                ctx.reporter.touch()
        if renderer is not None and renderer.used:
            stage.template = source
    bad.check()
    _require_taught(stage, pipeline.taught)
    _choose_too_long(stage, too_long)
    if any(dataset.format is None for dataset in spec.datasets):
        formats = ", ".join(dict.fromkeys(stage.formats))
        stage.choices.pick("datasets[].format", None, formats, "told from the first rows; every row was checked")


def _divide(stage: _Stage) -> Division:
    """Choose held-out rows and close the accounts of every file. Raises NO_TRAINING_DATA."""
    ledger = stage.ledger
    evaluation = stage.ctx.config.spec.evaluation or EvaluationSpec()
    division = divide(stage.spool_dir, evaluation.holdout_fraction)
    _choose_holdout(stage.choices, division, evaluation.holdout_fraction)
    for row in np.flatnonzero(division.held_out):
        record = division.rows[row]
        ledger.decide(int(record["file"]), int(record["number"]), "split", Action.HOLD_OUT, HELD_OUT)
    for row in np.flatnonzero(division.dropped):
        record, kept = division.rows[row], division.rows[division.copy_of[row]]
        ref = f"{ledger.files[int(kept['file'])].uri}#{int(kept['number'])}"
        ledger.drop(int(record["file"]), int(record["number"]), "split", Drop.DUPLICATE_HELD_OUT, ref=ref)
    used, held = (
        np.bincount(division.rows["file"][mask], minlength=len(ledger.files)).tolist()
        for mask in (division.train, division.held_out)
    )
    for account, used_rows, held_out_rows in zip(ledger.files, used, held, strict=True):
        account.used, account.held_out = used_rows, held_out_rows
        account.check()
    if not division.train.any():
        dropped = ledger.dropped
        reason = row_words(dropped.most_common(1)[0][0]) if dropped else "was in no file: the files are empty"
        raise StageError(Fault.NO_TRAINING_DATA, rows_in=ledger.rows_read, rows_dropped=dropped.total(), reason=reason)
    return division


def _choose_holdout(choices: Choices, division: Division, given: float | None) -> None:
    """Record how many rows are held out, and where none can be that were asked for."""
    held_out, field = int(division.held_out.sum()), "evaluation.holdoutFraction"
    if given and not held_out:
        text = f"as written: of {division.distinct:,} distinct rows it is none, so nothing is measured; write more"
        choices.note(field, given, text)
    reason = f"{held_out:,} of {division.distinct:,} distinct rows"
    if held_out == defaults.MAX_HELD_OUT_ROWS:
        reason += ", the most unless a fraction is written"
    if not held_out:
        reason = f"fewer than {defaults.MIN_ROWS_TO_HOLD_OUT} distinct rows: none are held out"
    choices.pick(field, given, defaults.HOLDOUT_FRACTION if held_out else 0.0, reason)


def _upload_failure(stage: _Stage, fence: Fence) -> None:
    """Leave the report of what was read, so that all broken rows can be found, not only the first."""
    ctx = stage.ctx
    content = {"state": "failed", **report.funnel(stage.ledger, stage.ignored, stage.timings.seconds)}
    with best_effort("the report of what was read is not uploaded"):  # what ended the stage matters more
        stage.ledger.flush()
        fence.check()
        ctx.store.put(join(ctx.config.run_uri, REPORT), _json(content))
        ctx.store.upload(ctx.work_dir / "decisions.jsonl", join(ctx.config.run_uri, DECISIONS))


def _json(content: Any) -> bytes:
    return json.dumps(content, indent=1).encode()


def _write(stage: _Stage, division: Division, fence: Fence) -> RunResult:
    """Write the splits, size the run, plan its batches, upload; plan.json is last."""
    ctx, model, ledger = stage.ctx, stage.model, stage.ledger
    spec, store, run_uri = ctx.config.spec, ctx.store, ctx.config.run_uri
    total_bytes = sum(each.size_bytes for each in ledger.files)
    ctx.reporter.update(
        activity="Saving",
        rows_read=ledger.rows_read,
        bytes_read=total_bytes,
        bytes_total=total_bytes,
        rows_per_second=None,
        eta_seconds=None,
    )
    rows = {"train": division.train, "held_out": division.held_out}
    with stage.timings.of("split"):
        written = {
            name: write_split(stage.spool_dir, ctx.work_dir / name, division, mask, ctx.reporter.touch)
            for name, mask in rows.items()
            if mask.any()
        }
    examples = {name: division.examples[division.examples_of(mask)] for name, mask in rows.items()}
    train = open_examples(written["train"].folder)
    mix = _mix(stage, train)
    facts = _data_facts(stage, division, examples, mix)
    sized = sizing.size(spec, model.facts, model.family, facts, ctx.config.resources)
    hyper = sized.hyperparameters
    plan = batches.plan_batches(
        examples["train"]["tokens"],
        examples["train"]["labels"],
        train.columns["weight"],
        sized.total_rows,
        hyper.global_batch_size,
        hyper.seed,
        mix,
    )
    shares = report.shares(plan, mix, examples["train"])
    if not mix.is_plain:
        shown = ", ".join(f"{share['reads_share']:.3g}" for share in shares)
        text = "as written: the share of the examples read that is of each dataset, in their order"
        stage.choices.note("datasets[].weight", shown, text)
    batches.write(plan, ctx.work_dir / "batches.safetensors")
    digest = _content_digest(written)
    folder = join(run_uri, PREPARED, digest.removeprefix("sha256:")[:32])
    with stage.timings.of("upload"):
        splits = {name: _upload_split(ctx, each, join(folder, name), examples[name]) for name, each in written.items()}
        batches_record = _upload_batches(ctx, folder)
    run_plan = RunPlan(
        method=spec.method.type,
        loss_on=stage.loss_on,
        formats=stage.formats,
        chat_template=stage.template,
        stop_token_ids=sorted(model.tokenizer.stop_ids)[:16],
        model=model.facts,
        hyperparameters=hyper,
        train=splits["train"],
        held_out=splits.get("held_out"),
        batches=batches_record,
        sample_prompts=_sample_prompts(model, division, stage.spool_dir),
        inputs=[
            FileRecord(uri=each.uri, size_bytes=each.size_bytes, etag=each.etag, sha256=each.sha256)
            for each in ledger.files
        ],
        resolved=first_to_change([*sized.resolved, *stage.choices.resolved]),
        train_tokens=int(plan.tokens.sum()),
        label_tokens=int(plan.label_tokens.sum()),
        memory_bytes=sized.memory_bytes,
        gpu_memory_bytes=sized.gpu_memory_bytes,
        disk_bytes=sized.disk_bytes,
    )
    content = {
        "state": "prepared",
        **report.funnel(ledger, stage.ignored, stage.timings.seconds),
        "tokenizer": model.tokenizer.choice._asdict(),
        "special_tokens_in_words": model.tokenizer.special_words.report,
        "lengths": report.lengths(division, ledger),
        "answers": stage.taught.report(),
        "datasets": [{"uri": dataset.uri, **share} for dataset, share in zip(spec.datasets, shares, strict=True)],
        "packing": report.packing(plan, train, splits["train"].longest_row, hyper),
        "resolved": [value.model_dump() for value in run_plan.resolved],
    }
    log.info("rows were read by the library %s: %s", *model.tokenizer.choice)
    for token, rows in model.tokenizer.special_words.report.items():
        log.warning("%d rows have the special token %s in their own words", rows, token)
    fence.check()
    store.put(join(run_uri, REPORT), _json(content))
    store.upload(ctx.work_dir / "decisions.jsonl", join(run_uri, DECISIONS))
    plan_bytes = run_plan.model_dump_json().encode()
    fence.check()  # again: all decisions may have taken long
    store.put(plan_uri(run_uri, run_plan.digest()), plan_bytes)
    store.put(join(run_uri, PLAN), plan_bytes)
    ctx.reporter.update(activity="Done", rows_read=ledger.rows_read)
    return _result(ctx, run_plan, plan, ledger, digest)


def _mix(stage: _Stage, train: Examples) -> Mix:
    """Return which dataset each training example is of, and how often an epoch reads those of each."""
    datasets = stage.ctx.config.spec.datasets
    dataset = np.searchsorted(stage.first_files, train.columns["file"], side="right").astype(np.int64) - 1
    return Mix(dataset, [defaults.given(each.weight, defaults.DATASET_WEIGHT) for each in datasets])


def _data_facts(stage: _Stage, division: Division, examples: dict[str, Any], mix: Mix) -> DataFacts:
    train, held_out, every = examples["train"], examples["held_out"], division.examples
    return DataFacts(
        rows=len(train),
        epoch_rows=mix.epoch_examples,
        distinct_rows=int(division.examples_of(division.train & ~division.copies).sum()),
        tokens=int(train["tokens"].sum(dtype=np.int64)),
        label_tokens=int(train["labels"].sum(dtype=np.int64)),
        longest_row=int(train["longest"].max()),
        longest_of_all=int(every["longest"].max()),
        largest_row=int(train["tokens"].max()),
        measured_tokens=int(
            held_out["tokens"].sum(dtype=np.int64) * min(1.0, defaults.MAX_HELD_OUT_ROWS / max(1, len(held_out)))
        ),
        prepared_bytes=prepared_bytes(every),
        too_long_rows=stage.ledger.dropped[Drop.TOO_LONG],
        limit=stage.limit,
    )


def _content_digest(written: dict[str, Written]) -> str:
    parts = {f"{name}/{file}": sha256 for name, each in written.items() for file, sha256 in each.sha256.items()}
    return sha256_digest(json.dumps(parts, sort_keys=True).encode())


def _record(ctx: StageContext, path: Path, uri: str, sha256: str) -> FileRecord:
    info = ctx.store.upload(path, uri)
    return FileRecord(uri=uri, size_bytes=info.size_bytes, sha256=sha256)


def _upload_split(ctx: StageContext, written: Written, uri: str, examples: Any) -> SplitFiles:
    def total(name: str) -> int:
        return int(examples[name].sum(dtype=np.int64))

    return SplitFiles(
        examples=len(examples),
        segments=total("segments"),
        sequences=total("sequences"),
        stored_tokens=total("stored_tokens"),
        total_tokens=total("tokens"),
        label_tokens=total("labels"),
        longest_row=int(examples["longest"].max()),
        arrays={
            file: _record(ctx, written.folder / file, join(uri, file), sha256)
            for file, sha256 in written.sha256.items()
        },
    )


def _upload_batches(ctx: StageContext, folder: str) -> FileRecord:
    path = ctx.work_dir / "batches.safetensors"
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return _record(ctx, path, join(folder, f"batches-{sha256[:16]}.safetensors"), f"sha256:{sha256}")


def _sample_prompts(model: Model, division: Division, spool_dir: Path) -> list[SamplePrompt]:
    """Beginnings of a few rows, held-out ones first: up to the first answer, or the first words of a text."""
    tokens = np.memmap(spool_dir / "tokens", dtype="<u4", mode="r")
    bounds = np.concatenate([[0], np.cumsum(division.examples["stored_tokens"].astype(np.int64))])
    prompts: list[SamplePrompt] = []
    for row in [*np.flatnonzero(division.held_out)[:100], *np.flatnonzero(division.train)[:100]]:
        first = int(division.first_example[row])
        begin, length = int(bounds[first]), int(bounds[first + 1] - bounds[first])
        size = int(division.rows["prompt_tokens"][row])
        if size >= length:  # the answer's begin is not known
            size = min(TEXT_PROMPT_TOKENS, length - 1)
        if not 1 <= size <= _MAX_SAMPLE_TOKENS:
            continue
        ids: Sequence[int] = tokens[begin : begin + size].tolist()
        prompts.append(SamplePrompt(text=model.tokenizer.decode(ids)[:_MAX_SAMPLE_CHARACTERS], token_ids=list(ids)))
        if len(prompts) == _SAMPLES:
            break
    return prompts


def _result(ctx: StageContext, plan: RunPlan, read: BatchPlan, ledger: Ledger, digest: str) -> RunResult:
    run_uri, hyper, plan_digest = ctx.config.run_uri, plan.hyperparameters, plan.digest()
    used = sum(account.used for account in ledger.files)
    held_out = sum(account.held_out for account in ledger.files)
    return RunResult(
        stage=ctx.stage,
        attempt=ctx.attempt,
        fault=Fault.PREPARED,
        args={
            "rows_in": ledger.rows_read,
            "rows_used": used,
            "rows_held_out": held_out,
            "rows_dropped": ledger.dropped.total(),
            "steps": hyper.total_steps,
        },
        exit_code=0,
        plan=PlanStatus(
            uri=plan_uri(run_uri, plan_digest),
            digest=plan_digest,
            steps=hyper.total_steps,
            rows=len(read.examples),
            distinct_rows=int(np.count_nonzero(np.bincount(read.examples))),
            train_tokens=plan.train_tokens,
            label_tokens=plan.label_tokens,
            memory_bytes=plan.memory_bytes,
            disk_bytes=plan.disk_bytes,
            resolved=plan.resolved[:MAX_RESOLVED],
        ),
        data=DataStatus(
            files=len(ledger.files),
            rows_in=ledger.rows_read,
            rows_used=used,
            rows_held_out=held_out,
            dropped=ledger.dropped_rows(),
            digest=digest,
            report_uri=join(run_uri, REPORT),
        ),
    )
