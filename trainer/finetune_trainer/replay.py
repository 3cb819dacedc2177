"""Replay: how often datasets are read so that a share of what is learned is theirs, and what held-out rows say of it.

The share is of learned tokens, not of examples: the loss of a step is a mean over its learned tokens, so that their
share is how much a dataset moves the model; a piece of a long text has a hundred times those of a short one. Pure."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune_api.errors import StageError
from finetune_api.job import DatasetSpec
from finetune_api.reasons import Fault
from finetune_api.replay import ReplaySpec
from finetune_trainer.runplan import FileRange

# Of held-out rows, as `quality.FIGURE_WORDS` has words for.
NEW_LOSS, REPLAYED_LOSS = "new_loss", "replayed_loss"


def is_replayed(datasets: Sequence[DatasetSpec], replay: ReplaySpec) -> list[bool]:
    """Return whether each dataset is replayed."""
    return [each.name is not None and each.name in replay.datasets for each in datasets]


def replay_weights(
    weights: Sequence[float], label_tokens: Sequence[int], replayed: Sequence[bool], fraction: float
) -> list[float]:
    """Return how often an epoch reads each dataset so that `fraction` of the learned tokens are of the replayed ones.

    weights: as the job gives them, of the replayed ones beside one another alone; label_tokens: of each dataset's
    examples. Raises CONFIG_UNREADABLE where one of the two sides has nothing to learn."""
    learned = [weight * tokens for weight, tokens in zip(weights, label_tokens, strict=True)]
    old = sum(tokens for tokens, is_old in zip(learned, replayed, strict=True) if is_old)
    new = sum(learned) - old
    if not old or not new:
        which = "of the datasets that are replayed" if not old else "beside the datasets that are replayed"
        problem = f"no row is left to learn from {which}; report.json in .job/ says what became of their rows"
        raise StageError(Fault.CONFIG_UNREADABLE, field="spec.replay.datasets", problem=problem)
    factor = fraction / (1 - fraction) * new / old
    return [weight * factor if is_old else weight for weight, is_old in zip(weights, replayed, strict=True)]


def file_ranges(files: Sequence[range], replayed: Sequence[bool]) -> list[FileRange]:
    """Return which of a job's files are of replayed datasets. files: of each dataset."""
    datasets = zip(files, replayed, strict=True)
    return [FileRange(first=each.start, end=each.stop) for each, is_old in datasets if is_old and each]


def replayed_rows(files: npt.NDArray[Any], ranges: Sequence[FileRange]) -> npt.NDArray[np.bool_]:
    """(rows,) whether each is of a replayed dataset. files: (rows,) the file of each."""
    found = np.zeros(len(files), dtype=np.bool_)
    for each in ranges:
        found |= (files >= each.first) & (files < each.end)
    return found


def losses_apart(
    row_losses: Sequence[float], row_units: Sequence[int], replayed: npt.NDArray[np.bool_]
) -> dict[str, float]:
    """Return the mean loss on the new rows and on the replayed ones; nothing where one of them has none.

    row_losses: (rows,) sums over the units of each row."""
    losses, units = np.asarray(row_losses, dtype=np.float64), np.asarray(row_units, dtype=np.int64)
    found = {
        name: float(losses[rows].sum()) / int(units[rows].sum())
        for name, rows in ((NEW_LOSS, ~replayed), (REPLAYED_LOSS, replayed))
        if units[rows].any()
    }
    return found if len(found) == 2 else {}
