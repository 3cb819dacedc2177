"""The process finds its device, and settles what holds for all of torch."""

import pytest
import torch

from finetune_api.errors import StageError
from finetune_api.reasons import Fault
from finetune_api.run import RunResources
from finetune_trainer import world

CPU = torch.device("cpu")


def resources(cpu_count: float = 1, gpus: int = 0) -> RunResources:
    return RunResources(cpu_count=cpu_count, memory_bytes=1, disk_bytes=1, gpus=gpus)


@pytest.mark.parametrize(("cpu_count", "threads"), [(0.5, 1), (1.9, 1), (2, 2)])
def test_threads_are_the_whole_cpus_that_were_granted(cpu_count: float, threads: int) -> None:
    before = torch.get_num_threads()
    try:
        found = world.join(resources(cpu_count))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert (found.device, found.rank, found.processes) == (CPU, 0, 1)
    assert torch.are_deterministic_algorithms_enabled()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_granted_gpu_that_is_not_there_is_the_gpus_fault() -> None:
    with pytest.raises(StageError) as caught:
        world.join(resources(gpus=1))
    assert caught.value.fault is Fault.GPU_FAULT


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_several_processes_are_refused_before_they_wait_for_each_other(
    monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "2")
    with pytest.raises(StageError, match="is 2, and this release trains in one process") as caught:
        world.join(resources())
    assert caught.value.fault is Fault.CONFIG_UNREADABLE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pass_multiplies_in_the_dtype_of_the_weights(dtype: torch.dtype) -> None:
    fp32 = torch.ones(2, 2)
    with world.autocast(CPU, dtype):
        assert (fp32 @ fp32).dtype == dtype


def test_the_cpu_has_no_memory_figures_and_no_name() -> None:
    assert world.device_memory(CPU) is None
    assert world.device_name(CPU) is None
    assert world.weight_dtype(CPU) == torch.float32
