"""`finetune data show`: single rows as they will be learned from, on the way that prepare takes, kept in memory."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, islice
from typing import Any

import numpy as np
import orjson

from finetune_api.errors import StageError
from finetune_api.job import OnBadRow, PreprocessingSpec, TooLong
from finetune_api.text_quality import QualitySpec
from finetune_trainer.context import StageContext
from finetune_trainer.data.accounts import Action, FileAccount, Ledger
from finetune_trainer.data.bad_rows import BadRows
from finetune_trainer.data.examples import TokenRun, Tree, flat_sequences
from finetune_trainer.data.kinds import kind_of, member_names, members_of
from finetune_trainer.data.model_facts import Model
from finetune_trainer.data.problems import Drop
from finetune_trainer.data.quality_report import require_few_poor
from finetune_trainer.data.reading import Checked, DecodedRows, Select
from finetune_trainer.data.sketches import Sketch
from finetune_trainer.data.structure import sizes_alone
from finetune_trainer.reading_steps import (
    DECISIONS_FILE,
    RowsStage,
    dataset_rows,
    find_inputs,
    funnel,
    no_training_data,
    opened,
    read_datasets,
    with_model,
)
from finetune_trainer.sizing import Choices


@dataclass(frozen=True)
class Segment:
    """A part of a sequence, all of which is learned or none."""

    text: str
    learned: bool


@dataclass(frozen=True, kw_only=True)
class ShownRow:
    """One sequence of a row, or a row that is left out, which has none.

    sequence: from 1; sequences: how many the row has; stop: the token that ends its last answer; answer: what the row
    says of it, chosen or rejected, good or bad; dropped: why it is left out, and words: what is wrong there, beyond
    that; changed: what was done to it. Both are codes of docs/data.md, the place or figures after a colon."""

    file: str
    row: int
    sequence: int = 1
    sequences: int = 1
    segments: list[Segment] = field(default_factory=list[Segment])
    stop: str | None = None
    answer: str | None = None
    dropped: str | None = None
    words: str | None = None
    changed: list[str] = field(default_factory=list[str])


class NoSuchFileError(Exception):
    """A row is wanted of a file that is none of the data's, or may be several."""


@dataclass(frozen=True)
class Wanted:
    """Which rows are shown: the first `most` of every dataset, or row `number` of the file that is called `file`."""

    most: int = 1
    file: str | None = None
    number: int = 0

    def select(self, files: Sequence[FileAccount]) -> Select:
        """Return what picks them. files: of all datasets, complete once a row is asked for."""
        return self._one(files) if self.file is not None else lambda rows: islice(rows, self.most)

    def _one(self, files: Sequence[FileAccount]) -> Select:
        def select(rows: DecodedRows) -> DecodedRows:
            wanted = self.index(files)
            for file, item in rows:
                if (file, item.number) == (wanted, self.number):
                    yield file, item
                if file > wanted or (file == wanted and item.number >= self.number):
                    return

        return select

    def index(self, files: Sequence[FileAccount]) -> int:
        """Return which file is meant. Raises NoSuchFileError."""
        assert self.file is not None
        name = self.file.removeprefix("./")
        found = [index for index, each in enumerate(files) if each.uri == name or each.uri.endswith(f"/{name}")]
        if len(found) != 1:
            raise NoSuchFileError(f"{len(found) or 'no'} files of the data are called {name}")
        return found[0]


