"""The rows of every step are fixed by the seed, and packing wastes little and loses nothing."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

import simple_rows
from finetune_trainer import batches
from finetune_trainer.batches import Mix, distinct_examples, epoch_order, pack, rows_to_read
from finetune_trainer.step_plan import StepPlan, open_steps


def plan_batches(*given: object, **named: object) -> StepPlan:
    """Plan in a file that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        return batches.plan_batches(Path(folder) / "steps", *given, **named)  # type: ignore[arg-type]


def test_an_epochs_order_depends_on_the_seed_and_the_epoch_only() -> None:
    assert epoch_order(1000, 1, 3).tolist() == epoch_order(1000, 1, 3).tolist()
    assert sorted(epoch_order(1000, 1, 3).tolist()) == list(range(1000))
    assert epoch_order(1000, 1, 3).tolist() != epoch_order(1000, 1, 4).tolist()
    assert epoch_order(1000, 1, 3).tolist() != epoch_order(1000, 2, 3).tolist()


@pytest.mark.parametrize(("rows", "epochs", "expected"), [(10, 3.0, 30), (10, 0.5, 5), (3, 0.1, 1), (7, 1.5, 10)])
def test_a_part_of_an_epoch_reads_a_part_of_the_rows(rows: int, epochs: float, expected: int) -> None:
    assert rows_to_read(rows, epochs) == expected


def test_steps_cut_the_epochs_and_count_their_tokens() -> None:
    lengths, labels = np.array([5, 7, 9], dtype=np.uint32), np.array([1, 2, 3], dtype=np.uint32)
    plan = plan_batches(lengths, labels, np.ones(3), total_rows=7, global_batch_size=2, seed=0)
    assert len(plan) == 4
    assert plan.step_offsets.tolist() == [0, 2, 4, 6, 7]
    assert plan.examples[:3].tolist() == epoch_order(3, 0, 0).tolist()
    # Step 1 has read row 0 at the end of the epoch before.
    assert (epoch_order(3, 0, 1).tolist(), plan.examples[3:6].tolist()) == ([0, 1, 2], [1, 0, 2])
    whole = plan_batches(lengths, labels, np.ones(3), total_rows=6, global_batch_size=3, seed=0)
    assert whole.examples[3:].tolist() == epoch_order(3, 0, 1).tolist()
    for step in range(len(plan)):
        rows = plan.examples[plan.step_offsets[step] : plan.step_offsets[step + 1]]
        assert plan.tokens[step] == lengths[rows].sum()
        assert plan.label_tokens[step] == plan.denominators[step] == labels[rows].sum()
    weighted = plan_batches(lengths, labels, np.array([1, 0.5, 2]), total_rows=3, global_batch_size=3, seed=0)
    assert (weighted.label_tokens.tolist(), weighted.denominators.tolist()) == ([6], [1 + 2 * 0.5 + 3 * 2])


@given(st.integers(1, 40), st.integers(1, 300), st.integers(1, 40), st.integers(0, 3))
def test_no_step_reads_a_row_twice_unless_it_is_larger_than_the_data(
    rows: int, total: int, batch: int, seed: int
) -> None:
    plan = plan_batches(np.ones(rows), np.ones(rows), np.ones(rows), total, batch, seed)
    for step in range(len(plan)):
        read = plan.examples[plan.step_offsets[step] : plan.step_offsets[step + 1]]
        assert len(set(read.tolist())) == min(len(read), rows) or batch > rows


@given(st.integers(1, 40), st.integers(1, 120), st.integers(1, 16), st.integers(0, 3))
def test_every_epoch_reads_every_row_once(rows: int, total: int, batch: int, seed: int) -> None:
    plan = plan_batches(np.ones(rows), np.ones(rows), np.ones(rows), total, batch, seed)
    for begin in range(0, total - rows + 1, rows):
        assert sorted(plan.examples[begin : begin + rows].tolist()) == list(range(rows))
    assert len(plan.examples) == total == plan.tokens.sum()
    assert set(np.diff(plan.step_offsets)[:-1].tolist()) <= {batch}


def mix_of(sizes: list[int], weights: list[float]) -> Mix:
    return Mix(sizes, weights)


def test_a_dataset_is_read_as_often_as_its_weight_says() -> None:
    mix = mix_of([30, 10, 7], [0.5, 3, 1])
    assert mix.epoch_examples == 15 + 30 + 7
    plan = plan_batches(np.ones(47), np.ones(47), np.ones(47), 4 * 52, 8, 1, mix)
    assert np.bincount(plan.examples).tolist() == [2] * 30 + [12] * 10 + [4] * 7
    first, second = (set(plan.examples[each : each + 52].tolist()) & set(range(30)) for each in (0, 52))
    assert len(first) == len(second) == 15
    assert not first & second, "every other epoch reads the other half"
    # Evenly spread: each of the steps has about the share of the whole.
    counts = [np.isin(plan.examples[each : each + 52], np.arange(30, 40)).sum() for each in range(0, 208, 52)]
    assert counts == [30] * 4


