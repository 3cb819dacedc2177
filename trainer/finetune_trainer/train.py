"""The train stage: from a plan to a committed adapter, or to a checkpoint and the reason why not.

In order: verify an earlier commit; claim the folder and fence off earlier attempts; fetch what the plan names; load;
resume or begin; train; answer the sample prompts; export; reload; upload; commit. Each part can die at any moment:
what counts is published last and whole, and the next attempt goes on from there.
"""

import logging
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from peft import PeftModel
from pydantic import ValidationError

from finetune_api import defaults
from finetune_api.base import first_problem
from finetune_api.errors import StageError
from finetune_api.job import LossOn
from finetune_api.layout import ADAPTER, JOB, METRICS, join
from finetune_api.names import Stage
from finetune_api.quality import Quality, concern_words
from finetune_api.reasons import Fault
from finetune_api.run import MAX_ARG_CHARS, RunResources, RunResult
from finetune_api.status import Artifact, CheckpointStatus
from finetune_trainer import checkpoint, commit, export, inputs, results, world
from finetune_trainer.base_weights import told_of_the_model
from finetune_trainer.batches import distinct_examples, examples_read
from finetune_trainer.card import RELOAD_ROWS, Evaluations, Learned, Lineage
from finetune_trainer.commit import Committed
from finetune_trainer.context import StageContext
from finetune_trainer.data.examples import Examples
from finetune_trainer.decoding import LastWords, open_tokenizer
from finetune_trainer.earlier_adapter import load_starting_adapter
from finetune_trainer.evaluate import answers
from finetune_trainer.flops import peak_flops
from finetune_trainer.guard import FIRST_STALL_S, Watchdog, watching
from finetune_trainer.logs import Uploader, take_over_transformers
from finetune_trainer.loop import Stepper, make_optimizer
from finetune_trainer.methods import planned_method
from finetune_trainer.metrics import MetricsFile, TrainMetrics
from finetune_trainer.mismatched import Mismatched
from finetune_trainer.model import LanguageModel, adapter_parameters, add_adapter, model_size
from finetune_trainer.patience import FailedTries, Patience, best_effort
from finetune_trainer.precision import computed_in, load_for_training
from finetune_trainer.reference import Kept, Scoring, reference_key, reference_of, reference_uri
from finetune_trainer.replay import replayed_rows
from finetune_trainer.runplan import RunPlan, SplitFiles, StoredPlan, read_plan
from finetune_trainer.serve import Reporter
from finetune_trainer.session import Session
from finetune_trainer.speed import slow_tokens_per_second
from finetune_trainer.standstill import end_process
from finetune_trainer.starting_adapter import require_same_base
from finetune_trainer.step_plan import StepPlan
from finetune_trainer.stop import StopFlag
from finetune_trainer.store import Store

log = logging.getLogger(__name__)

_LAST_UPLOAD_S = 60.0
_POLL_S = 0.5
_TRIED_TOKENS = 2  # of an answer before step 1: one from the prompt, one from what was kept of it
_MAX_METRICS_BYTES = 16 * 2**20


def run(ctx: StageContext, stop: StopFlag) -> RunResult:
    """One attempt. Raises StageError for every known end but success, INTERRUPTED once all is safe among them."""
    take_over_transformers()
    try:
        return _attempt(ctx, stop)
    except torch.cuda.OutOfMemoryError as error:
        raise StageError(Fault.GPU_OOM, step=ctx.reporter.progress().step) from error
    except torch.AcceleratorError as error:
        raise StageError(Fault.GPU_FAULT, step=ctx.reporter.progress().step) from error


