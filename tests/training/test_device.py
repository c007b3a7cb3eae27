import pytest
import torch

from lori_dist.errors import JobError
from lori_dist.training import device
from lori_dist.training.data import Batch

CPU = torch.device("cpu")


def batch() -> Batch:
    ids = torch.arange(12).view(3, 4)
    return Batch(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, weights=torch.ones(2))


def test_a_gloo_group_computes_on_the_cpu() -> None:
    assert device.of_rank(5, "gloo") == CPU


def test_more_ranks_than_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(JobError, match="this is rank 2 of its machine, which shows 2 CUDA devices; start at most one"):
        device.of_rank(2, "nccl")


def test_a_process_that_was_given_no_device_has_the_cpu() -> None:
    assert (device.first(0), device.first(2).type) == (CPU, "cuda")


def test_on_the_cpu_a_batch_is_not_copied() -> None:
    before = batch()
    after = before.to(CPU)
    assert after.input_ids is before.input_ids
    assert after.weights is before.weights


def test_memory_is_that_of_the_process() -> None:
    device.reset_peak(CPU)
    assert 2**20 < device.memory(CPU) < 2**40


@pytest.mark.gpu
def test_on_cuda_a_batch_is_the_same() -> None:
    before, after = batch(), batch().to("cuda")
    assert after.input_ids.is_cuda
    assert after.weights is not None
    assert after.weights.is_cuda
    assert torch.equal(after.labels.cpu(), before.labels)


@pytest.mark.gpu
def test_on_cuda_memory_is_the_most_since_the_reset() -> None:
    cuda = device.of_rank(0, "nccl")
    before = torch.cuda.memory_allocated(cuda)
    large = torch.empty(2**20, device=cuda)
    del large
    assert device.memory(cuda) >= before + 2**22
    device.reset_peak(cuda)
    assert device.memory(cuda) < before + 2**22


@pytest.mark.gpu
def test_on_cuda_a_group_is_told_its_device() -> None:
    assert device.group_settings(0) == {"backend": "nccl", "device_id": torch.device("cuda", 0)}
