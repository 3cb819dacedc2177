"""The trainers that `bench.preference` compares: ours, a plain loop, and TRL's, on the same tokens.

Each begins with the same adapter.

All in fp32 without recomputation, as TRL's pages on speed say for a machine whose memory suffices.
"""

import json
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from bench.preference_work import BETA, LEARNING_RATE, PairIds, PreferenceWork
from bench.trainers import step_clock
from bench.workload import RANK, local_path

_SAMPLED_IN_ORDER = "sequential"


@dataclass
class Timed:
    """What one run took, in seconds, and its figures of every step."""

    reference_s: float = 0.0  # before the first step, for all of them
    step_s: list[float] = field(default_factory=list[float])
    losses: list[float] = field(default_factory=list[float])
    log_odds: list[float] = field(default_factory=list[float])  # of ORPO


def ours(work: PreferenceWork) -> Timed:
    """The train stage as its container runs it; it leaves behind the adapter that all begin with."""
    from safetensors.torch import save_file

    from finetune_api.layout import METRICS, join
    from finetune_trainer import train, world
    from finetune_trainer.__main__ import main
    from finetune_trainer.model import adapter_parameters

    timed = Timed()
    add_adapter, reference_of = train.add_adapter, train.reference_of

    def add_and_keep(*arguments: Any) -> Any:
        adapted = add_adapter(*arguments)
        save_file({name: p.detach().contiguous() for name, p in adapter_parameters(adapted).items()}, work.start_file)
        return adapted

    def time_reference(*arguments: Any) -> Any:
        with _adding_seconds(timed):
            return reference_of(*arguments)

    world.bf16_speedup = lambda: 0.0  # fp32, however fast this CPU multiplies in bf16
    train.add_adapter, train.reference_of = add_and_keep, time_reference
    result = work.run.folder / "result.json"
    arguments = [
        "train",
        "--config",
        str(work.run.config_file),
        "--attempt",
        "1",
        "--plan-digest",
        work.run.plan_digest,
    ]
    if main([*arguments, "--result", str(result)]) != 0:
        raise SystemExit(f"our train stage ended as {result.read_text()}")
    rows = [json.loads(line) for line in local_path(join(work.run.config.run_uri, METRICS)).read_text().splitlines()]
    for row in rows:
        if "loss" in row:
            timed.step_s.append(row["seconds"])
            timed.losses.append(row["loss"])
            timed.log_odds.append(row.get("log_odds_ratio", 0.0))
    return timed


def plain(work: PreferenceWork) -> Timed:
    """DPO against transformers and PEFT alone: both answers of a step's pairs in one batch, logits of answers alone."""
    import torch

    model = _model(work)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    steps = work.pairs
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, len(steps))
    timed = Timed()
    references: list[Any] = []
    with _adding_seconds(timed), torch.no_grad(), model.disable_adapter():
        references = [_logprobs(model, pairs) for pairs in steps]
    for pairs, reference in zip(steps, references, strict=True):
        began_s = time.perf_counter()
        ratios = _logprobs(model, pairs) - reference
        margins = BETA * (ratios[: len(pairs)] - ratios[len(pairs) :])
        loss = -torch.nn.functional.logsigmoid(margins).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        timed.losses.append(float(loss))
        timed.step_s.append(time.perf_counter() - began_s)
    return timed


def _logprobs(model: Any, pairs: Sequence[PairIds]) -> Any:
    """(2 pairs,) log-probabilities of the chosen answers, then of the rejected ones; padded at the left."""
    import torch

    rows = [(each.prompt, each.chosen) for each in pairs] + [(each.prompt, each.rejected) for each in pairs]
    longest, kept = (max(lengths) for lengths in ([len(p) + len(a) for p, a in rows], [len(a) for _, a in rows]))
    ids = torch.tensor([[0] * (longest - len(p) - len(a)) + p + a for p, a in rows])
    mask = torch.tensor([[0] * (longest - len(p) - len(a)) + [1] * (len(p) + len(a)) for p, a in rows])
    answer = torch.tensor([[0] * (kept - len(a)) + [1] * len(a) for _, a in rows])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=kept + 1).logits[:, :-1]
    tokens = logits.log_softmax(-1).gather(2, ids[:, -kept:, None])[..., 0]
    return (tokens * answer).sum(1)


def trl_dpo(work: PreferenceWork, *, precompute: bool) -> Timed:
    """TRL's DPOTrainer."""
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    rows = [
        {"prompt_ids": each.prompt, "chosen_ids": each.chosen, "rejected_ids": each.rejected}
        for each in chain.from_iterable(work.pairs)
    ]
    make: Any = DPOConfig
    config = make(**_settings(work), max_length=None, beta=BETA, precompute_ref_log_probs=precompute)
    return _trained(work, DPOTrainer, config, rows)


