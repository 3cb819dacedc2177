"""A run tells the loss of new held-out rows from that of replayed ones."""

import json
from pathlib import Path

import numpy as np
import pytest

from finetune_api.layout import PREPARED, join
from finetune_api.reasons import Fault
from finetune_trainer import train
from finetune_trainer.runplan import FileRange
from finetune_trainer.stop import StopFlag
from tiny_run import context, make_run, record_of


def test_what_was_forgotten_stands_beside_the_loss_before_and_after(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=2)
    assert run.plan.held_out is not None
    path = Path(join(run.run_uri, PREPARED, "held_out", "file").removeprefix("file://"))
    np.array([0] * 6 + [1] * 4, dtype="<u4").tofile(path)
    arrays = {**run.plan.held_out.arrays, "file": record_of(run.store, path)}
    held_out = run.plan.held_out.model_copy(update={"arrays": arrays})
    replayed = [FileRange(first=1, end=2)]
    run.write_plan(run.plan.model_copy(update={"held_out": held_out, "replayed": replayed}))
    result = train.run(context(run), StopFlag(60))
    assert result.fault is Fault.COMMITTED
    assert result.artifact is not None
    folder = Path(result.artifact.uri.removeprefix("file://"))
    before, *_, after = json.loads((folder / "eval.json").read_text())["held_out"]
    for found in (before, after):
        losses = found["figures"]["new_loss"], found["figures"]["replayed_loss"]
        assert min(losses) <= found["loss"] <= max(losses)
    assert before["figures"]["new_loss"] != pytest.approx(before["figures"]["replayed_loss"])
    assert "| loss on those that are replayed |" in (folder / "README.md").read_text()
