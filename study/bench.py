"""Timing and memory tables, of models of random weights or of checkpoints.

    python -m study memory --n_layer 12 --dim 768           # what each memory saver saves, and what it costs
    python -m study decode --block_size 1024 --steps 20     # a token's time, fewer K/V heads, or --ckpts
    python -m study train                                   # training and evaluation
    python -m study pace "--n_layer 6" "--n_layer 6 --novel"    # a training step of each, in turns
    python -m study latency --batch_size 1 --ckpts a/ckpt.pt b/ckpt.pt    # texts of 64 tokens, in turns

`memory` trains each row in a process of its own, with the same number of tokens a step. `peak` is the most
during a step, weights included, minus a process that has only warmed torch up (on macOS: the most ever).
"""

import json
import math
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

from checkpoint import build_model, load, model_config, save
from common import UserError, autocast, bounded, parse, peak_memory_bytes, pick, pick_device, pick_dtype
from lora import LoRAConfig
from model import KVCache, Llama, ModelConfig
from sample import compile_step
from train import TrainConfig, compiling_pays, make_optimizers, starting_model, train_step, with_kernels

ROWS = {  # of the memory table, and the savers that each has
    "full fine-tune": "",
    "LoRA": "lora",
    "LoRA + AMP": "lora amp",
    "LoRA + accumulation": "lora accumulation",
    "LoRA + activation checkpointing": "lora checkpointing",
    "QLoRA": "lora nf4",
    "LoRA + AMP + accumulation + checkpointing": "lora amp accumulation checkpointing",
    "all together": "lora amp accumulation checkpointing nf4",
}


@dataclass
class BenchConfig:
    """benchmark"""

    batch_size: int = bounded(16, 1)  # sequences of a step, or texts at a time
    steps: int = bounded(5, 1)  # what is timed: steps, tokens or texts; attention: 10 x steps, 4 x texts
    device: str = "auto"  # cuda, mps, cpu or auto
    json: bool = False  # print one JSON object and nothing else


@dataclass
class PaceConfig:
    """pace"""

    shapes: list[str]  # flags of train.py for each variant, in quotes, with their values: "--n_layer 6"


@dataclass
class DecodingConfig:
    """decoding"""

    ckpts: list[str] | None = None  # checkpoints that take turns (decode by default: random weights)
    compile: bool = False  # compile the decoding step


def configs(doc: str, *classes: type) -> list:
    """An object of each class, from the flags."""
    flags = parse(doc, *classes)
    return [cls(**pick(cls, flags)) for cls in classes]


