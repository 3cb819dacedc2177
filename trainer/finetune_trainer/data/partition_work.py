"""One partition from its raw rows to what it adds to the spool: check, render, tokenise, count what became of each."""

from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

from finetune_api.duplicates import Copies
from finetune_api.errors import StageError
from finetune_api.job import DatasetFormat, FineTuneJobSpec, LossOn, TooLong
from finetune_api.reasons import Fault
from finetune_trainer.data.accounts import FileAccount, PartitionLedger, RowPlace
from finetune_trainer.data.bad_rows import BadRows
from finetune_trainer.data.deduplication import deduplication_of
from finetune_trainer.data.model_facts import Model
from finetune_trainer.data.partition_messages import PartitionResult, Rules, Task
from finetune_trainer.data.pipeline import Pipeline, Timings
from finetune_trainer.data.problems import Broken
from finetune_trainer.data.raw_rows import decode_row, read_rows
from finetune_trainer.data.reading import Checked, DecodedRows, valid_rows
from finetune_trainer.data.renderer import Renderer
from finetune_trainer.data.shared_runs import SharedRuns
from finetune_trainer.data.sketches import Sketcher
from finetune_trainer.data.spool import Spool
from finetune_trainer.data.stages.chain import chain_of, through
from finetune_trainer.data.stops import Ends
from finetune_trainer.data.too_long import LimitSource, SequenceLimit, TooLongRows
from finetune_trainer.methods import method_of

DECISIONS = "decisions"  # beside the files of the spool


class PartitionWork:
    """Works on one partition after another, with a tokenizer and a renderer that stay."""

    def __init__(self, rules: Rules, model: Model) -> None:
        self._rules, self._model = rules, model
        self._renderer = None if rules.renderer is None else renderer_of(rules.renderer)
        spec = FineTuneJobSpec.model_validate(rules.spec)
        runs = None if rules.evaluation_runs is None else SharedRuns(Path(rules.evaluation_runs))
        self._chain = chain_of(spec, None if rules.pii_key is None else bytes.fromhex(rules.pii_key), runs)
        self._method = method_of(spec.method.type)
        documents = spec.preprocessing and spec.preprocessing.documents
        self._with_headings = bool(documents and documents.heading_context)
        chosen = deduplication_of(spec)
        self._sketcher = None if chosen.near is Copies.OFF else Sketcher(chosen.similarity)

    def close(self) -> None:
        """End the renderer's process; the tokenizer's is the caller's."""
        if self._renderer is not None:
            self._renderer.close()

    def work(self, task: Task, told: Callable[[int], None]) -> PartitionResult:
        """Write what one partition adds to the spool into `task.out` and return what it came to.

        told: called with the rows that were read so far, now and then. Raises TokenizerFailedError, FastDiffersError,
        MemoryError and OSError; any other known end is in the result."""
        rules, tokenizer, out = self._rules, self._model.tokenizer, Path(task.out)
        tokenizer.special_words.rows.clear()
        tokenizer.stop_ids.clear()
        if self._renderer is not None:
            self._renderer.begin()
        error: StageError | None = None
        with Spool(out) as spool, PartitionLedger(out / DECISIONS, told) as ledger:
            ledger.files = [
                FileAccount(uri, 0, "", is_table=table) for uri, table in zip(task.files, task.tables, strict=True)
            ]
            bad = _BadRows(ledger, rules.quarantine, max_broken_fraction=1.0)
            limit = SequenceLimit(rules.limit_tokens, LimitSource(rules.limit_source))
            too_long = TooLongRows(TooLong(rules.too_long), limit, 1.0, ledger)
            loss_on = LossOn(rules.loss_on)
            pipeline = Pipeline(
                self._model,
                loss_on,
                too_long,
                self._renderer,
                ledger,
                bad,
                spool,
                Timings(),
                self._method.examples,
                pairs=self._method.pairs is not None,
                with_headings=self._with_headings,
                sketcher=self._sketcher,
            )
            rows = through(self._chain, _checked(task, ledger, bad), ledger)
            try:
                for _ in pipeline.run(rows):
                    told(ledger.rows_read)
            except StageError as caught:
                error = caught
        if bad.failing and error is not None and error.fault is Fault.BROKEN_ROW:
            error = None  # which rows are broken is in the result; what ends the job is told of all partitions
        return self._result(pipeline, sorted(bad.places), error)

    def _result(self, pipeline: Pipeline, broken: list[RowPlace], error: StageError | None) -> PartitionResult:
        ledger, bad, too_long, tokenizer = pipeline.ledger, pipeline.bad, pipeline.too_long, self._model.tokenizer
        return PartitionResult(
            files=[each.rows for each in ledger.files],
            counted={stage: dict(counts) for stage, counts in ledger.counted.items()},
            places=dict(ledger.places),
            changes=dict(ledger.changes),
            ignored_fields=dict(ledger.ignored_fields),
            broken=broken,
            first_broken=bad.first,
            first_broken_at=bad.first_at,
            first_long=too_long.first,
            long_dropped=too_long.dropped,
            longest=too_long.longest,
            met_long=too_long.met,
            taught=pipeline.taught,
            special_words=dict(tokenizer.special_words.rows),
            stop_ids=sorted(tokenizer.stop_ids),
            choice=tokenizer.choice,
            probed=pipeline.probe.rows,
            rendered=self._renderer is not None and self._renderer.used,
            killed=pipeline.killed,
            seconds=dict(pipeline.timings.seconds),
            fault=None if error is None else error.fault.value,
            args={} if error is None else dict(error.args_by_name),
        )


class _BadRows(BadRows):
    """Those of one partition, which lists them; whether they end the job is judged where all partitions are known."""

    def __init__(self, ledger: PartitionLedger, quarantine: bool, max_broken_fraction: float) -> None:
        super().__init__(ledger, quarantine, max_broken_fraction)
        self.places: list[RowPlace] = []

    def add(self, file: int, number: int, stage: str, broken: Broken, value: object = None) -> None:
        self.places.append(RowPlace(file, number))
        super().add(file, number, stage, broken, value)


def _checked(task: Task, ledger: PartitionLedger, bad: BadRows) -> Iterator[Checked]:
    """Yield a partition's valid rows."""
    with Path(task.rows).open("rb") as stream:
        rows = islice(read_rows(stream), task.most_rows)
        decoded: DecodedRows = ((file, decode_row(row)) for file, row in rows)
        yield from valid_rows(ledger, bad, decoded, DatasetFormat(task.data_format), task.choices)


def renderer_of(given: Mapping[str, Any]) -> Renderer:
    """Return the chat template's renderer. given: as Rules.renderer."""
    return Renderer(
        given["source"],
        given["special_tokens"],
        datetime.fromisoformat(given["now"]),
        ends=Ends(tuple(given["stops"]), given["added_end"]),
        learn_all=given["learn_all"],
        accepted=given["accepted"],
    )
