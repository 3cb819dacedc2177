"""A run of tiny_run.py with examples of a preference method: some bytes are better than others."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from finetune_api.job import MethodSpec, MethodType
from finetune_api.layout import PREPARED
from finetune_trainer.batches import plan_batches
from finetune_trainer.data.examples import ARRAYS, COLUMNS, Examples, TokenRun, Tree, one_segment, pair_of
from finetune_trainer.data.spool import flat_lengths
from finetune_trainer.methods import method_of
from finetune_trainer.runplan import SplitFiles
from finetune_trainer.store import Store
from tiny_run import STOP_ID, TinyRun, make_run, record_of

GOOD, BAD = 64, 128  # the first of eight bytes that good answers are made of, and of those of bad ones
HELD_OUT = 30


class Rows(NamedTuple):
    """Examples of one split. labels: of thumbs, 1 for a good answer and -1 for a bad one."""

    trees: list[Tree]
    labels: list[int] | None = None


def _answer(prompt: np.ndarray, begin: int, length: int, generator: np.random.Generator) -> TokenRun:
    tokens = np.concatenate([prompt, generator.integers(begin, begin + 8, length), [STOP_ID]]).astype("<u4")
    return TokenRun(tokens, (np.arange(len(tokens)) >= len(prompt)).astype("u1"))


def pairs(count: int, seed: int, *, equal: bool = True) -> list[Tree]:
    """Return pairs of random prompts and answers, of equal length unless told otherwise."""
    generator = np.random.default_rng(seed)
    found: list[Tree] = []
    for _ in range(count):
        prompt = generator.integers(0, 256, generator.integers(2, 12))
        lengths = [int(generator.integers(3, 10))] * 2 if equal else generator.integers(2, 14, 2).tolist()
        found.append(pair_of(*(_answer(prompt, *each, generator) for each in zip((GOOD, BAD), lengths, strict=True))))
    return found


def thumbs(count: int, seed: int) -> tuple[list[Tree], list[int]]:
    """Return answers, of which a third is good, and their labels."""
    generator = np.random.default_rng(seed)
    labels = [1 if place % 3 == 0 else -1 for place in range(count)]
    found: list[Tree] = []
    for label in labels:
        prompt = generator.integers(0, 256, generator.integers(2, 12))
        run = _answer(prompt, GOOD if label > 0 else BAD, int(generator.integers(3, 10)), generator)
        found.append(one_segment(*run))
    return found, labels


def joined_trees(trees: Sequence[Tree], **columns: Any) -> Examples:
    """Return the trees as the examples of one split."""
    lengths = np.concatenate([tree.lengths for tree in trees])
    return Examples(
        np.concatenate([tree.tokens for tree in trees]),
        np.concatenate([tree.labels for tree in trees]),
        np.concatenate([[0], np.cumsum(lengths)]),
        np.concatenate([tree.parents for tree in trees]),
        np.cumsum([0, *(len(tree.lengths) for tree in trees)]),
        columns,
    )


def write_trees(store: Store, folder: Path, trees: Sequence[Tree], labels: Sequence[int] | None = None) -> SplitFiles:
    """Write a split as prepare does."""
    folder.mkdir(parents=True, exist_ok=True)
    examples = joined_trees(trees)
    lengths = [each for tree in trees for each in flat_lengths(tree)]
    arrays: dict[str, Any] = {
        "tokens": examples.tokens,
        "labels": examples.labels,
        "segment_offsets": examples.segment_offsets,
        "parents": examples.parents,
        "example_offsets": examples.example_offsets,
        "weight": np.ones(len(trees)),
    }
    if labels is not None:
        arrays["label"] = np.array(labels)
    for name, array in arrays.items():
        array.astype((ARRAYS | COLUMNS)[name]).tofile(folder / name)
    return SplitFiles(
        examples=len(trees),
        segments=len(examples.parents),
        sequences=len(lengths),
        stored_tokens=len(arrays["tokens"]),
        total_tokens=sum(lengths),
        label_tokens=int(arrays["labels"].sum()),
        longest_row=max(lengths),
        arrays={name: record_of(store, folder / name) for name in arrays},
    )


def _drawn(method: MethodType, count: int, seed: int, equal: bool) -> Rows:
    """Return random examples of the method."""
    return Rows(pairs(count, seed, equal=equal)) if method_of(method).sequences == 2 else Rows(*thumbs(count, seed))


def preference_run(
    folder: Path,
    method: MethodType,
    options: dict[str, Any] | None = None,
    *,
    steps: int = 12,
    batch: int = 4,
    rows: int = 48,
    equal: bool = True,
    data: tuple[Rows, Rows] | None = None,
    **hyper: Any,
) -> TinyRun:
    """Everything below `folder`, as make_run does it, with pairs or thumbs. options: those of the method.

    data: to train on, and held out; None: `rows` that are drawn, and HELD_OUT more."""
    run = make_run(folder, steps=steps, batch=batch, method=method, **hyper)
    prepared = run.local(PREPARED)
    trained, measured = data or (_drawn(method, rows, 1, equal), _drawn(method, HELD_OUT, 2, equal))
    train, held_out = (
        write_trees(run.store, prepared / name, *each) for name, each in (("train", trained), ("held_out", measured))
    )
    path = prepared / "batches.safetensors"
    lengths = np.array([sum(flat_lengths(tree)) for tree in trained.trees])
    counts = np.array([int(tree.labels.sum()) for tree in trained.trees])
    denominator = method_of(method).denominator
    plan_batches(path, lengths, counts, np.ones(len(counts)), steps * batch, batch, 5, denominator=denominator)
    spec = {"type": method.value} | ({} if options is None else {method.value.lower(): options})
    update = {
        "train": train,
        "held_out": held_out,
        "denominator": denominator,
        "options": MethodSpec.model_validate(spec),
        "batches": record_of(run.store, path),
        "train_tokens": train.total_tokens,
        "label_tokens": train.label_tokens,
    }
    run.write_plan(run.plan.model_copy(update=update))
    return run