class _Shown:
    """A sink that keeps rows as text."""

    def __init__(self, model: Model, files: Sequence[FileAccount]) -> None:
        self._model, self._files = model, files
        self.rows: dict[tuple[int, int], list[ShownRow]] = {}

    def append(
        self,
        content_hash: bytes,  # noqa: ARG002 (of the interface)
        file: int,
        number: int,
        examples: list[Tree],
        *,
        prompt_tokens: int = 0,  # noqa: ARG002
        weight: float = 1.0,  # noqa: ARG002
        answers: Sequence[str] = (),
        label: int = 0,  # noqa: ARG002
        prompt_hash: bytes = b"",  # noqa: ARG002
        group_hash: bytes = b"",  # noqa: ARG002
        sketch: Sketch | None = None,  # noqa: ARG002
    ) -> None:
        """Keep one row."""
        of_trees = [flat_sequences(tree) for tree in examples]
        said = [_said(answers, place, len(runs)) for runs in of_trees for place in range(len(runs))]
        runs = [run for each in of_trees for run in each]
        self.rows[file, number] = [
            ShownRow(
                file=self._files[file].uri,
                row=number,
                sequence=place,
                sequences=len(runs),
                segments=self._segments(run),
                stop=self._stop(run),
                answer=answer,
            )
            for place, (run, answer) in enumerate(zip(runs, said, strict=True), 1)
        ]

    def _segments(self, run: TokenRun) -> list[Segment]:
        """Cut the text of all tokens where labels begin and end: some tokenizers decode a part alone otherwise."""
        ids, labels = run.tokens.tolist(), run.labels.tolist()
        whole = self._model.tokenizer.decode(ids)
        found: list[Segment] = []
        end = cut = 0
        for learned, group in groupby(labels):
            end += len(list(group))
            begin, cut = cut, len(whole)
            if end < len(ids):
                cut = max(begin, _same(self._model.tokenizer.decode(ids[:end]), whole))
            found.append(Segment(whole[begin:cut], bool(learned)))
        return found

    def _stop(self, run: TokenRun) -> str | None:
        """Return the last token that is learned, where a server stops at it."""
        learned = run.labels.nonzero()[0]
        if not len(learned):
            return None
        last = int(run.tokens[learned[-1]])
        text = self._model.tokenizer.decode([last])
        return text if text in self._model.stops or last == self._model.tokenizer.eos_id else None


def _said(answers: Sequence[str], place: int, sequences: int) -> str | None:
    """Return what is said of the answer of one of an example's sequences, if anything."""
    return (answers[place] or None) if len(answers) == sequences else None


