"""The prepare stage: rows in object storage become prepared arrays, a batch plan and `plan.json`. No GPU, no torch.

Arrays and the plan that is trained on lie at names made of their content; report.json, decisions.jsonl and, last,
plan.json are replaced by the next prepare, until training begins. Running the stage again is safe at any point.
"""

import errno
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from finetune_api import defaults
from finetune_api.base import sha256_digest
from finetune_api.errors import StageError
from finetune_api.job import EvaluationSpec
from finetune_api.layout import DECISIONS, PLAN, PREPARED, REPORT, REPORT_PAGE, join
from finetune_api.reasons import Fault, Reason
from finetune_api.redact import shortened
from finetune_api.run import RunResult
from finetune_api.status import MAX_RESOLVED, DataStatus, PlanStatus, ResolvedValue
from finetune_trainer import batches, sizing
from finetune_trainer.batches import Mix, distinct_examples
from finetune_trainer.commit import Fence, before_training, claim
from finetune_trainer.context import StageContext
from finetune_trainer.data import report
from finetune_trainer.data.accounts import Action, Ledger
from finetune_trainer.data.disk import (
    disk_use,
    require_arrays_fit,
    require_order_fits,
    require_pairs_fit,
    sketch_bytes,
)
from finetune_trainer.data.division import Division, divide
from finetune_trainer.data.examples import Examples, open_examples
from finetune_trainer.data.lengths import lengths
from finetune_trainer.data.mapped import mapped
from finetune_trainer.data.model_facts import Model
from finetune_trainer.data.pairing import Paired, pair_up
from finetune_trainer.data.problems import HELD_OUT, Drop
from finetune_trainer.data.splits import SPLITS, Written, write_split
from finetune_trainer.data.spool import EXAMPLE, Spool, prepared_bytes
from finetune_trainer.data.tokens import TEXT_PROMPT_TOKENS
from finetune_trainer.data.unknown_words import TokenCount
from finetune_trainer.finding_duplicates import clusters_of_pairs, find_duplicates
from finetune_trainer.origins import as_record, origins_of
from finetune_trainer.patience import best_effort
from finetune_trainer.reading_partitions import read_in_partitions
from finetune_trainer.reading_steps import DECISIONS_FILE, PrepareStage, funnel, no_training_data, opened, with_model
from finetune_trainer.replay import file_ranges, is_replayed, replay_weights
from finetune_trainer.runplan import (
    FileRange,
    FileRecord,
    Hyperparameters,
    PassLayout,
    RunPlan,
    SamplePrompt,
    SplitFiles,
    first_to_change,
    plan_uri,
)
from finetune_trainer.sizing import Choices, DataFacts, Sizing
from finetune_trainer.standstill import ended_by_standstill
from finetune_trainer.step_plan import StepPlan

if TYPE_CHECKING:
    from finetune_trainer.shown import ShownRow

log = logging.getLogger(__name__)

STEPS_FILE = "batches.safetensors"  # in the work folder
_SAMPLES = 3
_MOST_TRIED = 100  # rows of each split that may become a sample prompt
_MAX_SAMPLE_TOKENS = 4096
_MAX_SAMPLE_CHARACTERS = 4000


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
            fence = before_training(ctx.store, ctx.config.run_uri)
            return with_model(ctx, lambda model: _prepare(model, ctx, fence))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StageError(Fault.DISK_FULL, what="the prepared data") from error
        raise


@dataclass(frozen=True)
class Findings:
    """What prepare would report. error: why it would fail, if it would; decisions: the file with its decisions."""

    report: dict[str, Any]
    error: StageError | None
    decisions: Path


def check(ctx: StageContext) -> Findings:
    """Do all that `run` does in its work folder, and nothing at the job's output.

    Raises StageError for what ends it before any row is read."""
    return with_model(ctx, lambda model: _check(model, ctx))