def trl_kto(work: PreferenceWork) -> Timed:
    """TRL's KTOTrainer, which compares each prompt with the other answer that our plan chose."""
    from trl.trainer.kto_config import KTOConfig
    from trl.trainer.kto_trainer import KTOTrainer

    rows = [
        {
            "prompt_ids": each.prompt,
            "completion_ids": each.answer,
            "KL_completion_ids": each.other,
            "label": each.good,
        }
        for each in chain.from_iterable(work.thumbs)
    ]
    make: Any = KTOConfig
    weights = {"desirable_weight": 1.0, "undesirable_weight": 1.0}
    return _trained(work, KTOTrainer, make(**_settings(work), max_length=None, beta=BETA, **weights), rows)


def trl_orpo(work: PreferenceWork) -> Timed:
    """TRL's ORPOTrainer, whose likelihood covers the prompt too."""
    from trl.experimental.orpo.orpo_config import ORPOConfig
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    def tokenized(_: Any, row: Any, *__: Any) -> dict[str, Any]:
        """Return the tokens that are there, as TRL's own function lays them out."""
        found: dict[str, Any] = {}
        for side in ("chosen", "rejected"):
            ids, prompt = row["prompt_ids"] + row[f"{side}_ids"], len(row["prompt_ids"])
            found[f"{side}_input_ids"], found[f"{side}_attention_mask"] = ids, [1] * len(ids)
            found[f"{side}_labels"] = [-100] * prompt + ids[prompt:]
        return found

    rows = [
        {
            "prompt": "",
            "chosen": "",
            "rejected": "",
            "prompt_ids": each.prompt,
            "chosen_ids": each.chosen,
            "rejected_ids": each.rejected,
        }
        for each in chain.from_iterable(work.pairs)
    ]
    trainer: Any = ORPOTrainer
    trainer.tokenize_row = tokenized
    make: Any = ORPOConfig
    return _trained(work, trainer, make(**_settings(work), max_length=4096, beta=BETA), rows)


def _settings(work: PreferenceWork) -> dict[str, Any]:
    return {
        "output_dir": str(work.run.folder / "trl"),
        "per_device_train_batch_size": work.case.batch,
        "num_train_epochs": 1,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "linear",
        "train_sampling_strategy": _SAMPLED_IN_ORDER,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "report_to": [],
    }


def _trained(work: PreferenceWork, trainer_class: Any, config: Any, rows: list[dict[str, Any]]) -> Timed:
    """Train as a trainer of TRL does; what it computes of the reference before is timed by its own function for it."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    timed = Timed()

    def note(logs: dict[str, float]) -> None:
        timed.losses.append(logs["loss"])
        timed.log_odds.append(logs.get("log_odds_chosen", 0.0))

    def as_it_is(_: Any, dataset: Any, *__: Any, **___: Any) -> Any:
        return dataset

    precompute: Callable[..., Any] | None = getattr(trainer_class, "_precompute_ref_logps", None)

    def time_precompute(*arguments: Any, **named: Any) -> Any:
        assert precompute is not None
        with _adding_seconds(timed):
            return precompute(*arguments, **named)

    trainer_class._prepare_dataset = as_it_is
    if precompute is not None:
        trainer_class._precompute_ref_logps = time_precompute
    trainer = trainer_class(
        model=_model(work),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(_model_folder(work)),
        callbacks=[step_clock(timed.step_s, note)],
    )
    trainer.train()
    return timed


def _model_folder(work: PreferenceWork) -> Path:
    return local_path(work.run.config.spec.model.uri)


def _model(work: PreferenceWork) -> Any:
    """Return the model as PEFT makes it, with the adapter that ours began with."""
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    base: Any = AutoModelForCausalLM.from_pretrained(_model_folder(work), dtype=torch.float32)
    alpha = work.run.plan["hyperparameters"]["lora_alpha"]
    lora = LoraConfig(r=RANK, lora_alpha=alpha, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(base, lora)
    start = load_file(work.start_file)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if trained.keys() != start.keys():
        raise SystemExit("PEFT adapts other layers than ours")
    for name, parameter in trained.items():
        parameter.data.copy_(start[name])
    return model


@contextmanager
def _adding_seconds(timed: Timed) -> Generator[None]:
    began_s = time.perf_counter()
    yield
    timed.reference_s += time.perf_counter() - began_s
