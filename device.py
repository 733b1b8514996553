"""What this machine does best: its device, the number format that is fast and safe there, and its peak memory."""

import ctypes
import os
import resource
import shutil
import sys
import sysconfig
from pathlib import Path

import torch

from config import UserError


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA, else Apple's MPS, else the CPU, for which the process is told to keep its memory.

    Raises UserError for a device that is not here.
    """
    here = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    here = ["cuda", *here] if here else []
    several = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes that torchrun started on this machine
    here += ["mps"] * (torch.backends.mps.is_available() and several == 1) + ["cpu"]
    if name not in ["auto", *here]:
        raise UserError(f"--device {name} is not here; this machine has {', '.join(here)}")
    device = torch.device(here[0] if name == "auto" else name)
    if device.type == "cuda" and several > 1 and (device.index is not None or several > torch.cuda.device_count()):
        one_each = f"give --nproc_per_node {torch.cuda.device_count()} and --device cuda, or --device cpu"
        raise UserError(f"{several} processes on --device {device}, and each needs a GPU of its own: {one_each}")
    if device.type == "cpu":
        keep_freed_memory()
    return device


def keep_freed_memory() -> None:
    """Let the C library keep the memory of freed tensors for the next ones, where it is glibc.

    Otherwise it gives each large block back, and the next step's tensors must be mapped and cleared by the kernel, page
    by page: a sixth of the time of a training step. The price: what is freed does not go back to the system.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The format of matrix products; weights, norms, softmax sums and the loss stay in float32.

    `auto` is bfloat16 where the hardware multiplies it (recent GPUs; CPUs with AVX512-BF16 or AMX), float16 on older
    GPUs, and float32 elsewhere: an emulated bfloat16 is slower than float32.
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu":
        has = torch.cpu.get_capabilities()
        return torch.bfloat16 if has.get("avx512_bf16") or has.get("amx_bf16") else torch.float32
    return torch.float32


def compiler_missing() -> str | None:
    """What torch.compile would miss on a CPU, in words; None if all is there."""
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if not shutil.which(compiler):
        return f"a C++ compiler, {compiler}"
    header = Path(sysconfig.get_path("include"), "Python.h")
    return None if header.exists() else f"Python's headers, {header} (python3-dev)"


def compiles_by_itself(device: torch.device) -> bool:
    """Whether to compile where nobody says: where it was measured to pay, and all that it needs is there."""
    return device.type == "cpu" and sys.platform == "linux" and compiler_missing() is None


def check_compiler(device: torch.device) -> None:
    """Raise UserError where --compile cannot work."""
    if device.type == "cpu" and (missing := compiler_missing()):
        raise UserError(f"--compile needs {missing}: install it, or give --no-compile")


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Matrix products in `dtype` inside this context; float32 and float64 switch it off."""
    return torch.autocast(device.type, dtype, enabled=dtype in (torch.bfloat16, torch.float16))


def memory_bytes(device: torch.device) -> int:
    """Memory held now: allocated on a GPU, else resident in this process (where the system does not tell, its peak)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return linux_status("VmRSS") or peak_memory_bytes(device)


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held so far: allocated on a GPU, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return linux_status("VmHWM") or (peak if sys.platform == "darwin" else peak * 1024)  # macOS counts bytes, not KiB


def reset_peak_memory(device: torch.device) -> None:
    """From now on the peak is what is held, and what comes; elsewhere than on GPUs and Linux it stays."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access("/proc/self/clear_refs", os.W_OK):
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")


def linux_status(field: str) -> int | None:
    """A size in /proc/self/status, bytes; None on other systems."""
    if not os.path.exists("/proc/self/status"):
        return None
    with open("/proc/self/status") as file:
        return next((1024 * int(line.split()[1]) for line in file if line.startswith(field + ":")), None)