def _check(model: Model, ctx: StageContext) -> Findings:
    with opened(ctx, model) as stage:
        try:
            division = _read(stage, None)
            content = _report(stage, division, _plan(stage, division))
        except StageError as error:
            return Findings(_failure(stage, error), error, ctx.work_dir / DECISIONS_FILE)
    return Findings(content, None, ctx.work_dir / DECISIONS_FILE)


def _prepare(model: Model, ctx: StageContext, fence: Fence) -> RunResult:
    with opened(ctx, model) as stage:
        try:
            division = _read(stage, fence)
        except StageError as error:
            if error.reason is Reason.DATA_INVALID:
                _upload_failure(stage, fence, error)
            raise
    return _write(stage, division, fence)


def _spool_dir(stage: PrepareStage) -> Path:
    return stage.ctx.work_dir / "spool"


def _read(stage: PrepareStage, fence: Fence | None) -> Division:
    """Read all rows into the spool and say what each is for. fence: None where nothing is written to the output."""
    with Spool(_spool_dir(stage)) as spool:
        read_in_partitions(stage, spool, fence)
    return _divide(stage)


def _divide(stage: PrepareStage) -> Division:
    """Choose held-out rows and close the accounts of every file. Raises NO_TRAINING_DATA."""
    ledger, spool = stage.ledger, _spool_dir(stage)
    evaluation = stage.ctx.config.spec.evaluation or EvaluationSpec()
    beat, pairs = stage.ctx.reporter.touch, stage.method.pairs
    with stage.timings.of("duplicates"):
        duplicates = find_duplicates(stage, spool)
    stage.sketch_bytes = sketch_bytes(spool)
    left_out: Any = duplicates.left_out["why"]
    clusters = duplicates.clusters
    paired: Paired | None = None
    if pairs is not None:
        require_pairs_fit(spool, stage.resources.disk_bytes)
        paired = pair_up(spool, pairs, ledger, beat, left_out)
        if paired.origin is not None:
            left_out = None
            clusters = clusters if clusters is None else clusters_of_pairs(spool, clusters, paired.origin)
    division = divide(spool, evaluation.holdout_fraction, beat, clusters, left_out)
    if paired is not None:
        division = replace(division, joined=paired.joined)
    stage.duplicates = {
        "distinct_rows": division.distinct,
        "dropped_as_copies_of_held_out": division.dropped,
        **duplicates.report,
    }
    _choose_holdout(stage.choices, division, evaluation.holdout_fraction)
    for where in division.held_out_places():
        ledger.decide(*where, "split", Action.HOLD_OUT, HELD_OUT)
    for chunk in division.chunks():
        for row in np.flatnonzero(chunk.copies_of_held_out):
            record, kept = chunk.rows[row], division.rows[division.copy_of[chunk.first_row + row]]
            ref = ledger.ref(int(kept["file"]), int(kept["number"]))
            ledger.drop(int(record["file"]), int(record["number"]), "split", Drop.DUPLICATE_HELD_OUT, ref=ref)
    for account, rows in zip(ledger.files, division.rows_by_file(len(ledger.files)), strict=True):
        account.used, account.held_out = rows
        account.check()
    if not division.trained:
        raise no_training_data(ledger.rows_read, ledger.dropped)
    return division


def _choose_holdout(choices: Choices, division: Division, given: float | None) -> None:
    """Record how many rows are held out, and where none can be that were asked for."""
    held_out, field = division.held_out, "evaluation.holdoutFraction"
    if given and not held_out:
        text = f"as written: of {division.distinct:,} distinct rows it is none, so nothing is measured; write more"
        if division.smallest > 1:
            text += f", as the smallest cluster of rows that belong together has {division.smallest:,}"
        choices.note(field, given, text)
    reason = f"{held_out:,} of {division.distinct:,} distinct rows"
    if held_out == defaults.MAX_HELD_OUT_ROWS:
        reason += ", the most unless a fraction is written"
    if not held_out:
        reason = f"fewer than {defaults.MIN_ROWS_TO_HOLD_OUT} distinct rows: none are held out"
        if division.distinct >= defaults.MIN_ROWS_TO_HOLD_OUT:
            reason = (
                f"none of {division.distinct:,} distinct rows: the smallest cluster of rows that belong together has "
                f"{division.smallest:,}; write a larger evaluation.holdoutFraction"
            )
    choices.pick(field, given, defaults.HOLDOUT_FRACTION if held_out else 0.0, reason)


