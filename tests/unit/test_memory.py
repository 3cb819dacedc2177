"""The memory of a pass is planned from what autograd really keeps, and the measured table belongs to this plan."""

import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM

from bench import memory as bench_memory
from bench.tables import RESULTS
from finetune_trainer import attention, memory
from finetune_trainer.data.model_facts import adapted_shapes
from finetune_trainer.data.widths import layer_widths
from finetune_trainer.families import PACKING_FAMILIES
from finetune_trainer.inputs import pack_rows
from finetune_trainer.memory import kept_bytes, pass_bytes
from finetune_trainer.model import LanguageModel
from finetune_trainer.runplan import ModelFacts
from tiny_run import tiny_config

TOKENS = 64
RANK = 4
WINDOW = 16
CPU = torch.device("cpu")
_WINDOWED = ("gemma3_text", "mistral", "phi3", "starcoder2")
# On CUDA autocast computes LayerNorm in fp32 and keeps a copy of its input; the CPU's does not. Bytes per token.
_CUDA_LAYER_NORM = {"phi": 2, "gpt_neox": 6, "starcoder2": 4}
# Nor does it take powers in fp32, as CUDA's does in phi's GELU. Bytes per token and unit of the MLP.
_CUDA_POWERS = {"phi": 6}


def _config(family: str, layers: int, **changes: Any) -> Any:
    sizes = {"hidden_size": 96, "intermediate_size": 256, "head_dim": 32}
    if family in _WINDOWED:
        sizes["sliding_window"] = WINDOW
    if family == "gpt_neox":  # knows neither
        sizes["head_dim"], changes = 24, {"num_key_value_heads": 4}
    return tiny_config(family, **{**sizes, "num_hidden_layers": layers, **changes})


def _facts(config: Any) -> ModelFacts:
    with torch.device("meta"):
        causal = AutoModelForCausalLM.from_config(config)
    linear = adapted_shapes({name: list(w.shape) for name, w in causal.named_parameters()}, causal.config.model_type)
    shapes = [shape for _, shape in linear.values()]
    return ModelFacts(
        uri="s3://m/x",
        digest="sha256:" + "0" * 64,
        files=[],
        architecture="X",
        hidden_size=config.hidden_size,
        layers=config.num_hidden_layers,
        vocabulary_size=config.vocab_size,
        parameters=1,
        context_length=256,
        lora_parameters_per_rank=sum(map(sum, shapes)),
        target_modules=sorted({module for module, _ in linear.values()}),
        packing_safe=True,
        widths=layer_widths(config.to_dict(), config.hidden_size, config.num_hidden_layers, shapes),
    )


class _KeepsLikeFlash(torch.autograd.Function):
    """Keeps what flash attention keeps."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.zeros_like(q.transpose(1, 2)).contiguous()
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        raise NotImplementedError


def _stand_in(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **other: Any) -> tuple[Any, None]:
    return _KeepsLikeFlash.apply(q, k, v), None


@contextmanager
def _counting(kept: dict[int, int], model: torch.nn.Module) -> Generator[None]:
    """Add the bytes of every storage that autograd keeps, once; not those of the model itself."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    alive: list[Tensor] = []  # so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield


def _counted_bytes(
    config: Any, facts: ModelFacts, gpu: bool, lengths: Sequence[int] = (TOKENS,), shared: int = 0
) -> int:
    """Return what a pass over rows of these lengths keeps, all of which begin with the same tokens."""
    dtype = torch.bfloat16 if gpu else torch.float32
    causal = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    AttentionInterface.register("stand_in", _stand_in)  # type: ignore[arg-type]
    attention.register()
    causal.set_attn_implementation("stand_in" if gpu else attention.PACKED)
    get_peft_model(causal, LoraConfig(r=RANK, target_modules=facts.target_modules, task_type="CAUSAL_LM"))
    lm = LanguageModel(causal, CPU, packed=True, logit_scale=1.0)
    row = np.random.default_rng(0).integers(0, config.vocab_size, max(lengths))
    behind = [shared if place else 0 for place in range(len(lengths))]
    labels = [np.arange(length) >= max(1, begin) for length, begin in zip(lengths, behind, strict=True)]
    kept: dict[int, int] = {}
    with _counting(kept, causal):
        lm.nll_sum(pack_rows([row[:length] for length in lengths], labels, CPU, shared=behind))
    return sum(kept.values())


@pytest.mark.parametrize("key_heads", [2, 4])
@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("family", sorted(PACKING_FAMILIES))
def test_a_layer_keeps_what_the_plan_counts(family: str, gpu: bool, key_heads: int) -> None:
    """The difference of two depths is what the layers keep, without embeddings, head and the last norm."""
    counted, planned = [], []
    for layers in (3, 1):
        config = _config(family, layers, num_key_value_heads=key_heads)
        facts = _facts(config)
        counted.append(_counted_bytes(config, facts, gpu))
        if gpu:
            counted[-1] += _CUDA_LAYER_NORM.get(family, 0) * TOKENS * config.hidden_size * layers
            counted[-1] += _CUDA_POWERS.get(family, 0) * TOKENS * config.intermediate_size * layers
            counted[-1] -= 2 * RANK * facts.lora_parameters_per_rank  # autocast's copies, planned with the adapter
        planned.append(kept_bytes(facts, family, RANK, TOKENS, TOKENS, gpu))
    assert planned[0] - planned[1] == pytest.approx(counted[0] - counted[1], rel=0.02)


