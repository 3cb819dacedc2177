"""report.json: what became of every row, how long rows are, how fast it went. No content."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune_trainer.batches import BatchPlan, Mix, pack
from finetune_trainer.data.accounts import Ledger
from finetune_trainer.data.examples import Examples
from finetune_trainer.data.spool import Division
from finetune_trainer.runplan import Hyperparameters

_LONGEST = 10
_MAX_IGNORED = 100
_BUCKETS = 20
_STEPS_SAMPLED = 100


def funnel(ledger: Ledger, ignored: Sequence[str], seconds: dict[str, float]) -> dict[str, Any]:
    """Rows by file and reason, and the speed of each stage; also for a job that failed."""
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
        "ignored_files": list(ignored[:_MAX_IGNORED]),
        "ignored_files_total": len(ignored),
        "changed": dict(sorted(ledger.changes.items())),
        "counted": {stage: dict(sorted(counts.items())) for stage, counts in sorted(ledger.counted.items())},
        "ignored_fields": dict(sorted(ledger.ignored_fields.items(), key=lambda item: (-item[1], item[0]))),
        "stages": {
            stage: {"seconds": round(spent, 3), "bytes_per_second": round(size_bytes / spent) if spent else None}
            for stage, spent in seconds.items()
        },
    }


def disk_bytes(in_flight_bytes: int, prepared_bytes: int, ledger: Ledger) -> dict[str, int]:
    """Return what prepare took of its disk, by what it was, and in all at most.

    in_flight_bytes: of partitions that are worked on; prepared_bytes: of the arrays of all rows that were read."""
    tables = max((account.size_bytes for account in ledger.files if account.is_table), default=0)
    found = {"partitions": in_flight_bytes, "table": tables, "rows": prepared_bytes, "arrays": prepared_bytes}
    # Arrays are written once all rows are read, and the partitions are gone.
    return found | {"most": prepared_bytes + max(in_flight_bytes + tables, prepared_bytes)}


def lengths(division: Division, ledger: Ledger) -> dict[str, Any]:
    """How long the used examples are, in tokens of their longest sequence, and where the longest rows lie.

    tokens: of all sequences that the examples are read as; stored_tokens: with what sequences share counted once."""
    used = division.examples_of(~division.dropped)
    examples = division.examples[used]
    tokens = examples["longest"].astype(np.int64)
    labels = int(examples["labels"].sum(dtype=np.int64))
    counts, edges = np.histogram(tokens, bins=_BUCKETS)
    total = int(examples["tokens"].sum(dtype=np.int64))
    return {
        "examples": len(examples),
        "sequences": int(examples["sequences"].sum(dtype=np.int64)),
        "tokens": total,
        "stored_tokens": int(examples["stored_tokens"].sum(dtype=np.int64)),
        "label_tokens": labels,
        "label_share": round(labels / total, 4),
        "percentiles": {f"p{q}": int(np.percentile(tokens, q)) for q in (50, 95, 99, 100)},
        "histogram": {"edges": [round(float(edge), 1) for edge in edges], "examples": counts.tolist()},
        "longest_rows": _longest(division, ledger),
        "duplicates": {
            "distinct_rows": division.distinct,
            "repeated_rows": len(division.rows) - division.distinct,
            "dropped_as_copies_of_held_out": int(division.dropped.sum()),
        },
    }


def _longest(division: Division, ledger: Ledger) -> list[dict[str, Any]]:
    row_tokens = np.add.reduceat(division.examples["tokens"].astype(np.int64), division.first_example[:-1])
    order = np.argsort(-row_tokens, kind="stable")[:_LONGEST]
    return [
        {
            "file": ledger.files[int(division.rows["file"][row])].uri,
            "row": int(division.rows["number"][row]),
            "tokens": int(row_tokens[row]),
        }
        for row in order
    ]


def shares(plan: BatchPlan, mix: Mix, examples: npt.NDArray[Any]) -> list[dict[str, Any]]:
    """How much of what the steps read is of each dataset. examples: (examples,) EXAMPLE of the training split."""
    datasets = len(mix.weights)
    reads = np.bincount(plan.examples, minlength=len(examples))
    counted = {
        "reads": reads,
        "tokens": reads * examples["tokens"].astype(np.int64),
        "label_tokens": reads * examples["labels"].astype(np.int64),
    }
    found: list[dict[str, Any]] = [
        {"weight": weight, "examples": int(count)}
        for weight, count in zip(mix.weights, np.bincount(mix.dataset, minlength=datasets), strict=True)
    ]
    for name, values in counted.items():
        sums = np.bincount(mix.dataset, weights=values, minlength=datasets)
        for share, total in zip(found, sums.tolist(), strict=True):
            share |= {name: int(total), f"{name}_share": round(total / max(1.0, float(sums.sum())), 4)}
    return found


def weights(column: npt.NDArray[np.float32]) -> dict[str, float]:
    """How many examples count otherwise than 1, and from what to what all of them; nothing where none does.

    column: (examples,) of the training split."""
    weighted = int(np.count_nonzero(column != 1))
    return {"examples": weighted, "least": float(column.min()), "most": float(column.max())} if weighted else {}


def packing(plan: BatchPlan, examples: Examples, longest_row: int, hyper: Hyperparameters) -> dict[str, Any]:
    """How full forward passes are, over the first steps."""
    if not hyper.packing:
        return {"packing": False}
    budget = max(hyper.micro_batch_tokens, longest_row)
    passes = tokens = padded = 0
    steps = min(plan.steps, _STEPS_SAMPLED)
    for step in range(steps):
        read = plan.examples[plan.step_offsets[step] : plan.step_offsets[step + 1]].tolist()
        lengths = examples.lengths(examples.sequences_of(read))
        passes += len(pack(lengths, budget))
        tokens += int(plan.tokens[step])
        padded += len(lengths) * max(lengths)
    return {
        "packing": True,
        "budget_tokens": budget,
        "passes_per_step": round(passes / steps, 2),
        "budget_used": round(tokens / (passes * budget), 4),
        "padding_saved": round(1 - tokens / padded, 4),  # share of a padded batch of the whole step
    }
