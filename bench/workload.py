"""The same work for every trainer: real conversations, prepared by our own prepare stage, in the order of its plan.

Whoever trains reads these token ids, labels and steps; whoever is judged is judged on the same held-out rows.
"""

import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from finetune_api.layout import PLAN, join
from finetune_api.run import (
    CONTRACT_VERSION,
    JobRef,
    RunConfig,
    RunResources,
    RunResult,
    StartingAdapter,
    StorageConfig,
)
from finetune_trainer.data.examples import Examples, open_examples

RANK = 16
LEARNING_RATE = 2e-4
_TIMEOUT_S = 600


@dataclass(frozen=True)
class _Size:
    """How much work there is for a device: a GPU's time would be the host's with short rows."""

    joined: int  # conversations in a row
    batch_rows: int
    holdout_fraction: float


_SIZES = {
    "cpu": _Size(joined=1, batch_rows=8, holdout_fraction=0.02),
    "cuda": _Size(joined=12, batch_rows=32, holdout_fraction=0.25),
}


@dataclass(frozen=True)
class Row:
    """One conversation as every trainer gets it: both (tokens,) lists; -100 where nothing is to be learned."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Workload:
    """One prepared run: its configuration, its plan's digest, and its rows."""

    folder: Path
    plan_digest: str

    @property
    def device(self) -> str:
        """Where the trainers compute, as torch names it."""
        return "cuda" if self.config.resources.gpus else "cpu"

    @property
    def batch_rows(self) -> int:
        return self.plan["hyperparameters"]["global_batch_size"]

    @property
    def config_file(self) -> Path:
        return self.folder / "run.json"

    @cached_property
    def config(self) -> RunConfig:
        return RunConfig.model_validate_json(self.config_file.read_bytes())

    @cached_property
    def plan(self) -> dict[str, Any]:
        return json.loads(local_path(join(self.config.run_uri, PLAN)).read_bytes())

    @cached_property
    def steps(self) -> list[list[Row]]:
        """The rows of every optimizer step, in the order in which our trainer reads them."""
        import safetensors.numpy

        arrays = safetensors.numpy.load_file(local_path(self.plan["batches"]["uri"]))
        rows, bounds = arrays["examples"], arrays["step_offsets"]
        return [_rows(self._split("train"), rows[begin:end].tolist()) for begin, end in pairwise(bounds)]

    @cached_property
    def held_out(self) -> list[Row]:
        split = self._split("held_out")
        return _rows(split, list(range(len(split))))

    @property
    def tokens(self) -> list[int]:
        """Real tokens of every step."""
        return [sum(len(row.input_ids) for row in step) for step in self.steps]

    def _split(self, name: str) -> Examples:
        return open_examples(local_path(self.plan[name]["arrays"]["tokens"]["uri"]).parent)


def _conversations(joined: int) -> list[dict[str, list[dict[str, str]]]]:
    """Return the demo's conversations, so many of them in each row."""
    from demo.rows import good_rows

    rows = good_rows()
    parts = [rows[begin : begin + joined] for begin in range(0, len(rows), joined)]
    return [{"messages": [message for row in part for message in row["messages"]]} for part in parts]


def prepare(folder: Path, model_folder: Path, steps: int, threads: int, device: str) -> Workload:
    """Prepare conversations for a device in `folder`, a new run each time."""
    size = _SIZES[device]
    folder.mkdir(parents=True)
    data = write_rows(folder, _conversations(size.joined))
    spec = {
        "model": {"uri": model_folder.as_uri()},
        "method": {"type": "SFT"},
        "peft": {"type": "LoRA", "rank": RANK},
        "datasets": [{"uri": data.as_uri()}],
        "hyperparameters": {
            "maxSteps": steps,
            "globalBatchSize": size.batch_rows,
            "learningRate": LEARNING_RATE,
            "warmupRatio": 0.0,
            "schedule": "Linear",
            "weightDecay": 0.0,
        },
        "evaluation": {"holdoutFraction": size.holdout_fraction},
    }
    return Workload(folder, prepare_run(folder, spec, threads, device))


def write_rows(folder: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows as JSON lines."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def prepare_run(
    folder: Path, spec: dict[str, Any], threads: int, device: str = "cpu", adapter: StartingAdapter | None = None
) -> str:
    """Let our prepare stage plan a job, whose output lies in `folder`; return the plan's digest.

    adapter: that training goes on with, as model.adapterFrom names it."""
    config = RunConfig.model_validate(
        {
            "contract_version": CONTRACT_VERSION,
            "job": JobRef(name="bench", namespace="bench", uid=str(uuid.uuid4())).model_dump(),
            "spec": {**spec, "output": {"uri": (folder / "out").as_uri()}},
            "starting_adapter": adapter,
            "run_uri": join((folder / "out").as_uri(), "bench"),
            "storage": StorageConfig().model_dump(),
            "resources": RunResources(
                cpu_count=threads,
                memory_bytes=16 * 2**30,
                disk_bytes=shutil.disk_usage(folder).free,
                gpus=int(device == "cuda"),
            ).model_dump(),
            "work_dir": str(folder / "work"),
            "http_port": 0,
            "termination_log": str(folder / "termination-log"),
        }
    )
    (folder / "run.json").write_text(config.to_json())
    result = _run_stage(folder, "prepare")
    assert result.plan is not None
    return result.plan.digest


def train_run(folder: Path, plan_digest: str) -> RunResult:
    """Train what was prepared in `folder`, as its container would."""
    return _run_stage(folder, "train", "--plan-digest", plan_digest)


def _run_stage(folder: Path, stage: str, *arguments: str) -> RunResult:
    result_file = folder / f"{stage}.json"
    command = [sys.executable, "-P", "-m", "finetune_trainer", stage, "--config", str(folder / "run.json")]
    done = subprocess.run(
        [*command, "--attempt", "1", *arguments, "--result", str(result_file)],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(f"{stage} failed:\n{done.stderr[-3000:]}")
    return RunResult.model_validate_json(result_file.read_bytes())


def local_path(uri: str) -> Path:
    return Path(uri.removeprefix("file://"))


def _rows(split: Examples, ids: list[int]) -> list[Row]:
    found: list[Row] = []
    for run in map(split.read, split.sequences_of(ids)):
        tokens = run.tokens.astype(np.int64)
        found.append(Row(tokens.tolist(), np.where(run.labels == 1, tokens, -100).tolist()))
    return found
