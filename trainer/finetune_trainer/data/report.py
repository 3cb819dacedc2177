"""report.json: what became of every row, how long rows are, how fast it went. No content."""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune_trainer.batches import CHUNK, Mix
from finetune_trainer.data.accounts import FileAccount, Ledger, most_first
from finetune_trainer.data.examples import Examples
from finetune_trainer.data.stages.stage import Stage
from finetune_trainer.passes import computed_tokens, passes
from finetune_trainer.runplan import Hyperparameters
from finetune_trainer.step_plan import StepPlan

_MAX_IGNORED = 100
_STEPS_SAMPLED = 100


def funnel(ledger: Ledger, chain: Sequence[Stage], ignored: Sequence[str], seconds: dict[str, float]) -> dict[str, Any]:
    """Rows by file and reason, where the first that are left out lie, and the speed of each stage; also for a job that
    failed. chain: the stages between reading and rendering."""
    size_bytes = sum(account.size_bytes for account in ledger.files)
    return {
        "rows_in": ledger.rows_read,
        "dropped": dict(sorted(ledger.dropped.items())),
        "files": [
            {
                "uri": account.uri,
                "size_bytes": account.size_bytes,
                "etag": account.etag,
                "sha256": account.sha256,
                "rows_in": account.rows_in,
                "rows_used": account.used,
                "rows_held_out": account.held_out,
                "dropped": dict(sorted(account.dropped.items())),
                "dropped_by_stage": {
                    name: stage.dropped for name, stage in sorted(account.stages.items()) if stage.dropped
                },
            }
            for account in ledger.files
        ],
        "chain": [stage.name for stage in chain],
        "drop_places": ledger.decided.drop_places,
        "ignored_files": list(ignored[:_MAX_IGNORED]),
        "ignored_files_total": len(ignored),
        "changed": dict(sorted(ledger.changes.items())),
        "counted": {stage: dict(sorted(counts.items())) for stage, counts in sorted(ledger.counted.items())},
        "ignored_fields": most_first(ledger.ignored_fields),
        "stages": {
            stage: {"seconds": round(spent, 3), "bytes_per_second": round(size_bytes / spent) if spent else None}
            for stage, spent in seconds.items()
        },
    }


def licenses(index: int, field: str, files: Sequence[FileAccount]) -> dict[str, Any]:
    """Rows of a dataset by their own licence: those that were taken, and those that were left out by it."""
    taken, left = Counter[str](), Counter[str]()
    for account in files:
        taken.update(account.licenses)
        left.update(account.left_licenses)
    return {"dataset": index, "field": field, "taken": most_first(taken), "left_out": most_first(left)}


def shares(plan: StepPlan, mix: Mix, examples: npt.NDArray[Any]) -> list[dict[str, Any]]:
    """How much of what the steps read is of each dataset. examples: (examples,) EXAMPLE of the training split."""
    datasets = len(mix.weights)
    counted = {name: np.zeros(datasets) for name in ("reads", "tokens", "label_tokens")}
    for begin in range(0, len(plan.examples), CHUNK):
        read = plan.examples[begin : begin + CHUNK]
        dataset = np.searchsorted(mix.firsts, read, side="right") - 1
        weights = {"reads": None, "tokens": examples["tokens"][read], "label_tokens": examples["labels"][read]}
        for name, each in weights.items():
            counted[name] += np.bincount(dataset, weights=each, minlength=datasets)
    found: list[dict[str, Any]] = [
        {"weight": weight, "examples": size} for weight, size in zip(mix.weights, mix.sizes, strict=True)
    ]
    for name, sums in counted.items():
        for share, total in zip(found, sums.tolist(), strict=True):
            share |= {name: int(total), f"{name}_share": round(total / max(1.0, float(sums.sum())), 4)}
    return found


def by_dataset(values: npt.NDArray[Any], sizes: Sequence[int]) -> list[int]:
    """Return the sum of each dataset. values: (examples,) in the order of the datasets, which have so many each."""
    ends = np.cumsum([0, *sizes], dtype=np.int64)
    return [int(values[first:end].sum(dtype=np.int64)) for first, end in pairwise(ends.tolist())]


def weights(column: npt.NDArray[np.float32]) -> dict[str, float]:
    """How many examples count otherwise than 1, and from what to what all of them; nothing where none does.

    column: (examples,) of the training split."""
    chunks = (column[begin : begin + CHUNK] for begin in range(0, len(column), CHUNK))
    weighted = sum(int(np.count_nonzero(chunk != 1)) for chunk in chunks)
    return {"examples": weighted, "least": float(column.min()), "most": float(column.max())} if weighted else {}


def packing(plan: StepPlan, examples: Examples, hyper: Hyperparameters, *, whole: bool) -> dict[str, Any]:
    """How full forward passes are, over the first steps. whole: all sequences of an example are in one pass."""
    if not hyper.packing:
        return {"packing": False}
    budget = hyper.micro_batch_tokens
    groups = tokens = computed = padded = 0
    steps = min(len(plan), _STEPS_SAMPLED)
    for step in range(steps):
        read = plan.examples_of(step)
        sequences = examples.sequences_of(read)
        lengths = examples.lengths(sequences)
        groups += sum(1 for _ in passes(examples, read, budget, hyper.layout, whole=whole))
        tokens += int(plan.tokens[step])
        computed += sum(computed_tokens(examples, sequences, hyper.layout))
        padded += len(lengths) * max(lengths)
    return {
        "packing": True,
        "budget_tokens": budget,
        "passes_per_step": round(groups / steps, 2),
        "budget_used": round(computed / (groups * budget), 4),
        "padding_saved": round(1 - tokens / padded, 4),  # share of a padded batch of the whole step
        "sharing_saved": round(1 - computed / tokens, 4),  # share of the tokens of flat sequences
    }
