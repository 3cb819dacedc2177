"""Whether SmolLM2-135M learns to prefer right sums: SFT on right and wrong ones alike, then each method from there.

Both answers to a sum are of one length. What is told is of sums that no method was trained on.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.workload import local_path, prepare_run, train_run, write_rows
from finetune_api.layout import join
from finetune_api.run import StartingAdapter

_METHODS: dict[str, dict[str, Any]] = {
    "DPO": {"type": "DPO"},
    "DPO, IPO": {"type": "DPO", "dpo": {"loss": "IPO"}},
    "DPO, SimPO": {"type": "DPO", "dpo": {"loss": "SimPO"}},
    "ORPO": {"type": "ORPO", "orpo": {"lambda": 1.0}},
    "KTO": {"type": "KTO"},
}
_SFT_STEPS = 30
_STEPS = 24
_BATCH = 8
_SFT_LEARNING_RATE = 1e-3
_LEARNING_RATE = 3e-4
_HELD_OUT = 0.3


@dataclass(frozen=True)
class Learned:
    """What a method came to on held-out rows, before and after. likelier: share of pairs; None without pairs."""

    name: str
    rows: int
    likelier: tuple[float, float] | None  # whose right answer the model itself finds likelier
    accuracy: tuple[float, float]  # of rewards
    seconds: float


def learns(folder: Path, model_folder: Path, threads: int) -> list[Learned]:
    """Train everything below `folder`."""
    sums = [(a, b) for a in range(10) for b in range(10)]
    both = [{"prompt": f"{a}+{b}=", "completion": _answer(a, b, wrong)} for a, b in sums for wrong in (0, 1)]
    started = _train(folder / "sft", model_folder, threads, {"type": "SFT"}, both)
    assert started.artifact is not None
    adapter = StartingAdapter(uri=started.artifact.uri, digest=started.artifact.digest)
    pairs = [{"prompt": f"{a}+{b}=", "chosen": _answer(a, b, 0), "rejected": _answer(a, b, 1)} for a, b in sums]
    thumbs = [row | {"label": place % 2 == 0} for place, row in enumerate(both)]
    found: list[Learned] = []
    for number, (name, method) in enumerate(_METHODS.items()):
        began_s = time.perf_counter()
        rows = thumbs if method["type"] == "KTO" else pairs
        result = _train(folder / str(number), model_folder, threads, method, rows, adapter)
        assert result.artifact is not None
        measured = json.loads(local_path(join(result.artifact.uri, "eval.json")).read_bytes())["held_out"]
        before, after = (each["figures"] for each in (measured[0], measured[-1]))
        likelier = "chosen_likelier"
        found.append(
            Learned(
                name=name,
                rows=measured[-1]["rows"],
                likelier=(before[likelier], after[likelier]) if likelier in before else None,
                accuracy=(before["reward_accuracy"], after["reward_accuracy"]),
                seconds=time.perf_counter() - began_s,
            )
        )
    return found


def _answer(a: int, b: int, too_much: int) -> str:
    return f"{a + b + too_much:02d}"


def _train(
    folder: Path,
    model_folder: Path,
    threads: int,
    method: dict[str, Any],
    rows: Sequence[Mapping[str, Any]],
    adapter: StartingAdapter | None = None,
) -> Any:
    folder.mkdir(parents=True)
    model: dict[str, Any] = {"uri": model_folder.as_uri()}
    spec = {
        "model": model | ({} if adapter is None else {"adapterFrom": {"uri": adapter.uri}}),
        "method": method,
        "datasets": [{"uri": write_rows(folder, rows).as_uri()}],
        "hyperparameters": {
            "maxSteps": _STEPS if adapter else _SFT_STEPS,
            "globalBatchSize": _BATCH if adapter else 2 * _BATCH,
            "learningRate": _LEARNING_RATE if adapter else _SFT_LEARNING_RATE,
        },
        "evaluation": {"holdoutFraction": _HELD_OUT if adapter else 0},
    }
    return train_run(folder, prepare_run(folder, spec, threads, adapter=adapter))
