"""Reads the evaluation sets that rows are compared with: their texts become runs of words, and nothing else is kept.

A set is read as datasets are, but its rows may have any shape: all of their texts count, but for system prompts and
definitions of functions, which belong to no task.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from finetune_api.duplicates import EvaluationSetSpec
from finetune_api.errors import StageError
from finetune_api.job import DatasetSpec
from finetune_api.reasons import Fault
from finetune_api.redact import shortened
from finetune_api.row_words import SHARED_WORDS, row_words
from finetune_api.run import MAX_ARG_CHARS
from finetune_trainer.data.accounts import Ledger
from finetune_trainer.data.field_names import ROLE, ROLES, SYSTEM, TOOLS
from finetune_trainer.data.listing import find_files
from finetune_trainer.data.problems import Broken, LeftOut, ReadDocument
from finetune_trainer.data.raw_rows import decode_row
from finetune_trainer.data.reading import RawReader
from finetune_trainer.data.shared_runs import MAX_RUNS, RunsWriter, SharedRuns, TooManyRunsError, runs_of
from finetune_trainer.store import Store, spec_field

FIELD = "preprocessing.decontaminateAgainst"
_BATCH_CHARACTERS = 2**20
_OF_NO_TASK = frozenset((*SYSTEM, *TOOLS))
# What is wrong with a set's files. All else, as that the store is away, is told as of any file.
_UNREADABLE = frozenset(
    (
        Fault.NO_FILES_MATCH,
        Fault.TOO_MANY_FILES,
        Fault.FILE_NAMED_TWICE,
        Fault.WRONG_FILE,
        Fault.BROKEN_FILE,
        Fault.INPUT_CHANGED,
    )
)


class EvaluationSet(NamedTuple):
    """A set that was read. runs: different ones; short_rows: rows without any, which cannot be found."""

    name: str
    uri: str
    files: int
    rows: int
    short_rows: int
    runs: int


class EvaluationSets(NamedTuple):
    """All sets of a job, and what they say as runs of words."""

    sets: tuple[EvaluationSet, ...]
    runs: SharedRuns


def read_evaluation_sets(
    store: Store, specs: Sequence[EvaluationSetSpec], work_dir: Path, beat: Callable[[], None]
) -> EvaluationSets:
    """Read them in order, calling `beat` with every batch of their rows; their runs go to a folder of `work_dir`.

    Raises EVALUATION_SET_UNREADABLE, EVALUATION_SET_SAYS_NOTHING, EVALUATION_SETS_TOO_LARGE."""
    writer, found = RunsWriter(), list[EvaluationSet]()
    for index, spec in enumerate(specs):
        field = f"{FIELD}[{index}].uri"
        try:
            writer.begin(index)
            found.append(_read(store, spec, field, work_dir, writer, beat))
        except TooManyRunsError:
            raise StageError(Fault.EVALUATION_SETS_TOO_LARGE, field=field, words=SHARED_WORDS, limit=MAX_RUNS) from None
    folder = work_dir / "evaluation_sets"
    writer.write(folder)
    return EvaluationSets(tuple(found), SharedRuns(folder))


def _read(
    store: Store, spec: EvaluationSetSpec, field: str, work_dir: Path, writer: RunsWriter, beat: Callable[[], None]
) -> EvaluationSet:
    rows = short_rows = 0
    with Ledger(work_dir / "evaluation_decisions.jsonl") as ledger:
        for batch in _batches(_rows(store, spec, field, work_dir, ledger)):
            texts = [text for row in batch for text in row]
            of_text, hashes = runs_of(texts)
            writer.add(hashes)
            row_of = np.repeat(np.arange(len(batch)), [len(row) for row in batch])
            rows += len(batch)
            short_rows += len(batch) - len(np.unique(row_of[of_text]))
            beat()
        files = len(ledger.files)
    runs = writer.count()
    if not runs:
        raise StageError(Fault.EVALUATION_SET_SAYS_NOTHING, field=field, rows=rows, words=SHARED_WORDS)
    return EvaluationSet(spec.name, spec.uri, files, rows, short_rows, runs)


def _rows(store: Store, spec: EvaluationSetSpec, field: str, work_dir: Path, ledger: Ledger) -> Iterator[list[str]]:
    """Yield the texts of each row of a set."""
    try:
        with spec_field(field):
            (inputs,) = find_files(store, [DatasetSpec(uri=spec.uri)], ledger, takes_documents=True)
            reader = RawReader(store, ledger, inputs, (), work_dir)
            with closing(reader.rows()) as placed:
                for file, raw in placed:
                    value = decode_row(raw).value
                    if isinstance(value, Broken | LeftOut):
                        problem = value.words if isinstance(value, Broken) else row_words(value.drop)
                        raise _unreadable(field, f"{ledger.files[file].uri} row {raw.number} {problem}")
                    yield list(_texts(value.text if isinstance(value, ReadDocument) else value))
    except StageError as error:
        if error.fault in _UNREADABLE:
            raise _unreadable(field, str(error)) from error
        raise


def _unreadable(field: str, problem: str) -> StageError:
    return StageError(Fault.EVALUATION_SET_UNREADABLE, field=field, problem=shortened(problem, MAX_ARG_CHARS))


def _texts(value: object) -> Iterator[str]:
    """Yield all texts of a value that may belong to a task."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        fields = cast(Mapping[str, Any], value)
        if any(ROLES.get(str(fields.get(name))) == "system" for name in ROLE):
            return
        for name, each in fields.items():
            if name not in _OF_NO_TASK:
                yield from _texts(each)
    elif isinstance(value, list):
        for each in cast(list[object], value):
            yield from _texts(each)


def _batches(rows: Iterator[list[str]]) -> Iterator[list[list[str]]]:
    batch: list[list[str]] = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += 1 + sum(map(len, row))
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
