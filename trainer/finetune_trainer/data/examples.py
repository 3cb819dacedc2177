"""Prepared examples: what one row of the user's files became, a tree of segments. Pure numpy, read by both stages.

A segment is a run of tokens; its context is what its ancestors hold. So several sequences that begin alike, such as
a conversation that is unrolled into one sequence for each answer, hold the common part once. A tree may have several
roots, labels lie anywhere but at a root's first token, and it is stored in preorder: a parent, then all below its
first child, then all below the next.

A tree is read as *flat sequences*, one for each leaf: what its ancestors and it hold, one after another. A label of a
shared segment is learned once, in the first sequence that passes through it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from finetune_trainer.data.mapped import mapped

ARRAYS = {
    "tokens": np.dtype("<u4"),  # (tokens,) ids of all segments, one after another
    "labels": np.dtype("<u1"),  # (tokens,) 1 where the token is to be predicted from those before it
    "segment_offsets": np.dtype("<i8"),  # (segments + 1,) segment s is tokens[segment_offsets[s]:segment_offsets[s+1]]
    "parents": np.dtype("<u4"),  # (segments,) how many segments before it the parent lies; 0: it is a root
    "example_offsets": np.dtype("<i8"),  # (examples + 1,) example e has segments example_offsets[e] to …[e + 1] - 1
}
COLUMNS = {  # (examples,) each
    "file": np.dtype("<u4"),  # of the row, as an index into the plan's inputs
    "row": np.dtype("<u8"),  # its number there, from 1
    "weight": np.dtype("<f4"),  # what the losses of its labels are multiplied with, above 0
    "label": np.dtype("<i1"),  # 1: its answer is a good one, -1: a bad one; there is no such file where none says so
}
REFERENCE_VALUE = np.dtype(
    "<f4"
)  # of what the model that a job began with says of each segment: see `Examples.reference`
Tokens32 = npt.NDArray[np.uint32]
Labels8 = npt.NDArray[np.uint8]


class TokenRun(NamedTuple):
    """Token ids uint32 (n,), and labels uint8 (n,)."""

    tokens: Tokens32
    labels: Labels8


@dataclass(frozen=True, slots=True)
class Tree:
    """One example. tokens, labels: of all segments, in preorder; lengths, parents: (segments,) as in ARRAYS."""

    tokens: Tokens32
    labels: Labels8
    lengths: npt.NDArray[np.int64]
    parents: Tokens32


@dataclass(slots=True)
class _Node:
    tokens: Tokens32
    labels: Labels8
    children: "dict[int, _Node]" = field(default_factory=dict[int, "_Node"])  # by their first token


def one_segment(tokens: Tokens32, labels: Labels8) -> Tree:
    """Return the tree of one sequence, which is one segment."""
    return Tree(tokens, labels, np.array([len(tokens)], dtype=np.int64), np.zeros(1, dtype=np.uint32))


def tree_of(sequences: Sequence[TokenRun]) -> Tree:
    """Return the smallest tree that holds these sequences, none of them empty: what begins alike is held once.

    A token that is a label of any sequence is one of the tree's. What is the beginning of another sequence becomes
    no flat sequence of its own.
    """
    if len(sequences) == 1:
        return one_segment(*sequences[0])
    top: dict[int, _Node] = {}
    for tokens, labels in sequences:
        _insert(top, tokens, labels.copy())
    found: list[_Node] = []
    parents: list[int] = []
    waiting = [(node, -1) for node in reversed(top.values())]
    while waiting:
        node, parent = waiting.pop()
        place = len(found)
        found.append(node)
        parents.append(place - parent if parent >= 0 else 0)
        waiting.extend((child, place) for child in reversed(node.children.values()))
    return Tree(
        np.concatenate([node.tokens for node in found]),
        np.concatenate([node.labels for node in found]),
        np.array([len(node.tokens) for node in found], dtype=np.int64),
        np.array(parents, dtype=np.uint32),
    )


def _insert(siblings: dict[int, _Node], tokens: Tokens32, labels: Labels8) -> None:
    while len(tokens):
        node = siblings.get(int(tokens[0]))
        if node is None:
            siblings[int(tokens[0])] = _Node(tokens, labels)
            return
        most = min(len(tokens), len(node.tokens))
        others = np.flatnonzero(tokens[:most] != node.tokens[:most])
        same = int(others[0]) if len(others) else most
        node.labels[:same] |= labels[:same]
        if same < most:
            below = _Node(node.tokens[same:], node.labels[same:], node.children)
            node.tokens, node.labels = node.tokens[:same], node.labels[:same]
            node.children = {int(below.tokens[0]): below}
        elif same < len(tokens) and not node.children:
            node.tokens, node.labels = tokens, np.concatenate([node.labels, labels[same:]])
            return
        siblings, tokens, labels = node.children, tokens[same:], labels[same:]


def pair_of(chosen: TokenRun, rejected: TokenRun) -> Tree:
    """Return the tree of two answers to one prompt, in this order: what begins alike before labels is held once.

    Labels stay with their own sequence even where both answers begin alike, as each is scored as a whole."""
    unlabelled = min(int(run.labels.argmax()) if run.labels.any() else len(run.labels) for run in (chosen, rejected))
    most = min(unlabelled, len(chosen.tokens) - 1, len(rejected.tokens) - 1)
    others = np.flatnonzero(chosen.tokens[:most] != rejected.tokens[:most])
    shared = int(others[0]) if len(others) else most
    runs = [TokenRun(run.tokens[shared:], run.labels[shared:]) for run in (chosen, rejected)]
    if not shared:
        parts, parents = runs, [0, 0]
    else:
        parts, parents = [TokenRun(chosen.tokens[:shared], chosen.labels[:shared]), *runs], [0, 1, 2]
    return Tree(
        np.concatenate([part.tokens for part in parts]),
        np.concatenate([part.labels for part in parts]),
        np.array([len(part.tokens) for part in parts], dtype=np.int64),
        np.array(parents, dtype=np.uint32),
    )


def flat_sequences(tree: Tree) -> list[TokenRun]:
    """Return what a tree is read as, in the order of its leaves."""
    offsets = np.concatenate([[0], np.cumsum(tree.lengths)])
    bounds = np.array([0, len(tree.lengths)], dtype=np.int64)
    one = Examples(tree.tokens, tree.labels, offsets, tree.parents, bounds)
    return [one.read(sequence) for sequence in one.sequences_of([0])]


def leaves_of(parents: Tokens32) -> npt.NDArray[np.int64]:
    """Return the segments that no other has as its parent. parents: (segments,) of whole examples."""
    is_leaf = np.ones(len(parents), dtype=np.bool_)
    has_parent = np.flatnonzero(parents)
    is_leaf[has_parent - parents[has_parent].astype(np.int64)] = False
    return np.flatnonzero(is_leaf)


class FlatSequence(NamedTuple):
    """One flat sequence of an example: the path to a leaf, which is a segment's number in the split."""

    example: int
    leaf: int


