"""A whole training run in a folder: tiny random model, tokenizer, prepared arrays and plan, as prepare leaves them."""

import hashlib
import json
import random
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from peft import LoraConfig, get_peft_model
from prometheus_client import CollectorRegistry
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from finetune_api.job import DatasetFormat, FineTuneJobSpec, LossOn, MethodType, Schedule
from finetune_api.layout import ADAPTER, PLAN, PREPARED, join
from finetune_api.names import Stage
from finetune_api.run import CONTRACT_VERSION, JobRef, RunConfig, RunResources, StorageConfig
from finetune_trainer.context import StageContext
from finetune_trainer.data.examples import ARRAYS, Examples
from finetune_trainer.data.widths import layer_widths
from finetune_trainer.families import PACKING_FAMILIES
from finetune_trainer.loop import Stepper
from finetune_trainer.runplan import FileRecord, Hyperparameters, ModelFacts, RunPlan, SamplePrompt, SplitFiles
from finetune_trainer.serve import Reporter
from finetune_trainer.stop import StopFlag
from finetune_trainer.store import Store, open_store
from waiting import PATIENCE_S

VOCABULARY = 320  # 256 bytes and room for special tokens
STOP_ID = 257
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": 256,
    "eos_token_id": STOP_ID,
    "pad_token_id": 258,
}
_NOT_LINEAR_TARGETS = ("lm_head", "embed_out")


def tiny_config(family: str, **changes: Any) -> Any:
    """Configuration of a model of `family` with about 30,000 weights."""
    return AutoConfig.for_model(family, **{**_SMALL, **changes})


def tiny_model(config: Any, seed: int = 0) -> Any:
    """Random fp32 weights, larger than usual so that every part of the model shows in the output."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(0, 0.08)
    return model


def saved_shapes(family: str, **changes: Any) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """The configuration and the shapes of all tensors as save_pretrained writes them, tied heads left out."""
    settings = tiny_config(family, **changes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings)
        tensors = revert_weight_conversion(model, model.state_dict())
    config = json.loads(settings.to_json_string(use_diff=False)) | {"architectures": [type(model).__name__]}
    return config, {name: list(each.shape) for name, each in tensors.items() if name not in model.all_tied_weights_keys}


def linear_modules(model: Any) -> list[str]:
    """Names of all linear layers but the head, as prepare gives them to LoRA."""
    names = {name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, (torch.nn.Linear, Conv1D))}
    return sorted(names - set(_NOT_LINEAR_TARGETS))


def plain_peft(run: "TinyRun") -> Any:
    """The run's model with its adapter as PEFT alone makes them, for TRL to train."""
    hyper = run.plan.hyperparameters
    base = tiny_model(tiny_config("llama"))
    config = LoraConfig(
        r=hyper.lora_rank,
        lora_alpha=hyper.lora_alpha,
        lora_dropout=0.0,
        target_modules=linear_modules(base),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base, config)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and three special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=TEMPLATE
    )


