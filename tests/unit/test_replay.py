"""Replay: the share of what is learned, its place among the steps, and what is told of it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_run import Prepared, jsonl, prepare_run, prose, put
from finetune_api.errors import StageError
from finetune_api.reasons import Fault
from finetune_trainer.replay import file_ranges, losses_apart, replay_weights, replayed_rows
from finetune_trainer.step_plan import open_steps


@pytest.mark.parametrize(
    ("weights", "tokens", "replayed", "fraction", "expected"),
    [
        ([1, 1], [900, 100], [False, True], 0.1, [1, 1]),
        ([1, 1], [900, 10_000], [False, True], 0.1, [1, 0.01]),
        ([1, 1], [900, 10], [False, True], 0.1, [1, 10]),
        ([2, 1], [450, 100], [False, True], 0.1, [2, 1]),
        ([1, 1, 1, 3], [800, 100, 25, 25], [False, False, True, True], 0.1, [1, 1, 1, 3]),
        ([1, 5, 5], [500, 250, 250], [False, True, True], 0.5, [1, 1, 1]),
        ([1, 1], [100, 100], [True, False], 0.9, [9, 1]),
    ],
)
def test_the_replayed_share_of_the_learned_tokens_is_the_one_that_is_asked_for(
    weights: list[float], tokens: list[int], replayed: list[bool], fraction: float, expected: list[float]
) -> None:
    found = replay_weights(weights, tokens, replayed, fraction)
    assert found == pytest.approx(expected)
    learned = np.array(found) * tokens
    assert learned[replayed].sum() / learned.sum() == pytest.approx(fraction)


@pytest.mark.parametrize(("tokens", "words"), [([10, 0], "that are replayed"), ([0, 10], "beside the datasets")])
def test_a_side_of_which_nothing_is_left_to_learn_is_named(tokens: list[int], words: str) -> None:
    with pytest.raises(StageError, match=words) as caught:
        replay_weights([1, 1], tokens, [False, True], 0.1)
    assert caught.value.fault is Fault.CONFIG_UNREADABLE


def test_rows_are_known_as_replayed_by_their_files() -> None:
    ranges = file_ranges([range(2), range(2, 2), range(2, 5), range(5, 7)], [True, True, False, True])
    assert [(each.first, each.end) for each in ranges] == [(0, 2), (5, 7)]
    assert replayed_rows(np.array([0, 1, 2, 4, 5, 6]), ranges).tolist() == [True, True, False, False, True, True]


def test_held_out_losses_are_told_apart_where_there_are_rows_of_both() -> None:
    losses, units = [6.0, 2.0, 4.0], [3, 1, 4]
    assert losses_apart(losses, units, np.array([False, False, True])) == {"new_loss": 2.0, "replayed_loss": 1.0}
    assert losses_apart(losses, units, np.array([False] * 3)) == {}


def text(number: int, words: int) -> dict[str, Any]:
    return {"text": f"{number} {prose(number, words=4 * words)}"}


def replayed(tmp_path: Path, attempt: int = 1, **fields: Any) -> Prepared:
    """A job of 200 new texts, long and short ones, that replays 300 short ones."""
    put(
        tmp_path,
        new_jsonl=jsonl([text(number, 1 + number % 40) for number in range(200)]),
        old_jsonl=jsonl([text(number, 2) for number in range(1000, 1300)]),
    )
    data = (tmp_path / "data").as_uri()
    spec = {
        "method": {"type": "CPT"},
        "datasets": [{"name": "new", "uri": f"{data}/new.jsonl"}, {"name": "old", "uri": f"{data}/old.jsonl"}],
        "replay": {"datasets": ["old"], "fraction": 0.1},
        "hyperparameters": {"epochs": 3, "globalBatchSize": 16},
        **fields,
    }
    return prepare_run(tmp_path, spec, attempt=attempt)


def test_a_share_of_the_learned_tokens_is_replayed_evenly_over_the_steps(tmp_path: Path) -> None:
    found = replayed(tmp_path)
    new, old = found.report["datasets"]
    assert old["label_tokens_share"] == pytest.approx(0.1, abs=0.002)
    assert new["weight"] == 1, "an epoch is a pass over what is new"
    path = Path(found.plan.batches.uri.removeprefix("file://"))
    steps, examples = open_steps(path), found.examples(found.plan.train)
    labels = np.add.reduceat(examples.labels.astype(np.int64), examples.segment_offsets[:-1])
    is_old = replayed_rows(examples.columns["file"], found.plan.replayed)
    shares = [labels[read][is_old[read]].sum() / labels[read].sum() for read in np.array_split(steps.examples, 8)]
    assert max(shares) < 0.15
    assert min(shares) > 0.06
    (told,) = [each for each in found.report["resolved"] if each["field"] == "replay.fraction"]
    assert told["value"] == "0.1"
    assert f"10.0% of the learned tokens are replayed, in {old['reads']:,} reads of 29" in told["reason"]
    assert [each.model_dump() for each in found.plan.replayed] == [{"first": 1, "end": 2}]


def test_what_is_replayed_is_planned_so_that_a_rerun_reads_the_same(tmp_path: Path) -> None:
    assert replayed(tmp_path).plan.digest() == replayed(tmp_path, attempt=2).plan.digest()


def test_a_replayed_dataset_of_which_no_row_is_left_ends_the_job_by_the_field(tmp_path: Path) -> None:
    replayed(tmp_path)
    (tmp_path / "data" / "old.jsonl").write_bytes(jsonl([{"text": "a b c", "weight": 0}] * 3))
    data = (tmp_path / "data").as_uri()
    spec = {
        "method": {"type": "CPT"},
        "datasets": [{"uri": f"{data}/new.jsonl"}, {"name": "old", "uri": f"{data}/old.jsonl"}],
        "replay": {"datasets": ["old"], "fraction": 0.1},
    }
    with pytest.raises(StageError, match=r"spec\.replay\.datasets cannot be used: no row is left to learn"):
        prepare_run(tmp_path, spec, attempt=2)


def test_nothing_of_a_plan_without_replay_is_changed(tmp_path: Path) -> None:
    found = replayed(tmp_path, replay=None, datasets=[{"uri": (tmp_path / "data").as_uri() + "/"}])
    assert found.plan.replayed == []
    assert "replay" not in json.dumps(found.report)
