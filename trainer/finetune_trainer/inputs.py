"""What train reads: the plan, the base model's files, and the prepared arrays, each verified against its pin."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from finetune_api.base import sha256_digest
from finetune_api.errors import StageError
from finetune_api.layout import join
from finetune_api.reasons import Fault
from finetune_trainer.attention import Keys, Segments
from finetune_trainer.data.examples import Examples, FlatSequence, example_counts, open_examples
from finetune_trainer.identity import SAMPLE_BYTES, Evidence, evidence, is_other, sample_of
from finetune_trainer.runplan import FileRecord, PassLayout, RunPlan, SplitFiles
from finetune_trainer.step_plan import StepPlan, open_steps
from finetune_trainer.store import Store

log = logging.getLogger(__name__)

_MAX_DOWNLOADS = 3  # of one file that changes while it is read


@dataclass(frozen=True)
class Batch:
    """S flat sequences of one forward pass, N of their tokens labels; tensors on the model's device.

    The sequences are of E examples, one behind another, and lie in T places: what those of an example share may lie
    there once. apart: each goes through the model alone."""

    input_ids: Tensor  # (1, T) int64
    position_ids: Tensor  # (1, T) int64, in its sequence
    segments: Segments
    sources: Tensor  # (N,) int64 places whose hidden state predicts the label
    targets: Tensor  # (N,) int64 token ids
    label_counts: tuple[int, ...]  # (S,) labels of each sequence, one behind another in the N
    example_counts: tuple[int, ...]  # (E,) sequences of each example
    weights: Tensor | None = None  # (N,) fp32 what each label's loss is multiplied with; None: all with 1
    example_weights: Tensor | None = None  # (E,) fp32, the same for what is counted in examples
    desirable: Tensor | None = None  # (E,) bool whether the answer is a good one; None where nothing says so
    reference: Tensor | None = None  # (S,) fp32 log-probability of a sequence's labels before training, in nats
    drift: Tensor | None = None  # () fp32 mean log-ratio of answers under other prompts, over the whole step
    apart: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of all flat sequences."""
        return self.segments.tokens


def make_batch(
    examples: Examples,
    sequences: Sequence[FlatSequence],
    device: torch.device,
    layout: PassLayout = PassLayout.PACKED,
) -> Batch:
    """Return one pass with the flat sequences one after another, in this order; of trees, all those of each example."""
    runs = [examples.read(sequence) for sequence in sequences]
    counts = example_counts(sequences)
    shared = None
    if layout is PassLayout.TREES:
        examples_of_pass = [sequences[end - 1].example for end in accumulate(counts)]
        assert list(sequences) == examples.sequences_of(examples_of_pass), "all sequences of an example are in one pass"
        shared = examples.shared(sequences)
    batch = pack_rows(
        [run.tokens for run in runs], [run.labels for run in runs], device, examples.weights(sequences), counts, shared
    )
    label, reference = examples.columns.get("label"), examples.reference
    firsts = np.cumsum([0, *counts[:-1]])
    return replace(
        batch,
        desirable=None if label is None else _on(device, label[[sequences[at].example for at in firsts]] > 0),
        reference=None if reference is None else _on(device, reference[[each.leaf for each in sequences]]),
        apart=layout is PassLayout.APART,
    )


def pack_rows(
    tokens: Sequence[npt.NDArray[Any]],
    labels: Sequence[npt.NDArray[Any]],
    device: torch.device,
    weights: npt.NDArray[np.float32] | None = None,
    example_counts: Sequence[int] | None = None,
    shared: Sequence[int] | None = None,
) -> Batch:
    """Return one pass with the given rows one after another. labels[i][j] is 1 where tokens[i][j] is to be predicted.

    weights: what the losses of each row's labels are multiplied with; None: with 1. example_counts: rows of each
    example, one behind another; None: each is one. shared: with how many tokens of the row before it each row begins,
    none of them a label, which lie in the pass once; None: each row lies there whole."""
    behind = shared if shared is not None and any(shared) else [0] * len(tokens)
    own = [row[begin:] for row, begin in zip(tokens, behind, strict=True)]
    own_labels = [row[begin:] for row, begin in zip(labels, behind, strict=True)]
    lengths = [len(row) for row in own]
    bounds = np.cumsum([0, *lengths])
    places = np.flatnonzero(np.concatenate(own_labels))
    ids = np.concatenate(own).astype(np.int64)
    positions = np.arange(bounds[-1]) - np.repeat(bounds[:-1] - np.array(behind), lengths)
    counts = [int(np.count_nonzero(row)) for row in labels]
    assert sum(counts) == len(places), "labels of what rows share belong to the first of them"
    of_examples = tuple(example_counts or (1,) * len(lengths))
    firsts = np.cumsum([0, *of_examples[:-1]])
    segments = Segments(tuple(bounds.tolist()), _on(device, bounds.astype(np.int32)), max(len(row) for row in tokens))
    predecessors = np.arange(bounds[-1]) - 1
    if any(behind):
        seen = _places_seen(bounds, behind)
        predecessors[bounds[:-1]] = [row[begin - 1] if begin else -1 for row, begin in zip(seen, behind, strict=True)]
        cumulative = np.cumsum([0, *map(len, seen)]).astype(np.int32)
        keys = Keys(_on(device, np.concatenate(seen)), _on(device, cumulative))
        segments = replace(segments, shared=tuple(behind), keys=keys)
    return Batch(
        input_ids=_on(device, ids)[None],
        position_ids=_on(device, positions)[None],
        segments=segments,
        sources=_on(device, predecessors[places]),
        targets=_on(device, ids[places]),
        label_counts=tuple(counts),
        example_counts=of_examples,
        weights=None if weights is None else _on(device, np.repeat(weights, counts)),
        example_weights=None if weights is None else _on(device, weights[firsts]),
    )