def example_counts(sequences: Sequence[FlatSequence]) -> list[int]:
    """Return how many of these sequences, which are in the order of their examples, belong to each.

    An example that is read twice in a row is two: its leaves begin anew."""
    counts: list[int] = []
    before: FlatSequence | None = None
    for each in sequences:
        if before is not None and each.example == before.example and each.leaf > before.leaf:
            counts[-1] += 1
        else:
            counts.append(1)
        before = each
    return counts


@dataclass(frozen=True)
class Examples:
    """The prepared examples of one split; the arrays may be mapped from files. columns: by name, (examples,).

    reference: (segments,) of each leaf, the log-probability of its flat sequence's labels by the model that the job
    began with, in nats; mismatched: the same prompts with the answers of others. None where a method needs no such."""

    tokens: npt.NDArray[np.uint32]
    labels: npt.NDArray[np.uint8]
    segment_offsets: npt.NDArray[np.int64]
    parents: npt.NDArray[np.uint32]
    example_offsets: npt.NDArray[np.int64]
    columns: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict[str, npt.NDArray[Any]])
    reference: npt.NDArray[np.float32] | None = None
    mismatched: "Examples | None" = None

    @classmethod
    def of_rows(cls, tokens: Tokens32, labels: Labels8, offsets: npt.NDArray[np.int64]) -> Self:
        """Return examples of one segment each: row i is tokens[offsets[i]:offsets[i + 1]]."""
        examples = len(offsets) - 1
        return cls(tokens, labels, offsets, np.zeros(examples, dtype=np.uint32), np.arange(examples + 1))

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.example_offsets) - 1

    def sequences_of(self, examples: Sequence[int]) -> list[FlatSequence]:
        """Return the flat sequences of the examples, in this order."""
        return [FlatSequence(example, leaf) for example in examples for leaf in self._leaves(example)]

    def _leaves(self, example: int) -> list[int]:
        first, last = int(self.example_offsets[example]), int(self.example_offsets[example + 1])
        return [first] if last == first + 1 else (first + leaves_of(self.parents[first:last])).tolist()

    def _path(self, leaf: int) -> Iterator[tuple[slice, bool]]:
        """Yield where the segments from a leaf up to its root lie, and whether their labels are learned here."""
        segment, learned = leaf, True
        while True:
            yield slice(int(self.segment_offsets[segment]), int(self.segment_offsets[segment + 1])), learned
            up = int(self.parents[segment])
            if not up:
                return
            learned = learned and up == 1  # in preorder the first child follows its parent
            segment -= up

    def read(self, sequence: FlatSequence) -> TokenRun:
        """Return one flat sequence; a label is 1 where it is learned in this one."""
        path = list(self._path(sequence.leaf))
        if len(path) == 1:
            return TokenRun(self.tokens[path[0][0]], self.labels[path[0][0]])
        path.reverse()
        tokens = np.concatenate([self.tokens[span] for span, _ in path])
        return TokenRun(tokens, np.concatenate([self.labels[span] * np.uint8(learned) for span, learned in path]))

    def lengths(self, sequences: Sequence[FlatSequence]) -> list[int]:
        """Return the number of tokens of each flat sequence."""
        return [sum(span.stop - span.start for span, _ in self._path(each.leaf)) for each in sequences]

    def shared(self, sequences: Sequence[FlatSequence]) -> list[int]:
        """Return with how many of its first tokens each flat sequence goes through segments that an earlier one has.

        The one before it in the order of the leaves has them all: in preorder it passes through the same parent."""
        return [
            sum(span.stop - span.start for span, learned in self._path(each.leaf) if not learned) for each in sequences
        ]

    def weights(self, sequences: Sequence[FlatSequence]) -> npt.NDArray[np.float32] | None:
        """Return the weight of each flat sequence's example; None where all are 1, as where there is no column."""
        column = self.columns.get("weight")
        found = None if column is None else column[[each.example for each in sequences]]
        return None if found is None or (found == 1).all() else found


def open_examples(folder: Path) -> Examples:
    """Map the arrays that lie in a folder, one file each. Raises KeyError without one of ARRAYS."""
    dtypes = ARRAYS | COLUMNS
    arrays = {path.name: mapped(path, dtypes[path.name]) for path in folder.iterdir() if path.name in dtypes}
    columns = {name: arrays[name] for name in COLUMNS if name in arrays}
    return Examples(*(arrays[name] for name in ARRAYS), columns=columns)
