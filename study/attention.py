"""How attention is computed, in a QLoRA run (`attention`) and by itself (`kernel`).

    python -m study attention --init_from ckpt.pt      # attention x slices of each product
    python -m study kernel                             # the Triton kernels; needs a GPU

In `attention` each row is a run of train.py from the same seed, in a process of its own, and val_loss that of
16,384 tokens; then all write texts of 100 tokens in turns. Slices (pretraining_tp) are what tensor-parallel
ranks multiply (arXiv 1909.08053): a block's first matrices are split by rows, each giving a part of the
output, and those that read it by columns, each giving a summand. Only the order of the sums changes, hence
the rounding, and the time.

In `kernel`, TFLOP/s count the products of the formula, 2 in the forward and 5 in the backward, over half of
T x T; a kernel that repeats one does more.
"""

import contextlib
import io
import math
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import train
from checkpoint import build_model, load, model_config
from common import UserError, peak_memory_bytes, pick_device, require
from data.tokenizer import read_tokenizer
from eval_ppl import split_tokens
from gqa import perplexity_on
from lora import TARGETS, LoRALinear
from model import HeadGroups, Llama, naive, sdpa
from nf4 import FrozenProduct, NF4Linear
from study.bench import BenchConfig, alone, configs, in_turns, records, show

H, D = 16, 64  # of the kernel table: query heads and their width


@dataclass
class AttentionConfig:
    """attention"""

    init_from: str | None = None  # the ckpt.pt to fine-tune
    dataset: str | None = None  # on which data (default: its own)


def multiply(x: torch.Tensor, weight: torch.Tensor, slices: int, columns: bool) -> torch.Tensor:
    """x W^T for x (..., in), W (out, in): `slices` of W's rows side by side, or of its columns added up."""
    if columns:
        return sum(F.linear(part, w) for part, w in zip(x.chunk(slices, -1), weight.chunk(slices, 1)))
    return torch.cat([F.linear(x, w) for w in weight.chunk(slices)], dim=-1)


def forward(layer: nn.Module, slices: int, columns: bool, x: torch.Tensor) -> torch.Tensor:
    """What a linear layer, in NF4 or not, or its adapter computes, in slices."""
    if isinstance(layer, NF4Linear):
        sliced = partial(multiply, slices=slices, columns=columns)
        return FrozenProduct.apply(x, layer.codes, layer.absmax, layer.scales, layer.shape, sliced)
    if isinstance(layer, nn.Linear):
        return multiply(x, layer.weight, slices, columns)
    # a rank holds the columns of A or the rows of B that belong to its slice of W, and all of the other
    low = multiply(layer.dropout(x), layer.lora_A, slices if columns else 1, columns=True)
    high = multiply(low, layer.lora_B, 1 if columns else slices, columns=False)
    return layer.linear(x) + layer.scale * high


def slice_model(model: Llama, slices: int) -> None:
    """Let every matrix be multiplied in slices. Raises UserError for a width that they do not divide."""
    for path, layer in model.named_modules():
        name = path.removesuffix(".linear").split(".")[-1]  # an adapter keeps its layer in .linear
        if name not in TARGETS:
            continue
        columns = name in ("wo", "w2")
        if not isinstance(layer, LoRALinear):
            width = layer.in_features if columns else layer.out_features
            require(width % slices == 0, f"{slices} slices do not divide the {width} of {path}")
        layer.forward = partial(forward, layer, slices, columns)


def prepare(model: Llama, backend: str, slices: int) -> None:
    """Give the model a row's attention and slices; assert that `backend` will compute the attention."""
    train.with_kernels(model)
    if slices > 1:
        slice_model(model, slices)
    names = {layer.attention.attend.__name__.replace("fused", "triton") for layer in model.layers}
    assert names == {backend}, f"--attention {backend} computed {names}"


