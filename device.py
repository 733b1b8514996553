"""What this machine does best: its device, the number format that is fast and safe there, and its peak memory."""

import resource
import sys

import torch

from config import UserError


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA, else Apple's MPS, else the CPU. Raises UserError for a device that is not here."""
    here = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    here = ["cuda", *here] if here else []
    here += ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if name not in ["auto", *here]:
        raise UserError(f"--device {name} is not here; this machine has {', '.join(here)}")
    return torch.device(here[0] if name == "auto" else name)


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


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Matrix products in `dtype` inside this context; float32 and float64 switch it off."""
    return torch.autocast(device.type, dtype, enabled=dtype in (torch.bfloat16, torch.float16))


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held so far: allocated on a GPU, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
