"""Jobs that go on with the adapter of another: what a committed one is, and runs and prepares that begin with it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import data_run
from finetune_api.base import sha256_digest
from finetune_api.errors import StageError
from finetune_api.job import AdapterMode
from finetune_api.layout import ADAPTER
from finetune_api.run import StartingAdapter
from finetune_trainer import prepare, train
from finetune_trainer.runplan import RunPlan
from finetune_trainer.starting_adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_adapter
from finetune_trainer.stop import StopFlag
from tiny_run import TinyRun, context, stop_before


def source_of(run: TinyRun) -> StartingAdapter:
    """Return the adapter that the run has committed, as an operator names it."""
    folder = run.local(ADAPTER)
    return StartingAdapter(uri=folder.as_uri(), digest=sha256_digest((folder / "manifest.json").read_bytes()))


def begin_with(run: TinyRun, first: TinyRun, mode: AdapterMode = AdapterMode.CONTINUE) -> TinyRun:
    """Put the adapter that `first` has committed into the run's plan."""
    adapter = read_adapter(first.store, source_of(first), run.plan.model, mode)
    run.write_plan(run.plan.model_copy(update={"starting_adapter": adapter}))
    return run


def stopped_before(monkeypatch: pytest.MonkeyPatch, run: TinyRun, step: int) -> StageError:
    """Train until a stop while step `step - 1` runs; return how that ended."""
    stop = StopFlag(60)
    with monkeypatch.context() as patch:
        stop_before(patch, stop, step)
        with pytest.raises(StageError) as caught:
            train.run(context(run), stop)
    return caught.value


class Prepared:
    """A model, rows, and an adapter of that model as a job commits one."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.adapter = folder, folder / "earlier"
        data_run.put(folder, a_jsonl=data_run.jsonl(data_run.chats(40)))
        self.plan: RunPlan = data_run.prepare_run(folder).plan
        self.config: dict[str, Any] = {
            "peft_type": "LORA",
            "r": 7,
            "lora_alpha": 9,
            "target_modules": sorted(self.plan.model.target_modules),
            "base_model_name_or_path": "elsewhere",
        }
        self.base_files = {
            file.uri.rpartition("/")[2]: file.sha256 for file in self.plan.model.files if file.sha256 is not None
        }

    def write(self) -> str:
        """Write the adapter; returns the digest of its manifest."""
        self.adapter.mkdir(exist_ok=True)
        (self.adapter / ADAPTER_CONFIG).write_text(json.dumps(self.config))
        (self.adapter / ADAPTER_WEIGHTS).write_bytes(b"weights")
        files = [
            {"path": path.name, "size_bytes": path.stat().st_size, "sha256": sha256_digest(path.read_bytes())}
            for path in sorted(self.adapter.iterdir())
            if path.name != "manifest.json"
        ]
        content = json.dumps({"version": 1, "files": files, "base": {"files": self.base_files}}).encode()
        (self.adapter / "manifest.json").write_bytes(content)
        return sha256_digest(content)

    def prepare(self, digest: str | None = None, mode: AdapterMode | None = None, **peft: Any) -> RunPlan:
        """Prepare a job that begins with the adapter. peft: fields of the spec."""
        adapter_from = {"jobName": "earlier"} | ({"mode": mode.value} if mode else {})
        spec: dict[str, Any] = {"model": {"uri": (self.folder / "model").as_uri(), "adapterFrom": adapter_from}}
        ctx = data_run.context(self.folder, spec | ({"peft": {"type": "LoRA", **peft}} if peft else {}), attempt=2)
        source = StartingAdapter(uri=self.adapter.as_uri(), digest=digest)
        prepare.run(replace(ctx, config=ctx.config.model_copy(update={"starting_adapter": source})))
        content = (self.folder / "out" / "bot-1a2b3" / ".job" / "plan.json").read_bytes()
        return RunPlan.model_validate_json(content)

    def fault(self, digest: str | None = None, mode: AdapterMode | None = None, **peft: Any) -> StageError:
        """Return what prepare ends with."""
        with pytest.raises(StageError) as caught:
            self.prepare(digest, mode, **peft)
        return caught.value
