"""Compile the kernels of flash_attention.py for real GPUs, without one, and report what they need.

    python tests/compile_kernels.py              # every block size that is tuned over: a few minutes
    python tests/compile_kernels.py --first      # the first block size of each list, two widths

It fails where a kernel spills registers to memory, needs more shared memory than the target has, or
multiplies without tensor cores. Compiled for bfloat16, rows that 16 divides. Not with TRITON_INTERPRET=1.
"""

import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import flash_attention

# KiB of shared memory that a program may have (CUDA's programming guide, technical specifications)
SHARED = {80: 163, 90: 227, 100: 227}
WIDTHS = (16, 32, 48, 64, 80, 96, 128)
KERNELS = {  # direction: kernel, and what it is specialized for; both gradients at once for narrow heads only
    "forward": ("forward_kernel", {}),
    "grad q": ("grad_q_kernel", {}),
    "grad k": ("grad_kv_kernel", {"KEYS": True, "VALUES": False}),
    "grad v": ("grad_kv_kernel", {"KEYS": False, "VALUES": True}),
    "grad k, v": ("grad_kv_kernel", {"KEYS": True, "VALUES": True}),
    "decode": ("decode_kernel", {"PAD_H": 16}),
    "decode, 32": ("decode_kernel", {"PAD_H": 32}),
}
TENSOR_CORES = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")
FLOATS, GROUPS = ("lse", "delta", "parts"), ("k_groups", "v_groups", "begins")
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def compiled(kernel, constants: dict, target: int, config: triton.Config):
    """The kernel for bfloat16, rows of D numbers that lie side by side, and sizes that 16 divides."""
    constants = constants | config.kwargs
    signature, values, attributes, aligned = {}, {}, {}, [["tt.divisibility", 16]]
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[(i,)] = "constexpr", constants[name]
        elif name in flash_attention.SIZES:
            signature[name] = "i32"
        elif name in FLOATS or name in GROUPS:
            signature[name] = "*fp32" if name in FLOATS else "*i64"
            attributes[(i,)] = aligned
        else:
            strides = ("i32", "i32", "i32", "constexpr")
            signature[name], values[(i, 1, 3)] = flash_attention.View("*bf16", strides), 1
            attributes |= dict.fromkeys([(i, 0), (i, 1, 0), (i, 1, 1), (i, 1, 2)], aligned)
    how = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    source = ASTSource(kernel, signature, values, attributes)
    return triton.compile(source, GPUTarget("cuda", target, 32), how)


def resources(target: int, D: int, direction: str, first: bool) -> tuple[str, bool]:
    """The most registers of a thread, bytes spilled and shared memory, as text; and whether they fit."""
    name, constants = KERNELS[direction]
    tuner, half = getattr(flash_attention, name), torch.empty(0, dtype=torch.bfloat16)
    constants = {**constants, "D": D, "PRECISION": "ieee"}
    configs, rows = tuner.early_config_prune(tuner.configs, {"q": half}, D=D), []
    for config in configs[:1] if first else configs:
        code = compiled(tuner.fn, constants, target, config)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(code.asm["cubin"])
            file.flush()
            line = [CUOBJDUMP, "--dump-resource-usage", file.name]
            usage = subprocess.run(line, capture_output=True, text=True)
        sizes = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage.stdout)}
        local = len(re.findall(r"\b(?:ld|st)\.local", code.asm["ptx"]))
        core = next((word for word in TENSOR_CORES if word in code.asm["ptx"]), "none")
        spills = sizes["STACK"] + sizes["LOCAL"] + local
        rows.append((sizes["REG"], spills, code.metadata.shared / 1024, core))
    registers, spills, shared = (max(column) for column in list(zip(*rows))[:3])
    cores = " ".join(sorted({row[3] for row in rows}))
    ok = spills == 0 and shared <= SHARED[target] and "none" not in cores
    where = f"sm_{target:<5}{D:>4}  {direction:12}"
    return f"{where}{registers:>4} registers {spills:>3} spills {shared:>6.1f} KiB shared  {cores}", ok


def main() -> None:
    first = sys.argv[1:] == ["--first"]
    jobs = [(target, D, name, first) for target in SHARED for D in WIDTHS for name in KERNELS]
    jobs = [job for job in jobs if not first or job[1] == 128 or job[:2] == (90, 48)]
    jobs = [job for job in jobs if job[2] != "grad k, v" or job[1] <= flash_attention.BOTH]
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(os.cpu_count()) as pool:
        os.environ["TRITON_CACHE_DIR"] = folder
        rows = list(pool.map(resources, *zip(*jobs)))
    for row, ok in rows:
        print(row if ok else f"{row}   <- no")
    sys.exit(not all(ok for _, ok in rows))


if __name__ == "__main__":
    main()