def _attempt(ctx: StageContext, stop: StopFlag) -> RunResult:
    store, run_uri = ctx.store, ctx.config.run_uri

    def beat() -> None:
        """A large file takes longer than a stage may stand still, or than a pod that is stopped has time."""
        ctx.reporter.touch()
        _go_on(stop)

    beat()
    reading = store.telling(beat)
    committed = commit.read_commit(reading, run_uri)
    if committed is not None and commit.is_claimed_by(store, run_uri, ctx.config.job.uid):
        # Nothing is left to train: a store that takes no writes any more must not hide that.
        _after_commit(ctx, None, committed, stop)
        return _success(ctx, committed.artifact, _tell_measured(ctx, committed.artifact), None, None)
    commit.claim(store, run_uri, ctx.config.job.uid)
    fence = commit.raise_epoch(store, run_uri, ctx.attempt, ctx.pod_uid)
    fetched = _fetch(replace(ctx, store=reading))
    beat()
    scratch = ctx.work_dir / "checkpoints"
    found = checkpoint.newest(fetched.store, run_uri, fetched.plan_digest, fetched.model_digests, scratch)
    lm = _load(ctx, fetched, found)
    beat()
    adapted = add_adapter(lm, fetched.plan)
    if fetched.starting_adapter is not None:
        load_starting_adapter(adapted, fetched.starting_adapter, fetched.plan)
    fetched = _with_reference(ctx, fence, fetched, lm, adapted, beat)
    session, uploader, resumed_from = _begin(ctx, fence, fetched, lm, adapted, found, stop)
    del found  # its tensors are in the model now
    resumed_step = resumed_from.step if resumed_from else None
    try:
        with watching(session.watchdog):
            done = session.run()
        if not done:
            raise StageError(Fault.INTERRUPTED, step=session.position.step)
        committed, quality = _finish(ctx, fence, fetched, session, lm, adapted, stop)
        _after_commit(ctx, fence, committed, stop)
        return _success(ctx, committed.artifact, quality, session, resumed_step)
    finally:
        session.checkpointer.close(min(_LAST_UPLOAD_S, stop.remaining_s()))
        session.metrics_file.close()
        uploader.close(min(_LAST_UPLOAD_S, stop.remaining_s()))


@dataclass(frozen=True)
class _Fetched:
    """The inputs, on disk and verified."""

    store: Store  # that they were read from: it heeds a stop
    plan: RunPlan
    plan_digest: str
    model_folder: Path
    model_files: dict[str, inputs.ModelFile]
    examples: Examples
    held_out: Examples | None
    steps: StepPlan
    starting_adapter: Path | None  # its weights

    @property
    def model_digests(self) -> dict[str, str]:
        """ "sha256:…" of the base model's files, by name."""
        return {name: file.sha256 for name, file in self.model_files.items()}


def _fetch(ctx: StageContext) -> _Fetched:
    ctx.reporter.update(activity="Reading")
    store = ctx.store
    stored = _read_plan(ctx)
    plan = stored.plan
    prepared = ctx.work_dir / "prepared"
    prepared.mkdir(parents=True, exist_ok=True)
    examples = inputs.fetch_examples(store, plan.train, prepared / "train")
    held_out = None
    if plan.held_out is not None and plan.held_out.examples:
        held_out = inputs.fetch_examples(store, plan.held_out, prepared / "held_out")
    steps = inputs.fetch_steps(store, plan, prepared)
    model_folder = ctx.work_dir / "model"
    model_files = inputs.fetch_model(store, plan, model_folder)
    adapter = inputs.fetch_starting_adapter(store, plan, ctx.work_dir / "starting_adapter")
    fetched = _Fetched(store, plan, stored.digest, model_folder, model_files, examples, held_out, steps, adapter)
    if plan.starting_adapter is not None:
        require_same_base(plan.starting_adapter, plan.model.uri, fetched.model_digests)
    return fetched


def _read_plan(ctx: StageContext) -> StoredPlan:
    """Read the plan this attempt was told to follow. Raises PLAN_OF_OTHER_RELEASE if that cannot be made anew."""
    try:
        return read_plan(ctx.store, ctx.config.run_uri, ctx.plan_digest)
    except StageError as error:
        saved = checkpoint.manifests(ctx.store, ctx.config.run_uri)
        if error.fault is Fault.PLAN_OUTDATED and saved and saved[0][0] > 0:
            raise StageError(Fault.PLAN_OF_OTHER_RELEASE, **error.args_by_name, step=saved[0][0]) from error
        raise


