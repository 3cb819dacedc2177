"""The first steps of prepare, which `finetune data` takes too: judge the model; find, read, check and tokenise rows.

What is made of them goes to the stage that asks: prepare writes it, `data check` counts it, `data show` shows it.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, TypeVar

from finetune_api import defaults
from finetune_api.errors import StageError
from finetune_api.job import (
    AdapterMode,
    DatasetFormat,
    DatasetSpec,
    LossOn,
    MethodSpec,
    OnBadRow,
    Pairing,
    PreferenceSpec,
    PreprocessingSpec,
    SameRoleMessages,
    SystemMessages,
)
from finetune_api.reasons import Fault
from finetune_api.redact import shortened
from finetune_api.row_words import row_words
from finetune_api.run import MAX_ARG_CHARS, RunResources
from finetune_trainer import sizing
from finetune_trainer.context import StageContext
from finetune_trainer.data import report
from finetune_trainer.data.accounts import Ledger
from finetune_trainer.data.bad_rows import BadRows
from finetune_trainer.data.detect import check_given
from finetune_trainer.data.documents.reading import PLAIN
from finetune_trainer.data.encoders import FAST, FastDiffersError
from finetune_trainer.data.end_token import require_end_token
from finetune_trainer.data.evaluation_sets import EvaluationSets, read_evaluation_sets
from finetune_trainer.data.leaks_report import leaks_report
from finetune_trainer.data.licenses import check_license
from finetune_trainer.data.listing import Inputs, find_files
from finetune_trainer.data.model_facts import Model, read_model
from finetune_trainer.data.partition_work import renderer_of
from finetune_trainer.data.pii.figures import pii_figures
from finetune_trainer.data.pipeline import Pipeline, Sink, Timings
from finetune_trainer.data.problems import place
from finetune_trainer.data.progress import reading_figures
from finetune_trainer.data.quality_report import quality_parts, require_few_poor
from finetune_trainer.data.reading import Checked, Select, checked_rows, every_row
from finetune_trainer.data.same_ids import OwnIds, Probe, SameIds
from finetune_trainer.data.shapes import RowChoices
from finetune_trainer.data.stages.chain import chain_of, through
from finetune_trainer.data.stages.pii import NAME as PII
from finetune_trainer.data.structure import Judge, check_structure
from finetune_trainer.data.taught import Taught
from finetune_trainer.data.template import plain_template
from finetune_trainer.data.tokenizer import TokenizerFailedError
from finetune_trainer.data.too_long import SequenceLimit, TooLongRows
from finetune_trainer.kept_partitions import KeptPartitions
from finetune_trainer.methods import method_of
from finetune_trainer.methods.method import Method
from finetune_trainer.metrics import DecidedRows
from finetune_trainer.pii_key import read_key
from finetune_trainer.runplan import AdapterFacts
from finetune_trainer.sizing import Choices
from finetune_trainer.starting_adapter import read_adapter

log = logging.getLogger(__name__)

DECISIONS_FILE = "decisions.jsonl"  # in the work folder

Result = TypeVar("Result")


@dataclass(kw_only=True)
class RowsStage:
    """What the steps share that read rows, for which no model is needed."""

    ctx: StageContext
    ledger: Ledger
    choices: Choices = field(default_factory=Choices)
    formats: list[DatasetFormat] = field(default_factory=list[DatasetFormat])
    files: list[range] = field(default_factory=list[range])  # of each dataset, as indices into the ledger
    ignored: list[str] = field(default_factory=list[str])
    evaluation: EvaluationSets | None = None  # once they are read, of a job that names any

    @property
    def method(self) -> Method:
        """What the job's method decides."""
        return method_of(self.ctx.config.spec.method.type)

    @property
    def resources(self) -> RunResources:
        """What this stage has."""
        return self.ctx.config.prepare_resources or self.ctx.config.resources

    @cached_property
    def pii_key(self) -> bytes | None:
        """The key of the job's pseudonyms, None without any. Raises CONFIG_UNREADABLE."""
        return read_key(self.preprocessing.pii, self.ctx.config.pii_key_path)

    @property
    def preprocessing(self) -> PreprocessingSpec:
        return self.ctx.config.spec.preprocessing or PreprocessingSpec()

    @property
    def weights(self) -> list[float]:
        """How often an epoch reads the rows of each dataset, as the job gives it."""
        return [defaults.given(each.weight, defaults.DATASET_WEIGHT) for each in self.ctx.config.spec.datasets]


