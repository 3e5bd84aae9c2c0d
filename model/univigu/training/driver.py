"""Whether the NVIDIA driver of this machine is recent enough for this build of torch.

With a driver that is too old, `torch.cuda.is_available()` is False and work would continue on the CPU, for weeks.
"""

import ctypes
from pathlib import Path

from univigu.errors import ConfigError

# The least driver for all builds of a major version of CUDA:
# https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html, table 1.
LEAST_DRIVERS = {11: 450, 12: 525, 13: 580}


def check_driver(
    cuda: str | None, library: str = "libcuda.so.1", version: Path = Path("/proc/driver/nvidia/version")
) -> None:
    """Raise `ConfigError` if the driver is older than a build of torch needs.

    cuda: the build's version of CUDA (`torch.version.cuda`), such as "13.0"; None, for a build without CUDA, checks
    nothing, and neither does a machine without a driver. library: the driver's library. version: the kernel module's
    text about its version, which is only used in the message.
    """
    supported = _supported(library) if cuda else None
    if cuda is None or supported is None or supported[0] >= int(cuda.partition(".")[0]):
        return
    least = LEAST_DRIVERS.get(int(cuda.partition(".")[0]))
    needed = f", driver {least} or later" if least else ""
    raise ConfigError(
        f"The NVIDIA driver of this machine{_installed(version)} supports CUDA {supported[0]}.{supported[1]}, but this "
        f"build of torch is for CUDA {cuda}{needed}; update the driver, or install a build for CUDA {supported[0]} "
        f"(TORCH in the Makefile and in the container file of the training image)."
    )


def _supported(library: str) -> tuple[int, int] | None:
    """The latest version of CUDA that the driver supports (cuDriverGetVersion); None without a driver."""
    number = ctypes.c_int()
    try:
        if ctypes.CDLL(library).cuDriverGetVersion(ctypes.byref(number)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return number.value // 1000, number.value % 1000 // 10


def _installed(version: Path) -> str:
    try:
        words = version.read_text(encoding="utf-8", errors="replace").split()
    except OSError:
        return ""
    return next((f", {word}," for word in words if word.replace(".", "").isdigit() and "." in word), "")