def _go_on(stop: StopFlag) -> None:
    """Between parts that hold nothing to save."""
    if stop.is_set():
        raise StageError(Fault.STOPPED)


def _load(ctx: StageContext, fetched: _Fetched, found: checkpoint.Restored | None) -> LanguageModel:
    ctx.reporter.update(activity="Loading")
    device = world.join(ctx.config.resources).device
    # Both are needed after the last step, too late to find that they fail.
    with open_tokenizer(fetched.model_folder, fetched.plan) as tokenizer:
        earlier = found.snapshot.position.computed_in if found else None
        lm = load_for_training(
            fetched.model_folder, fetched.plan, device, examples=fetched.examples, steps=fetched.steps, earlier=earlier
        )
        with told_of_the_model(fetched.plan, "transformers cannot generate answers with it"):
            shortest = sorted(fetched.plan.sample_prompts, key=lambda prompt: len(prompt.token_ids))[:1]
            answers(lm, tokenizer, shortest, [], limit=_TRIED_TOKENS)
    return lm


def _with_reference(
    ctx: StageContext,
    fence: commit.Fence,
    fetched: _Fetched,
    lm: LanguageModel,
    adapted: PeftModel,
    beat: Callable[[], None],
) -> _Fetched:
    """Add what the model that the job began with says of the answers, where the method compares with it."""
    plan, train, held_out = fetched.plan, fetched.examples, fetched.held_out
    method, hyper = planned_method(plan), fetched.plan.hyperparameters
    if not method.needs_reference:
        return fetched
    base = inputs.digest_of(fetched.model_digests)
    read = examples_read(fetched.steps.examples, len(train))
    examples = np.count_nonzero(read) + (len(held_out) if held_out is not None else 0)
    scoring = Scoring(ctx.reporter, int(examples) * method.sequences * (2 if method.needs_drift else 1))

    def values(
        examples: Examples, split: SplitFiles, is_read: npt.NDArray[np.bool_], name: str
    ) -> npt.NDArray[np.float32]:
        key = reference_key(plan, split, base, lm.dtype, name)
        uri = reference_uri(ctx.config.run_uri, key)
        kept = Kept(store=ctx.store, fence=fence, folder_uri=uri, beat=beat, scored=scoring.add)
        return reference_of(lm, examples, is_read, plan, kept, ctx.work_dir / "prepared" / f"reference-{name}")

    def compared(examples: Examples, split: SplitFiles, is_read: npt.NDArray[np.bool_], name: str) -> Examples:
        found = replace(examples, reference=values(examples, split, is_read, name))
        if not method.needs_drift:
            return found
        others = Mismatched.of(examples, hyper.seed, hyper.max_sequence_length)
        reference = values(others, split, is_read, f"{name}-mismatched")
        return replace(found, mismatched=replace(others, reference=reference))

    # A new adapter changes nothing yet, and would cost time.
    with nullcontext() if plan.starting_adapter is not None else adapted.disable_adapter():
        train = compared(train, plan.train, read, "train")
        if held_out is not None and plan.held_out is not None:
            held_out = compared(held_out, plan.held_out, np.ones(len(held_out), dtype=np.bool_), "held-out")
    return replace(fetched, examples=train, held_out=held_out)