def _upload_failure(stage: PrepareStage, fence: Fence, error: StageError) -> None:
    """Leave the report of what was read, so that all broken rows can be found, not only the first."""
    ctx = stage.ctx
    content = _failure(stage, error)
    if stage.kept is not None:
        stage.kept.tidy()
    with best_effort("the report of what was read is not uploaded"):  # what ended the stage matters more
        stage.ledger.flush()
        fence.check()
        _put_report(ctx, content)


def _put_report(ctx: StageContext, content: dict[str, Any]) -> None:
    """Write what became of the rows: for programs, row by row, and for people."""
    ctx.store.put(join(ctx.config.run_uri, REPORT), _json(content))
    ctx.store.upload(ctx.work_dir / DECISIONS_FILE, join(ctx.config.run_uri, DECISIONS))
    ctx.store.put(join(ctx.config.run_uri, REPORT_PAGE), page(content))


def _failure(stage: PrepareStage, error: StageError) -> dict[str, Any]:
    """Return the report of a job that failed."""
    return {"state": "failed", "problem": str(error), **funnel(stage, stage.timings.seconds)}


def page(content: Mapping[str, Any], rows: Sequence["ShownRow"] = ()) -> bytes:
    """Return report.html of a report. rows: some of the data, where their owner asks for them."""
    from finetune_trainer.report_html.page import report_page  # matplotlib takes a while to come

    return report_page(content, rows)


def _json(content: Any) -> bytes:
    return json.dumps(content, indent=1).encode()


@dataclass(frozen=True, kw_only=True)
class _Planned:
    """The run's plan, as far as no upload is needed for it."""

    written: dict[str, Written]  # by split, in the work folder
    examples: dict[str, Any]  # by split, held-out always: (examples,) EXAMPLE
    train: Examples
    sized: Sizing
    batches: StepPlan
    shares: list[dict[str, Any]]
    weights: dict[str, float]
    resolved: list[ResolvedValue]


def _plan(stage: PrepareStage, division: Division) -> _Planned:
    """Write the splits into the work folder, size the run and plan its batches."""
    ctx, model = stage.ctx, stage.model
    require_arrays_fit(_spool_dir(stage), division, stage.resources.disk_bytes)
    splits = ["train", "held_out"] if division.held_out else ["train"]
    with stage.timings.of("split"):
        written = {
            name: write_split(_spool_dir(stage), ctx.work_dir / name, division, name, ctx.reporter.touch)
            for name in splits
        }
    examples = {"held_out": np.empty(0, dtype=EXAMPLE)} | {name: each.examples for name, each in written.items()}
    train = open_examples(written["train"].folder)
    require_order_fits(len(train), stage.resources.memory_bytes)
    stage.options = stage.method.settle(stage.options, train.columns, stage.choices)
    mix = _mix(stage, train, examples["train"]["labels"])
    facts = _data_facts(stage, division, examples, mix)
    sized = sizing.size(ctx.config.spec, model.facts, model.family, facts, ctx.config.resources, stage.starting_adapter)
    hyper = sized.hyperparameters
    plan = batches.plan_batches(
        ctx.work_dir / STEPS_FILE,
        examples["train"]["tokens"],
        examples["train"]["labels"],
        train.columns["weight"],
        sized.total_rows,
        hyper.global_batch_size,
        hyper.seed,
        mix,
        denominator=stage.method.denominator,
    )
    shares = report.shares(plan, mix, examples["train"])
    _note_replay(stage, shares)
    if any(each.weight not in (None, 1) for each in ctx.config.spec.datasets):
        shown = ", ".join(f"{share['reads_share']:.3g}" for share in shares)
        text = "as written: the share of the examples read that is of each dataset, in their order"
        stage.choices.note("datasets[].weight", shown, text)
    _note_unknown_words(stage)
    weights = report.weights(train.columns["weight"])
    if weights:
        text = f"of {weights['examples']:,} of {len(train):,} examples; their losses are multiplied with it"
        stage.choices.note("rows' weight", f"{weights['least']:g} to {weights['most']:g}", text)
    return _Planned(
        written=written,
        examples=examples,
        train=train,
        sized=sized,
        batches=plan,
        shares=shares,
        weights=weights,
        resolved=first_to_change([*sized.resolved, *stage.choices.resolved]),
    )


