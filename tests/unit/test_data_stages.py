"""Stages are pure maps over rows of one kind; every row that comes to one goes on or is dropped with a decision."""

import pickle
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import orjson
import pytest

from finetune_api.errors import StageError
from finetune_api.job import FineTuneJobSpec
from finetune_api.reasons import Fault
from finetune_trainer.data.accounts import Action, FileAccount, Ledger
from finetune_trainer.data.reading import Checked
from finetune_trainer.data.rows import Completion, Conversation, Row, Text
from finetune_trainer.data.stages.chain import chain_of, through
from finetune_trainer.data.stages.stage import Decision, Stage, Staged
from finetune_trainer.data.stages.unanswered import UNANSWERED
from finetune_trainer.data.stages.weightless import WEIGHTLESS

SPEC = FineTuneJobSpec.model_validate(
    {
        "model": {"uri": "file:///model"},
        "datasets": [{"uri": "file:///data"}],
        "method": {"type": "SFT"},
        "output": {"uri": "file:///out"},
    }
)
MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def checked(*rows: Row, file: int = 0, held_bytes: int = 1) -> list[Checked]:
    return [Checked(file, at, row, b"", held_bytes) for at, row in enumerate(rows, 1)]


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    found = Ledger(tmp_path / "decisions.jsonl")
    found.files += [FileAccount(f"file:///{name}", 1, "") for name in ("a", "b")]
    return found


def numbers(rows: Sequence[Checked]) -> list[int]:
    return [each.number for each in rows]


@pytest.mark.parametrize(
    ("stage", "rows", "left", "detail"),
    [
        (WEIGHTLESS, [Text("a", 0.0), Text("b"), Text("c", 0.5)], [2, 3], "weight"),
        (WEIGHTLESS, [Conversation(MESSAGES, (False, True), weight=0.0)], [], "weight"),
        (UNANSWERED, [Conversation(MESSAGES, (False, False)), Conversation(MESSAGES, (False, True))], [2], ""),
        (UNANSWERED, [Completion("q", "a"), Completion("q", "b")], [1, 2], ""),
    ],
)
def test_a_stage_drops_what_its_description_says_with_a_decision_each(
    stage: Stage, rows: list[Row], left: list[int], detail: str
) -> None:
    staged = stage.run(checked(*rows))
    assert numbers(staged.rows) == left
    dropped = [at for at in range(1, len(rows) + 1) if at not in left]
    assert staged.decisions == [
        Decision(file=0, row=at, action=Action.DROP, reason="no_label", detail=detail) for at in dropped
    ]


def test_the_chain_of_a_job_follows_from_its_spec_and_can_be_sent_to_a_worker() -> None:
    assert [stage.name for stage in chain_of(SPEC)] == ["repair", "weightless", "unanswered", "quality", "pii"]
    assert [stage.name for stage in pickle.loads(pickle.dumps(chain_of(SPEC)))] == [
        stage.name for stage in chain_of(SPEC)
    ]


def test_rows_go_through_all_stages_in_order_and_the_accounts_say_where_others_ended(
    tmp_path: Path, ledger: Ledger
) -> None:
    masked, learned = Conversation(MESSAGES, (False, False)), Conversation(MESSAGES, (False, True))
    rows = [*checked(learned, masked, Completion("q", "a", 0.0), Completion("q", "a")), *checked(masked, file=1)]
    found = list(through(chain_of(SPEC), rows, ledger))
    assert [(each.file, each.number) for each in found] == [(0, 1), (0, 4)]
    ledger.flush()
    decisions = [orjson.loads(line) for line in (tmp_path / "decisions.jsonl").read_bytes().splitlines()]
    assert [(each["file"], each["row"], each["stage"], each.get("detail")) for each in decisions] == [
        ("file:///a", 3, "weightless", "weight"),
        ("file:///a", 2, "unanswered", None),
        ("file:///b", 1, "unanswered", None),
    ]
    counts = {
        (account.uri[-1], name): (stage.rows_in, stage.rows_out, stage.dropped)
        for account in ledger.files
        for name, stage in account.stages.items()
    }
    assert counts == {
        ("a", "repair"): (4, 4, 0),
        ("b", "repair"): (1, 1, 0),
        ("a", "weightless"): (4, 3, 1),
        ("b", "weightless"): (1, 1, 0),
        ("a", "unanswered"): (3, 2, 1),
        ("b", "unanswered"): (1, 0, 1),
        ("a", "pii"): (2, 2, 0),
        ("a", "quality"): (2, 2, 0),
    }


@pytest.mark.parametrize(("held_bytes", "most"), [(1, 256), (2**19, 2), (2**21, 1)])
def test_a_stage_gets_bounded_batches_of_one_kind(ledger: Ledger, held_bytes: int, most: int) -> None:
    sizes: list[int] = []

    def run(rows: Sequence[Checked]) -> Staged:
        assert len({type(each.row) for each in rows}) == 1
        sizes.append(len(rows))
        return Staged(list(rows), counters=Counter(seen=len(rows)))

    rows = checked(*[Text("a")] * 600, *[Completion("q", "a")] * 5, held_bytes=held_bytes)
    assert list(through([Stage("counts", "counts rows", run)], rows, ledger)) == rows
    assert max(sizes) == most
    assert ledger.counted == {"counts": {"seen": 605}}


def test_rows_before_what_ends_the_reading_go_through_all_stages(tmp_path: Path, ledger: Ledger) -> None:
    masked, learned = Conversation(MESSAGES, (False, False)), Conversation(MESSAGES, (False, True))

    def until_it_fails() -> Iterator[Checked]:
        yield from checked(learned, masked, learned)
        raise StageError(Fault.BROKEN_FILE, file="a", row=4, problem="it is cut off")

    passed: list[int] = []
    with pytest.raises(StageError, match="it is cut off"):
        passed.extend(each.number for each in through(chain_of(SPEC), until_it_fails(), ledger))
    assert passed == [1, 3]
    ledger.flush()
    decisions = [orjson.loads(line) for line in (tmp_path / "decisions.jsonl").read_bytes().splitlines()]
    assert [(each["row"], each["stage"]) for each in decisions] == [(2, "unanswered")]


def split(rows: Sequence[Checked]) -> Staged:
    return Staged([each for each in rows for _ in range(3)])


def lose(rows: Sequence[Checked]) -> Staged:
    return Staged(list(rows)[1:])


def invent(rows: Sequence[Checked]) -> Staged:
    return Staged([*rows, rows[0]._replace(number=99)])


@pytest.mark.parametrize(("run", "is_lost"), [(split, False), (lose, True), (invent, True)])
def test_a_stage_that_loses_or_invents_a_row_is_found_out(
    ledger: Ledger, run: Callable[[Sequence[Checked]], Staged], is_lost: bool
) -> None:
    account = ledger.files[0]
    passed = list(through([Stage("toy", "", run)], checked(Text("a"), Text("b")), ledger))
    account.rows_in = account.used = len({each.number for each in passed})
    if is_lost:
        with pytest.raises(AssertionError, match="rows came to stage toy"):
            account.check()
    else:
        account.check()
