"""How attention is computed, in a QLoRA run (`attention`) and by itself (`kernel`).

    python -m study attention --init_from ckpt.pt      # attention x slices of each product
    python -m study kernel                             # the Triton kernels; needs a GPU

`attention` repeats a published experiment, flash or textbook attention with pretraining_tp 1 or 2, whose four
runs were in truth two: the adapter's library had set pretraining_tp back to 1. Each row is a run of train.py
from the same seed, in a process of its own; then all write greedy texts of 100 tokens in turns. A row fails
if its model computed another attention than the row's.

`kernel` compares the kernels with PyTorch's and with the textbook in bfloat16, for a K/V head per query head,
for equal groups, and for uneven ones, K and V apart. TFLOP/s count the products of the formula, 2 in the
forward and 5 in the backward, over half of T x T; a kernel that repeats one does more.
"""

import contextlib
import io
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import torch

import train
from checkpoint import build_model, empty_model, load, model_config
from common import UserError, pick_device
from model import HeadGroups, Llama, naive, sdpa
from study.bench import BenchConfig, alone, configs, in_turns, show
from study.sliced import slice_model

NEW_TOKENS, PROMPT = 100, 16
H, D = 16, 64  # of the kernel table: query heads and their width
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)


@dataclass
class AttentionConfig:
    """attention"""

    init_from: str | None = None  # the ckpt.pt to fine-tune


# ---- in a QLoRA run ----


def check(model: Llama, backend: str) -> None:
    """Fail unless this function computes the model's attention."""
    names = {layer.attention.attend.__name__.replace("fused", "triton") for layer in model.layers}
    assert names == {backend}, f"--attention {backend} computed {names}"


def finetune(flags: list[str], backend: str, slices: int, folder: str) -> dict:
    """Train a QLoRA adapter, into folder/ckpt.pt; in a process of its own, whose peak memory is the row's.

    On a GPU the first steps of triton include its compiling and its tuning, and the peak 256 MB for that."""
    sys.argv, models = ["train.py", *flags, "--attention", backend, "--no-compile", "--out_dir", folder], []

    def change(model: Llama) -> None:
        models.append(model)
        if slices > 1:
            slice_model(model, slices)

    with contextlib.redirect_stdout(io.StringIO()):
        train.main(change)
    check(models[0], backend)
    records = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    steps, last = [record for record in records if "ms" in record], records[-1]
    row = {"attention": backend, "pretraining_tp": slices, "val_loss": last["val_loss"]}
    row |= {"training_s": steps[-1]["seconds"], "step_ms": statistics.median(r["ms"] for r in steps[1:])}
    return {**row, "peak": last["peak_memory_bytes"]}