def _report(stage: PrepareStage, division: Division, planned: _Planned) -> dict[str, Any]:
    """Return what report.json says of a job that can be trained."""
    model, datasets = stage.model, stage.ctx.config.spec.datasets
    return {
        "state": "prepared",
        **funnel(stage, stage.timings.seconds),
        "kept_rows": stage.kept_rows,
        "disk_bytes": disk_use(
            stage.in_flight_bytes, stage.sketch_bytes, stage.ledger, division, planned.batches
        ).report(),
        "tokenizer": {"library": model.tokenizer.choice.library, "reason": model.tokenizer.choice.reason},
        "special_tokens_in_words": model.tokenizer.special_words.report,
        "duplicates": stage.duplicates,
        "lengths": lengths(division, stage.ledger),
        "answers": stage.taught.report(),
        "same_ids": None if stage.same_ids is None else stage.same_ids.report(),
        "datasets": [
            {**as_record(origin), **share, "unknown_words": count.report()}
            for origin, share, count in zip(origins_of(datasets), planned.shares, _token_counts(stage), strict=True)
        ],
        "weights": planned.weights,
        "packing": report.packing(
            planned.batches,
            planned.train,
            planned.sized.hyperparameters,
            whole=stage.method.denominator.keeps_examples_whole,
        ),
        "resolved": [value.model_dump() for value in planned.resolved],
    }


def _write(stage: PrepareStage, division: Division, fence: Fence) -> RunResult:
    """Plan the run and upload it; plan.json is last."""
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
    planned = _plan(stage, division)
    written, sized, plan = planned.written, planned.sized, planned.batches
    digest = _content_digest(written)
    folder = join(run_uri, PREPARED, digest.removeprefix("sha256:")[:32])
    with stage.timings.of("upload"):
        splits = {
            name: _upload_split(ctx, each, join(folder, name), planned.examples[name]) for name, each in written.items()
        }
        batches_record = _upload_batches(ctx, folder)
    stop_token_ids = sorted(model.tokenizer.stop_ids)[:16]
    run_plan = RunPlan(
        method=spec.method.type,
        options=stage.options,
        loss_on=stage.loss_on,
        formats=stage.formats,
        chat_template=stage.template,
        stop_token_ids=stop_token_ids,
        same_ids=None if stage.same_ids is None else stage.same_ids.words,
        stop_tokens=[shortened(model.tokenizer.decode([each]), 64) for each in stop_token_ids],
        model=model.facts,
        starting_adapter=stage.starting_adapter,
        hyperparameters=sized.hyperparameters,
        train=splits["train"],
        held_out=splits.get("held_out"),
        denominator=stage.method.denominator,
        batches=batches_record,
        sample_prompts=_sample_prompts(model, division, _spool_dir(stage)),
        inputs=[
            FileRecord(uri=each.uri, size_bytes=each.size_bytes, etag=each.etag, sha256=each.sha256)
            for each in ledger.files
        ],
        data=origins_of(spec.datasets),
        replayed=_replayed_files(stage),
        resolved=planned.resolved,
        train_tokens=int(plan.tokens.sum()),
        computed_tokens=_computed_tokens(plan, planned.examples["train"], sized.hyperparameters),
        label_tokens=int(plan.label_tokens.sum()),
        memory_bytes=sized.memory_bytes,
        gpu_memory_bytes=sized.gpu_memory_bytes,
        disk_bytes=sized.disk_bytes,
    )
    content = _report(stage, division, planned)
    log.info("rows were read by the library %s: %s", *model.tokenizer.choice[:2])
    for token, rows in model.tokenizer.special_words.report.items():
        log.warning("%d rows have the special token %s in their own words", rows, token)
    fence.check()
    _put_report(ctx, content)
    plan_bytes = run_plan.model_dump_json().encode()
    fence.check()  # again: all decisions may have taken long
    store.put(plan_uri(run_uri, run_plan.digest()), plan_bytes)
    store.put(join(run_uri, PLAN), plan_bytes)
    if stage.kept is not None:
        stage.kept.tidy()
    ctx.reporter.update(activity="Done", rows_read=ledger.rows_read)
    return _result(ctx, run_plan, plan, ledger, digest)


