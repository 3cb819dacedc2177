"""A base model without torch, data files in a folder, and one prepare stage over them."""

import gzip
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import safetensors.numpy
from prometheus_client import CollectorRegistry
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from finetune_api.job import FineTuneJobSpec
from finetune_api.names import Stage
from finetune_api.run import CONTRACT_VERSION, JobRef, RunConfig, RunResources, RunResult, StorageConfig
from finetune_trainer import own_ids, prepare
from finetune_trainer.context import StageContext
from finetune_trainer.data import structure
from finetune_trainer.data.answers import everything, learnable
from finetune_trainer.data.examples import Examples, open_examples
from finetune_trainer.data.renders import Chat
from finetune_trainer.data.same_ids import OwnIds
from finetune_trainer.data.sequences import RenderedSequence
from finetune_trainer.data.stops import Ends
from finetune_trainer.data.structure import LoadReport
from finetune_trainer.data.template import ChatTemplate
from finetune_trainer.runplan import RunPlan, SplitFiles
from finetune_trainer.serve import Reporter
from finetune_trainer.store import open_store

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
HIDDEN, INNER, LAYERS = 32, 48, 2
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 12345\n"
GIB = 2**30
ENDS = Ends(("<|im_end|>", "</s>"))


def byte_bpe(vocabulary_size: int = 600) -> Tokenizer:
    """A small byte-level BPE with merges over words and newlines."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(token, normalized=False) for token in SPECIAL],
        show_progress=False,
    )
    words = ["the quick brown fox jumps over the lazy dog", "user assistant system question answer", "\n\n\n a\nb"]
    tokenizer.train_from_iterator(words * 20, trainer)
    return tokenizer


CHILD = structure.load_without_values


@cache
def judged(request: bytes) -> LoadReport:
    """What the child process says, asked once, and not where torch, which takes it seconds, is there already."""
    if "torch" not in sys.modules:
        return CHILD(request)
    from finetune_trainer.dry_load import judge

    asked = json.loads(request)
    del asked["memory_bytes"]  # of a process of its own
    return judge(**asked)


structure.load_without_values = judged


def use_own_process() -> None:
    """Have conversations compared in a process of its own again, as jobs do."""
    OwnIds.begin, OwnIds.ask = _OWN_PROCESS


_OWN_PROCESS = OwnIds.begin, OwnIds.ask


def _asked_here(self: OwnIds, request: bytes, files: Sequence[bytes]) -> bytes | None:
    """What that process says, without its start, which takes seconds; None where it would end."""
    if b'"plain":true' in request:
        return own_ids.judged(request, *files)
    with suppress(Exception):
        return own_ids.judged(request, *files)
    return None


OwnIds.begin, OwnIds.ask = lambda self: None, _asked_here


def llama_weights(vocabulary: int) -> dict[str, Any]:
    """All tensors of the model that `write_model` describes, its head being tied to the embeddings."""
    shapes = {"model.embed_tokens": (vocabulary, HIDDEN), "model.norm": (HIDDEN,)}
    for layer in range(LAYERS):
        names = {
            **dict.fromkeys((f"self_attn.{name}_proj" for name in "qkvo"), (HIDDEN, HIDDEN)),
            **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (INNER, HIDDEN)),
            "mlp.down_proj": (HIDDEN, INNER),
            **dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (HIDDEN,)),
        }
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in names.items()}
    return {f"{name}.weight": np.zeros(shape, dtype=np.float32) for name, shape in shapes.items()}


def write_model(
    folder: Path,
    template: str | None = CHATML,
    tokenizer: Tokenizer | None = None,
    config: dict[str, Any] | None = None,
    tokenizer_config: dict[str, Any] | None = None,
) -> str:
    """A tiny Llama in Hugging Face layout; returns its URI."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer or byte_bpe()
    vocabulary = tokenizer.get_vocab_size(with_added_tokens=True)
    settings: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "tie_word_embeddings": True,
        "vocab_size": vocabulary,
        "max_position_embeddings": 512,
        **(config or {}),
    }
    (folder / "config.json").write_text(json.dumps(settings))
    named = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    if template is not None:
        named["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(named | (tokenizer_config or {})))
    tokenizer.save(str(folder / "tokenizer.json"))
    weights = llama_weights(settings["vocab_size"])
    safetensors.numpy.save_file(weights, folder / "model.safetensors")
    return folder.as_uri()


def chat(question: str, answer: str, *more: str) -> dict[str, Any]:
    """A conversation that alternates between user and assistant."""
    roles = ("user", "assistant")
    texts = (question, answer, *more)
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]}