@given(
    st.lists(st.tuples(st.integers(1, 12), st.sampled_from([0.1, 0.5, 1, 2.5])), min_size=1, max_size=4),
    st.integers(1, 80),
    st.integers(1, 6),
    st.integers(0, 3),
)
def test_a_mix_depends_on_the_seed_alone_and_reads_the_rows_of_a_dataset_equally_often(
    datasets: list[tuple[int, float]], total: int, batch: int, seed: int
) -> None:
    mix = mix_of([size for size, _ in datasets], [weight for _, weight in datasets])
    rows = sum(mix.sizes)
    plans = [plan_batches(np.ones(rows), np.ones(rows), np.ones(rows), total, batch, seed, mix) for _ in range(2)]
    assert plans[0].examples.tolist() == plans[1].examples.tolist()
    assert len(plans[0].examples) == total
    reads = np.bincount(plans[0].examples, minlength=rows)
    for number, (_, weight) in enumerate(datasets):
        of_one = reads[np.repeat(np.arange(len(datasets)), mix.sizes) == number]
        assert (
            abs(of_one.sum() - total * weight * len(of_one) / mix.epoch_examples)
            <= total / 2 + weight * len(of_one) + 1
        )
        assert np.ptp(of_one) <= 2


def test_where_every_weight_is_one_nothing_is_mixed() -> None:
    plain = plan_batches(np.ones(20), np.ones(20), np.ones(20), 50, 4, 3)
    mixed = plan_batches(np.ones(20), np.ones(20), np.ones(20), 50, 4, 3, mix_of([5, 15], [1, 1]))
    assert plain.examples.tolist() == mixed.examples.tolist()


def arrays(plan: StepPlan) -> dict[str, np.ndarray]:
    return {
        name: getattr(plan, name) for name in ("examples", "step_offsets", "label_tokens", "denominators", "tokens")
    }


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_steps_are_planned_as_if_all_were_in_memory_however_little_is_read_at_once(data: st.DataObject) -> None:
    datasets = data.draw(st.lists(st.tuples(st.integers(0, 40), st.sampled_from([0.1, 0.5, 1, 1, 2.5])), max_size=4))
    sizes, weights = [7, *(size for size, _ in datasets)], [1.0, *(weight for _, weight in datasets)]
    rows, total, batch, seed = sum(sizes), data.draw(st.integers(1, 300)), data.draw(st.integers(1, 30)), 3
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    lengths, labels = random.integers(1, 900, rows).astype("<u8"), random.integers(0, 90, rows).astype("<u4")
    row_weights = random.random(rows).astype("<f4")
    is_plain = set(weights) == {1.0}
    order = simple_rows.plain_order(rows, total, batch, seed)
    if not is_plain:
        order = simple_rows.mixed_order(sizes, weights, total, batch, seed)
    starts = np.arange(0, total, batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "CHUNK", data.draw(st.sampled_from([1, 5, 64, 10_000])))
        plan = plan_batches(lengths, labels, row_weights, total, batch, seed, Mix(sizes, weights))
        assert distinct_examples(plan.examples, rows) == len(set(order.tolist()))
    assert plan.examples.tolist() == order.tolist()
    assert plan.step_offsets.tolist() == [*starts.tolist(), total]
    assert plan.tokens.tolist() == np.add.reduceat(lengths.astype(np.int64)[order], starts).tolist()
    assert plan.label_tokens.tolist() == np.add.reduceat(labels.astype(np.int64)[order], starts).tolist()
    denominators = labels.astype(np.int64) * row_weights.astype(np.float64)
    assert plan.denominators.tolist() == np.add.reduceat(denominators[order], starts).tolist()


def test_a_plan_of_many_reads_is_the_same_as_in_memory(tmp_path: Path) -> None:
    sizes, weights = [200_000, 150_000], [1.5, 0.7]
    ones = np.ones(sum(sizes))
    plan = batches.plan_batches(tmp_path / "steps", ones, ones, ones, 700_000, 16, 5, Mix(sizes, weights))
    assert (plan.examples == simple_rows.mixed_order(sizes, weights, 700_000, 16, 5)).all()
    plan = batches.plan_batches(tmp_path / "steps", ones, ones, ones, 700_000, 16, 5)
    assert (plan.examples == simple_rows.plain_order(350_000, 700_000, 16, 5)).all()


def test_the_plans_file_is_the_one_that_safetensors_writes_and_is_read_back(tmp_path: Path) -> None:
    for reads in (1, 4, 12_345):
        given = np.array([3, 4]), np.array([1, 1]), np.ones(2), reads, 2, 0
        plan = batches.plan_batches(tmp_path / "ours", *given)
        safetensors.numpy.save_file(arrays(plan), tmp_path / "theirs")
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
        found = open_steps(tmp_path / "ours")
        for name, array in arrays(plan).items():
            assert getattr(found, name).tolist() == array.tolist()
            assert getattr(found, name).dtype.name == ("float64" if name == "denominators" else "int64")


@given(st.lists(st.integers(1, 60), max_size=80), st.integers(1, 50))
def test_packing_keeps_every_row_once_and_within_the_budget(lengths: list[int], budget: int) -> None:
    groups = pack(lengths, budget)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or sum(lengths[row] for row in group) <= budget
    assert groups == pack(lengths, budget)


def test_packing_leaves_at_most_one_group_half_empty() -> None:
    lengths = np.random.default_rng(0).integers(1, 500, 2000).tolist()
    groups = pack(lengths, 1000)
    assert sum(sum(lengths[row] for row in group) <= 500 for group in groups) <= 1
    assert sum(lengths) / (1000 * len(groups)) > 0.99