def _places_seen(bounds: npt.NDArray[np.int64], shared: Sequence[int]) -> list[npt.NDArray[np.int64]]:
    """Return where in the pass the tokens of each row lie, those that it shares included."""
    found: list[npt.NDArray[np.int64]] = []
    for (begin, end), count in zip(pairwise(bounds), shared, strict=True):
        own = np.arange(begin, end)
        found.append(np.concatenate([found[-1][:count], own]) if count else own)
    return found


def _on(device: torch.device, array: npt.NDArray[Any]) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class ModelFile(NamedTuple):
    """A file of the base model as it was downloaded."""

    sha256: str
    known_by: Evidence


def fetch_model(store: Store, plan: RunPlan, folder: Path) -> dict[str, ModelFile]:
    """Download the base model's files; returns them by name.

    Raises MODEL_CHANGED when the content of a file is not the one that was planned with.
    """
    fetched: dict[str, ModelFile] = {}
    for record in plan.model.files:
        name = record.uri.removeprefix(join(plan.model.uri, ""))
        parts = PurePosixPath(name).parts
        if name == record.uri or not parts or ".." in parts or parts[0] == "/":
            raise StageError(Fault.CONFIG_UNREADABLE, field="plan.model.files", problem="a file outside the model")
        fetched[name] = _fetch(store, record, folder.joinpath(*parts), Fault.MODEL_CHANGED)
        if fetched[name].known_by is Evidence.SAMPLE:
            log.warning(
                "%s was written since the job was prepared, and the store keeps no checksum of it: its size and a "
                "sample of %d MiB are what was planned with, the rest cannot be compared",
                name,
                SAMPLE_BYTES >> 20,
            )
    return fetched


def fetch_starting_adapter(store: Store, plan: RunPlan, folder: Path) -> Path | None:
    """Download the weights of the adapter that training goes on with; None where it begins with a new one.

    Raises MODEL_CHANGED when they are not what its job committed."""
    if plan.starting_adapter is None:
        return None
    path = folder / "adapter.safetensors"
    _fetch(store, plan.starting_adapter.weights, path, Fault.MODEL_CHANGED)
    return path


def _fetch(store: Store, record: FileRecord, path: Path, changed: Fault) -> ModelFile:
    """Download one file, all of one version. Raises `changed` when it has another content than was planned with.

    A file that is written meanwhile is begun again: only its content says whether that matters."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for tries_left in reversed(range(_MAX_DOWNLOADS)):
        # The last try does without a pin, for stores whose ETags do not stay.
        found = store.head(record.uri) if tries_left else None
        if found is not None and is_other(record, found):
            break
        try:
            sha256 = store.download(record.uri, path, if_match=found.etag if found else None)
        except StageError as error:
            if error.fault is Fault.INPUT_CHANGED:
                continue
            raise
        same_size = path.stat().st_size == record.size_bytes
        known_by = evidence(record, sha256, lambda: sample_of(path), found) if same_size else None
        if known_by is not None:
            return ModelFile(sha256, known_by)
        break
    raise StageError(changed, uri=record.uri, file=record.uri)


def fetch_examples(store: Store, split: SplitFiles, folder: Path) -> Examples:
    """Download one split's arrays and map them. Raises INPUT_CHANGED when they are not what prepare wrote."""
    for name, record in split.arrays.items():
        _fetch(store, record, folder / name, Fault.INPUT_CHANGED)
    examples = open_examples(folder)
    ends = (examples.example_offsets[-1], examples.segment_offsets[-1])
    sizes = (len(examples.parents), len(examples.tokens), len(examples.labels), len(examples))
    whole = sizes == (*ends, ends[1], split.examples)
    if not whole or any(len(column) != len(examples) for column in examples.columns.values()):
        raise StageError(Fault.INPUT_CHANGED, file=split.arrays["example_offsets"].uri)
    return examples


def fetch_steps(store: Store, plan: RunPlan, folder: Path) -> StepPlan:
    """Download the batch plan. Raises INPUT_CHANGED when it is not what prepare wrote."""
    path = folder / "batches.safetensors"
    _fetch(store, plan.batches, path, Fault.INPUT_CHANGED)
    steps = open_steps(path)
    if len(steps) != plan.hyperparameters.total_steps:
        raise StageError(Fault.INPUT_CHANGED, file=plan.batches.uri)
    return steps


def digest_of(digests: Mapping[str, str]) -> str:
    """One digest over names and digests of files, whatever their order."""
    lines = "".join(f"{name} {digests[name]}\n" for name in sorted(digests))
    return sha256_digest(lines.encode())
