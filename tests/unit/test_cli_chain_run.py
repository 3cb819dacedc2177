"""`finetune run` without a cluster: all preference methods, and a chain whose jobs name the one before by its URI."""

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from e2e_assets import chat_rows, jsonl, model_files, pair_rows, text_rows, thumb_rows
from likely_answers import share_preferred

pytestmark = pytest.mark.timeout(900)

DEADLINE_S = 600
ROWS = {"texts": text_rows(60), "chats": chat_rows(60), "pairs": pair_rows(120), "thumbs": thumb_rows(120)}


@dataclass(frozen=True)
class Site:
    """A folder with a base model and rows, in which jobs are run."""

    folder: Path

    def start(self, name: str, method: str, rows: str, earlier: Path | None = None) -> subprocess.Popen[str]:
        """Begin a job as a person would at a terminal. earlier: the adapter that it goes on with."""
        model: dict[str, Any] = {"uri": (self.folder / "model").as_uri()}
        peft: dict[str, Any] = {"type": "LoRA"}
        if earlier is None:
            peft |= {"rank": 4}
        else:
            model |= {"adapterFrom": {"uri": earlier.as_uri()}}
        spec = {
            "model": model,
            "method": {"type": method},
            "peft": peft,
            "datasets": [{"uri": (self.folder / rows).as_uri() + "/"}],
            "hyperparameters": {"maxSteps": 24, "globalBatchSize": 8, "learningRate": 2e-2},
            "evaluation": {"holdoutFraction": 0.2},
            "resources": {"cpu": 1},  # as several jobs run beside one another
            "output": {"uri": (self.folder / "out" / name).as_uri()},
        }
        job = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": name}, "spec": spec}
        file = self.folder / f"{name}.yaml"
        file.write_text(json.dumps(job))
        return subprocess.Popen(
            [str(Path(sys.executable).with_name("finetune")), "run", str(file)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | {"COLUMNS": "200"},
            text=True,
        )

    def ended(self, name: str, run: subprocess.Popen[str]) -> Path:
        """Wait for a job; returns the folder of its adapter, which is the one that it has told."""
        said, _ = run.communicate(timeout=DEADLINE_S)
        assert run.returncode == 0, said
        (adapter,) = (self.folder / "out" / name).glob(f"{name}-*/adapter")
        assert adapter.as_uri() in said
        return adapter


@pytest.fixture
def site(tmp_path: Path) -> Site:
    (tmp_path / "model").mkdir()
    for name, content in model_files().items():
        (tmp_path / "model" / name).write_bytes(content)
    for name, rows in ROWS.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.jsonl").write_bytes(jsonl(rows))
    return Site(tmp_path)


def test_every_method_and_a_chain_end_with_adapters_that_prefer_what_people_preferred(site: Site):
    with ExitStack() as started:

        def run(*arguments: Any) -> subprocess.Popen[str]:
            process = started.enter_context(site.start(*arguments))
            started.callback(process.kill)
            return process

        alone = {"orpo": run("orpo", "ORPO", "pairs"), "kto": run("kto", "KTO", "thumbs")}
        chain: list[Path] = []
        for name, method, rows in (("read", "CPT", "texts"), ("answer", "SFT", "chats"), ("prefer", "DPO", "pairs")):
            chain.append(site.ended(name, run(name, method, rows, chain[-1] if chain else None)))
        adapters = [chain[-1], *(site.ended(name, process) for name, process in alone.items())]
    for earlier, adapter in pairwise(chain):
        begun_with = json.loads((adapter / "manifest.json").read_bytes())["starting_adapter"]
        assert begun_with["uri"].rstrip("/") == earlier.as_uri()
    for adapter in adapters:
        start = json.loads((adapter / "eval.json").read_bytes())["held_out"][0]["figures"]
        assert start.get("reward_margin", 0) == pytest.approx(0, abs=1e-3), "it is compared with what it began with"
        assert share_preferred(site.folder / "model", adapter, pair_rows(30, seed=7)) >= 0.9, adapter