def finetune(flags: list[str], device: torch.device, backend: str, slices: int, folder: str) -> dict:
    """Train a QLoRA adapter, into folder/ckpt.pt. On a GPU, triton's peak includes 256 MB for its tuning."""
    sys.argv = ["train.py", *flags, "--attention", backend, "--no-compile", "--out_dir", folder]
    with contextlib.redirect_stdout(io.StringIO()):
        train.main(partial(prepare, backend=backend, slices=slices))
    steps = records(Path(folder, "log.jsonl"))[1:]
    row = {"attention": backend, "pretraining_tp": slices, "loss": steps[-1]["loss"]}
    row |= {"training_s": steps[-1]["seconds"], "step_ms": median(record["ms"] for record in steps[1:])}
    return {**row, "peak": peak_memory_bytes(device)}


def main() -> None:
    asked, config = configs(__doc__, AttentionConfig, BenchConfig)
    require(asked.init_from, "attention fine-tunes a trained model: give --init_from ckpt.pt")
    checkpoint, device, steps = load(asked.init_from), pick_device(config.device), 10 * config.steps
    require("lora" not in checkpoint, f"{asked.init_from} has an adapter: merge it with checkpoint.py")
    c = model_config(checkpoint)
    flags = f"--max_steps {steps} --warmup_steps {steps // 10} --eval_tokens 0 --lora_r 8 --quantize nf4"
    flags += f" --batch_size {config.batch_size} --device {config.device}"
    flags = [*flags.split(), "--init_from", asked.init_from]
    flags += ["--dataset", asked.dataset] if asked.dataset else []
    here = ["naive", "sdpa"]
    if device.type == "cuda":
        from flash_attention import why_not

        here += ["triton"] * (why_not(build_model(checkpoint, device)) is None)
    width = math.gcd(c.dim, c.hidden_dim, c.vocab_size, c.n_head * c.head_dim, *sum(c.kv_widths, ()))
    ranks = [n for n in (1, 2, 4, 8) if width % n == 0]
    tokens, _ = split_tokens(checkpoint, read_tokenizer(checkpoint["tokenizer"]), asked.dataset, "val")
    rows, writers, prompt = {}, {}, [1] * min(16, c.block_size // 2)
    with tempfile.TemporaryDirectory() as folder:
        for backend, slices in tqdm(list(product(here, ranks)), desc="training", disable=None, leave=False):
            name = f"{backend}, pretraining_tp {slices}"
            rows[name] = alone(name, finetune, flags, device, backend, slices, f"{folder}/{name}")
            model = build_model(load(f"{folder}/{name}/ckpt.pt"), device)
            prepare(model, backend, slices)
            rows[name]["val_loss"] = math.log(perplexity_on(tokens[: 2**14 + 1], model))
            writers[name] = partial(model.generate, [prompt], 100)
        for name, seconds in in_turns(writers, 4 * config.steps).items():
            rows[name]["generation_s"] = median(seconds)
    show(config, list(rows.values()))


def kernel_rows(B: int, T: int, device: torch.device, milliseconds: Callable) -> list[dict]:
    """{groups, direction, attention, T, ms, tflops} for B texts of T tokens."""
    import flash_attention as flash

    uneven = [[max(0, h - H + n) for h in range(H)] for n in (6, 2)]  # about as many K and V groups as equal
    maps = {"every head": [list(range(H))] * 2, "equal": [[h // 4 for h in range(H)]] * 2, "uneven": uneven}
    rows, work = [], B * H * T * D  # half of the operations of a product for one query
    for groups, pair in maps.items():
        heads = [HeadGroups(of_head).to(device) for of_head in pair]
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
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        raise UserError(f"kernel times Triton on an NVIDIA GPU from the A100 on, and this is {device}")
    from triton.testing import do_bench

    once = partial(do_bench, warmup=50, rep=200, return_mode="median")
    rows = [row for i in range(9, 15) for row in kernel_rows(config.batch_size, 2**i, device, once)]
    show(config, rows, gpu=torch.cuda.get_device_name(device))