def _begin(
    ctx: StageContext,
    fence: commit.Fence,
    fetched: _Fetched,
    lm: LanguageModel,
    adapted: PeftModel,
    found: checkpoint.Restored | None,
    stop: StopFlag,
) -> tuple[Session, Uploader, CheckpointStatus | None]:
    """The session at the newest whole checkpoint, or at step 0, and the uploader of its metrics.jsonl."""
    plan, hyper = fetched.plan, fetched.plan.hyperparameters
    run_uri = ctx.config.run_uri
    parameters = adapter_parameters(adapted)
    optimizer = make_optimizer(list(parameters.values()), hyper)
    metrics = TrainMetrics(ctx.reporter.registry)
    if found is None:
        position = checkpoint.Position(step=0, tokens=0, label_tokens=0, first_started_at=time.time())
        resumed_from = None
    else:
        checkpoint.restore(found.snapshot, parameters, optimizer)
        position, resumed_from = found.snapshot.position, found.status
        log.info("resumed at step %d", position.step)
        metrics.resumes.inc()
        ctx.reporter.update(resumed_from_step=position.step, checkpoint=resumed_from)
        if position.evaluations:
            ctx.reporter.update(base_eval_loss=position.evaluations[0].loss, eval_loss=position.evaluations[-1].loss)
    position = position.model_copy(
        update={"computed_in": computed_in(found and position.computed_in, lm.dtype, hyper.total_steps - position.step)}
    )
    # Together: a total beside step 0 would look as if the work of earlier attempts were lost.
    ctx.reporter.update(step=position.step, total_steps=hyper.total_steps, tokens_total=position.tokens)

    metrics.label_tokens.inc(position.label_tokens)
    metrics.nonfinite_steps.inc(position.nonfinite_steps)

    def saved(status: CheckpointStatus, write_s: float, upload_s: float) -> None:
        ctx.reporter.update(checkpoint=status)
        metrics.checkpoint_write.set(write_s)
        metrics.checkpoint_upload.set(upload_s)
        metrics.checkpoint_success.set(time.time())

    def in_trouble(trouble: FailedTries | None) -> None:
        metrics.checkpoint_failures.inc(trouble is not None)
        ctx.reporter.touch("Saving")
        _report_trouble(ctx.reporter, trouble)

    name, earlier = _earlier_metrics(ctx)
    metrics_file = MetricsFile(ctx.work_dir / name, hyper.total_steps, earlier, position.step)
    uploader = Uploader(ctx.store, join(run_uri, JOB), [metrics_file.path])
    spec = ctx.config.spec.checkpoint
    checkpointer = checkpoint.Checkpointer(
        # Its thread counts as progress only while the loop waits for it: else it would hide a step that hangs.
        ctx.store.telling(lambda: ctx.reporter.touch("Saving")),
        fence,
        run_uri,
        plan_digest=fetched.plan_digest,
        base_files=fetched.model_digests,
        scratch=ctx.work_dir / "checkpoints",
        keep_last=defaults.given(spec.keep_last if spec else None, defaults.CHECKPOINTS_KEPT),
        interval_s=defaults.given(spec.interval_seconds if spec else None, defaults.CHECKPOINT_INTERVAL_S),
        resumed_from=resumed_from,
        before_publishing=uploader.flush,  # so that no step of a checkpoint is missing in the metrics, whatever happens
        on_saved=saved,
        on_trouble=in_trouble,
    )
    stepper = Stepper(
        lm,
        planned_method(plan),
        list(parameters.values()),
        optimizer,
        fetched.examples,
        fetched.steps,
        hyper,
        hyper.micro_batch_tokens,
    )
    gpu_name = world.device_name(lm.device)
    session = Session(
        stepper,
        adapted,
        parameters,
        fetched.held_out,
        planned_method(plan).answer_end_ids(plan),
        plan.loss_on is LossOn.ALL,
        position,
        checkpointer,
        stop,
        ctx.reporter,
        metrics,
        metrics_file,
        Watchdog(
            lambda step, seconds: _end_stalled(ctx, step, seconds),
            first_limit_s=_first_pass_limit_s(plan, ctx.config.resources),
        ),
        _replayed(plan, fetched.held_out),
        model_size(lm, adapted),
        peak_flops(gpu_name) if gpu_name else None,
    )
    return session, uploader, resumed_from


def _first_pass_limit_s(plan: RunPlan, resources: RunResources) -> float:
    """Return how long a pass may take before any is known: half an hour, or what a slow machine needs for it."""
    tokens, rank = plan.hyperparameters.micro_batch_tokens, plan.exported_rank
    tokens_per_s = slow_tokens_per_second(plan.model, rank, plan.train.longest_row, resources)
    return max(FIRST_STALL_S, max(tokens, plan.train.longest_row) / tokens_per_s)