@dataclass(kw_only=True)
class PrepareStage(RowsStage):
    """What the steps of one prepare stage share."""

    model: Model
    limit: SequenceLimit
    options: MethodSpec  # of the method; all are chosen once rows are read
    starting_adapter: AdapterFacts | None = None
    loss_on: LossOn = LossOn.ALL
    template: str | None = None  # the chat template, if any conversation was rendered
    taught: Taught = field(default_factory=Taught)
    same_ids: SameIds | None = None  # once conversations were compared
    timings: Timings = field(default_factory=Timings)
    kept: KeptPartitions | None = None  # partitions that are to be removed once there is a plan
    in_flight_bytes: int = 0  # of disk, that partitions took at most while rows were read
    kept_rows: int = 0  # read by an earlier attempt, whose partitions were taken
    sketch_bytes: int = 0  # of disk, by which near copies are found
    duplicates: dict[str, Any] = field(default_factory=dict[str, Any])  # what report.json says of them


def with_model(ctx: StageContext, work: Callable[[Model], Result], judge: Judge = check_structure) -> Result:
    """Judge the job's model and do the work with it; all of it once more where the faster library gave other ids.

    Raises what `read_model` does, CONFIG_UNREADABLE, and UNSUPPORTED_MODEL for a tokenizer that fails."""
    spec = ctx.config.spec
    for index, dataset in enumerate(spec.datasets):
        check_given(dataset.format, spec.method.type, index)
        check_license(dataset.license, index)
    ctx.reporter.update(activity="Loading")  # judging the model takes longer than the data does where that is small
    model = read_model(ctx.store, spec.model.uri, judge)
    ctx.reporter.update(activity="Reading")
    try:
        with closing(model.tokenizer):
            return _exactly(model, work)
    except TokenizerFailedError as error:
        uri, architecture = place(spec.model.uri), shortened(model.facts.architecture, 64)
        problem = shortened(str(error), MAX_ARG_CHARS)
        raise StageError(Fault.UNSUPPORTED_MODEL, uri=uri, architecture=architecture, problem=problem) from error


def _exactly(model: Model, work: Callable[[Model], Result]) -> Result:
    """Do the work; once more from the start, by Hugging Face's library alone, where the faster one gave other ids."""
    try:
        return work(model)
    except FastDiffersError:
        reason = f"{FAST} gave other ids for a row, so all rows were read again"
        log.warning("%s", reason)
        model.tokenizer.start_slow(reason)
        return work(model)


@contextmanager
def opened(ctx: StageContext, model: Model) -> Generator[PrepareStage]:
    """Begin a stage with empty accounts, whose decisions go to decisions.jsonl in the work folder.

    Raises SEQUENCE_LENGTH_TOO_LONG, and what `read_adapter` does."""
    source, asked = ctx.config.starting_adapter, ctx.config.spec.model.adapter_from
    mode = AdapterMode(defaults.given(asked and asked.mode, defaults.ADAPTER_MODE))
    adapter = None if source is None else read_adapter(ctx.store, source, model.facts, mode)
    limit = sizing.sequence_limit(ctx.config.spec, model.facts, model.family, ctx.config.resources, adapter)
    began_s = time.monotonic()

    def told(rows: int) -> None:
        seconds = time.monotonic() - began_s
        ctx.reporter.update(**reading_figures(ledger.files, ledger.file_read, rows, seconds))

    with Ledger(ctx.work_dir / DECISIONS_FILE, told) as ledger:
        options, registry, rows = ctx.config.spec.method, ctx.reporter.registry, DecidedRows(ledger.decided)
        registry.register(rows)
        try:
            yield PrepareStage(
                ctx=ctx, ledger=ledger, model=model, limit=limit, options=options, starting_adapter=adapter
            )
        finally:
            registry.unregister(rows)  # all may be read once more