def random_rows(count: int, seed: int, longest: int = 40) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Token ids and labels of rows with something to learn: the answer is the prompt's first byte again and again."""
    generator = np.random.default_rng(seed)
    tokens: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    for _ in range(count):
        prompt = generator.integers(0, 256, generator.integers(2, longest // 2))
        answer = np.full(generator.integers(2, longest // 2), prompt[0])
        row = np.concatenate([prompt, answer, [STOP_ID]])
        tokens.append(row.astype("<u4"))
        labels.append((np.arange(len(row)) >= len(prompt)).astype("u1"))
    return tokens, labels


@dataclass
class TinyRun:
    """Folder, configuration and plan of one run."""

    folder: Path
    config: RunConfig
    plan: RunPlan

    @property
    def store(self) -> Store:  # not kept: a run is sent to child processes, a store cannot be
        return open_store(self.config.storage)

    def local(self, *parts: str) -> Path:
        """A path below the run's folder."""
        return Path(join(self.run_uri, *parts).removeprefix("file://"))

    def adapter_bytes(self) -> bytes:
        """The committed weights."""
        return self.local(ADAPTER, "adapter_model.safetensors").read_bytes()

    @property
    def run_uri(self) -> str:
        return self.config.run_uri

    def write_plan(self, plan: RunPlan) -> None:
        self.plan = plan
        path = self.local(PLAN)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(plan.model_dump_json())


def record_of(store: Store, path: Path) -> FileRecord:
    """What a plan holds of a file."""
    uri = f"file://{path}"
    info = store.head(uri)
    assert info is not None
    digest = "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
    return FileRecord(uri=uri, size_bytes=info.size_bytes, etag=info.etag, sha256=digest)


def _write_split(store: Store, folder: Path, rows: int, seed: int, longest: int) -> SplitFiles:
    tokens, labels = random_rows(rows, seed, longest)
    offsets = np.cumsum([0, *map(len, tokens)])
    folder.mkdir(parents=True, exist_ok=True)
    examples = Examples.of_rows(np.concatenate(tokens), np.concatenate(labels), offsets)
    for name, dtype in ARRAYS.items():
        getattr(examples, name).astype(dtype).tofile(folder / name)
    return SplitFiles(
        examples=rows,
        segments=rows,
        sequences=rows,
        stored_tokens=int(offsets[-1]),
        total_tokens=int(offsets[-1]),
        label_tokens=int(np.concatenate(labels).sum()),
        longest_row=max(map(len, tokens)),
        arrays={name: record_of(store, folder / name) for name in ARRAYS},
    )


def _write_batches(store: Store, folder: Path, split: SplitFiles, steps: int, batch: int, seed: int) -> FileRecord:
    prepared = folder / "train"
    offsets = np.fromfile(prepared / "segment_offsets", "<i8")
    labels = np.add.reduceat(np.fromfile(prepared / "labels", "u1").astype(np.int64), offsets[:-1])
    order: list[int] = []
    generator = random.Random(seed)
    while len(order) < steps * batch:
        order += generator.sample(range(split.examples), split.examples)
    rows = np.array(order[: steps * batch], dtype=np.int64).reshape(steps, batch)
    safetensors.numpy.save_file(
        {
            "examples": rows.reshape(-1),
            "step_offsets": np.arange(steps + 1, dtype=np.int64) * batch,
            "label_tokens": labels[rows].sum(1),
            "denominators": labels[rows].sum(1).astype(np.float64),
            "tokens": np.diff(offsets)[rows].sum(1),
        },
        folder / "batches.safetensors",
    )
    return record_of(store, folder / "batches.safetensors")


def make_run(
    folder: Path,
    *,
    steps: int = 12,
    rows: int = 48,
    batch: int = 4,
    longest: int = 40,
    family: str = "llama",
    model_changes: dict[str, Any] | None = None,
    method: MethodType = MethodType.SFT,
    checkpoint_interval_s: int = 600,
    keep_last: int = 3,
    gpus: int = 0,
    **hyper: Any,
) -> TinyRun:
    """Everything below `folder`: model/, out/ (output.uri), scratch/."""
    storage = StorageConfig()
    store = open_store(storage)
    model_folder = folder / "model"
    model = tiny_model(tiny_config(family, **(model_changes or {})))
    model.save_pretrained(model_folder)
    byte_tokenizer().save_pretrained(model_folder)
    uid = "1a2b3c4d-0000-4000-8000-000000000000"
    run_uri = f"file://{folder}/out/tiny-1a2b3"
    prepared = Path(join(run_uri, PREPARED).removeprefix("file://"))
    train = _write_split(store, prepared / "train", rows, 1, longest)
    held_out = _write_split(store, prepared / "held_out", 10, 2, longest)
    hyperparameters = Hyperparameters.model_validate(
        {
            "learning_rate": 5e-3,
            "warmup_steps": 2,
            "schedule": Schedule.LINEAR,
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "seed": 42,
            "total_steps": steps,
            "global_batch_size": batch,
            "max_sequence_length": longest + 1,
            "micro_batch_tokens": 96,
            "packing": True,
            "lora_rank": 4,
            "lora_alpha": 32,
            "eval_interval_steps": max(1, steps // 3),
            **hyper,
        }
    )
    files = [record_of(store, path) for path in sorted(model_folder.iterdir())]
    linear = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "head" not in n]
    batches = _write_batches(store, prepared, train, steps, batch, hyperparameters.seed)
    prompt = "".join(chr(c) for c in range(65, 75))
    plan = RunPlan(
        method=method,
        loss_on=LossOn.ASSISTANT,
        formats=[DatasetFormat.MESSAGES if method is MethodType.SFT else DatasetFormat.TEXT],
        chat_template=TEMPLATE if method is MethodType.SFT else None,
        stop_token_ids=[STOP_ID],
        model=ModelFacts(
            uri=f"file://{model_folder}",
            digest="sha256:" + "0" * 64,
            files=files,
            architecture=type(model).__name__,
            hidden_size=model.config.hidden_size,
            layers=model.config.num_hidden_layers,
            vocabulary_size=VOCABULARY,
            parameters=sum(p.numel() for p in model.parameters()),
            context_length=256,
            lora_parameters_per_rank=sum(m.in_features + m.out_features for m in linear),
            target_modules=linear_modules(model),
            packing_safe=family in PACKING_FAMILIES,
            widths=layer_widths(model.config.to_dict(), model.config.hidden_size, 2, [[32, 64]]),
        ),
        hyperparameters=hyperparameters,
        train=train,
        held_out=held_out,
        batches=batches,
        sample_prompts=[SamplePrompt(text=prompt[i:], token_ids=list(prompt[i:].encode())) for i in range(3)],
        inputs=[],
        resolved=[],
        train_tokens=int(train.total_tokens),
        label_tokens=int(train.label_tokens),
        memory_bytes=2**30,
        gpu_memory_bytes=None,
        disk_bytes=2**30,
    )
    spec = FineTuneJobSpec.model_validate(
        {
            "model": {"uri": "s3://models/tiny"},
            "method": {"type": method.value},
            "datasets": [{"uri": "s3://data/rows.jsonl"}],
            "checkpoint": {"intervalSeconds": checkpoint_interval_s, "keepLast": keep_last},
            "output": {"uri": "s3://adapters/tiny"},
        }
    )
    config = RunConfig(
        contract_version=CONTRACT_VERSION,
        job=JobRef(name="tiny", namespace="test", uid=uid),
        spec=spec,
        run_uri=run_uri,
        storage=storage,
        resources=RunResources(cpu_count=1, memory_bytes=2**31, disk_bytes=2**31, gpus=gpus),
        work_dir=str(folder / "scratch"),
        http_port=0,
        termination_log=str(folder / "termination-log"),
    )
    run = TinyRun(folder, config, plan)
    run.write_plan(plan)
    return run


def use_model(run: TinyRun, folder: Path) -> None:
    """Plan with the real Llama-like model in `folder` instead of the tiny one; the rows' token ids are in range."""
    config = AutoConfig.from_pretrained(folder)
    facts = run.plan.model.model_copy(
        update={
            "uri": f"file://{folder}",
            "files": [record_of(run.store, path) for path in sorted(folder.iterdir())],
            "vocabulary_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "layers": config.num_hidden_layers,
        }
    )
    run.write_plan(run.plan.model_copy(update={"model": facts}))


def context(run: TinyRun, attempt: int = 1, stage: Stage = Stage.TRAIN) -> StageContext:
    """What `__main__` gives to the stage, without its server and signals."""
    work_dir = Path(run.config.work_dir)
    work_dir.mkdir(parents=True, exist_ok=True)
    return StageContext(
        config=run.config,
        stage=stage,
        attempt=attempt,
        pod_uid=f"pod-{attempt}",
        plan_digest=run.plan.digest(),
        work_dir=work_dir,
        store=run.store,
        reporter=Reporter(stage, attempt, CollectorRegistry()),
    )


def stop_before(monkeypatch: pytest.MonkeyPatch, stop: StopFlag, step: int) -> None:
    """Ask to stop while step `step - 1` runs."""
    original = Stepper.run

    def run_and_stop(self: Stepper, number: int) -> torch.Tensor:
        if number == step - 1:
            stop.set()
        return original(self, number)

    monkeypatch.setattr(Stepper, "run", run_and_stop)


def steps_file(run: TinyRun) -> Path:
    """Holds a byte for each step that the last attempt of `train_in_child` has run."""
    return run.folder / "steps"


def train_in_child(run: TinyRun, attempt: int, most_steps: int | None = None) -> None:
    """One attempt in a process of its own, importable by multiprocessing's children; it ends when killed or done.

    most_steps: so many it runs, and then stands still, so that it is not done before somebody kills it."""
    from finetune_trainer import train, world

    world.bf16_speedup = lambda: 0.2  # as in conftest.py: what it ends with is compared bit by bit
    original, done = Stepper.run, 0

    def run_and_tell(self: Stepper, step: int) -> torch.Tensor:
        nonlocal done
        if done == most_steps:
            threading.Event().wait(PATIENCE_S)
        figures = original(self, step)
        done += 1
        steps_file(run).write_bytes(bytes(done))
        return figures

    Stepper.run = run_and_tell
    train.run(context(run, attempt), StopFlag(60))
