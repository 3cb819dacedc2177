"""How much memory a training pass takes above the loaded model: counted from what autograd keeps. Pure.

A pass keeps, until it has gone backward, what the gradients are made of: inputs of adapted linear layers, of norms and
of activations, query, key, value and output of attention. There is no recomputation. How often each family keeps each
width stands in two tables below; tests/unit/test_memory.py counts it with autograd's own hooks on tiny models, and
`python -m bench.memory` measures the whole at real widths.
"""

from dataclasses import dataclass

from finetune_trainer.families import PACKING_FAMILIES
from finetune_trainer.runplan import ModelFacts

_TILE_BYTES = {"cpu": 32 * 2**20, "cuda": 512 * 2**20}  # of fp32 logits, as in logprobs.py
_MIN_TILE_ROWS = 16
# Of what is kept, the C library's heap holds as much again in pieces: 3 to 31 % in bench/results/memory.md.
_CPU_HEAP_SHARE = 0.16


@dataclass(frozen=True)
class Kept:
    """Bytes that a layer keeps per token and unit of each width."""

    hidden: int
    query: int
    key: int
    mlp: int


# fp32 on the CPU: 4 bytes each. Attention repeats keys and values for all query heads.
_CPU_LLAMA = Kept(hidden=16, query=20, key=0, mlp=16)
_CPU = {
    "cohere": Kept(hidden=12, query=20, key=0, mlp=16),
    "gemma3_text": Kept(hidden=24, query=24, key=4, mlp=16),
    "gpt_neox": Kept(hidden=12, query=20, key=0, mlp=8),
    "olmo2": Kept(hidden=16, query=24, key=4, mlp=16),
    "phi": Kept(hidden=8, query=20, key=0, mlp=20),
    "qwen3": Kept(hidden=16, query=24, key=4, mlp=16),
    "starcoder2": Kept(hidden=16, query=20, key=0, mlp=8),
}
_CPU_AT_MOST = Kept(hidden=24, query=24, key=4, mlp=20)

# bf16 under autocast on a GPU: each adapted layer keeps a bf16 copy of its input, norms keep theirs in fp32, flash
# attention keeps keys and values unrepeated.
_GPU_LLAMA = Kept(hidden=18, query=6, key=4, mlp=8)
_GPU = {
    "gemma3_text": Kept(hidden=26, query=10, key=8, mlp=8),
    "gpt_neox": Kept(hidden=12, query=6, key=4, mlp=4),
    "olmo2": Kept(hidden=18, query=10, key=8, mlp=8),
    "phi": Kept(hidden=12, query=6, key=4, mlp=16),  # its GELU is written out, and autocast takes powers in fp32
    "phi3": Kept(hidden=12, query=6, key=4, mlp=8),
    "qwen3": Kept(hidden=18, query=10, key=8, mlp=8),
    "starcoder2": Kept(hidden=16, query=6, key=4, mlp=4),
}
_GPU_AT_MOST = Kept(hidden=26, query=10, key=8, mlp=10)
# One projection makes query, key and value, and the value that is kept is a view of all three.
_FUSED_ATTENTION = {"gpt_neox", "phi3"}


def kept_bytes(
    model: ModelFacts, family: str, rank: int, tokens: int, longest_row: int, gpu: bool, copied_tokens: int = 0
) -> int:
    """Return what a pass over `tokens` in rows of at most `longest_row` keeps until it goes backward.

    A family that was not counted is taken to keep the most of all that were. copied_tokens: that rows see which share
    their beginnings, and whose keys and values are copied for each.
    """
    widths, size = model.widths, 2 if gpu else 4
    table, llama, most = (_GPU, _GPU_LLAMA, _GPU_AT_MOST) if gpu else (_CPU, _CPU_LLAMA, _CPU_AT_MOST)
    kept = table.get(family, llama if family in PACKING_FAMILIES else most)
    per_token = kept.hidden * model.hidden_size + kept.query * widths.query
    per_token += kept.key * widths.key + kept.mlp * widths.mlp
    per_token += size * rank * len(model.target_modules)
    if family in _FUSED_ATTENTION and (gpu or widths.key == widths.query):
        per_token += size * (widths.query + widths.key)
    masks = 0
    if not gpu and widths.window is not None and longest_row > widths.window:
        masks = 4 * widths.windowed_layers * tokens * longest_row
    copies = copied_tokens * 2 * size * (widths.key if gpu else widths.query)
    return model.layers * (tokens * per_token + copies) + masks


def pass_bytes(
    model: ModelFacts,
    family: str,
    rank: int,
    tokens: int,
    longest_row: int,
    gpu: bool,
    label_tokens: int | None = None,
    *,
    copied_tokens: int = 0,
    kept_rank: int = 0,
) -> int:
    """Return the highest memory above the loaded model: adapter and moments, what is kept, and what is in flight.

    kept_rank: of an adapter that is kept beside the one of `rank` that is trained.

    The model is held in fp32 on the CPU and in bf16 on a GPU. `label_tokens` of the pass are projected by the head;
    None: all of them, as a plan must expect. Measured on an H200: bench/results/memory-gpu.md.
    """
    labels = tokens if label_tokens is None else label_tokens
    adapter = adapter_bytes(model, rank, gpu, kept_rank)
    size = 3 if gpu else 4  # bf16 and, inside LoRA's branch, fp32
    in_flight = tokens * size * (4 * model.widths.mlp + 3 * model.hidden_size)
    head = _head_bytes(model.vocabulary_size, labels, gpu) + labels * 3 * (2 if gpu else 4) * model.hidden_size
    kept = kept_bytes(model, family, rank + kept_rank, tokens, longest_row, gpu, copied_tokens)
    heap = 0 if gpu else int(_CPU_HEAP_SHARE * kept)
    return adapter + kept + heap + max(in_flight, head)


def adapter_bytes(model: ModelFacts, rank: int, gpu: bool, kept_rank: int = 0) -> int:
    """Return what an adapter takes: weight, gradient and two moments, on a GPU a copy in bf16.

    One that is kept beside it has its weights, and both are put together in each layer: on a GPU in bf16."""
    trained, kept = (18 if gpu else 16) * rank, 4 * kept_rank
    together = (2 * kept_rank if gpu else 4 * (rank + kept_rank)) if kept_rank else 0
    return (trained + kept + together) * model.lora_parameters_per_rank


def _head_bytes(vocabulary: int, labels: int, gpu: bool) -> int:
    """Return what the loss head holds: a tile of logits, and as much again while it is summed."""
    rows = max(_MIN_TILE_ROWS, _TILE_BYTES["cuda" if gpu else "cpu"] // (4 * vocabulary))
    return 2 * 4 * min(rows, labels) * vocabulary
