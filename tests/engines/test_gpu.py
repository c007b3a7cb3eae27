"""Every engine on CUDA devices, with nccl, on as many as there are, up to four, gives what a CPU gives."""

from typing import Any

import pytest

from lori_dist import plugin
from lori_dist.benchmarks._gang import gang
from lori_dist.training import device
from lori_dist.training.compilation import compile_blocks
from lori_dist.training.world import World
from tests.engines.oracle import TRAIN, adapt, difference, one_process, run
from tests.models import on_meta, tiny_llama

TOLERANCE = 1e-4
"""Relative, in fp32: CUDA's kernels add up in another order than a CPU's."""
STEPS = range(3)


def trained(world: World, engine: str, options: dict[str, Any], is_compiled: bool) -> dict[str, Any]:
    model = adapt(tiny_llama())
    if is_compiled:
        compile_blocks(model)
    build = plugin.find("engines", engine, "build", "engine").load()
    course = run(build(*on_meta(model), TRAIN, world, state=None, **options), world, STEPS)
    if world.rank > 0:
        return {}
    reference = one_process(adapt(tiny_llama()), len(STEPS))
    return {"device": world.device.type, "error": difference(course.state, reference.state)}


@pytest.mark.gpu
@pytest.mark.parametrize("is_compiled", [False, True], ids=["as it is", "compiled"])
@pytest.mark.parametrize(
    ("engine", "options"),
    [
        ("ddp", {}),
        ("fsdp", {}),
        ("fsdp", {"base": "replicated"}),
        ("fsdp", {"offload": True}),
        ("deepspeed", {"stage": 1}),
        ("deepspeed", {"stage": 2}),
        ("deepspeed", {"stage": 3}),
        ("deepspeed", {"stage": 3, "offload": True}),
    ],
    ids=str,
)
def test_on_cuda_it_trains_what_one_process_trains_on_a_cpu(
    engine: str, options: dict[str, Any], is_compiled: bool
) -> None:
    if is_compiled and options.get("stage") == 3:
        pytest.skip("stage 3 is not compiled")
    found = gang(trained, device.num_ranks(4), engine, options, is_compiled)
    assert found["device"] == "cuda"
    assert found["error"] <= TOLERANCE