def generation_seconds(rows: list[dict], folder: str, device: torch.device, texts: int) -> list[float]:
    """The median seconds of a greedy text by the checkpoint of each row, in turns."""
    runs = {}
    for i, row in enumerate(rows):
        model = build_model(load(f"{folder}/{i}/ckpt.pt"), device)
        if row["attention"] == "triton":
            from flash_attention import use_kernels

            use_kernels(model)
        check(model, row["attention"])
        if row["pretraining_tp"] > 1:
            slice_model(model, row["pretraining_tp"])
        runs[str(i)] = partial(model.generate, [[1] * min(PROMPT, model.config.block_size // 2)], NEW_TOKENS)
    return [statistics.median(own) for own in in_turns(runs, texts).values()]


def attention_rows(init_from: str, config: BenchConfig) -> list[dict]:
    """A row for every attention that runs here, with 1 and 2 slices: `finetune`'s, and generation_s."""
    c, device, steps, rows = model_config(load(init_from)), pick_device(config.device), 10 * config.steps, []
    slice_model(empty_model(c), 2)  # a width that they do not divide is refused before the first run
    flags = f"--max_steps {steps} --warmup_steps {steps // 10} --eval_every {steps} --lora_r 8 --quantize nf4"
    flags += f" --batch_size {config.batch_size} --device {config.device} --init_from"
    here = ("naive", "blocks", "sdpa", *["triton"] * kernels_run(device, torch.float32, c.head_dim))
    with tempfile.TemporaryDirectory() as folder:
        for backend, slices in product(here, (1, 2)):
            name = f"{backend}, pretraining_tp {slices}"
            print(f"training: {name}", file=sys.stderr, flush=True)
            how = [*flags.split(), init_from], backend, slices, f"{folder}/{len(rows)}"
            rows.append(alone(name, finetune, *how))
        times = generation_seconds(rows, folder, device, 4 * config.steps)
    return [{**row, "generation_s": seconds} for row, seconds in zip(rows, times)]


def main() -> None:
    asked, config = configs(__doc__, AttentionConfig, BenchConfig)
    if not asked.init_from:
        raise UserError("attention fine-tunes a trained model: give --init_from ckpt.pt")
    show(config, attention_rows(asked.init_from, config))


# ---- the kernels by themselves ----


def kernels_run(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    if device.type != "cuda":
        return False
    from flash_attention import why_not

    return why_not(device, dtype, head_dim) is None


def maps() -> dict[str, list[HeadGroups]]:
    """K and V groups to compare: a head each, equal runs of four heads, about as many in uneven groups."""
    uneven = [[max(0, h - H + n) for h in range(H)] for n in (6, 2)]
    found = {"every head": [list(range(H))] * 2, "equal": [[h // 4 for h in range(H)]] * 2, "uneven": uneven}
    return {name: [HeadGroups(of_head) for of_head in pair] for name, pair in found.items()}


def kernel_rows(B: int, T: int, device: torch.device, milliseconds: Callable) -> list[dict]:
    """{groups, direction, attention, T, ms, tflops} for B texts of T tokens."""
    import flash_attention as flash

    rows, work = [], B * H * T * D  # half of the operations of a product for one query
    for groups, heads in maps().items():
        heads = [x.to(device) for x in heads]
        sizes, like = (H, heads[0].n_group, heads[1].n_group), {"device": device, "dtype": torch.bfloat16}
        q, k, v = (torch.randn(B, n, T, D, requires_grad=True, **like) for n in sizes)
        for kernel in (flash.forward_kernel, flash.grad_q_kernel, flash.grad_kv_kernel, flash.decode_kernel):
            kernel.cache.clear()  # tuned anew for these groups and this length
        for name, way in {"triton": flash.fused, "sdpa": sdpa, "naive": naive}.items():
            if name == "naive" and 4 * B * H * T * T > 2**33:
                continue  # scores, weights and their gradients would not fit
            out = way(q, k, v, *heads, None)
            backward = partial(torch.autograd.grad, out, (q, k, v), torch.ones_like(out), retain_graph=True)
            found = {"backward": (milliseconds(backward), 5 * work * T)}
            with torch.no_grad():
                found["forward"] = milliseconds(partial(way, q, k, v, *heads, None)), 2 * work * T
                found["decode"] = milliseconds(partial(way, q[:, :, -1:], k, v, *heads, None)), 4 * work
            for direction, (ms, operations) in found.items():
                row = {"groups": groups, "direction": direction, "attention": name, "T": T}
                rows.append({**row, "ms": ms, "tflops": operations / ms / 1e9})
    return rows


def kernel_main() -> None:
    (config,) = configs(__doc__, BenchConfig)
    device = pick_device(config.device)
    if not kernels_run(device, torch.bfloat16, D):
        raise UserError(f"kernel times Triton on an NVIDIA GPU, and this is {device}")
    from triton.testing import do_bench

    once = partial(do_bench, warmup=50, rep=200, return_mode="median")
    rows = [row for T in LENGTHS for row in kernel_rows(config.batch_size, T, device, once)]
    show(config, rows, gpu=torch.cuda.get_device_name(device))