def chats(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [chat(f"what is {i} and one?", f"the answer is {i + 1}.") for i in range(start, start + count)]


def prose(seed: int, words: int) -> str:
    """Return sentences of made-up words: no two seeds give texts that are alike, and no rule of quality drops one."""
    draw = Random(seed)
    spelled = [
        "".join(draw.choice("bdfklmnrst") + draw.choice("aeiou") for _ in range(draw.randint(2, 4)))
        for _ in range(words)
    ]
    return " ".join(f"{word}." if at % 9 == 8 else word for at, word in enumerate(spelled))


def every_answer(messages: Sequence[dict[str, Any]], learn_from: int = 0) -> tuple[bool, ...]:
    """Return what is learned where every answer from message `learn_from` on is."""
    return tuple(index >= learn_from and each["role"] == "assistant" for index, each in enumerate(messages))


def one_sequence(
    template: ChatTemplate, messages: list[dict[str, Any]], learned: Sequence[bool], learn_all: bool = False
) -> RenderedSequence:
    """Return the text that carries all answers of a conversation, and where they are in it."""
    chat = Chat(messages, learned)
    if learn_all:
        return everything(template, chat)
    (sequence,) = learnable(template, chat, ENDS).sequences
    return sequence


def jsonl(rows: Iterable[object]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def gz(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)


@dataclass(frozen=True)
class Prepared:
    """What a prepare stage returned and left in the run's folder."""

    result: RunResult
    plan: RunPlan
    report: dict[str, Any]
    decisions: list[dict[str, Any]]

    def rows(self, split: SplitFiles) -> list[tuple[list[int], list[int]]]:
        """(token ids, labels) of each flat sequence."""
        examples = self.examples(split)
        runs = [examples.read(sequence) for sequence in examples.sequences_of(range(len(examples)))]
        return [(run.tokens.tolist(), run.labels.tolist()) for run in runs]

    def examples(self, split: SplitFiles) -> Examples:
        """What train reads."""
        return open_examples(Path(split.arrays["tokens"].uri.removeprefix("file://")).parent)

    @property
    def train(self) -> list[tuple[list[int], list[int]]]:
        return self.rows(self.plan.train)


def context(tmp: Path, spec: dict[str, Any], attempt: int = 1, memory_bytes: int = 16 * GIB) -> StageContext:
    """A prepare stage in `tmp`: data in data/, the model in model/ unless the spec says otherwise."""
    if not (tmp / "model").exists():
        write_model(tmp / "model")
    values: dict[str, Any] = {
        "model": {"uri": (tmp / "model").as_uri()},
        "method": {"type": "SFT"},
        "datasets": [{"uri": (tmp / "data").as_uri() + "/"}],
        "output": {"uri": (tmp / "out").as_uri()},
        **spec,
    }
    config = RunConfig(
        contract_version=CONTRACT_VERSION,
        job=JobRef(name="bot", namespace="default", uid="1a2b3c4d"),
        spec=FineTuneJobSpec.model_validate(values),
        run_uri=(tmp / "out" / "bot-1a2b3").as_uri(),
        storage=StorageConfig(),
        resources=RunResources(cpu_count=2, memory_bytes=memory_bytes, disk_bytes=10 * GIB, gpus=0),
        work_dir=str(tmp / "work"),
    )
    work_dir = tmp / "work" / str(attempt)
    work_dir.mkdir(parents=True, exist_ok=True)
    return StageContext(
        config=config,
        stage=Stage.PREPARE,
        attempt=attempt,
        pod_uid=f"pod-{attempt}",
        plan_digest=None,
        work_dir=work_dir,
        store=open_store(config.storage),
        reporter=Reporter(Stage.PREPARE, attempt, CollectorRegistry()),
    )


def train_context(ctx: StageContext, plan_digest: str, work_dir: Path) -> StageContext:
    """Return the train stage of a job, once prepare has written that plan. work_dir: a folder that is made for it."""
    work_dir.mkdir()
    reporter = Reporter(Stage.TRAIN, ctx.attempt, CollectorRegistry())
    return replace(ctx, stage=Stage.TRAIN, plan_digest=plan_digest, reporter=reporter, work_dir=work_dir)


def put(tmp: Path, **files: bytes) -> None:
    """Write data files; `a_jsonl` becomes data/a.jsonl and `a_jsonl_gz` data/a.jsonl.gz."""
    folder = tmp / "data"
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("_", ".")).write_bytes(content)


def prepare_run(tmp: Path, spec: dict[str, Any] | None = None, attempt: int = 1) -> Prepared:
    """Run the stage and read back what it wrote."""
    ctx = context(tmp, spec or {}, attempt)
    return read_back(tmp, prepare.run(ctx))


def read_back(tmp: Path, result: RunResult) -> Prepared:
    """Return what a stage in `tmp` wrote."""
    folder = tmp / "out" / "bot-1a2b3" / ".job"
    return Prepared(
        result=result,
        plan=RunPlan.model_validate_json((folder / "plan.json").read_bytes()),
        report=json.loads((folder / "report.json").read_bytes()),
        decisions=[json.loads(line) for line in (folder / "decisions.jsonl").read_bytes().splitlines()],
    )


def accounted(prepared: Prepared) -> None:
    """rows in = used + held out + dropped, per file and in all; one decision per held-out or dropped row."""
    data = prepared.result.data
    assert data is not None
    for file in prepared.report["files"]:
        assert file["rows_in"] == file["rows_used"] + file["rows_held_out"] + sum(file["dropped"].values())
    assert data.rows_in == data.rows_used + data.rows_held_out + sum(each.rows for each in data.dropped)
    assert data.rows_in == sum(file["rows_in"] for file in prepared.report["files"])
    actions = Counter(decision["action"] for decision in prepared.decisions)
    assert actions["drop"] == sum(each.rows for each in data.dropped)
    assert actions["hold_out"] == data.rows_held_out
    assert actions.keys() <= {"drop", "hold_out", "split", "change"}
    changed = Counter(
        each["reason"] for each in prepared.decisions if each["stage"] == "read" and each["action"] == "change"
    )
    assert changed == prepared.report["changed"]