def find_inputs(stage: RowsStage) -> list[Inputs]:
    """Find the files of all datasets, and read the evaluation sets that their rows are compared with.

    Raises what `find_files` and `read_evaluation_sets` do."""
    inputs = find_files(
        stage.ctx.store,
        stage.ctx.config.spec.datasets,
        stage.ledger,
        takes_documents=stage.method.takes_documents,
    )
    stage.files = [each.files for each in inputs]
    stage.ignored = [uri for each in inputs for uri in each.ignored]
    named = stage.preprocessing.decontaminate_against
    if named:
        ctx = stage.ctx
        stage.evaluation = read_evaluation_sets(ctx.store, named, ctx.work_dir, ctx.reporter.touch)
    return inputs


def document_template(spec: PreprocessingSpec) -> str:
    """Return what the texts of documents are put into."""
    return (spec.documents and spec.documents.template) or PLAIN


def no_training_data(rows_in: int, dropped: Counter[str]) -> StageError:
    """Return the end of a job of which no row is left to train on."""
    reason = row_words(dropped.most_common(1)[0][0]) if dropped else "was in no file: the files are empty"
    return StageError(Fault.NO_TRAINING_DATA, rows_in=rows_in, rows_dropped=dropped.total(), reason=reason)


def funnel(stage: RowsStage, seconds: dict[str, float]) -> dict[str, Any]:
    """Return what a report says of the rows, whatever became of the job. seconds: by stage."""
    spec = stage.ctx.config.spec
    told = report.funnel(stage.ledger, chain_of(spec), stage.ignored, seconds)
    leaks = leaks_report(stage.evaluation.sets if stage.evaluation else (), stage.ledger)
    told |= {**quality_parts(spec, stage.ledger), "leaks": leaks}
    return {**told, "pii": _pii(stage), "licenses": _licenses(stage)}


def _pii(stage: RowsStage) -> dict[str, Any]:
    ledger, uris = stage.ledger, [each.uri for each in stage.ledger.files]
    return pii_figures(stage.preprocessing.pii, ledger.counted[PII], ledger.places[PII], uris)


def _licenses(stage: RowsStage) -> list[dict[str, Any]]:
    """Return rows by their own licence, of each dataset that names the field of it; nothing before files are found."""
    datasets = zip(stage.ctx.config.spec.datasets, stage.files, strict=False)
    return [
        report.licenses(index, dataset.license_field, stage.ledger.files[files.start : files.stop])
        for index, (dataset, files) in enumerate(datasets)
        if dataset.license_field is not None
    ]


