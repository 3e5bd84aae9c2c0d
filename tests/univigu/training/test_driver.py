"""A driver that is too old for the build of torch is named, instead of training on the CPU."""

import os
import shutil
import subprocess
import sys

import pytest

from univigu.errors import ConfigError
from univigu.training.driver import LEAST_DRIVERS, check_driver

VERSION = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n"


@pytest.fixture
def driver(tmp_path):
    """A function that makes a `libcuda.so.1` for a version of CUDA, such as 12040 for 12.4; returns its path."""
    compiler = shutil.which("cc") or ""
    if not compiler:
        pytest.skip("making a library takes a C compiler")

    def make(cuda, result=0):
        source = tmp_path / "driver.c"
        source.write_text(f"int cuDriverGetVersion(int *version) {{ *version = {cuda}; return {result}; }}\n")
        library = tmp_path / "libcuda.so.1"
        subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
        return library

    return make


def test_a_driver_of_an_earlier_major_version_is_refused_in_one_sentence(driver, tmp_path):
    (tmp_path / "version").write_text(VERSION)
    with pytest.raises(ConfigError) as refused:
        check_driver("13.0", str(driver(12040)), tmp_path / "version")
    message = str(refused.value)
    assert "driver of this machine, 550.54.15, supports CUDA 12.4" in message
    assert "for CUDA 13.0, driver 580 or later; update the driver" in message
    assert message.count(". ") == 0


@pytest.mark.parametrize(("cuda", "supported"), [("13.0", 13000), ("12.6", 12040), ("12.6", 13010)])
def test_a_driver_of_the_same_or_a_later_major_version_is_accepted(cuda, supported, driver):
    check_driver(cuda, str(driver(supported)))


def test_nothing_is_checked_without_cuda_or_without_a_driver(driver, tmp_path):
    check_driver(None, str(driver(11000)))
    check_driver("13.0", str(tmp_path / "missing.so"))
    check_driver("13.0", str(driver(11000, result=100)))  # CUDA_ERROR_NO_DEVICE


def test_a_build_for_a_version_of_cuda_that_is_not_listed_is_refused_without_a_driver_number(driver, tmp_path):
    later = max(LEAST_DRIVERS) + 1
    with pytest.raises(ConfigError, match=rf"machine supports CUDA 13.0, but .* for CUDA {later}.0; update"):
        check_driver(f"{later}.0", str(driver(13000)), tmp_path / "missing")


@pytest.mark.slow
def test_the_launcher_starts_no_worker_on_a_machine_whose_driver_is_too_old(driver, tmp_path):
    worker = f"open({str(tmp_path / 'started')!r}, 'w')"
    start = "import torch; torch.version.cuda = {!r}; from univigu.training.launch import launch; "
    (tmp_path / "worker.py").write_text(worker)
    program = "import sys; sys.exit(launch(['--standalone', '--nproc-per-node=1', sys.argv[1]]))"
    environment = {**os.environ, "LD_LIBRARY_PATH": str(driver(12040).parent)}

    def run(cuda):
        command = [sys.executable, "-c", start.format(cuda) + program, tmp_path / "worker.py"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    refused = run("13.0")
    assert refused.returncode == ConfigError.exit_code
    assert refused.stderr.splitlines()[-1].startswith("univigu: The NVIDIA driver of this machine")
    assert not (tmp_path / "started").exists()
    assert run("12.6").returncode == 0
    assert (tmp_path / "started").exists()
