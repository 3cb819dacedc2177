"""The same work for every implementation: real conversations, tokenised once, cut into the same steps."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from finetune_api.job import DatasetFormat, LossOn, MethodType, Schedule
from finetune_trainer.batches import plan_batches
from finetune_trainer.inputs import Rows, StepPlan
from finetune_trainer.runplan import FileRecord, Hyperparameters, LayerWidths, ModelFacts, RunPlan, SplitFiles

BATCH_ROWS = 8
PASS_TOKENS = 1024
RANK = 16
LEARNING_RATE = 2e-4
_NO_FILE = FileRecord(uri="file:///dev/null", size_bytes=0, etag="")
_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Workload:
    """Rows as the data stage writes them, and which of them each step reads."""

    rows: Rows
    steps: list[list[int]]

    def _label_tokens(self, rows: list[int]) -> int:
        return int(sum(self.rows.labels[self.rows.offsets[row] : self.rows.offsets[row + 1]].sum() for row in rows))

    def step_plan(self) -> StepPlan:
        return StepPlan(
            rows=np.concatenate(self.steps).astype(np.int64),
            step_offsets=np.arange(len(self.steps) + 1, dtype=np.int64) * BATCH_ROWS,
            label_tokens=np.array([self._label_tokens(step) for step in self.steps]),
            tokens=np.array([sum(self.rows.lengths(step)) for step in self.steps]),
        )

    def plan(self, model_folder: Path) -> RunPlan:
        """The run plan that the training stage would be given for these steps."""
        split = SplitFiles(
            rows=len(self.rows),
            total_tokens=len(self.rows.tokens),
            label_tokens=int(self.rows.labels.sum()),
            longest_row=max(self.rows.lengths(range(len(self.rows)))),
            tokens=_NO_FILE,
            labels=_NO_FILE,
            offsets=_NO_FILE,
        )
        return RunPlan(
            method=MethodType.SFT,
            loss_on=LossOn.ASSISTANT,
            formats=[DatasetFormat.MESSAGES],
            stop_token_ids=[],
            model=ModelFacts(
                uri=f"file://{model_folder}",
                digest="sha256:" + "0" * 64,
                files=[],
                architecture="LlamaForCausalLM",
                hidden_size=576,
                layers=30,
                vocabulary_size=49152,
                parameters=134_515_008,
                context_length=8192,
                lora_parameters_per_rank=0,
                target_modules=_LINEAR,
                packing_safe=True,
                widths=LayerWidths(query=576, key=192, mlp=1536, window=None, windowed_layers=0),
            ),
            hyperparameters=Hyperparameters(
                learning_rate=LEARNING_RATE,
                warmup_steps=0,
                schedule=Schedule.LINEAR,
                weight_decay=0.0,
                max_grad_norm=1.0,
                seed=42,
                total_steps=len(self.steps),
                global_batch_size=BATCH_ROWS,
                max_sequence_length=split.longest_row,
                micro_batch_tokens=PASS_TOKENS,
                packing=True,
                lora_rank=RANK,
                lora_alpha=32,
                eval_interval_steps=1,
            ),
            train=split,
            held_out=None,
            batches=_NO_FILE,
            sample_prompts=[],
            inputs=[],
            resolved=[],
            train_tokens=split.total_tokens,
            label_tokens=split.label_tokens,
            memory_bytes=0,
            gpu_memory_bytes=None,
            disk_bytes=0,
        )


def write_workload(folder: Path, model_folder: Path, steps: int) -> Workload:
    """Tokenise the demo's conversations with answers as labels; keep the rows of the first `steps` steps."""
    from transformers import AutoTokenizer

    from demo.rows import good_rows

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    opening = tokenizer.encode("<|im_start|>assistant\n")
    tokens: list[int] = []
    labels: list[int] = []
    offsets = [0]
    for row in good_rows():
        ids: list[int] = tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=False)
        learned = [0] * len(ids)
        inside = False
        for place, token in enumerate(ids):
            learned[place] = int(inside)
            if ids[place - len(opening) + 1 : place + 1] == opening:
                inside = True
            elif token == stop:
                inside = False
        tokens += ids
        labels += learned
        offsets.append(len(tokens))
    np.array(tokens, "<u4").tofile(folder / "tokens")
    np.array(labels, "<u1").tofile(folder / "labels")
    np.array(offsets, "<i8").tofile(folder / "offsets")
    rows = _read_rows(folder)
    lengths = np.diff(rows.offsets)
    row_labels = np.add.reduceat(rows.labels.astype(np.int64), rows.offsets[:-1])
    plan = plan_batches(lengths, row_labels, steps * BATCH_ROWS, BATCH_ROWS, seed=42)
    np.save(folder / "steps.npy", plan.rows.reshape(steps, BATCH_ROWS))
    return read_workload(folder)


def read_workload(folder: Path) -> Workload:
    return Workload(_read_rows(folder), np.load(folder / "steps.npy").tolist())


def _read_rows(folder: Path) -> Rows:
    return Rows(
        tokens=np.fromfile(folder / "tokens", "<u4"),
        labels=np.fromfile(folder / "labels", "<u1"),
        offsets=np.fromfile(folder / "offsets", "<i8"),
    )