def in_turns(runs: dict[str, Callable], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of `rounds` calls of each run, after some to warm up, in turns: a machine's speed drifts."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in tqdm(range(warm_up + rounds), desc="timing", disable=None, leave=False):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    return {name: own[warm_up:] for name, own in seconds.items()}


def alone(name: str, function: Callable, *args):
    """function(*args) in a process of its own, so that its peak memory is the row's."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        try:
            return process.submit(function, *args).result()
        except BrokenExecutor:
            raise UserError(f"{name!r} died (no memory?): give a smaller --batch_size or model") from None


def records(path: Path) -> list[dict]:
    """The objects of a JSONL, whose last line may not be finished. Raises UserError if it is damaged."""
    try:
        return [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from None


def cell(name: str, value) -> str:
    if name in ("weights", "optimizer", "peak", "cache_bytes"):
        return f"{value / 2**20:,.1f} MiB"
    if isinstance(value, float) and "loss" in name:
        return f"{value:.6f}"
    if isinstance(value, float) and abs(value) < 1000:
        return f"{value:.5g}"
    return f"{value:,.0f}" if isinstance(value, int | float) else str(value)


def table(rows: list[dict]) -> str:
    """Markdown; keys are the headings."""
    head = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[cell(key, row[key]) if key in row else "" for key in head] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *cells])


def show(config, rows: list[dict], **about) -> None:
    """Print rows as a table; with --json as one object, together with the settings."""
    print(json.dumps({"bench": asdict(config), **about, "rows": rows}) if config.json else table(rows))


def reset_peak_memory(device: torch.device) -> int:
    """Reset the peak to what is held now, and return that, bytes; macOS cannot reset it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")
    return peak_memory_bytes(device)


def compared(runs: dict[str, Callable], rounds: int, warm_up: int = 1) -> dict[str, dict]:
    """ms: the median time of each run; ratio: the median over rounds of the first run's time / its own."""
    seconds = in_turns(runs, rounds, warm_up)
    first = seconds[next(iter(runs))]
    ratio = {name: median(a / b for a, b in zip(first, own)) for name, own in seconds.items()}
    return {name: {"ms": 1000 * median(own), "ratio": ratio[name]} for name, own in seconds.items()}


def random_step(model: nn.Module, settings: TrainConfig, shape: tuple[int, int], dtype: torch.dtype, parts=1):
    """A train_step on `shape` = (B, T) random tokens in `parts` micro-batches, blocks compiled where train.py
    would compile a long run's; its optimizers, and its batches."""
    device = next(with_kernels(model).parameters()).device
    if compiling_pays(settings, math.inf, device):
        for part in model.layers if isinstance(model, Llama) else [model]:
            part.compile()
    optimizers = make_optimizers(model.train(), settings)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    text = torch.randint(model.config.vocab_size, (shape[0], shape[1] + 1), device=device)
    batches = [(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()) for rows in text.chunk(parts)]
    step = partial(train_step, model, batches, optimizers, 1e-4, dtype, scaler, settings.grad_clip)
    return step, optimizers, batches


def train_speed(model: nn.Module, config: BenchConfig, dtype: torch.dtype, compiled=None, parts=1) -> dict:
    """AdamW's bytes, the peak, and tokens a second of training in `parts` micro-batches and of evaluation."""
    c, device = model.config, pick_device(config.device)
    how, shape = TrainConfig(optimizer="adamw", compile=compiled), (config.batch_size, c.block_size)
    step, optimizers, batches = random_step(model.to(device), how, shape, dtype, parts)

    @torch.no_grad()
    @autocast(device, dtype)
    def evaluate() -> float:
        return sum(model.eval()(*batch).item() for batch in batches)

    reset_peak_memory(device)
    runs = {"train_tok_s": lambda: model.train() and step(), "eval_tok_s": evaluate}
    seconds = in_turns(runs, config.steps, warm_up=2)
    states = [x for optimizer in optimizers for state in optimizer.state.values() for x in state.values()]
    sizes = {"optimizer": sum(x.nbytes for x in states if x.dim()), "peak": peak_memory_bytes(device)}
    return sizes | {name: config.batch_size * c.block_size / median(own) for name, own in seconds.items()}


def train_main() -> None:
    config, c = configs(__doc__, BenchConfig, ModelConfig)
    torch.manual_seed(0)
    device, model, tokens = pick_device(config.device), Llama(c), config.batch_size * c.block_size
    dtype = pick_dtype("auto", device)
    found = train_speed(model, config, dtype)
    if device.type == "cpu":  # the rate of SwiGLU's product, and the share of it that a step reaches
        x, w = torch.randn(tokens, c.dim, dtype=dtype), torch.randn(c.hidden_dim, c.dim, dtype=dtype)
        rate = 2 * tokens * c.dim * c.hidden_dim / median(in_turns({"": lambda: x @ w.T}, 20)[""])
        # 2 operations a weight and token in the forward, 4 in the backward; half the scores are hidden
        matrices = sum(p.numel() for p in model.layers.parameters() if p.dim() == 2) + c.vocab_size * c.dim
        needed = 6 * (matrices + c.n_layer * c.n_head * c.head_dim * c.block_size)
        found |= {"product_gflops": rate / 1e9, "reached": needed * found["train_tok_s"] / rate}
    show(config, [found])


def pace_main() -> None:
    """The time of a step of train.py with each variant's flags, on random tokens."""
    asked, config = configs(__doc__, PaceConfig, BenchConfig)
    runs, device = {}, pick_device(config.device)
    for shape in asked.shapes:
        sys.argv[1:] = ["--batch_size", str(config.batch_size), *shape.split()]  # the last one counts
        c, own = configs(__doc__, ModelConfig, TrainConfig)
        model, rows = Llama(c).to(device), own.batch_size * own.grad_accum
        model.checkpoint_activations = own.checkpoint_activations
        dtype = pick_dtype(own.dtype, device)
        runs[shape] = random_step(model, own, (rows, c.block_size), dtype, own.grad_accum)[0]
    times = compared(runs, config.steps, warm_up=3)
    show(config, [{"variant": shape, **times[shape]} for shape in times])


def measure(path: str, config: BenchConfig, name: str, savers: str) -> dict:
    """Train the checkpoint for some steps with these savers. It is called in a process of its own."""
    device, dtype = pick_device(config.device), torch.bfloat16 if "amp" in savers else torch.float32
    for size in (64, 32):  # the first steps load libraries and start threads, which is not measured
        layer = nn.Linear(size, size, device=device)
        with autocast(device, dtype):
            layer(torch.ones(size, size, device=device)).sum().backward()
        torch.optim.AdamW(layer.parameters(), fused=True).step()
    before, checkpoint = reset_peak_memory(device), load(path)
    lora = LoRAConfig(lora_r=8 * ("lora" in savers), quantize="nf4" if "nf4" in savers else "none")
    model = starting_model(model_config(checkpoint), lora, checkpoint, device)
    del checkpoint
    model.checkpoint_activations = "checkpointing" in savers
    found = train_speed(model, config, dtype, False, parts=4 if "accumulation" in savers else 1)
    found["peak"] -= before
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weights = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
    return {"row": name, "trainable": trainable, "weights": weights, **found}


def memory_main() -> None:
    config, c = configs(__doc__, BenchConfig, ModelConfig)
    if config.batch_size % 4:
        raise UserError(f"--batch_size {config.batch_size}: give 4, 8, ..., as 4 micro-batches add up")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.pt"
        save(path, {"model": Llama(c).state_dict(), "config": asdict(c), "tokenizer": None})
        each = tqdm(ROWS.items(), desc="measuring", disable=None, leave=False)
        rows = [alone(name, measure, str(path), config, name, savers) for name, savers in each]
    show(config, rows, model=asdict(c))


@torch.no_grad()
def decode_main() -> None:
    """The time of a token of all texts."""
    config, written, c = configs(__doc__, BenchConfig, DecodingConfig, ModelConfig)
    if config.steps > c.block_size - 2:
        raise UserError(f"steps is {config.steps}: give --steps 1 to {c.block_size - 2}, block_size - 2")
    if written.ckpts and c != ModelConfig(block_size=c.block_size, kv_bits=c.kv_bits):
        raise UserError("--ckpts have shapes of their own: give --block_size and --kv_bits only")
    device, shape = pick_device(config.device), (config.batch_size, c.block_size - config.steps - 1)
    heads, models = [c.n_kv_head // i for i in (1, 2, 4, 8) if c.n_kv_head % i == 0], {}
    for path, bits in product(written.ckpts or (), sorted({16, c.kv_bits}, reverse=True)):
        cache = "floats" if bits == 16 else f"{bits} bits"
        models[f"{path}, {cache}"] = build_model(load(path), device, kv_bits=bits)
    if not models:
        models = {n: Llama(replace(c, n_kv_head=n, k_groups=None, v_groups=None)).to(device) for n in heads}
    prompt, runs, caches, rows = torch.ones(shape, dtype=torch.int64, device=device), {}, {}, []
    for name, model in models.items():
        caches[name] = KVCache(with_kernels(model.eval()).config, c.block_size)
        for part in prompt.split(128, dim=1):  # the scores of a whole prompt would need much memory
            model(part, cache=caches[name])
        if written.compile:
            compile_step(model)
        step = partial(model.compiled_step or model, prompt[:, :1], cache=caches[name])
        runs[name] = lambda step=step: step().sum().item()  # waits for a GPU
    for name, times in compared(runs, config.steps).items():
        stored = *caches[name].keys, *caches[name].values, caches[name].tokens
        size = sum(x.nbytes for x in stored if x is not None)
        rows.append({"model": name, "cache_bytes": size, **times})
    show(config, rows)


def latency_main() -> None:
    """A row for each checkpoint: milliseconds of batch_size greedy texts, and tokens a second."""
    config, written = configs(__doc__, BenchConfig, DecodingConfig)
    if not written.ckpts:
        raise UserError("latency compares checkpoints: give --ckpts a/ckpt.pt b/ckpt.pt")
    device, runs, rows = pick_device(config.device), {}, []
    models = {path: with_kernels(build_model(load(path), device)) for path in written.ckpts}  # own dtypes
    new = min(64, *(model.config.block_size - 1 for model in models.values()))
    for name, model in models.items():
        if written.compile:
            compile_step(model)
        runs[name] = partial(model.generate, [[1]] * config.batch_size, new)
    for name, seconds in in_turns(runs, config.steps).items():
        p5, middle, p95 = (1000 * np.percentile(seconds, (5, 50, 95))).tolist()
        row = {"ckpt": name, "params": models[name].num_params(), "layers": models[name].config.n_layer}
        row |= {"median": middle, "p5": p5, "p95": p95, "tokens": new}
        rows.append({**row, "tok_s": 1000 * config.batch_size * new / middle})
    show(config, rows)
