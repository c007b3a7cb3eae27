"""Devices by name: what their makers say of them."""

import re
from collections.abc import Mapping

from lori_dist.errors import ConfigError
from lori_dist.plugin import nearest

GIB = 2**30
RESERVED = 1.5 * GIB
"""Bytes of each device that CUDA, NCCL and libraries take."""


def _device(
    gib: float, tflops: float, bandwidth: float, link: float, host: float, network: float
) -> Mapping[str, float]:
    return {
        "gpu_memory": gib * GIB, "tflops": tflops, "bandwidth": bandwidth, "link": link, "host": host,
        "network": network,
    }  # fmt: skip


DEVICES: Mapping[str, Mapping[str, float]] = {
    # name: GiB, TFLOP/s, GB/s of its memory, GB/s to its neighbours, GB/s from its host, GB/s between nodes
    "b200": _device(
        179, 2250, 8000, 900, 64, 400
    ),  # NVIDIA DGX B200 data sheet: a half of what it gives with sparsity, NVLink 5
    "h200": _device(141, 989, 4800, 450, 64, 400),  # NVIDIA H200 SXM data sheet, NVLink 4
    "h100": _device(80, 989, 3350, 450, 64, 400),  # NVIDIA H100 SXM data sheet, NVLink 4
    "h100-pcie": _device(80, 756, 2000, 64, 64, 100),  # NVIDIA H100 PCIe data sheet
    "a100": _device(80, 312, 2039, 300, 32, 200),  # NVIDIA A100 SXM 80 GB data sheet, NVLink 3
    "a100-40": _device(40, 312, 1555, 300, 32, 200),  # NVIDIA A100 SXM 40 GB data sheet
    "l40s": _device(48, 362, 864, 32, 32, 50),  # NVIDIA L40S data sheet, PCIe 4
    "l4": _device(24, 121, 300, 32, 32, 25),  # NVIDIA L4 data sheet: 242 TFLOP/s with sparsity
    "a10g": _device(24, 70, 600, 32, 32, 12.5),  # AWS G5: 70 TFLOP/s dense
    "a10": _device(24, 125, 600, 32, 32, 25),  # NVIDIA A10 data sheet
    "a6000": _device(48, 155, 768, 32, 32, 25),  # NVIDIA RTX A6000 data sheet: 310 TFLOP/s with sparsity
    "rtx-4090": _device(24, 165, 1008, 32, 32, 12.5),  # NVIDIA Ada white paper: fp32 accumulation, dense
    "rtx-3090": _device(24, 71, 936, 32, 32, 12.5),  # NVIDIA Ampere GA102 white paper: fp32 accumulation, dense
    "t4": _device(16, 65, 320, 16, 16, 12.5),  # NVIDIA T4 data sheet: float16, no bfloat16
    "v100": _device(32, 125, 900, 150, 16, 12.5),  # NVIDIA V100 SXM2 32 GB data sheet: float16, no bfloat16, NVLink 2
    "mi300x": _device(192, 1307, 5300, 448, 64, 400),  # AMD Instinct MI300X data sheet, seven Infinity Fabric links
    "mi250x": _device(128, 383, 3277, 350, 36, 100),  # AMD Instinct MI250X data sheet, both dies as one device
}
"""Name -> what is usual of such devices: peak of dense bfloat16 products (float16 where there is no bfloat16), links of
NVLink or PCIe in one direction, and one network adapter of 400 or 200 Gb/s for each device, or one for a node. Clouds
differ: say what you know of yours."""
ASSUMED = "h100"
"""Device that is assumed if none is named."""
OTHER_NAMES: Mapping[str, str] = {"4090": "rtx-4090", "3090": "rtx-3090", "a100-80": "a100", "rtx4090": "rtx-4090"}


def device(name: str) -> tuple[str, dict[str, float]]:
    """The device's name in DEVICES and its usual figures. Raises ConfigError for an unknown device."""
    known = OTHER_NAMES.get(name.lower(), name.lower())
    if known not in DEVICES:
        near = nearest(name, [*DEVICES, *OTHER_NAMES])
        raise ConfigError(f"--gpu: unknown device {name!r}; there are {', '.join(DEVICES)}.{near}")
    return known, dict(DEVICES[known])


def known(description: str) -> str | None:
    """The name in DEVICES of a GPU that its driver calls something like `NVIDIA H100 80GB HBM3`; None if there is
    none."""
    words = set(re.split(r"[^a-z0-9]+", description.lower()))
    found = [name for name in DEVICES if words >= set(name.split("-"))]
    return max(found, key=len, default=None)
