"""What this machine could do at best: matrix rate, copy bandwidth; and its energy counters."""

import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import pynvml
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from helpers.models.classifier import Classifier

_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16", "amx_tile",
          "amx_int8", "amx_bf16")  # fmt: skip
_RAPL = Path("/sys/class/powercap")

# Sides of the square matrices: at the last, starting the product takes no visible share of it.
_SIDES = {"cpu": (512, 2048), "cuda": (512, 8192)}
_SLOW = (
    0.02  # seconds at the smaller side: without instructions for a type the larger takes minutes
)
_BUDGET = 1.0  # seconds for the repeats of one product
_REPEATS = 5


def cpu_flags() -> list[str]:
    """Instruction sets that decide how fast a classifier runs, as far as the machine names them."""
    info = Path("/proc/cpuinfo")
    words = set(info.read_text().split()) if info.is_file() else set()
    return [flag for flag in _FLAGS if flag in words]


def machine_limits(
    device: str, threads: int, sides: tuple[int, ...] | None = None
) -> dict[str, float]:
    """Best matrix multiplication rates (FLOP/s by precision) and copy bandwidth (bytes/s).

    Square matrices of `sides`, of which the larger is left out where the smaller is slow already;
    what is multiplied in a lower precision can be in fp32, so no rate lies below that of fp32.
    Copies of 256 MiB, read and written bytes both counted.
    """
    torch.set_num_threads(threads)

    def fastest(action: Callable[[], object]) -> float:
        times = []
        while len(times) < _REPEATS and sum(times) < _BUDGET:
            start = time.perf_counter()
            action()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return min(times)

    def rate(dtype: torch.dtype) -> float:
        best = 0.0
        multiply = torch._int_mm if dtype == torch.int8 else torch.matmul
        for side in sides or _SIDES[device]:
            matrix = torch.randint(-9, 9, (side, side), device=device).to(dtype)
            seconds = fastest(lambda m=matrix: multiply(m, m))
            best = max(best, 2 * side**3 / seconds)
            if seconds > _SLOW:
                break
        return best

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
    rates = {name: rate(dtype) for name, dtype in dtypes.items()}
    limits = {name: max(value, rates["fp32"]) for name, value in rates.items()}
    source = torch.zeros(2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return limits | {"bytes_per_s": 2 * source.numel() / fastest(lambda: target.copy_(source))}


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


def energy_meter(device: str) -> tuple[str, Callable[[], float]] | None:
    """What measures the energy of a device, and a function that reads it.

    Args:
        device: `cpu` (RAPL, all packages) or `cuda` (NVML, the GPU that torch calls the first).

    Returns:
        A name, and a function that returns the joules since its last call (since now, at first);
        None where the machine exposes no counter.
    """
    if device == "cuda":
        return _nvml()
    counters = [
        p for p in sorted(_RAPL.glob("intel-rapl:?")) if os.access(p / "energy_uj", os.R_OK)
    ]
    if not counters:
        return None
    readers = [
        _since_last(
            lambda p=p: int((p / "energy_uj").read_text()) / 1e6,
            int((p / "max_energy_range_uj").read_text()) / 1e6,
        )
        for p in counters
    ]
    return f"RAPL, {len(counters)} CPU package(s)", lambda: sum(read() for read in readers)


def _since_last(read: Callable[[], float], limit: float = math.inf) -> Callable[[], float]:
    """A function that returns what a counter grew by; at `limit` the counter begins again at 0."""
    last = read()

    def growth() -> float:
        nonlocal last
        before, last = last, read()
        return last - before + (limit if last < before else 0.0)

    return growth


def _nvml() -> tuple[str, Callable[[], float]] | None:
    """NVML's counter of torch's first GPU, by UUID: indices ignore CUDA_VISIBLE_DEVICES."""
    try:
        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(0).uuid
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        read = _since_last(lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3)
    except pynvml.NVMLError:
        return None
    return f"NVML, {torch.cuda.get_device_name(0)}", read