def _token_counts(stage: PrepareStage) -> list[TokenCount]:
    """Return what was counted of the tokens of each dataset."""
    counts = [TokenCount() for _ in stage.files]
    for count, files in zip(counts, stage.files, strict=True):
        for account in stage.ledger.files[files.start : files.stop]:
            count.add(account.tokens)
    return counts


def _replayed_files(stage: PrepareStage) -> list[FileRange]:
    spec = stage.ctx.config.spec
    if spec.replay is None:
        return []
    return file_ranges(stage.files, is_replayed(spec.datasets, spec.replay))


def _note_unknown_words(stage: PrepareStage) -> None:
    """Say of which datasets the tokenizer does not know many words."""
    for index, count in enumerate(_token_counts(stage)):
        if count.is_much_unknown:
            text = f"{count.unknown:,} of {count.tokens:,} tokens stand for words that the tokenizer does not know"
            stage.choices.note(f"datasets[{index}]: unknown words", f"{count.unknown_rows:,} rows", text)
            log.warning("datasets[%d]: %s; %d of them are learned", index, text, count.unknown_learned)


def _mix(stage: PrepareStage, train: Examples, labels: Any) -> Mix:
    """Return how many training examples each dataset has, and how often an epoch reads those of each.

    labels: (examples,) tokens to learn of each."""
    datasets, files = stage.ctx.config.spec.datasets, train.columns["file"]  # in the order of the datasets
    firsts = np.searchsorted(files, np.array([each.start for each in stage.files], dtype=files.dtype))
    sizes: list[int] = np.diff(np.append(firsts, len(train))).tolist()
    weights = stage.weights
    replay = stage.ctx.config.spec.replay
    if replay is not None:
        learned = report.by_dataset(labels, sizes)
        weights = replay_weights(weights, learned, is_replayed(datasets, replay), replay.fraction)
    return Mix(sizes, weights)


def _note_replay(stage: PrepareStage, shares: list[dict[str, Any]]) -> None:
    """Say how much of what is learned is really replayed, and how often its examples are read."""
    spec = stage.ctx.config.spec
    if spec.replay is None:
        return
    which = is_replayed(spec.datasets, spec.replay)
    old = [share for share, is_old in zip(shares, which, strict=True) if is_old]
    share = sum(each["label_tokens_share"] for each in old)
    reads, examples = (sum(each[name] for each in old) for name in ("reads", "examples"))
    text = f"as written: {share:.1%} of the learned tokens are replayed, in {reads:,} reads of {examples:,} examples"
    stage.choices.note("replay.fraction", f"{spec.replay.fraction:g}", text)