def _earlier_metrics(ctx: StageContext) -> tuple[str, bytes]:
    """Return the name of metrics.jsonl and what earlier attempts wrote to it.

    Where that cannot be read, this attempt writes a file of its own instead of one over theirs."""
    uri, path = join(ctx.config.run_uri, METRICS), Path(METRICS)
    with best_effort("metrics.jsonl of earlier attempts cannot be read, this one writes beside it"):
        return path.name, ctx.store.read(uri, max_bytes=_MAX_METRICS_BYTES)[0] if ctx.store.head(uri) else b""
    return f"{path.stem}-{ctx.attempt}{path.suffix}", b""


def _report_trouble(reporter: Reporter, trouble: FailedTries | None) -> None:
    """Let the operator and people see that nothing can be saved at present; None: it can again."""
    if trouble is None:
        reporter.update(trouble=None)
        return
    since_s = time.time() - (time.monotonic() - trouble.since_s)
    reporter.update(trouble=results.trouble(trouble.error, since_s))


def _replayed(plan: RunPlan, held_out: Examples | None) -> npt.NDArray[np.bool_] | None:
    """(held-out rows,) which of them are of replayed datasets; None where nothing is replayed."""
    if held_out is None or not plan.replayed:
        return None
    return replayed_rows(held_out.columns["file"], plan.replayed)


def _end_stalled(ctx: StageContext, step: int, seconds: float) -> None:
    """End the process from the watchdog's thread."""
    end_process(ctx, StageError(Fault.STALLED, seconds=round(seconds), step=step))


def _finish(
    ctx: StageContext,
    fence: commit.Fence,
    fetched: _Fetched,
    session: Session,
    lm: LanguageModel,
    adapted: PeftModel,
    stop: StopFlag,
) -> tuple[Committed, Quality | None]:
    """Export, prove and commit the adapter; returns what counts as committed, and what was measured of it.

    A stop request waits as long as it has time: often little is left to do.

    A store that is away is waited for, as long as `patience` says; everything is read back before it is committed.
    Raises INTERRUPTED when the time to stop is over, as the next attempt begins at the last step; STOPPED where that
    could not be saved: it is tried again once asked to stop."""
    plan, run_uri = fetched.plan, ctx.config.run_uri

    tried_to_save = False

    def beat() -> None:
        nonlocal tried_to_save
        ctx.reporter.touch()
        if stop.is_set() and not tried_to_save:
            tried_to_save = True
            session.save_last()
        if not stop.remaining_s():
            step = session.position.step
            raise StageError(Fault.INTERRUPTED, step=step) if session.saved else StageError(Fault.STOPPED)

    ctx.reporter.update(activity="Evaluating")
    stop_ids = planned_method(plan).stop_token_ids(plan, export.model_stop_ids(fetched.model_folder, plan))
    with closing(LastWords(fetched.model_folder)) as words:
        with adapted.disable_adapter():
            base_answers = answers(lm, words, plan.sample_prompts, stop_ids, beat)
        tuned_answers = answers(lm, words, plan.sample_prompts, stop_ids, beat)
    lineage = Lineage(
        ctx.config.job.name,
        fetched.plan_digest,
        inputs.digest_of(fetched.model_digests),
        fetched.model_digests,
        export.package_versions(),
        ctx.config.image,
        {name: file.known_by.value for name, file in fetched.model_files.items()},
        plan.starting_adapter,
    )
    ctx.reporter.update(activity="Committing")
    folder = ctx.work_dir / ADAPTER
    quality = session.quality() or Quality()
    found = Evaluations(
        session.position.evaluations, base_answers, tuned_answers, quality, session.position.computed_in
    )
    learned = _learned(session)
    export.write_adapter(adapted, folder, fetched.model_folder, plan, stop_ids, lineage, learned, found)
    if fetched.starting_adapter is not None:
        export.require_change(folder, fetched.starting_adapter, plan)
    for concern in concern_words(quality):
        log.warning("%s", concern)
    examples = fetched.held_out or fetched.examples
    sequences = examples.sequences_of(range(min(RELOAD_ROWS, len(examples))))[:RELOAD_ROWS]
    batches = [inputs.make_batch(examples, [sequence], lm.device) for sequence in sequences]
    checks = export.check_reload(lm, adapted, folder, batches, beat)
    log.info("reloaded the adapter: %s", ", ".join(f"{name} {value:.3g}" for name, value in checks.items()))

    def wait(seconds: float) -> None:
        until_s = time.monotonic() + seconds
        while (left_s := until_s - time.monotonic()) > 0:
            beat()
            time.sleep(min(left_s, _POLL_S))

    patience = Patience(time.monotonic, wait, lambda trouble: _report_trouble(ctx.reporter, trouble))
    telling = ctx.store.telling(beat)
    artifact = export.upload(telling, fence, run_uri, folder, plan, lineage, checks, patience)
    patience.keep_trying(lambda: commit.read_manifest(telling, artifact.manifest_uri, artifact.digest))
    committed = patience.keep_trying(lambda: commit.commit(ctx.store, fence, run_uri, artifact))
    log.info("committed %s", committed.artifact.uri)
    # Another attempt's adapter may stand: then its own figures count.
    own = committed.artifact == artifact
    return committed, quality if own else _tell_measured(ctx, committed.artifact)


