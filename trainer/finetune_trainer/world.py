"""Where training runs: the process among its peers, its device, the device's precision and memory.

The one home of accelerate, and of those settings of torch that hold for the whole process.
"""

import logging
import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from accelerate import PartialState
from accelerate.utils.environment import get_cpu_distributed_information
from accelerate.utils.memory import clear_device_cache

from finetune_api.errors import StageError
from finetune_api.reasons import Fault
from finetune_api.run import RunResources

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class World:
    """This process's place in the run."""

    device: torch.device
    rank: int  # from 0; rank 0 owns the store
    processes: int


def join(resources: RunResources) -> World:
    """Take this process's place: find the device, fix the number of threads, make the CPU's results repeatable.

    Raises GPU_FAULT without the GPU that was granted, CONFIG_UNREADABLE when a launcher started several processes.
    """
    processes = get_cpu_distributed_information().world_size
    if processes != 1:  # before accelerate waits for the others
        problem = f"is {processes}, and this release trains in one process"
        raise StageError(Fault.CONFIG_UNREADABLE, field="the environment's WORLD_SIZE", problem=problem)
    state = PartialState(cpu=not resources.gpus)
    device = torch.device(state.device or "cpu") if resources.gpus else torch.device("cpu")
    if resources.gpus and device.type != "cuda":
        raise StageError(Fault.GPU_FAULT, step=0)
    # The sum of a product depends on how many threads share it: without a fixed number resumes are not bit-equal.
    # Rounded down: a thread beyond the CPU quota makes all others wait for it at every barrier.
    torch.set_num_threads(max(1, int(resources.cpu_count)))
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    world = World(device, state.process_index, state.num_processes)
    log.info(
        "process %d of %d on %s, %d threads",
        world.rank + 1,
        world.processes,
        device_name(device) or "the CPU",
        torch.get_num_threads(),
    )
    return world


def device_name(device: torch.device) -> str | None:
    """Return the GPU's name; None on the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


_PROBE_TOKENS, _PROBE_WIDTH, _PROBE_TURNS = 256, 1024, 8
_CLEARLY_SLOWER = 0.5  # then more turns would tell the same


def bf16_speedup() -> float:
    """Return how many times as fast as in fp32 this CPU multiplies in bf16: a linear layer forward and backward, within
    a second.

    AMX and AVX512-BF16 have instructions for it: AMX multiplied 5.5 to 6.5 times as fast as fp32, where a CPU with AVX2
    alone was six times as slow (both measured at SmolLM2-135M's shapes).
    """
    states = torch.ones(_PROBE_TOKENS, _PROBE_WIDTH, requires_grad=True)
    seconds = dict.fromkeys((torch.float32, torch.bfloat16), math.inf)
    for turn in range(1 + _PROBE_TURNS):  # the first warms up
        for dtype in seconds:
            weight = torch.ones(_PROBE_WIDTH, _PROBE_WIDTH, dtype=dtype)
            began_s = time.perf_counter()
            with autocast(torch.device("cpu"), dtype):
                torch.nn.functional.linear(states, weight).sum().backward()
            if turn:
                seconds[dtype] = min(seconds[dtype], time.perf_counter() - began_s)
        if turn and seconds[torch.float32] < _CLEARLY_SLOWER * seconds[torch.bfloat16]:
            break
    return seconds[torch.float32] / seconds[torch.bfloat16]


def weight_dtype(device: torch.device) -> torch.dtype:
    """Return what the frozen base is held and multiplied in: fp32 on the CPU, bf16 on a GPU."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Return the context of a pass over weights of `dtype`.

    Without it PEFT computes the fp32 adapter, and all that follows, in fp32.
    """
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


@dataclass(frozen=True)
class DeviceMemory:
    """A GPU's memory as this process uses it."""

    peak_bytes: int  # most that tensors held at once
    reserved_bytes: int  # held from the driver, for tensors now and later


def device_memory(device: torch.device) -> DeviceMemory | None:
    """Return what the process uses of its GPU; None on the CPU."""
    if device.type != "cuda":
        return None
    return DeviceMemory(torch.cuda.max_memory_allocated(device), torch.cuda.memory_reserved(device))


def release_memory() -> None:
    """Give memory that no tensor uses back to the device."""
    clear_device_cache()