def _data_facts(stage: PrepareStage, division: Division, examples: dict[str, Any], mix: Mix) -> DataFacts:
    train, held_out, every = examples["train"], examples["held_out"], division.examples
    return DataFacts(
        rows=len(train),
        epoch_rows=mix.epoch_examples,
        distinct_rows=sum(
            int(chunk.rows["examples"][chunk.train & ~chunk.copies].sum(dtype=np.int64)) for chunk in division.chunks()
        ),
        tokens=int(train["tokens"].sum(dtype=np.int64)),
        label_tokens=int(train["labels"].sum(dtype=np.int64)),
        longest_row=int(train["longest"].max()),
        longest_of_all=int(every["longest"].max()),
        largest_row=int(train["tokens"].max()),
        stored_tokens=int(train["stored_tokens"].sum(dtype=np.int64)),
        largest_tree=int(train["stored_tokens"].max()),
        most_repeated=_most_repeated(train),
        measured_tokens=int(
            held_out["tokens"].sum(dtype=np.int64) * min(1.0, defaults.MAX_HELD_OUT_ROWS / max(1, len(held_out)))
        ),
        prepared_bytes=prepared_bytes(every),
        segments=int(every["segments"].sum(dtype=np.int64)),
        too_long_rows=stage.ledger.dropped[Drop.TOO_LONG],
        limit=stage.limit,
    )


def _most_repeated(examples: Any) -> float:
    """Return how many tokens an example's flat sequences have for each that it stores, at most."""
    chunks = (examples[begin : begin + batches.CHUNK] for begin in range(0, len(examples), batches.CHUNK))
    return max(float((each["tokens"] / each["stored_tokens"]).max()) for each in chunks)


def _computed_tokens(plan: StepPlan, examples: Any, hyper: Hyperparameters) -> int:
    """Return the tokens that all steps compute, with what flat sequences share counted once where that is so."""
    lengths = examples["stored_tokens" if hyper.layout is PassLayout.TREES else "tokens"]
    reads = (plan.examples[begin : begin + batches.CHUNK] for begin in range(0, len(plan.examples), batches.CHUNK))
    return sum(int(lengths[each].sum(dtype=np.int64)) for each in reads)


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
    path = ctx.work_dir / STEPS_FILE
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return _record(ctx, path, join(folder, f"batches-{sha256[:16]}.safetensors"), f"sha256:{sha256}")


def _sample_prompts(model: Model, division: Division, spool_dir: Path) -> list[SamplePrompt]:
    """Beginnings of a few rows, held-out ones first: up to the first answer, or the first words of a text."""
    tokens = mapped(spool_dir / "tokens", np.dtype("<u4"))
    prompts: list[SamplePrompt] = []
    for begin, length, size in (*_beginnings(division, "held_out"), *_beginnings(division, "train")):
        if size >= length:  # the answer's begin is not known
            size = min(TEXT_PROMPT_TOKENS, length - 1)
        if not 1 <= size <= _MAX_SAMPLE_TOKENS:
            continue
        ids: Sequence[int] = tokens[begin : begin + size].tolist()
        prompts.append(SamplePrompt(text=model.tokenizer.decode(ids)[:_MAX_SAMPLE_CHARACTERS], token_ids=list(ids)))
        if len(prompts) == _SAMPLES:
            break
    return prompts


class _Beginning(NamedTuple):
    """Where the first example of a row begins among the spool's tokens, how many it has, and how many to prompt."""

    token: int
    tokens: int
    prompt_tokens: int


def _beginnings(division: Division, split: str) -> list[_Beginning]:
    """Return the beginnings of the first rows of a split."""
    found: list[_Beginning] = []
    for chunk in division.chunks():
        counts = chunk.examples["stored_tokens"]
        bounds = chunk.first_token + np.cumsum(counts, dtype=np.int64) - counts
        firsts = np.cumsum(chunk.rows["examples"], dtype=np.int64) - chunk.rows["examples"]
        for row in np.flatnonzero(SPLITS[split](chunk))[: _MOST_TRIED - len(found)]:
            first = firsts[row]
            found.append(_Beginning(int(bounds[first]), int(counts[first]), int(chunk.rows["prompt_tokens"][row])))
        if len(found) == _MOST_TRIED:
            break
    return found


def _result(ctx: StageContext, plan: RunPlan, read: StepPlan, ledger: Ledger, digest: str) -> RunResult:
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
            distinct_rows=distinct_examples(read.examples, plan.train.examples),
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
            report_page_uri=join(run_uri, REPORT_PAGE),
        ),
    )
