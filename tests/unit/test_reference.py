"""What the base model says of the answers is computed once, whole or not at all, whatever ends an attempt."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from finetune_api.errors import StageError
from finetune_api.job import MethodType
from finetune_api.layout import REFERENCE
from finetune_api.reasons import Fault
from finetune_trainer import reference, train
from finetune_trainer.commit import Fence, raise_epoch
from finetune_trainer.data.examples import Examples
from finetune_trainer.inputs import Batch, fetch_examples, make_batch
from finetune_trainer.model import LanguageModel, load_base
from finetune_trainer.policy import Scores
from finetune_trainer.reference import Kept, reference_key, reference_of
from finetune_trainer.runplan import AdapterFacts
from finetune_trainer.stop import StopFlag
from finetune_trainer.store import Store
from pair_run import preference_run
from tiny_run import TinyRun, context


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TinyRun:
    monkeypatch.setattr(reference, "PART_TOKENS", 300)
    return preference_run(tmp_path, MethodType.DPO, rows=40, steps=4, equal=False)


@dataclass
class Asked:
    """A run's training examples, the base, and how to ask it of them."""

    run: TinyRun
    folder: Path
    key: str = "key"

    def __post_init__(self) -> None:
        self.examples: Examples = fetch_examples(self.run.store, self.run.plan.train, self.folder / "train")
        self.lm: LanguageModel = load_base(self.run.folder / "model", self.run.plan, torch.device("cpu"))
        self.fence: Fence = raise_epoch(self.run.store, self.run.run_uri, 1, "pod-1")
        self.is_read = np.arange(len(self.examples)) % 3 != 0
        self.passes = self.scored = 0

    def values(self, beat: Callable[[], None] = lambda: None, store: Store | None = None) -> np.ndarray:
        """Return what the base says, and count the passes that it took."""
        self.passes = self.scored = 0

        def scored(answers: int) -> None:
            self.scored += answers

        def count(lm: LanguageModel, batch: Batch) -> torch.Tensor:
            self.passes += 1
            return original(lm, batch)

        original = LanguageModel.token_logprobs
        uri = f"{self.run.run_uri}/{REFERENCE}/{self.key}"
        kept = Kept(store=store or self.run.store, fence=self.fence, folder_uri=uri, beat=beat, scored=scored)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LanguageModel, "token_logprobs", count)
            path = self.folder / "values"
            return reference_of(self.lm, self.examples, self.is_read, self.run.plan, kept, path).copy()

    @property
    def parts(self) -> list[Path]:
        return sorted(path for path in self.run.local(REFERENCE, self.key).glob("*") if path.name.isdecimal())


@pytest.fixture
def asked(run: TinyRun, tmp_path: Path) -> Asked:
    return Asked(run, tmp_path / "fetched")


@pytest.mark.parametrize("trees", [False, True])
def test_it_is_the_log_probability_of_each_answer_that_is_read(asked: Asked, trees: bool) -> None:
    hyper = asked.run.plan.hyperparameters.model_copy(update={"trees": trees})
    asked.run.plan = asked.run.plan.model_copy(update={"hyperparameters": hyper})
    found = asked.values()
    expected = np.full(len(asked.examples.parents), np.nan)
    with torch.no_grad():
        for each in asked.examples.sequences_of(np.flatnonzero(asked.is_read).tolist()):
            batch = make_batch(asked.examples, [each], asked.lm.device)
            expected[each.leaf] = float(Scores(asked.lm, batch).sequences)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert len(asked.parts) > 2


def test_it_is_computed_once_for_all_attempts(asked: Asked) -> None:
    first = asked.values()
    assert asked.passes
    answers = len(asked.examples.sequences_of(np.flatnonzero(asked.is_read).tolist()))
    assert asked.scored == answers
    np.testing.assert_array_equal(asked.values(), first)
    assert not asked.passes
    assert asked.scored == answers, "what an earlier attempt has done is done"


class _KilledError(Exception):
    pass