def dataset_rows(
    stage: RowsStage, inputs: list[Inputs], bad: BadRows, select: Select = every_row
) -> Iterator[Iterator[Checked]]:
    """Yield the valid rows of each dataset, all of which are to be taken before the next."""
    ctx, spec = stage.ctx, stage.ctx.config.spec
    chain = chain_of(spec, stage.pii_key, stage.evaluation and stage.evaluation.runs)
    for dataset, choices, files in zip(spec.datasets, dataset_choices(stage), inputs, strict=True):
        checked = checked_rows(
            ctx.store,
            stage.ledger,
            bad,
            files,
            dataset.format,
            spec.method.type,
            choices,
            ctx.work_dir,
            stage.formats,
            select,
            template=document_template(stage.preprocessing),
        )
        yield through(chain, checked, stage.ledger)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What is the same for all rows, chosen before the first is read. rendering: None where none is rendered."""

    inputs: list[Inputs]
    bad: BadRows
    too_long: TooLongRows
    rendering: dict[str, Any] | None


def begin(stage: PrepareStage) -> Reading:
    """Find all files and choose what is the same for all their rows: every way to read them begins so.

    Raises what `find_files` does, and BROKEN_MODEL for a tokenizer that cannot end texts."""
    stage.options = stage.method.choose(stage.ctx.config.spec.method, stage.choices)
    stage.loss_on = stage.method.labels(stage.options)
    bad = bad_rows(stage)
    if stage.method.needs_end_token:
        require_end_token(stage.model)
    inputs = find_inputs(stage)
    return Reading(inputs=inputs, bad=bad, rendering=rendering(stage), too_long=too_long_rows(stage))


def end(stage: PrepareStage, reading: Reading, taught: Taught, is_rendered: bool) -> None:
    """Say what all rows came to: every way to read them ends so. is_rendered: whether any conversation was.

    Raises BROKEN_ROW, UNROLLED_TOO_MUCH, TOO_MANY_LONG_ROWS, TOO_MANY_POOR_ROWS."""
    if is_rendered and reading.rendering is not None:
        stage.template = reading.rendering["source"]
    if not is_rendered and reading.rendering is not None and stage.ledger.rows_read:
        text = "prompts and answers are plain texts, which it does not render; it renders lists of messages"
        stage.choices.note("chat template", "none", text)
    reading.bad.check()
    _require_taught(stage, taught)
    _choose_too_long(stage, reading.too_long)
    require_few_poor(stage.ctx.config.spec, stage.ledger)
    choose_formats(stage)


def read_datasets(stage: PrepareStage, sink: Sink, select: Select = every_row) -> None:
    """Read, check, render and tokenise all datasets here, in one piece, and hand the rows on to the sink."""
    ctx, ledger, reading = stage.ctx, stage.ledger, begin(stage)
    with ExitStack() as stack:
        renderer = None if reading.rendering is None else renderer_of(reading.rendering)
        if renderer is not None:
            stack.callback(renderer.close)
        pipeline = Pipeline(
            stage.model,
            stage.loss_on,
            reading.too_long,
            renderer,
            ledger,
            reading.bad,
            sink,
            stage.timings,
            stage.method.examples,
            pairs=stage.method.pairs is not None,
            with_headings=bool(stage.preprocessing.documents and stage.preprocessing.documents.heading_context),
        )
        for rows in dataset_rows(stage, reading.inputs, reading.bad, select):
            for _ in pipeline.run(rows):
                ctx.reporter.update(rows_read=ledger.rows_read)
                ctx.reporter.touch()
    end(stage, reading, pipeline.taught, renderer is not None and renderer.used)


def require_same_ids(stage: PrepareStage, own_ids: OwnIds, probe: Probe, found: dict[str, Any]) -> None:
    """Say of how many conversations transformers gives the same ids. Raises what `SameIds.error` names.

    found: as `rendering` has it."""
    unnamed = {name: each for name, each in found["special_tokens"].items() if name not in stage.model.special_tokens}
    with stage.timings.of("compare"):
        answer = own_ids.compare(probe.rows, renderer_of(found).setup, unnamed)
    stage.same_ids = SameIds(len(probe.rows), answer)
    difference = stage.same_ids.difference
    if difference is not None:
        row = probe.rows[difference.row]
        file = place(stage.ledger.files[row.file].uri)
        raise stage.same_ids.error(difference, place(stage.model.facts.uri), file, row.number)


def choose_formats(stage: RowsStage) -> None:
    """Record the shapes that were told from the rows."""
    if any(dataset.format is None for dataset in stage.ctx.config.spec.datasets):
        formats = ", ".join(dict.fromkeys(stage.formats))
        stage.choices.pick("datasets[].format", None, formats, "told from the first rows; every row was checked")
    _choose_pairs(stage)


def bad_rows(stage: RowsStage) -> BadRows:
    """Choose what becomes of broken rows."""
    given, fraction = stage.preprocessing.on_bad_row, stage.preprocessing.max_broken_fraction
    policy = stage.choices.pick(
        "preprocessing.onBadRow", given, OnBadRow(defaults.ON_BAD_ROW), "no row is left out unasked"
    )
    if policy is OnBadRow.FAIL:
        return BadRows(stage.ledger, quarantine=False, max_broken_fraction=0.0)
    reason = "if more are broken, something else is wrong"
    fraction = stage.choices.pick("preprocessing.maxBrokenFraction", fraction, defaults.MAX_BROKEN_FRACTION, reason)
    return BadRows(stage.ledger, quarantine=True, max_broken_fraction=fraction)


def _message_choices(stage: RowsStage) -> tuple[SystemMessages, SameRoleMessages]:
    """Choose what becomes of system messages and of neighbours of one role."""
    given = stage.preprocessing
    if not stage.method.takes_chats:
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


def dataset_choices(stage: RowsStage) -> list[RowChoices]:
    """Choose how the rows of each dataset are read."""
    learns_all = stage.method.labels(stage.ctx.config.spec.method) is LossOn.ALL
    system_messages, same_role = _message_choices(stage)
    evaluation = stage.ctx.config.spec.evaluation
    group_by = evaluation and evaluation.group_by
    return [
        replace(_row_choices(dataset, system_messages, same_role), learns_all=learns_all, group_field=group_by)
        for dataset in stage.ctx.config.spec.datasets
    ]


def _row_choices(dataset: DatasetSpec, system_messages: SystemMessages, same_role: SameRoleMessages) -> RowChoices:
    columns = dataset.columns.model_dump(exclude_none=True) if dataset.columns else {}
    return RowChoices(
        columns={theirs: ours for ours, theirs in columns.items()},
        ignored=frozenset(dataset.ignore_fields or ()),
        system_messages=system_messages,
        same_role=same_role,
        preference=dataset.preference or PreferenceSpec(),
        license_field=dataset.license_field,
        licenses=tuple(dataset.licenses or ()),
    )


def too_long_rows(stage: PrepareStage) -> TooLongRows:
    """Choose what becomes of rows that are too long."""
    given, fraction = stage.preprocessing.too_long, stage.preprocessing.max_too_long_fraction
    policy = given or stage.method.too_long
    return TooLongRows(policy, stage.limit, defaults.given(fraction, defaults.MAX_TOO_LONG_FRACTION), stage.ledger)


def _choose_too_long(stage: PrepareStage, too_long: TooLongRows) -> None:
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


def rendering(stage: PrepareStage) -> dict[str, Any] | None:
    """Return the chat template and how it is used, as plain values; None where there is none, or no conversation."""
    model = stage.model
    if not stage.method.takes_chats:
        return None
    tokens, source = dict(model.special_tokens), model.chat_template
    if stage.preprocessing.chat_template == "plain":
        require_end_token(model)
        assert model.tokenizer.eos_id is not None
        tokens.setdefault("eos_token", model.tokenizer.decode([model.tokenizer.eos_id]))
        source = plain_template(begins_with_bos=bool(model.tokenizer.prefix_ids) and "bos_token" in tokens)
    if source is None:
        return None
    return {
        "source": source,
        "special_tokens": tokens,
        "now": (stage.ctx.config.job.created_at or datetime.now(UTC)).isoformat(),
        "stops": model.stops,
        "added_end": model.stops[0] if stage.preprocessing.add_end_token and model.stops else None,
        "learn_all": stage.loss_on is LossOn.ALL,
        "accepted": sorted(stage.preprocessing.accept_vanishing or ()),
    }


def _require_taught(stage: PrepareStage, taught: Taught) -> None:
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


def _choose_pairs(stage: RowsStage) -> None:
    """Record which answers of rankings make pairs, where a dataset has some and does not say."""
    datasets = zip(stage.ctx.config.spec.datasets, stage.formats, strict=False)  # those that were read
    ranked = [each.preference or PreferenceSpec() for each, found in datasets if found is DatasetFormat.RANKING]
    if any(each.pairs is None for each in ranked):
        reason = "of each prompt the clearest preference, so that none counts more than another"
        stage.choices.pick("datasets[].preference.pairs", None, Pairing(defaults.PAIRING), reason)