def _tell_measured(ctx: StageContext, artifact: Artifact) -> Quality | None:
    """Tell the figures of an adapter that another attempt has committed, and return its quality.

    None, and nothing is told, when they cannot be read, as the adapter counts."""
    with best_effort("the figures of the committed adapter cannot be read"):
        measured = export.read_measured(ctx.store, artifact)
        if measured is not None and measured.held_out:
            base, last = measured.held_out[0], measured.held_out[-1]
            ctx.reporter.update(step=last.step, base_eval_loss=base.loss, eval_loss=last.loss)
        return measured.quality if measured is not None else None
    return None


def _learned(session: Session) -> Learned:
    position, examples = session.position, session.stepper.steps.examples
    return Learned(
        rows=len(examples),
        distinct_rows=distinct_examples(examples, len(session.stepper.examples)),
        tokens=position.tokens,
        label_tokens=position.label_tokens,
        skipped_steps=position.nonfinite_steps,
    )


def _after_commit(ctx: StageContext, fence: commit.Fence | None, committed: Committed, stop: StopFlag) -> None:
    """Do what the commit makes possible or needless; whatever goes wrong here, the job has succeeded.

    `fence` is None for an attempt that found the commit of another."""
    store, run_uri = ctx.store, ctx.config.run_uri
    try:
        with best_effort("latest.json is not moved"):
            commit.move_latest(store, committed)
        if stop.is_set():
            return
        with best_effort("what the commit has made needless is not removed"):
            own = fence or commit.raise_epoch(store, run_uri, ctx.attempt, ctx.pod_uid)
            checkpoint.keep_newest(store, own, run_uri, stop)
            export.remove_orphans(store, own, run_uri, committed.artifact, stop)
    except Exception as error:  # the one place that cannot know what may fail and must not fail
        log.error("the adapter is committed; what follows failed with %s", type(error).__name__, exc_info=error)


def _success(
    ctx: StageContext,
    artifact: Artifact,
    quality: Quality | None,
    session: Session | None,
    resumed_from_step: int | None,
) -> RunResult:
    """Return the result of a run that is committed: figures that cannot be told are left out, the commit never is."""
    result = RunResult(
        stage=Stage.TRAIN,
        attempt=ctx.attempt,
        fault=Fault.COMMITTED,
        args={"uri": artifact.uri[:MAX_ARG_CHARS]},
        exit_code=0,
        checkpoint=session.checkpointer.last if session else None,
        artifact=artifact,
        step=session.position.step if session else ctx.reporter.progress().step or None,
        resumed_from_step=resumed_from_step,
        quality=quality,
    )
    ctx.reporter.update(activity="Done", trouble=None)
    try:
        return result.model_copy(update={"metrics": results.metrics_of(ctx.reporter.progress())})
    except ValidationError as error:
        log.error("the last figures cannot be told: %s", first_problem(error))
        return result
