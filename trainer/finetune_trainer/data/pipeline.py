"""Checked rows to tokens: render, tokenise, drop or split what is too long, hand on to the spool or another sink.

Batches are bounded by rows and bytes, and one batch is rendered in the child process while the one before is
tokenised here, so memory does not grow with the data.
"""

import time
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from finetune_api.errors import StageError
from finetune_api.job import LossOn, TooLong
from finetune_api.reasons import Fault
from finetune_api.redact import shortened
from finetune_trainer.data.accounts import Action, Ledger, RowPlace
from finetune_trainer.data.bad_rows import BadRows
from finetune_trainer.data.examples import TokenRun, Tree
from finetune_trainer.data.kinds import conversation_of, is_rendered, kind_of
from finetune_trainer.data.model_facts import Model
from finetune_trainer.data.problems import Broken, Drop, Problem, place
from finetune_trainer.data.reading import Checked
from finetune_trainer.data.renderer import Rendered, RenderedSequence, Renderer, TemplateInvalidError
from finetune_trainer.data.rows import Conversation
from finetune_trainer.data.same_ids import Probe
from finetune_trainer.data.taught import Taught, changes_of, refused, stop_is_split
from finetune_trainer.data.tokenizer import TokenizerFailedError
from finetune_trainer.data.tokens import Tokens, all_end_in
from finetune_trainer.data.too_long import TooLongRows, from_turn, turns

_BATCH_ROWS = 512
_BATCH_BYTES = 2**20

Batch = list[Checked]


@dataclass
class Timings:
    """Seconds by stage."""

    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def of(self, stage: str) -> Generator[None]:
        begin = time.monotonic()
        try:
            yield
        finally:
            self.seconds[stage] += time.monotonic() - begin


def template_failed(model: Model, file_uri: str, number: int, problem: str) -> StageError:
    """Return what a row ends the job with that the chat template refuses."""
    return StageError(
        Fault.TEMPLATE_FAILED,
        uri=place(model.facts.uri),
        file=place(file_uri),
        row=number,
        problem=shortened(problem, 200),
    )


class Sink(Protocol):
    """Takes every row that is not left out, in order."""

    def append(
        self,
        content_hash: bytes,
        file: int,
        number: int,
        examples: list[Tree],
        *,
        prompt_tokens: int = 0,
        weight: float = 1.0,
    ) -> None:
        """Take one row, as the spool does."""
        ...


