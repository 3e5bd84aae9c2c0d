"""GPUs by name, with their peak performance: for cost estimates and for the MFU of a run.

Dense bf16 TFLOP/s with fp32 accumulation (data sheets often print twice that, with sparsity), memory in GiB as the
driver reports it, its bandwidth in TB/s. Sources: the vendors' data sheets of each product (NVIDIA A100 80GB SXM, H100
SXM and PCIe, H200 SXM, H20, HGX B200, L40S, GeForce RTX 4090; AMD Instinct MI300X). H800 and A800 are H100 and A100
with slower links between GPUs.
"""

import re
from typing import NamedTuple

from univigu.errors import ConfigError


class Gpu(NamedTuple):
    """One GPU's limits."""

    tflops: float  # dense bf16
    memory_gib: float
    bandwidth_tb: float


GPUS = {
    "a100": Gpu(312.0, 80.0, 2.04),
    "a100-40gb": Gpu(312.0, 40.0, 1.56),
    "a800": Gpu(312.0, 80.0, 2.04),
    "h100": Gpu(989.4, 79.6, 3.35),
    "h100-pcie": Gpu(756.0, 79.6, 2.0),
    "h800": Gpu(989.4, 79.6, 3.35),
    "h200": Gpu(989.4, 140.4, 4.8),
    "h20": Gpu(148.0, 95.6, 4.0),
    "b200": Gpu(2250.0, 179.0, 7.7),
    "l40s": Gpu(362.0, 45.0, 0.86),
    "rtx4090": Gpu(165.2, 24.0, 1.01),
    "mi300x": Gpu(1307.4, 192.0, 5.3),
}


def find_gpu(name: str) -> Gpu:
    """The GPU of that name, in upper or lower case; raises `ConfigError` with the known names."""
    gpu = GPUS.get(name.lower().replace(" ", "-"))
    if gpu is None:
        raise ConfigError(f"There is no GPU '{name}' in the table; use one of {', '.join(GPUS)}.")
    return gpu


def recognise_gpu(device_name: str) -> Gpu | None:
    """The GPU with this device name, such as "NVIDIA H100 80GB HBM3"; None if it isn't in the table."""
    words = re.sub(r"[^a-z0-9]", "", device_name.lower())
    found = [name for name in GPUS if all(part in words for part in name.split("-"))]
    return GPUS[max(found, key=len)] if found else None
