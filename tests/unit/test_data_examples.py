"""What begins alike is stored once, and what is read is what was stored."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer.data.examples import TokenRun, Tree, flat_sequences, one_segment, tree_of
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
