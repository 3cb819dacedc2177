"""Checked rows to tokens: render, tokenise, drop or split what is too long, hand on to the spool or another sink.

Batches are bounded by rows and bytes, and one batch is rendered in the child process while the one before is
tokenised here, so memory does not grow with the data.
"""

import time
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby, islice
from operator import itemgetter
from typing import Protocol

from finetune_api.errors import StageError
from finetune_api.job import LossOn, TooLong
from finetune_api.reasons import Fault
from finetune_api.redact import shortened
from finetune_trainer.data.accounts import Action, Ledger, RowPlace
from finetune_trainer.data.bad_rows import BadRows
from finetune_trainer.data.examples import TokenRun, Tree
from finetune_trainer.data.kinds import compared, conversations_of, kind_of, member_names, members_of, prompt_hash
from finetune_trainer.data.members import (
    Batch,
    Example,
    Member,
    Shorter,
    asked_of,
    divided,
    examples_of,
    longest,
    of_member,
    runs_of,
    useless,
)
from finetune_trainer.data.model_facts import Model
from finetune_trainer.data.problems import Broken, Drop, Problem, place
from finetune_trainer.data.reading import Checked
from finetune_trainer.data.renderer import Rendered, Renderer, TemplateInvalidError
from finetune_trainer.data.rows import Row
from finetune_trainer.data.same_ids import Probe
from finetune_trainer.data.sketches import Sketch, Sketcher
from finetune_trainer.data.taught import Taught, changes_of, refused, stop_is_split
from finetune_trainer.data.tokenizer import TokenizerFailedError
from finetune_trainer.data.tokens import Tokens, all_end_in
from finetune_trainer.data.too_long import TooLongRows, from_turn, turns
from finetune_trainer.data.unknown_words import counted

_BATCH_ROWS = 512
_BATCH_BYTES = 2**20


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
        answers: Sequence[str] = (),
        label: int = 0,
        prompt_hash: bytes = b"",
        group_hash: bytes = b"",
        sketch: Sketch | None = None,
    ) -> None:
        """Take one row, as the spool does. answers: what is said of each sequence of an example, as chosen."""
        ...


