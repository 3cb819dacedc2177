"""What begins alike is stored once, and what is read is what was stored."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer.data.examples import (
    FlatSequence,
    TokenRun,
    Tree,
    example_counts,
    flat_sequences,
    one_segment,
    pair_of,
    tree_of,
)
from finetune_trainer.data.spool import flat_lengths

Plain = list[tuple[int, int]]  # (token, label) of each place


def run(places: Plain) -> TokenRun:
    tokens, labels = zip(*places, strict=True)
    return TokenRun(np.array(tokens, dtype=np.uint32), np.array(labels, dtype=np.uint8))


def segments(tree: Tree) -> list[tuple[list[int], int]]:
    """(tokens, how far before it the parent lies) of each segment."""
    cuts = np.cumsum(tree.lengths)[:-1]
    return [(part.tolist(), int(up)) for part, up in zip(np.split(tree.tokens, cuts), tree.parents, strict=True)]


@given(st.lists(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1)), min_size=1, max_size=8), min_size=1))
def test_a_tree_holds_every_sequence_and_teaches_every_label_exactly_once(sequences: list[Plain]) -> None:
    given_tokens = [tuple(token for token, _ in places) for places in sequences]
    tree = tree_of([run(places) for places in sequences])
    flat = [(tuple(found.tokens.tolist()), found.labels.tolist()) for found in flat_sequences(tree)]
    # Exactly the sequences that are not the beginning of another, each once.
    whole = {
        mine for mine in given_tokens if not any(other != mine and other[: len(mine)] == mine for other in given_tokens)
    }
    assert sorted(tokens for tokens, _ in flat) == sorted(whole)
    wanted = {
        tokens[: place + 1]
        for tokens, places in zip(given_tokens, sequences, strict=True)
        for place, (_, label) in enumerate(places)
        if label
    }
    learned = [tokens[: place + 1] for tokens, labels in flat for place, label in enumerate(labels) if label]
    assert sorted(learned) == sorted(wanted)
    assert flat_lengths(tree) == [len(tokens) for tokens, _ in flat]
    assert len(tree.tokens) == sum(map(int, tree.lengths)) <= sum(map(len, given_tokens))


def test_sequences_that_differ_in_the_middle_share_only_their_beginning() -> None:
    plain: list[Plain] = [[(1, 0), (2, 1), (3, 0)], [(1, 0), (2, 1), (4, 1), (5, 1)], [(1, 0), (2, 0), (4, 0), (6, 1)]]
    tree = tree_of([run(places) for places in plain])
    assert segments(tree) == [([1, 2], 0), ([3], 1), ([4], 2), ([5], 1), ([6], 2)]
    assert [found.labels.tolist() for found in flat_sequences(tree)] == [[0, 1, 0], [0, 0, 1, 1], [0, 0, 0, 1]]


def test_a_conversation_that_only_grows_is_one_segment() -> None:
    grown = [run([(1, 0), (2, 1)]), run([(1, 0), (2, 0), (3, 0), (4, 1)])]
    tree = tree_of(grown)
    assert segments(tree) == [([1, 2, 3, 4], 0)]
    assert tree.labels.tolist() == [0, 1, 0, 1]


def test_one_sequence_is_its_own_tree() -> None:
    only = run([(1, 0), (1, 1)])
    tree = one_segment(*only)
    assert segments(tree) == [([1, 1], 0)]
    assert [found.labels.tolist() for found in flat_sequences(tree)] == [[0, 1]]


def test_a_tree_may_be_deep() -> None:
    flat = flat_sequences(tree_of([run([(0, 0)] * place + [(1, 1)]) for place in range(1500)]))
    assert [len(each.tokens) for each in flat] == list(range(1, 1501))
    assert sum(int(each.labels.sum()) for each in flat) == 1500


@given(st.lists(st.integers(0, 2), min_size=1, max_size=4), *[st.lists(st.integers(0, 2), min_size=1, max_size=6)] * 4)
def test_a_pair_is_read_as_its_two_answers_however_alike_they_begin(
    prompt: list[int], more: list[int], chosen: list[int], other: list[int], rejected: list[int]
) -> None:
    """The prompts may differ behind what is common, and one answer may be all of the other's beginning."""
    runs = [
        run([(token, 0) for token in [*prompt, *asked]] + [(token, 1) for token in answer])
        for asked, answer in ((more, chosen), (other, rejected))
    ]
    tree = pair_of(*runs)
    assert [(each.tokens.tolist(), each.labels.tolist()) for each in flat_sequences(tree)] == [
        (each.tokens.tolist(), each.labels.tolist()) for each in runs
    ]
    assert len(tree.tokens) <= sum(len(each.tokens) for each in runs) - len(prompt)


def test_answers_that_begin_alike_are_each_learned_from_their_first_token_on() -> None:
    tree = pair_of(run([(7, 0), (8, 0), (1, 1), (2, 1)]), run([(7, 0), (8, 0), (1, 1), (3, 1)]))
    assert segments(tree) == [([7, 8], 0), ([1, 2], 1), ([1, 3], 2)]


def test_sequences_are_counted_by_the_example_that_they_are_read_for() -> None:
    pair, twice, single = [(5, 11), (5, 12)], [(6, 13), (6, 14)] * 2, [(9, 20), (9, 20)]
    read = [FlatSequence(*each) for each in (*pair, *twice, *single)]
    assert example_counts(read) == [2, 2, 2, 1, 1]