def test_an_attempt_that_is_killed_at_any_moment_is_gone_on_with_behind_its_last_part(asked: Asked) -> None:
    moments = 0

    def count() -> None:
        nonlocal moments
        moments += 1

    def die() -> None:
        nonlocal left
        left -= 1
        if not left:
            raise _KilledError

    expected = asked.values(count)
    whole, parts = asked.passes, len(asked.parts)
    most_kept = 0
    for moment in range(1, moments):
        asked.key, left = f"killed-{moment}", moment
        with pytest.raises(_KilledError):
            asked.values(die)
        kept = len(asked.parts)
        np.testing.assert_array_equal(asked.values(), expected)
        assert asked.passes <= whole - kept, "what was kept is not computed again"
        most_kept = max(most_kept, kept)
    assert most_kept == parts - 1


@pytest.mark.parametrize("damage", [b"", b"\0" * 40, None])
def test_a_part_that_is_not_as_it_was_written_is_computed_again(asked: Asked, damage: bytes | None) -> None:
    expected = asked.values()
    part = asked.parts[1]
    part.write_bytes(part.read_bytes()[:-1] + b"\0" if damage is None else damage)
    np.testing.assert_array_equal(asked.values(), expected)
    assert asked.passes
    asked.values()
    assert not asked.passes, "it was written again"


def test_values_of_another_key_are_not_taken(asked: Asked) -> None:
    """As if somebody had put a folder of another job in its place: the parts are whole, and as long."""
    expected = asked.values()
    folder = asked.run.local(REFERENCE, "key")
    folder.rename(folder.with_name("another"))
    asked.key = "another"
    np.testing.assert_array_equal(asked.values(), expected)
    assert asked.passes


def test_a_store_that_takes_nothing_only_makes_it_computed_again(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise StageError(Fault.ACCESS_DENIED, action="write", uri="s3://b/k", problem="no")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "put", refuse)
        first = asked.values()
    assert asked.passes
    np.testing.assert_array_equal(asked.values(), first)
    assert asked.passes


def test_an_attempt_that_a_newer_one_has_taken_over_from_ends(asked: Asked) -> None:
    raise_epoch(asked.run.store, asked.run.run_uri, 2, "pod-2")
    with pytest.raises(StageError) as caught:
        asked.values()
    assert caught.value.fault is Fault.SUPERSEDED


def test_another_base_or_other_tokens_or_another_precision_have_a_key_of_their_own(run: TinyRun) -> None:
    plan, train_split, held_out = run.plan, run.plan.train, run.plan.held_out
    assert held_out is not None
    hyper, adapter = (
        plan.hyperparameters,
        AdapterFacts(
            uri="s3://b/adapter", digest="sha256:" + "1" * 64, weights=plan.batches, base_files={}, rank=4, alpha=8
        ),
    )
    changes: list[dict[str, Any]] = [
        {"starting_adapter": adapter},
        {"starting_adapter": adapter.model_copy(update={"digest": "sha256:" + "2" * 64})},
        {"batches": plan.batches.model_copy(update={"sha256": "sha256:" + "3" * 64})},
        {"hyperparameters": hyper.model_copy(update={"seed": hyper.seed + 1})},
        {"hyperparameters": hyper.model_copy(update={"max_sequence_length": hyper.max_sequence_length + 1})},
    ]
    keys = [
        reference_key(plan, train_split, "sha256:a", torch.float32, "train"),
        reference_key(plan, train_split, "sha256:b", torch.float32, "train"),
        reference_key(plan, held_out, "sha256:a", torch.float32, "train"),
        reference_key(plan, train_split, "sha256:a", torch.bfloat16, "train"),
        reference_key(plan, train_split, "sha256:a", torch.float32, "mismatched"),
        *(
            reference_key(plan.model_copy(update=each), train_split, "sha256:a", torch.float32, "train")
            for each in changes
        ),
    ]
    assert len(set(keys)) == len(keys)
    assert keys[0] == reference_key(plan, train_split, "sha256:a", torch.float32, "train")


def test_a_run_begins_where_nothing_has_changed_and_keeps_what_the_base_says(run: TinyRun) -> None:
    """At step 0 no answer is likelier or less likely than it was: its preferences are ties."""
    assert train.run(context(run), StopFlag(60)).artifact is not None
    assert list(run.local(REFERENCE).rglob("000000"))