@dataclass(frozen=True)
class Pipeline:
    """Where rows go on their way to the sink. renderer: None when no row is a conversation's; probe: keeps the first
    that go there."""

    model: Model
    loss_on: LossOn
    too_long: TooLongRows
    renderer: Renderer | None
    ledger: Ledger
    bad: BadRows
    sink: Sink
    timings: Timings
    examples: Callable[[Sequence[TokenRun]], list[Tree]]  # what the sequences of a row become, or the pieces of a text
    probe: Probe = field(default_factory=Probe)
    taught: Taught = field(default_factory=Taught)
    killed: list[RowPlace] = field(default_factory=list[RowPlace])  # rows that the renderer's child died of

    def run(self, rows: Iterator[Checked]) -> Iterator[None]:
        """Take all rows of one dataset; yields whenever some were stored.

        What ends the rows is raised once all before it were taken, so that of several errors the first in the order
        of the rows is told. Raises NO_CHAT_TEMPLATE, TEMPLATE_FAILED, TEMPLATE_INVALID, what `refused` names,
        BROKEN_MODEL, and TokenizerFailedError.
        """
        pending: deque[tuple[Batch, Future[list[Rendered | Broken]]]] = deque()
        until_end = _UntilEnd(rows)
        with ThreadPoolExecutor(max_workers=1) as pool:
            for batch in self._batches(until_end):
                pending.append((batch, pool.submit(self._render, batch)))
                if len(pending) > 1:
                    yield from self._finish(pool, *pending.popleft())
            while pending:
                yield from self._finish(pool, *pending.popleft())
        if until_end.error is not None:
            raise until_end.error

    def _batches(self, rows: Iterator[Checked]) -> Iterator[Batch]:
        while True:
            batch: Batch = []
            held_bytes = 0
            with self.timings.of("read"):
                for row in rows:
                    batch.append(row)
                    held_bytes += row.held_bytes
                    if len(batch) >= _BATCH_ROWS or held_bytes >= _BATCH_BYTES:
                        break
            if not batch:
                return
            yield batch

    def _render(self, batch: Batch) -> list[Rendered | Broken]:
        """The first of the batch's conversations as text, in order. Runs in the pool's thread."""
        conversations = [row for item in batch if (row := conversation_of(item.row)) is not None]
        if not conversations:
            return []
        if self.renderer is None:
            raise StageError(Fault.NO_CHAT_TEMPLATE, uri=place(self.model.facts.uri))
        return self.renderer.render(conversations)

    def _finish(
        self, pool: ThreadPoolExecutor, batch: Batch, future: Future[list[Rendered | Broken]]
    ) -> Iterator[None]:
        """Store a batch, in as many parts as its texts are rendered in; yields after each."""
        while batch:
            with self.timings.of("render"):
                rendered = self._rendered(batch, future)
            part, batch = _divided(batch, len(rendered))
            if batch:
                future = pool.submit(self._render, batch)
            with self.timings.of("tokenise"):
                sequences = self._tokenised(pool, part, rendered)
            with self.timings.of("write"):
                for item, parts in sequences:
                    self._store(item, parts)
            yield

    def _rendered(self, batch: Batch, future: Future[list[Rendered | Broken]]) -> list[Rendered | Broken]:
        try:
            return future.result()
        except TemplateInvalidError as error:
            if error.row is None:
                raise self._template_invalid(str(error)) from error
            conversations = [item for item in batch if is_rendered(item.row)]
            raise self._template_failed(conversations[error.row], str(error)) from error

    def _tokenised(
        self, pool: ThreadPoolExecutor, batch: Batch, rendered: list[Rendered | Broken]
    ) -> Iterable[tuple[Checked, list[Tokens]]]:
        try:
            found = self._sequences(batch, rendered)
            return [self._shortened(pool, item, sequences) for item, sequences in found]
        except TokenizerFailedError as error:
            file = place(self.ledger.files[batch[0].file].uri)
            raise TokenizerFailedError(f"{error}, at row {batch[0].number} of {file} or soon after") from error

    def _sequences(self, batch: Batch, rendered: list[Rendered | Broken]) -> Iterable[tuple[Checked, list[Tokens]]]:
        """Every row's sequences, in the order of the batch; broken rows are left out and recorded."""
        tokenizer = self.model.tokenizer
        learn_all = self.loss_on is LossOn.ALL
        by_row: dict[int, list[Tokens]] = {}
        rows = ((index, conversation_of(item.row)) for index, item in enumerate(batch))
        conversations = {index: row for index, row in rows if row is not None}
        texts: list[RenderedSequence] = []
        places: list[int] = []
        for index, result in zip(conversations, rendered, strict=True):
            if isinstance(result, Broken):
                self._broken(batch[index], result)
            else:
                places += [index] * len(result.sequences)
                texts += result.sequences
        tokens = tokenizer.conversations([each.text for each in texts], [each.spans for each in texts], learn_all)
        for index, sequence in zip(places, tokens, strict=True):
            by_row.setdefault(index, []).append(sequence)
        for index, result in zip(conversations, rendered, strict=True):
            if isinstance(result, Rendered):
                if not learn_all and not all_end_in(by_row[index], self.model.stop_ids):
                    del by_row[index]
                    self._broken(batch[index], stop_is_split(conversations[index]))
                    continue
                self.taught.add(result.notes, [len(each.ids) for each in by_row[index]])
                for reason, detail in changes_of(result.notes):
                    self.ledger.decide(batch[index].file, batch[index].number, "render", Action.CHANGE, reason, detail)
        by_row.update(self._untemplated(batch, learn_all))
        return [(batch[index], by_row[index]) for index in sorted(by_row)]

    def _untemplated(self, batch: Batch, learn_all: bool) -> Iterator[tuple[int, list[Tokens]]]:
        """Yield the tokens of the rows that no template renders, each with its place in the batch."""
        places: defaultdict[type, list[int]] = defaultdict(list)
        for index, item in enumerate(batch):
            places[type(item.row)].append(index)
        for of_kind in places.values():
            untemplated = kind_of(batch[of_kind[0]].row).untemplated
            if untemplated is not None:
                tokens = untemplated.tokens(self.model, [batch[index].row for index in of_kind], learn_all)
                yield from ((index, [each]) for index, each in zip(of_kind, tokens, strict=True))

    def _shortened(
        self, pool: ThreadPoolExecutor, item: Checked, sequences: list[Tokens]
    ) -> tuple[Checked, list[Tokens]]:
        """Make a row that is too long shorter, as far as the job's choice allows; else it stays as long as it is."""
        limit, policy, kind = self.too_long.limit.tokens, self.too_long.policy, kind_of(item.row)
        tokens = _longest(sequences)
        if tokens <= limit:
            return item, sequences
        tokenizer, untemplated = self.model.tokenizer, kind.untemplated
        if policy is TooLong.SPLIT and untemplated is not None and untemplated.pieces is not None:
            pieces = untemplated.pieces(sequences[0], limit, tokenizer.breaks)
            self.too_long.split(item.file, item.number, len(pieces))
            return item, pieces
        if policy is not TooLong.TRUNCATE:
            return item, sequences
        if kind.conversation is not None:
            return self._from_later_turn(pool, item, kind.conversation(item.row)) or (item, sequences)
        shorter = untemplated and untemplated.cut(sequences[0], limit, len(tokenizer.prefix_ids))
        if shorter is None:
            return item, sequences
        self.too_long.changed(item.file, item.number, f"{limit} of {tokens} tokens are kept")
        return item, [shorter]

    def _from_later_turn(
        self, pool: ThreadPoolExecutor, item: Checked, row: Conversation
    ) -> tuple[Checked, list[Tokens]] | None:
        """Return a conversation without its oldest turns, as few as do; None where none are enough."""
        begins = turns(row)
        tried: dict[int, list[Tokens]] = {}

        def is_short(begin: int) -> bool:
            shorter = item._replace(row=from_turn(row, begin))
            (rendered,) = self._rendered([shorter], pool.submit(self._render, [shorter]))
            if isinstance(rendered, Broken):
                return False
            parts, learn_all = rendered.sequences, self.loss_on is LossOn.ALL
            tried[begin] = self.model.tokenizer.conversations(
                [each.text for each in parts], [each.spans for each in parts], learn_all
            )
            return _longest(tried[begin]) <= self.too_long.limit.tokens

        place = bisect_left(begins, True, key=is_short)
        if place == len(begins):
            return None
        begin = begins[place]
        later = from_turn(row, begin)
        dropped = len(row.messages) - len(later.messages)
        self.too_long.changed(item.file, item.number, f"the oldest {dropped} messages are left out")
        return item._replace(row=later), tried[begin]

    def _store(self, item: Checked, sequences: list[Tokens]) -> None:
        """Hand on one row, or record why it is left out."""
        size = self.model.facts.vocabulary_size
        if any(part.ids.max(initial=0) >= size for part in sequences):
            raise StageError(
                Fault.BROKEN_MODEL,
                uri=place(self.model.facts.uri),
                problem=f"its tokenizer makes ids above the model's vocabulary of {size}",
            )
        tokens = _longest(sequences)
        if tokens > self.too_long.limit.tokens:
            self.too_long.drop(item.file, item.number, tokens)
        elif not any(part.labels.any() for part in sequences):
            self.ledger.drop(item.file, item.number, "tokenise", Drop.NO_LABEL)
        else:
            self.model.tokenizer.special_words.count(item.row)
            self.probe.take(item.file, item.number, item.row, sequences)
            runs = [TokenRun(part.ids, part.labels) for part in sequences]
            self.sink.append(
                item.content_hash,
                item.file,
                item.number,
                self.examples(runs),
                prompt_tokens=sequences[0].prompt_tokens,
                weight=item.row.weight,
            )

    def _broken(self, item: Checked, broken: Broken) -> None:
        """Put a row that the template refuses aside, or end the job."""
        fails_always = self.renderer.fails_always if self.renderer is not None else None
        if broken.problem is Problem.TEMPLATE_FAILED and fails_always is not None:
            raise self._template_invalid(fails_always)
        if self.renderer is not None and broken.detail == self.renderer.too_much:
            self.killed.append(RowPlace(item.file, item.number))
        if self.bad.quarantine:
            self.bad.add(item.file, item.number, "render", broken)
        elif broken.problem is Problem.TEMPLATE_FAILED:
            raise self._template_failed(item, broken.detail)
        else:
            raise refused(broken, place(self.ledger.files[item.file].uri), item.number, self.model.stops)

    def _template_invalid(self, problem: str) -> StageError:
        return StageError(Fault.TEMPLATE_INVALID, uri=place(self.model.facts.uri), problem=shortened(problem, 200))

    def _template_failed(self, item: Checked, problem: str) -> StageError:
        return template_failed(self.model, self.ledger.files[item.file].uri, item.number, problem)


class _UntilEnd(Iterator[Checked]):
    """The rows before what ends them. error: that, if anything did."""

    def __init__(self, rows: Iterator[Checked]) -> None:
        self._rows = rows
        self.error: StageError | None = None

    def __next__(self) -> Checked:
        if self.error is not None:
            raise StopIteration
        try:
            return next(self._rows)
        except StageError as error:
            self.error = error
            raise StopIteration from None


def _divided(batch: Batch, conversations: int) -> tuple[Batch, Batch]:
    """Return the rows before the first conversation that is not among the first `conversations`, and the others."""
    places = [index for index, item in enumerate(batch) if is_rendered(item.row)]
    cut = places[conversations] if conversations < len(places) else len(batch)
    return batch[:cut], batch[cut:]


def _longest(sequences: list[Tokens]) -> int:
    """Return the tokens of the longest of a row's sequences."""
    return max(len(part.ids) for part in sequences)