def _same(one: str, other: str) -> int:
    """Return how many characters both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def show(ctx: StageContext, wanted: Wanted) -> list[ShownRow]:
    """Return the wanted rows as the job's model learns them.

    Raises NoSuchFileError and what prepare raises; rows that are broken or too long are shown as dropped."""
    spec = ctx.config.spec
    given = spec.preprocessing or PreprocessingSpec()
    spec = spec.model_copy(update={"preprocessing": _letting_through(given)})
    lenient = replace(ctx, config=ctx.config.model_copy(update={"spec": spec}))
    return with_model(lenient, lambda model: _show(model, lenient, wanted), sizes_alone)


def _letting_through(given: PreprocessingSpec) -> PreprocessingSpec:
    """Return the choices by which no row ends the job."""
    fractions = dict.fromkeys(("max_broken_fraction", "max_too_long_fraction", "max_unrolled_fraction"), 1.0)
    too_long = TooLong.DROP if given.too_long is TooLong.FAIL else given.too_long
    quality = (given.quality or QualitySpec()).model_copy(update={"max_dropped_fraction": 1.0})
    update = {**fractions, "on_bad_row": OnBadRow.QUARANTINE, "too_long": too_long, "quality": quality}
    return given.model_copy(update=update)


def _show(model: Model, ctx: StageContext, wanted: Wanted) -> list[ShownRow]:
    with opened(ctx, model) as stage:
        shown = _Shown(model, stage.ledger.files)
        read_datasets(stage, shown, wanted.select(stage.ledger.files))
    return _with_decisions(ctx, stage.ledger, shown.rows)


def show_unrendered(ctx: StageContext, wanted: Wanted) -> list[ShownRow]:
    """Return the wanted rows as they are read, a segment a message: without a model nothing more can be told."""
    with Ledger(ctx.work_dir / DECISIONS_FILE) as ledger:
        stage = RowsStage(ctx=ctx, ledger=ledger)
        rows = dataset_rows(
            stage, find_inputs(stage), BadRows(ledger, True, max_broken_fraction=1), wanted.select(ledger.files)
        )
        found = {
            (item.file, item.number): _as_read(ledger.files[item.file].uri, item)
            for dataset in rows
            for item in dataset
        }
    return _with_decisions(ctx, ledger, found)


def _as_read(uri: str, item: Checked) -> list[ShownRow]:
    members, names = members_of(item.row), member_names(item.row)
    return [
        ShownRow(
            file=uri,
            row=item.number,
            sequence=place + 1,
            sequences=len(members),
            segments=[Segment(*each) for each in kind_of(member).said(member)],
            answer=names[place % len(names)] or None,
        )
        for place, member in enumerate(members)
    ]


def _with_decisions(ctx: StageContext, ledger: Ledger, rows: dict[tuple[int, int], list[ShownRow]]) -> list[ShownRow]:
    """Return the rows in order, with those that are left out, and with what was done to each."""
    numbers = {account.uri: index for index, account in enumerate(ledger.files)}
    for decision in decisions(ctx):
        key = numbers[decision["file"]], int(decision["row"])
        reason = reason_of(decision)
        if decision["action"] == Action.DROP:
            said = decision.get("words")
            rows[key] = [ShownRow(file=decision["file"], row=key[1], dropped=reason, words=said)]
        else:
            rows[key] = [replace(each, changed=[*each.changed, reason]) for each in rows.get(key, [])]
    return [each for key in sorted(rows) for each in rows[key]]


def decisions(ctx: StageContext) -> Iterator[dict[str, Any]]:
    """Yield the decisions that were written, without the last line on how many were not."""
    with (ctx.work_dir / DECISIONS_FILE).open("rb") as file:
        for line in file:
            decision = orjson.loads(line)
            if "row" in decision:
                yield decision


def reason_of(decision: Mapping[str, Any]) -> str:
    """Return why it was made, as a code of docs/data.md, the place or figures after a colon."""
    return ": ".join(decision[name] for name in ("reason", "detail") if name in decision)


@dataclass(frozen=True)
class Unrendered:
    """What reading alone tells of the data. report: the part of report.json that needs no model; error: why it would
    fail, if it would."""

    report: dict[str, Any]
    formats: list[str]
    error: StageError | None


def check_unrendered(ctx: StageContext) -> Unrendered:
    """Read and check all rows, as far as that needs no model."""
    error: StageError | None = None
    labels = Counter[int]()  # of the rows that are left: 1 for a good answer, -1 for a bad one, 0 for others
    with Ledger(ctx.work_dir / DECISIONS_FILE) as ledger:
        stage = RowsStage(ctx=ctx, ledger=ledger)
        bad = BadRows(ledger, False, max_broken_fraction=0)
        try:
            for dataset in dataset_rows(stage, find_inputs(stage), bad):
                labels.update(kind_of(item.row).label(item.row) for item in dataset)
            require_few_poor(ctx.config.spec, ledger)
            _require_trainable(stage, labels)
        except StageError as caught:
            error = caught
    state = {"state": "read"} if error is None else {"state": "failed", "problem": str(error)}
    return Unrendered({**state, **funnel(stage, {})}, [str(each) for each in stage.formats], error)


def _require_trainable(stage: RowsStage, labels: Counter[int]) -> None:
    """Raise what prepare would where no row is left, or where all answers are rated alike."""
    ledger, method = stage.ledger, stage.method
    if not labels:
        raise no_training_data(ledger.rows_read, ledger.dropped)
    if method.pairs is not None and not labels[0] and not (labels[1] and labels[-1]):
        one_sided = Counter({str(Drop.ONE_SIDED): labels.total()})
        raise no_training_data(ledger.rows_read, ledger.dropped + one_sided)
    label = np.repeat(np.array([1, 0, -1], dtype=np.int8), [labels[1], labels[0], labels[-1]])
    method.settle(stage.ctx.config.spec.method, {"label": label}, Choices())
