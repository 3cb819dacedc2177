"""How fast a machine trains that nobody has measured: estimates from below, for limits of time alone. Pure."""

from finetune_api.run import RunResources
from finetune_trainer.runplan import ModelFacts

# fp32 on one CPU of an old or busy machine; with SmolLM2-135M 68e9 were measured on AMD Milan (bench/throughput.py).
_FLOPS_PER_CPU_SECOND = 10e9
_FLOPS_PER_GPU_SECOND = 10e12  # bf16 on a small GPU


def slow_tokens_per_second(model: ModelFacts, rank: int, row_tokens: int, resources: RunResources) -> float:
    """Return the tokens per second that even a slow machine with these resources trains on, in rows of `row_tokens`.

    FLOPs per token as in flops.py, with all weights counted as weights of layers.
    """
    adapter_weights = rank * model.lora_parameters_per_rank
    attention = 12 * model.layers * model.hidden_size * row_tokens
    flops = 4 * model.parameters + 6 * adapter_weights + attention
    if resources.gpus:
        return resources.gpus * _FLOPS_PER_GPU_SECOND / flops
    return resources.cpu_count * _FLOPS_PER_CPU_SECOND / flops
