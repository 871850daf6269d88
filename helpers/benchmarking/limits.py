"""What this machine could do at best: matrix rate, copy bandwidth; and its energy counters."""

import ctypes
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from helpers.models.classifier import Classifier

_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16", "amx_tile",
          "amx_int8", "amx_bf16")  # fmt: skip


_RAPL = Path("/sys/class/powercap/intel-rapl:0/energy_uj")


def cpu_flags() -> list[str]:
    """Instruction sets that decide how fast a classifier runs, as far as the machine names them."""
    info = Path("/proc/cpuinfo")
    words = set(info.read_text().split()) if info.is_file() else set()
    return [flag for flag in _FLAGS if flag in words]


def machine_limits(device: str, threads: int, side: int = 2048, repeats: int = 8) -> dict:
    """Best matrix multiplication rates (FLOP/s by precision) and copy bandwidth (bytes/s).

    Square matrices of `side`; copies of 256 MiB, read and written bytes both counted.
    """
    torch.set_num_threads(threads)

    def best(action) -> float:
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            action()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return min(times)

    limits = {}
    for name, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16}.items():
        matrix = torch.randn(side, side, device=device).to(dtype)
        limits[name] = 2 * side**3 / best(lambda m=matrix: m @ m)
    small = torch.randint(-9, 9, (side, side), dtype=torch.int8, device=device)
    limits["int8"] = 2 * side**3 / best(lambda: torch._int_mm(small, small))
    source = torch.zeros(2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    limits["bytes_per_s"] = 2 * source.numel() / best(lambda: target.copy_(source))
    return limits


def flops_per_image(classifier: Classifier) -> int:
    """Floating-point operations of one forward pass of one chip, two per multiply-add.

    Counted by torch in matrix products and convolutions; the plain attention is asked for, since
    the counter does not know the fused one on the CPU.
    """
    size, bands = classifier.config.image_size, len(classifier.config.bands)
    chip = torch.zeros(1, bands, size, size, dtype=torch.uint8)
    with (
        torch.inference_mode(),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        classifier(chip)
    return counter.get_total_flops()


def energy_counter() -> tuple[str, Callable[[], float]] | None:
    """Name of a counter that this machine exposes and a function that reads it in joules."""
    if os.access(_RAPL, os.R_OK):
        return "RAPL, first CPU package", lambda: int(_RAPL.read_text()) / 1e6
    if not torch.cuda.is_available():
        return None
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    handle, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()
    nvml.nvmlInit_v2()
    nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(handle))

    def read() -> float:
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules))
        return millijoules.value / 1e3

    return "NVML, first GPU", read
