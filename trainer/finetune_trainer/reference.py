"""What the model that a job began with says of the prepared answers: computed once, and kept with the job.

Of every flat sequence that is read, the log-probability of its labels, computed with the adapter as it was at the
start, so that no second model is in memory. They lie in parts below `.job/reference/KEY/`: each is whole or not there,
and KEY is made of all that they follow from. So a killed attempt goes on behind the parts that it has finished, and
later epochs and attempts compute nothing. Here they are in a file that is mapped, 4 bytes a segment.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from finetune_api.layout import REFERENCE, join
from finetune_trainer.commit import Fence
from finetune_trainer.data.examples import REFERENCE_VALUE, Examples
from finetune_trainer.data.mapped import new_mapped
from finetune_trainer.inputs import make_batch
from finetune_trainer.model import LanguageModel
from finetune_trainer.passes import passes
from finetune_trainer.patience import ENDS_AT_ONCE, best_effort
from finetune_trainer.policy import Scores
from finetune_trainer.runplan import RunPlan, SplitFiles
from finetune_trainer.serve import Reporter
from finetune_trainer.store import Store

log = logging.getLogger(__name__)

PART_TOKENS = 2**18  # stored tokens: some minutes of work of a CPU, and all that a kill can cost
_MAX_PARTS = 100_000  # 26 billion tokens
_DIGEST_BYTES = 32  # SHA-256 of place and values, behind them
_VERSION = 3  # rises when the same key would stand for other values


class _Part(NamedTuple):
    """Examples that lie beside one another, and their segments."""

    number: int
    examples: range
    segments: slice


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Where the values of one split are kept. beat: called after each pass and with each part; it may raise.

    scored: called with how many answers more are known."""

    store: Store
    fence: Fence
    folder_uri: str
    beat: Callable[[], None]
    scored: Callable[[int], None]


class Scoring:
    """Tells how many of the answers are scored."""

    def __init__(self, reporter: Reporter, answers: int) -> None:
        self._reporter, self._scored = reporter, 0
        reporter.update(activity="Scoring", answers_scored=0, answers_to_score=answers)

    def add(self, answers: int) -> None:
        """Add answers that are scored now, or were by an earlier attempt."""
        self._scored += answers
        self._reporter.update(answers_scored=self._scored)


def reference_key(plan: RunPlan, split: SplitFiles, base_digest: str, dtype: torch.dtype, name: str) -> str:
    """Return the name of a split's values: equal where base, tokens, and what is read and computed in are equal.

    name: tells the values of one split from others of it.

    The model that a job begins with is its base, with the earlier adapter that training goes on with."""
    arrays = {name: record.sha256 for name, record in split.arrays.items()}
    told = {
        "version": _VERSION,
        "name": name,
        "order": [
            plan.hyperparameters.seed,
            plan.hyperparameters.max_sequence_length,
        ],  # by which prompts get others' answers
        "base": base_digest,
        "adapter": plan.starting_adapter.digest if plan.starting_adapter is not None else None,
        "arrays": arrays,
        "read": plan.batches.sha256,
        "computed_in": str(dtype),
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:32]


def reference_uri(run_uri: str, key: str) -> str:
    """Return the folder of the values of this key."""
    return join(run_uri, REFERENCE, key)


@torch.no_grad()
def reference_of(
    lm: LanguageModel,
    examples: Examples,
    is_read: npt.NDArray[np.bool_],
    plan: RunPlan,
    kept: Kept,
    path: Path,
) -> npt.NDArray[np.float32]:
    """Return (segments,) what `Examples.reference` holds, mapped from `path`; NaN where nothing is read.

    The adapter is as it was at the start. is_read: (examples,). What storage refuses ends nothing: it is only computed
    again after a kill. Raises what `kept.beat` does, and SUPERSEDED."""
    values = new_mapped(path, REFERENCE_VALUE, len(examples.parents))
    names: set[str] = set()
    with best_effort("what the base model says of the answers is not looked for"):
        names = {info.uri.rpartition("/")[2] for info in kept.store.list(join(kept.folder_uri, ""), _MAX_PARTS)}
    found = 0
    for part in _parts(examples):
        name = f"{part.number:06d}"
        there = _read(kept, name, part.segments.stop - part.segments.start) if name in names else None
        found += there is not None
        values[part.segments] = _computed(lm, examples, part, is_read, plan, kept) if there is None else there
        if there is None:
            _write(kept, name, values[part.segments])
        else:
            kept.scored(len(examples.sequences_of([each for each in part.examples if is_read[each]])))
        kept.beat()
    log.info("what the base model says of the answers: %d parts were there, the others are computed", found)
    return values


def _parts(examples: Examples) -> Iterator[_Part]:
    """Yield the examples in parts of about PART_TOKENS stored tokens; those without an example are left out."""
    first = 0
    for number in range(int(examples.segment_offsets[-1]) // PART_TOKENS + 1):
        segment = int(np.searchsorted(examples.segment_offsets, (number + 1) * PART_TOKENS))
        last = min(len(examples), int(np.searchsorted(examples.example_offsets, segment)))
        if last > first:
            begin, end = int(examples.example_offsets[first]), int(examples.example_offsets[last])
            yield _Part(number, range(first, last), slice(begin, end))
        first = last


def _computed(
    lm: LanguageModel, examples: Examples, part: _Part, is_read: npt.NDArray[np.bool_], plan: RunPlan, kept: Kept
) -> npt.NDArray[np.float32]:
    values = np.full(part.segments.stop - part.segments.start, np.nan, dtype=REFERENCE_VALUE)
    hyper = plan.hyperparameters
    numbers = [each for each in part.examples if is_read[each]]
    for group in passes(examples, numbers, hyper.micro_batch_tokens, hyper.layout):
        batch = make_batch(examples, group, lm.device, hyper.layout)
        leaves = np.array([each.leaf for each in group])
        values[leaves - part.segments.start] = Scores(lm, batch).sequences.cpu().numpy()
        kept.beat()
        kept.scored(len(group))
    return values


def _read(kept: Kept, name: str, count: int) -> npt.NDArray[np.float32] | None:
    """Return a part that an earlier attempt has finished; None where it cannot be read, or is not as it was written."""
    length = count * REFERENCE_VALUE.itemsize
    with best_effort("what the base model says of some answers cannot be read, and is computed again"):
        content = kept.store.read(join(kept.folder_uri, name), max_bytes=length + _DIGEST_BYTES)[0]
        if len(content) == length + _DIGEST_BYTES and _digest(kept, name, content[:length]) == content[length:]:
            return np.frombuffer(content[:length], dtype=REFERENCE_VALUE)
        log.warning("what the base model says of some answers is not as it was written, and is computed again")
    return None


def _write(kept: Kept, name: str, values: npt.NDArray[np.float32]) -> None:
    content = values.tobytes()
    with best_effort("what the base model says of some answers is not kept", but=ENDS_AT_ONCE):
        kept.fence.check()
        kept.store.put(join(kept.folder_uri, name), content + _digest(kept, name, content))


def _digest(kept: Kept, name: str, content: bytes) -> bytes:
    """Return what tells that a part is whole, and lies where it was written: others have as many values."""
    key = kept.folder_uri.rstrip("/").rpartition("/")[2]
    return hashlib.sha256(f"{key}/{name}\n".encode() + content).digest()