@pytest.mark.parametrize("family", sorted(PACKING_FAMILIES))
def test_what_is_copied_for_rows_that_share_their_beginning_is_in_the_plan(family: str) -> None:
    """The plan takes all rows to be copied, where the first of them is not."""
    lengths, shared = (TOKENS, TOKENS - 8), TOKENS - 16
    tokens = sum(lengths) - shared
    counted, planned, alone = [], [], []
    for layers in (3, 1):
        config = _config(family, layers)
        facts = _facts(config)
        counted.append(_counted_bytes(config, facts, gpu=False, lengths=lengths, shared=shared))
        planned.append(kept_bytes(facts, family, RANK, tokens, TOKENS, gpu=False, copied_tokens=sum(lengths)))
        alone.append(kept_bytes(facts, family, RANK, tokens, TOKENS, gpu=False))
    assert alone[0] - alone[1] < counted[0] - counted[1] <= planned[0] - planned[1]
    assert planned[0] - planned[1] < 1.25 * (counted[0] - counted[1])


def test_a_wide_mlp_needs_its_memory() -> None:
    """Gemma's MLP is 8 times as wide as the model where Llama's is 3.5 to 4 times: one constant per width is wrong."""
    llama = bench_memory.facts(bench_memory.CASES["Llama-3.2-1B"])
    wide = llama.model_copy(update={"widths": llama.widths.model_copy(update={"mlp": 8 * llama.hidden_size})})
    narrow_bytes, wide_bytes = (pass_bytes(each, "llama", 16, 2048, 2048, gpu=False) for each in (llama, wide))
    extra = 4 * llama.hidden_size * 16 * 2048 * llama.layers  # 4 fp32 values per token for each unit of MLP
    assert wide_bytes - narrow_bytes > extra
    assert wide_bytes > 1.6 * narrow_bytes


def test_a_family_that_was_not_counted_is_planned_with_the_most_of_all() -> None:
    facts = _facts(_config("llama", 2))
    for gpu in (False, True):
        unknown = kept_bytes(facts, "a-new-family", RANK, TOKENS, TOKENS, gpu)
        assert unknown >= max(
            kept_bytes(facts, each, RANK, TOKENS, TOKENS, gpu) for each in ("qwen3", "phi", "gemma3_text")
        )


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 300}, (64, 16, 300, None, 0)),
        ({"num_attention_heads": 8, "head_dim": 16, "intermediate_size": 300}, (128, 128, 300, None, 0)),
        ({"n_head": 8, "multi_query": True, "n_inner": 256}, (64, 8, 256, None, 0)),
        ({}, (64, 64, 200, None, 0)),
        ({"num_attention_heads": "8", "intermediate_size": -1, "sliding_window": True}, (64, 64, 200, None, 0)),
        ({"intermediate_size": [100, 300], "sliding_window": 7}, (64, 64, 300, 7, 2)),
        ({"sliding_window": 7, "use_sliding_window": False}, (64, 64, 200, None, 0)),
        ({"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}, (64, 64, 200, 7, 1)),
        (
            {"intermediate_size": 300, "moe_intermediate_size": 90, "num_experts_per_tok": 4, "n_shared_experts": 1},
            (64, 64, 450, None, 0),
        ),
    ],
)
def test_widths_come_from_the_configuration_or_else_from_the_weights(config: dict[str, Any], expected: Any) -> None:
    found = layer_widths(config, hidden_size=64, layers=2, weights=[[64, 64], [200, 64]])
    assert (found.query, found.key, found.mlp, found.window, found.windowed_layers) == expected


def test_the_tile_of_the_plan_is_the_tile_of_the_head() -> None:
    from finetune_trainer import logprobs

    assert memory._TILE_BYTES == logprobs._TILE_BYTES  # pyright: ignore[reportPrivateUsage]


@pytest.mark.parametrize("table", sorted(RESULTS.glob("memory*.md")), ids=lambda table: table.name)
def test_a_measured_table_stands_beside_todays_plan(table: Path) -> None:
    """`python -m bench.memory` makes it anew; of no case may the plan be off by more than 15 %."""
    device = "cuda" if table.stem == "memory-gpu" else "cpu"
    lines = re.findall(r"^\| (.+?) \|.*\| ([\d,]+) \| ([\d,]+) \| (\S+) % \|$", table.read_text(), re.MULTILINE)
    assert [name for name, *_ in lines] == list(bench_memory.CASES)
    for name, planned, measured, error in lines:
        measured_bytes = int(measured.replace(",", "")) * bench_memory.MIB
        expected = bench_memory.row(name, bench_memory.CASES[name], device, measured_bytes)
        assert [planned, f"{error} %"] == [expected[-3], expected[-1]], name
        assert abs(float(error)) <= 15, name
