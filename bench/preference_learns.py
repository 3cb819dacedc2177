"""Whether SmolLM2-135M learns to prefer right sums: SFT on right and wrong ones, then each method from there.

Both answers to a sum are of one length. What is told is of sums that no job was given, and of the committed adapters as
PEFT loads them: whose right answer the model finds likelier than the wrong one. Wrong answers count more in SFT, as the
base model knows some of the sums.
"""

import argparse
import os
import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench import tables
from bench.workload import local_path, prepare_run, train_run, write_rows
from finetune_api.run import Artifact, StartingAdapter


class _Job(NamedTuple):
    """A job that begins with the adapter of SFT. batch_size: pairs, of KTO single answers, of which it needs more."""

    method: dict[str, Any]
    steps: int = 24
    batch_size: int = 8


_JOBS = {
    "DPO": _Job({"type": "DPO"}),
    "DPO, IPO": _Job({"type": "DPO", "dpo": {"loss": "IPO"}}),
    "DPO, SimPO": _Job({"type": "DPO", "dpo": {"loss": "SimPO"}}),
    "ORPO": _Job({"type": "ORPO", "orpo": {"lambda": 1.0}}),
    "KTO": _Job({"type": "KTO"}, steps=40, batch_size=16),
}
_SFT = _Job({"type": "SFT"}, steps=30, batch_size=16)
_SFT_LEARNING_RATE = 1e-3
_LEARNING_RATE = 3e-4
_HELD_OUT_SUMS = 60
_WRONG_WEIGHT = 1.5


class Sum(NamedTuple):
    """Two numbers to add."""

    a: int
    b: int

    @property
    def prompt(self) -> str:
        return f"{self.a}+{self.b}="

    def answer(self, *, too_much: int = 0) -> str:
        return f"{self.a + self.b + too_much:02d}"


def learns(folder: Path, model_folder: Path, threads: int) -> Iterator[list[str]]:
    """Yield a row of the table for each method; everything is trained below `folder`."""
    sums = [Sum(a, b) for a in range(10, 90) for b in range(1, 10)]
    mixed = random.Random(0).sample(sums, len(sums))
    held_out, taught = mixed[:_HELD_OUT_SUMS], mixed[_HELD_OUT_SUMS:]
    both = [
        {"prompt": each.prompt, "completion": each.answer(too_much=wrong), "weight": _WRONG_WEIGHT if wrong else 1}
        for each in taught
        for wrong in (0, 1)
    ]
    start = _train(folder / "sft", model_folder, threads, _SFT, both)
    before = share_preferred(model_folder, start, held_out)
    pairs = [{"prompt": each.prompt, "chosen": each.answer(), "rejected": each.answer(too_much=1)} for each in taught]
    thumbs = [
        {"prompt": each.prompt, "completion": each.answer(too_much=wrong), "label": wrong == 0}
        for each in taught
        for wrong in (0, 1)
    ]
    adapter = StartingAdapter(uri=start.uri, digest=start.digest)
    for number, (name, job) in enumerate(_JOBS.items()):
        began_s = time.perf_counter()
        rows = thumbs if job.method["type"] == "KTO" else pairs
        made = _train(folder / str(number), model_folder, threads, job, rows, adapter)
        seconds = time.perf_counter() - began_s
        after = share_preferred(model_folder, made, held_out)
        yield [name, f"{job.steps} of {job.batch_size}", f"{before:.2f}", f"{after:.2f}", f"{seconds:.0f}"]


def share_preferred(model_folder: Path, adapter: Artifact, sums: Sequence[Sum]) -> float:
    """Return the share of sums whose right answer the model with the adapter finds likelier than the wrong one."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(local_path(adapter.uri)))

    def likelihood(prompt: str, answer: str) -> float:
        before, tokens = tokenizer(prompt).input_ids, tokenizer(answer).input_ids
        with torch.no_grad():
            logits = model(torch.tensor([before + tokens])).logits[0]
        said = logits.log_softmax(-1)[len(before) - 1 : -1]
        return float(said[range(len(tokens)), tokens].sum())

    right = [likelihood(each.prompt, each.answer()) for each in sums]
    wrong = [likelihood(each.prompt, each.answer(too_much=1)) for each in sums]
    return sum(one > other for one, other in zip(right, wrong, strict=True)) / len(sums)


def _train(
    folder: Path,
    model_folder: Path,
    threads: int,
    job: _Job,
    rows: Sequence[Mapping[str, Any]],
    adapter: StartingAdapter | None = None,
) -> Artifact:
    folder.mkdir(parents=True)
    model: dict[str, Any] = {"uri": model_folder.as_uri()}
    spec = {
        "model": model | ({} if adapter is None else {"adapterFrom": {"uri": adapter.uri}}),
        "method": job.method,
        "datasets": [{"uri": write_rows(folder, rows).as_uri()}],
        "hyperparameters": {
            "maxSteps": job.steps,
            "globalBatchSize": job.batch_size,
            "learningRate": _LEARNING_RATE if adapter else _SFT_LEARNING_RATE,
        },
        "evaluation": {"holdoutFraction": 0},
    }
    made = train_run(folder, prepare_run(folder, spec, threads, adapter=adapter)).artifact
    assert made is not None
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    from demo.assets import ensure_model

    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        rows = list(learns(Path(temporary), ensure_model(), arguments.threads))
    header = ["", "steps, examples", "right answer likelier, before", "after", "s, prepare and train"]
    tables.write(
        "preference-learns",
        "Preference methods learn what is preferred",
        "python -m bench.preference_learns",
        ["torch", "transformers", "peft"],
        "SmolLM2-135M-Instruct learned sums of a number below 90 and a digit by SFT, right answers and wrong ones (one "
        f"too much, as long, counting {_WRONG_WEIGHT} times); then each method from that adapter "
        f"(`model.adapterFrom`), all jobs as a user runs them. Of {_HELD_OUT_SUMS} sums that no job was given, as PEFT "
        "loads the committed adapters, the share whose right answer is likelier than the wrong one:\n\n"
        + tables.table(header, rows),
    )


if __name__ == "__main__":
    main()
