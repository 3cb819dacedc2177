"""What train reads: the plan, the base model's files, and the prepared arrays, each verified against its pin."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from finetune_trainer.attention import Segments
from finetune_trainer.data.examples import Examples, FlatSequence, open_examples
from finetune_trainer.identity import SAMPLE_BYTES, Evidence, evidence, is_other, sample_of
from finetune_trainer.runplan import FileRecord, RunPlan, SplitFiles
from finetune_trainer.step_plan import StepPlan, open_steps
from finetune_trainer.store import Store

log = logging.getLogger(__name__)

_MAX_DOWNLOADS = 3  # of one file that changes while it is read


@dataclass(frozen=True)
class Batch:
    """S flat sequences of one forward pass, T tokens in all, N of them labels; tensors on the model's device."""

    input_ids: Tensor  # (1, T) int64
    position_ids: Tensor  # (1, T) int64, from 0 in every sequence
    segments: Segments
    sources: Tensor  # (N,) int64 places whose hidden state predicts the label
    targets: Tensor  # (N,) int64 token ids
    label_counts: tuple[int, ...]  # (S,) labels of each sequence, one behind another in the N
    weights: Tensor | None = None  # (N,) fp32 what each label's loss is multiplied with; None: all with 1
    sequence_weights: Tensor | None = None  # (S,) fp32, the same for what is counted in sequences

    @property
    def tokens(self) -> int:
        return self.segments.bounds[-1]


def make_batch(examples: Examples, sequences: Sequence[FlatSequence], device: torch.device) -> Batch:
    """Return one pass with the flat sequences one after another, in this order."""
    runs = [examples.read(sequence) for sequence in sequences]
    weights = examples.weights(sequences)
    return pack_rows([run.tokens for run in runs], [run.labels for run in runs], device, weights)


def pack_rows(
    tokens: Sequence[npt.NDArray[Any]],
    labels: Sequence[npt.NDArray[Any]],
    device: torch.device,
    weights: npt.NDArray[np.float32] | None = None,
) -> Batch:
    """Return one pass with the given rows one after another. labels[i][j] is 1 where tokens[i][j] is to be predicted.

    weights: what the losses of each row's labels are multiplied with; None: with 1."""
    lengths = [len(row) for row in tokens]
    bounds = np.cumsum([0, *lengths])
    places = np.flatnonzero(np.concatenate(labels))
    ids = np.concatenate(tokens).astype(np.int64)
    positions = np.arange(bounds[-1]) - np.repeat(bounds[:-1], lengths)

    def on_device(array: npt.NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

    counts = [int(np.count_nonzero(row)) for row in labels]
    segments = Segments(tuple(bounds.tolist()), on_device(bounds.astype(np.int32)), max(lengths))
    return Batch(
        input_ids=on_device(ids)[None],
        position_ids=on_device(positions)[None],
        segments=segments,
        sources=on_device(places - 1),
        targets=on_device(ids[places]),
        label_counts=tuple(counts),
        weights=None if weights is None else on_device(np.repeat(weights, counts)),
        sequence_weights=None if weights is None else on_device(weights),
    )


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
