"""What the kernels of flash_attention.py become on real GPUs, without one: compile them ahead of time to machine code.

    python tests/compile_kernels.py              # every block size that is tuned over: a few minutes
    python tests/compile_kernels.py --first      # the first block size of each list

Of each target, head width and kernel: the most registers of a thread, bytes that it spills to memory, shared memory of
a program, and the tensor cores' instruction. It fails where a kernel spills, needs more shared memory than the target
has, or multiplies without tensor cores. Compiled for bfloat16, causal, rows that 16 divides. Developers' only, and not
with TRITON_INTERPRET=1.
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
KERNELS = {  # direction: kernel, and what it is specialized for
    "forward": ("forward_kernel", {}),
    "grad q": ("grad_q_kernel", {}),
    "grad k": ("grad_kv_kernel", {"KEYS": True, "VALUES": False}),
    "grad v": ("grad_kv_kernel", {"KEYS": False, "VALUES": True}),
    "grad k, v": ("grad_kv_kernel", {"KEYS": True, "VALUES": True}),
    "decode": ("decode_kernel", {"PAD_H": 16}),
    "decode, 32": ("decode_kernel", {"PAD_H": 32}),
}
TENSOR_CORES = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")
HALF = torch.empty(0, dtype=torch.bfloat16)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def compiled(kernel, constants: dict, target: int, config: triton.Config):
    """The kernel for bfloat16, rows of D numbers that lie side by side, and sizes that 16 divides."""
    constants = constants | config.kwargs
    signature, values, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[(i,)] = "constexpr", constants[name]
        elif name.endswith("strides"):
            signature[name], values[(i, 3)] = ("i32", "i32", "i32", "constexpr"), 1
            attributes |= {(i, axis): [["tt.divisibility", 16]] for axis in range(3)}
        elif name in flash_attention.SIZES:
            signature[name] = "i32"
        else:
            index = name.endswith("groups") or name == "begins"
            wide = name in ("lse", "delta", "parts")
            signature[name] = "*" + ("i64" if index else "fp32" if wide else "bf16")
            attributes[(i,)] = [["tt.divisibility", 16]]
    how = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return triton.compile(ASTSource(kernel, signature, values, attributes), GPUTarget("cuda", target, 32), how)


def resources(target: int, D: int, direction: str, first: bool) -> dict:
    name, constants = KERNELS[direction]
    tuner, PAD = getattr(flash_attention, name), triton.next_power_of_2(D)
    constants = {**constants, "scale": D**-0.5, "D": D, "PAD": PAD, "CAUSAL": True, "PRECISION": "ieee"}
    rows = []
    for config in tuner.early_config_prune(tuner.configs, {"q": HALF}, PAD=PAD)[: 1 if first else None]:
        code = compiled(tuner.fn, constants, target, config)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(code.asm["cubin"])
            file.flush()
            usage = subprocess.run([CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True)
        sizes = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage.stdout)}
        local = len(re.findall(r"\b(?:ld|st)\.local", code.asm["ptx"]))
        core = next((word for word in TENSOR_CORES if word in code.asm["ptx"]), "none")
        rows.append((sizes["REG"], sizes["STACK"] + sizes["LOCAL"] + local, code.metadata.shared / 1024, core))
    registers, spills, shared, cores = zip(*rows)
    cores = " ".join(sorted({core.split(".")[0] for core in cores}))
    ok = max(spills) == 0 and max(shared) <= SHARED[target] and "none" not in cores
    most = {"registers": max(registers), "spills": max(spills), "shared": max(shared)}
    return {"target": target, "D": D, "direction": direction, **most, "cores": cores, "ok": ok}


def wanted(direction: str, D: int) -> bool:
    """Both gradients at once are made of narrow heads only."""
    return direction != "grad k, v" or D <= flash_attention.FUSED


def main() -> None:
    first = sys.argv[1:] == ["--first"]
    jobs = [(t, D, name, first) for t in SHARED for D in WIDTHS for name in KERNELS if wanted(name, D)]
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(os.cpu_count()) as pool:
        os.environ["TRITON_CACHE_DIR"] = folder
        rows = list(pool.map(resources, *zip(*jobs)))
    print(f"{'target':10}{'head_dim':>8}  {'direction':12}{'registers':>9}{'spills':>8}{'shared memory':>16}  products")
    for row in rows:
        sizes = f"{row['registers']:>9}{row['spills']:>8}{row['shared']:>8.1f} of {SHARED[row['target']]}K"
        where = f"sm_{row['target']:<7}{row['D']:>8}  {row['direction']:12}"
        print(f"{where}{sizes}  {row['cores']}{'' if row['ok'] else '   <- no'}")
    sys.exit(not all(row["ok"] for row in rows))


if __name__ == "__main__":
    main()