@dataclass(frozen=True)
class Pipeline:
    """Where rows go on their way to the sink. renderer: None when no row is a conversation's; pairs: whether single
    answers that are rated are paired there; with_headings: whether pieces of a text begin with the headings above them;
    probe: keeps the first that go there."""

    model: Model
    loss_on: LossOn
    too_long: TooLongRows
    renderer: Renderer | None
    ledger: Ledger
    bad: BadRows
    sink: Sink
    timings: Timings
    examples: Callable[[Sequence[TokenRun]], list[Tree]]  # what the sequences of a row become, or the pieces of a text
    pairs: bool = False
    with_headings: bool = False
    sketcher: Sketcher | None = None  # None where near copies are not looked for
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
        """The first of the batch's conversations as text, in order, of each row all or none. Runs in the pool's
        thread."""
        asked = asked_of(batch)
        if not asked:
            return []
        if self.renderer is None:
            raise StageError(Fault.NO_CHAT_TEMPLATE, uri=place(self.model.facts.uri))
        found = self.renderer.render([each.conversation for each in asked])
        while len(found) < len(asked) and asked[len(found)].row == asked[len(found) - 1].row:
            begun = len(found)
            rest = [each.conversation for each in asked[begun:] if each.row == asked[begun].row]
            try:
                found += self.renderer.render(rest)
            except TemplateInvalidError as error:
                raise TemplateInvalidError(str(error), None if error.row is None else begun + error.row) from error
        return found

    def _finish(
        self, pool: ThreadPoolExecutor, batch: Batch, future: Future[list[Rendered | Broken]]
    ) -> Iterator[None]:
        """Store a batch, in as many parts as its texts are rendered in; yields after each."""
        while batch:
            with self.timings.of("render"):
                rendered = self._rendered(batch, future)
            part, batch = divided(batch, len(rendered))
            if batch:
                future = pool.submit(self._render, batch)
            with self.timings.of("tokenise"):
                rows = self._tokenised(pool, part, rendered)
            with self.timings.of("sketch"):
                sketches = self._sketched([item for item, _ in rows])
            with self.timings.of("write"):
                for (item, examples), sketch in zip(rows, sketches, strict=True):
                    self._store(item, examples, sketch)
            yield

    def _rendered(self, batch: Batch, future: Future[list[Rendered | Broken]]) -> list[Rendered | Broken]:
        try:
            return future.result()
        except TemplateInvalidError as error:
            if error.row is None:
                raise self._template_invalid(str(error)) from error
            item = batch[asked_of(batch)[error.row].row]
            raise self._template_failed(item, str(error)) from error

    def _tokenised(
        self, pool: ThreadPoolExecutor, batch: Batch, rendered: list[Rendered | Broken]
    ) -> list[tuple[Checked, list[Example]]]:
        try:
            found = self._sequences(batch, rendered)
            return [(item, self._shortened(pool, item, examples)) for item, examples in found]
        except TokenizerFailedError as error:
            file = place(self.ledger.files[batch[0].file].uri)
            raise TokenizerFailedError(f"{error}, at row {batch[0].number} of {file} or soon after") from error

    def _sequences(self, batch: Batch, rendered: list[Rendered | Broken]) -> Iterable[tuple[Checked, list[Example]]]:
        """Every row's examples, in the order of the batch; broken rows are left out and recorded."""
        by_row: dict[int, list[list[Tokens]]] = {}  # by the row's place, the sequences of each of its members
        for index, results, sequences in self._of_texts(self._whole(batch, rendered)):
            item = batch[index]
            broken = self._stop_is_split(item.row, sequences)
            if broken is not None:
                self._broken(item, broken)
                continue
            by_row[index] = sequences
            for result, each in zip(results, sequences, strict=True):
                self.taught.add(result.notes, [len(sequence.ids) for sequence in each])
            notes = dict.fromkeys(note for result in results for note in result.notes)
            for reason, detail in changes_of(notes):
                self.ledger.decide(item.file, item.number, "render", Action.CHANGE, reason, detail)
        by_row.update(self._untemplated(batch))
        return [(batch[index], examples_of(batch[index].row, by_row[index])) for index in sorted(by_row)]

    def _whole(self, batch: Batch, rendered: list[Rendered | Broken]) -> dict[int, list[Rendered]]:
        """Return what the conversations of each row became, by its place in the batch.

        A row one of whose conversations is broken is recorded, and is not among them."""
        by_row: defaultdict[int, list[Rendered | Broken]] = defaultdict(list)
        for asked, result in zip(asked_of(batch), rendered, strict=True):
            by_row[asked.row].append(result)
        whole: dict[int, list[Rendered]] = {}
        for index, results in by_row.items():
            row = batch[index].row
            broken = (of_member(row, at, each) for at, each in enumerate(results) if isinstance(each, Broken))
            if (first := next(broken, None)) is not None:
                self._broken(batch[index], first)
            else:
                whole[index] = [each for each in results if isinstance(each, Rendered)]
        return whole

    def _of_texts(
        self, whole: Mapping[int, list[Rendered]]
    ) -> Iterator[tuple[int, list[Rendered], list[list[Tokens]]]]:
        """Yield the place of each row, what its conversations became, and the sequences of each."""
        texts = [each for results in whole.values() for result in results for each in result.sequences]
        learn_all = self.loss_on is LossOn.ALL
        tokens = iter(
            self.model.tokenizer.conversations([each.text for each in texts], [each.spans for each in texts], learn_all)
        )
        for index, results in whole.items():
            yield index, results, [list(islice(tokens, len(each.sequences))) for each in results]

    def _stop_is_split(self, row: Row, sequences: list[list[Tokens]]) -> Broken | None:
        """Return what is wrong with a row one of whose answers ends in the text of a stop token alone."""
        if self.loss_on is LossOn.ALL:
            return None
        ends = [all_end_in(each, self.model.stop_ids) for each in sequences]
        if all(ends):
            return None
        at = ends.index(False)
        return of_member(row, at, stop_is_split(conversations_of(row)[at]))

    def _untemplated(self, batch: Batch) -> Iterator[tuple[int, list[list[Tokens]]]]:
        """Yield the sequences of the rows that no template renders, each with its place in the batch."""
        by_kind: defaultdict[type, list[tuple[int, Row]]] = defaultdict(list)
        for index, item in enumerate(batch):
            for member in members_of(item.row):
                by_kind[type(member)].append((index, member))
        for members in by_kind.values():
            untemplated = kind_of(members[0][1]).untemplated
            if untemplated is None:
                continue
            tokens = untemplated.tokens(self.model, [member for _, member in members], self.loss_on is LossOn.ALL)
            placed = zip((index for index, _ in members), tokens, strict=True)
            for index, group in groupby(placed, key=itemgetter(0)):
                yield index, [[each] for _, each in group]

    def _shortened(self, pool: ThreadPoolExecutor, item: Checked, examples: list[Example]) -> list[Example]:
        """Make the examples of a row that are too long shorter, as far as the job's choice allows."""
        if all(longest(each) <= self.too_long.limit.tokens for each in examples):
            return examples
        found = [self._shorter(pool, item, each) for each in examples]
        for change in dict.fromkeys(each.change for each in found if each.change):
            self.too_long.changed(item.file, item.number, change)
        return [each.example for each in found]

    def _shorter(self, pool: ThreadPoolExecutor, item: Checked, example: Example) -> Shorter:
        """Make an example shorter if it is too long, or leave it as long as it is."""
        limit, policy, tokens = self.too_long.limit.tokens, self.too_long.policy, longest(example)
        if tokens <= limit:
            return Shorter(example)
        tokenizer, untemplated = self.model.tokenizer, kind_of(example[0].row).untemplated
        if policy is TooLong.SPLIT and untemplated is not None and untemplated.pieces is not None:
            ((row, (whole,)),) = example
            pieces = untemplated.pieces(whole, limit, tokenizer.marks, self.with_headings)
            self.too_long.split(item.file, item.number, len(pieces))
            return Shorter([Member(row, pieces)])
        if policy is not TooLong.TRUNCATE or (self.pairs and kind_of(item.row).label(item.row)):
            return Shorter(example)  # an answer that is to be paired keeps the prompt of the other one
        if untemplated is None:
            return self._from_later_turn(pool, item, example)
        cut: list[Member] = []
        for row, (whole,) in example:  # all lose as much, so that the answers of a pair keep one prompt
            shorter = untemplated.cut(whole, len(whole.ids) - (tokens - limit), len(tokenizer.prefix_ids))
            if shorter is None:
                return Shorter(example)
            cut.append(Member(row, [shorter]))
        return Shorter(cut, f"{limit} of {tokens} tokens are kept")

    def _from_later_turn(self, pool: ThreadPoolExecutor, item: Checked, example: Example) -> Shorter:
        """Return an example without the oldest turns of its conversations, as few as do; whole where none are enough.

        All of them lose the same turns, so that the answers of a pair keep one prompt."""
        conversations = [each for member in example for each in conversations_of(member.row)]
        begins = sorted(set[int].intersection(*(set(turns(each)) for each in conversations)))
        tried: dict[int, Example] = {}

        def is_short(begin: int) -> bool:
            rows = [from_turn(each, begin) for each in conversations]
            rendered = self._all_rendered(pool, [item._replace(row=row) for row in rows])
            whole = [each for each in rendered if isinstance(each, Rendered)]
            if len(whole) < len(rows):
                return False
            ((_, _, sequences),) = self._of_texts({0: whole})
            tried[begin] = [Member(row, each) for row, each in zip(rows, sequences, strict=True)]
            return longest(tried[begin]) <= self.too_long.limit.tokens

        place = bisect_left(begins, True, key=is_short)
        if place == len(begins):
            return Shorter(example)
        kept = from_turn(conversations[0], begins[place]).messages
        dropped = len(conversations[0].messages) - len(kept)
        return Shorter(tried[begins[place]], f"the oldest {dropped} messages are left out")

    def _all_rendered(self, pool: ThreadPoolExecutor, batch: Batch) -> list[Rendered | Broken]:
        """Render a few conversations, however much they are."""
        found: list[Rendered | Broken] = []
        while len(found) < len(batch):
            rest = batch[len(found) :]
            found += self._rendered(rest, pool.submit(self._render, rest))
        return found

    def _sketched(self, batch: Batch) -> Sequence[Sketch | None]:
        """Return the sketch of each row, where near copies are looked for."""
        if self.sketcher is None:
            return [None] * len(batch)
        return self.sketcher.sketches([compared(item.row) for item in batch])

    def _store(self, item: Checked, examples: list[Example], sketch: Sketch | None) -> None:
        """Hand on one row, or record why it is left out."""
        highest = max(int(run.tokens.max(initial=0)) for example in examples for run in runs_of(example))
        if highest >= self.model.facts.vocabulary_size:
            raise self._no_embedding(item, highest)
        reasons = [useless(example, self.too_long.limit.tokens) for example in examples]
        kept = [example for example, reason in zip(examples, reasons, strict=True) if reason is None]
        if reasons[0] is not None and not kept:
            self._drop(item, examples[0], reasons[0])
            return
        for reason in dict.fromkeys(each for each in reasons if each is not None):
            detail = f"{reasons.count(reason)} of {len(examples)} pairs are left out"
            self.ledger.decide(item.file, item.number, "tokenise", Action.CHANGE, reason, detail)
        members = [member for example in kept for member in example]
        self.model.tokenizer.special_words.count([member.row for member in members])
        sequences = [each for member in members for each in member.sequences]
        self.ledger.files[item.file].tokens.add(counted(sequences, self.model.unknown_id))
        for member in members:
            self.probe.take(item.file, item.number, member.row, member.sequences)
        self.sink.append(
            item.content_hash,
            item.file,
            item.number,
            [tree for example in kept for tree in self.examples(runs_of(example))],
            prompt_tokens=members[0].sequences[0].prompt_tokens,
            weight=item.row.weight,
            answers=member_names(item.row),
            label=kind_of(item.row).label(item.row),
            prompt_hash=prompt_hash(item.row) if self.pairs else b"",
            group_hash=item.group_hash,
            sketch=sketch,
        )

    def _drop(self, item: Checked, example: Example, reason: Drop) -> None:
        if reason is Drop.TOO_LONG:
            self.too_long.drop(item.file, item.number, longest(example))
        else:
            self.ledger.drop(item.file, item.number, "tokenise", reason)

    def _no_embedding(self, item: Checked, token_id: int) -> StageError:
        """Return what a row ends the job with that has a token beyond the model's embeddings."""
        added = self.model.tokenizer.added.get(token_id)  # of others the text may be the row's own
        token = "a text" if added is None else shortened(repr(added), 48)
        file = shortened(self.ledger.files[item.file].uri.rpartition("/")[2], 64)
        return StageError(
            Fault.BROKEN_MODEL,
            uri=place(self.model.facts.uri),
            problem=f"its tokenizer reads {token} as id {token_id}, at row {item.number} of {file}, but it has "
            f"embeddings for {self.model.facts.vocabulary_size} ids; save it after model.resize_token_embeddings",
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
