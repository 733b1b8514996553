"""Timing and memory tables, of models of random weights or of checkpoints.

    python -m study memory --n_layer 12 --dim 768           # what each memory saver saves, and what it costs
    python -m study decode --block_size 1024 --steps 20     # a token's time with fewer K/V heads
    python -m study train                                   # training and evaluation
    python -m study generate --batch_size 16                # greedy texts that fill the context
    python -m study latency --ckpts a/ckpt.pt b/ckpt.pt     # greedy texts of 64 tokens by each, in turns

`memory` trains each row in a process of its own, with the same number of tokens a step: `weights` are bytes
of the model's tensors, `optimizer` those of AdamW's two moments, `peak` the most during a step, weights
included, minus a process that has only warmed torch up (macOS does not reset it: there it is the most ever).
"""

import json
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

from checkpoint import build_model, load, model_config, save
from common import UserError, autocast, bounded, parse, peak_memory_bytes, pick, pick_device, pick_dtype
from lora import LoRAConfig
from model import KVCache, Llama, ModelConfig
from train import TrainConfig, compiling_pays, make_optimizers, starting_model, train_step

SIZES = ("weights", "optimizer", "peak", "cache_bytes")  # measures in bytes
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

    batch_size: int = bounded(16, 1)  # sequences of a step, or texts
    steps: int = bounded(5, 1)  # steps or tokens that are timed; attention: 10 x steps, 4 x texts
    device: str = "auto"  # cuda, mps, cpu or auto
    json: bool = False  # print one JSON object and nothing else


@dataclass
class WriteConfig:
    """text"""

    ckpts: list[str] | None = None  # checkpoints that take turns (default: a model of random weights)
    batch_size: int = bounded(1, 1)  # texts at a time
    steps: int = bounded(5, 1)  # times that they are written
    compile: bool = False  # compile the decoding step
    device: str = "auto"  # cuda, mps, cpu or auto
    json: bool = False  # print one JSON object and nothing else


# ---- what all share ----


def configs(doc: str, *classes: type) -> list:
    """An object of each class, from the flags."""
    flags = parse(doc, *classes)
    return [cls(**pick(cls, flags)) for cls in classes]


def timed(run: Callable[[], object]) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def in_turns(runs: dict[str, Callable], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of `rounds` calls of each run, after `warm_up` that do not count, in turns: a machine's speed
    drifts."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in tqdm(range(warm_up + rounds), desc="timing", disable=None, leave=False):
        for name, run in runs.items():
            seconds[name].append(timed(run))
    return {name: own[warm_up:] for name, own in seconds.items()}


def alone(name: str, function: Callable, *args):
    """function(*args) in a process of its own, so that its peak memory is the row's."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        try:
            return process.submit(function, *args).result()
        except BrokenProcessPool:
            raise UserError(f"out of memory in {name!r}: give a smaller --batch_size or model") from None


def cell(name: str, value) -> str:
    if name in SIZES:
        return f"{value / 2**20:,.1f} MiB"
    if isinstance(value, float):
        return f"{value:.6f}" if "loss" in name else f"{value:,.5g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def show(config, rows: list[dict] | dict[str, dict], **about) -> None:
    """Print rows, a list or by name, as a table; with --json as one object, together with the settings."""
    if config.json:
        print(json.dumps({"bench": asdict(config), **about, "rows": rows}))
        return
    each = [{"row": name, **row} for name, row in rows.items()] if isinstance(rows, dict) else rows
    print(table(list(each[0]), [[cell(*item) for item in row.items()] for row in each]))


# ---- memory ----


def measure(path: str, config: BenchConfig, savers: str) -> dict:
    """Train the checkpoint for some steps with these savers. It is called in a process of its own."""
    device, dtype = pick_device(config.device), torch.float32
    if "amp" in savers:
        dtype = pick_dtype("auto", device) if device.type == "cuda" else torch.bfloat16
    for size in (64, 32):  # the first steps load libraries and start threads, which is not measured
        layer = nn.Linear(size, size, device=device)
        with autocast(device, dtype):
            layer(torch.ones(size, size, device=device)).sum().backward()
        torch.optim.AdamW(layer.parameters(), fused=True).step()
    before, checkpoint = reset_peak_memory(device), load(path)
    c = model_config(checkpoint)
    lora = LoRAConfig(lora_r=8, quantize="nf4" if "nf4" in savers else "none") if savers else LoRAConfig()
    model = starting_model(c, lora, checkpoint, device)
    del checkpoint
    model.checkpoint_activations = "checkpointing" in savers
    optimizers = make_optimizers(model, TrainConfig(optimizer="adamw"))
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    rows = torch.randint(c.vocab_size, (config.batch_size, c.block_size + 1))
    rows = rows.chunk(4 if "accumulation" in savers else 1)
    batches = [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in rows]
    reset_peak_memory(device)
    step = partial(train_step, model, batches, optimizers, 1e-4, dtype, scaler)
    seconds = statistics.median(in_turns({"": step}, config.steps)[""])
    states = [x for optimizer in optimizers for state in optimizer.state.values() for x in state.values()]
    return {
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "weights": sum(x.nbytes for x in (*model.parameters(), *model.buffers())),
        "optimizer": sum(x.nbytes for x in states if x.dim()),
        "peak": peak_memory_bytes(device) - before,
        "tokens_per_s": config.batch_size * c.block_size / seconds,
    }


def reset_peak_memory(device: torch.device) -> int:
    """From now on the peak is what is held, which is returned, bytes, and what comes; on macOS it stays."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")
    return peak_memory_bytes(device)


def memory_main() -> None:
    (config, c), rows = configs(__doc__, BenchConfig, ModelConfig), {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.pt"
        save(path, {"model": Llama(c).state_dict(), "config": asdict(c), "tokenizer": None})
        for name, savers in tqdm(ROWS.items(), desc="measuring", disable=None, leave=False):
            rows[name] = alone(name, measure, str(path), config, savers)
    show(config, rows, model=asdict(c))


# ---- training ----


def operations(model: Llama) -> int:
    """Floating-point operations that training on one token needs: 2 for each weight of a matrix in the
    forward and 4 in the backward, and as many for scores and values, half of which a causal mask hides."""
    c = model.config
    matrices = sum(p.numel() for p in model.layers.parameters() if p.dim() == 2) + c.vocab_size * c.dim
    return 6 * (matrices + c.n_layer * c.n_head * c.head_dim * c.block_size)


def train_speed(model: nn.Module, config: BenchConfig, dtype="auto", compiled: bool | None = None):
    """Tokens a second of training and evaluation on random tokens, and the peak, GiB."""
    device, c = pick_device(config.device), model.config
    dtype, settings = pick_dtype(dtype, device), TrainConfig(optimizer="adamw", compile=compiled)
    if compiling_pays(settings, math.inf, device):
        for part in model.layers if isinstance(model, Llama) else [model]:
            part.compile()
    optimizers = make_optimizers(model.to(device).train(), settings)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    text = torch.randint(c.vocab_size, (config.batch_size, c.block_size + 1), device=device)
    batch = text[:, :-1].contiguous(), text[:, 1:].contiguous()

    @torch.no_grad()
    def evaluate() -> None:
        with autocast(device, dtype):
            model(*batch).item()

    step = partial(train_step, model, [batch], optimizers, 5e-4, dtype, scaler)
    seconds = in_turns({"train_tok_s": step, "eval_tok_s": evaluate}, config.steps, warm_up=2)
    rates = {name: batch[0].numel() / statistics.median(own) for name, own in seconds.items()}
    return {**rates, "peak_gb": peak_memory_bytes(device) / 2**30}


def train_main() -> None:
    config, c = configs(__doc__, BenchConfig, ModelConfig)
    torch.manual_seed(0)
    device, model, tokens = pick_device(config.device), Llama(c), config.batch_size * c.block_size
    found = train_speed(model, config)
    if device.type == "cpu":  # the rate of a step's largest product, and the share of it that a step reaches
        like = {"dtype": pick_dtype("auto", device)}
        x, w = torch.randn(tokens, c.dim, **like), torch.randn(c.hidden_dim, c.dim, **like)
        seconds = statistics.median(timed(lambda: x @ w.T) for _ in range(20))
        rate = 2 * tokens * c.dim * c.hidden_dim / seconds
        found |= {"product_gflops": rate / 1e9, "reached": operations(model) * found["train_tok_s"] / rate}
    show(config, [found])


# ---- writing ----


@torch.no_grad()
def decode_rows(c: ModelConfig, config: BenchConfig) -> list[dict]:
    """{heads, cache_bytes, ms, ratio} with all K/V heads and with a half, a quarter and an eighth of them; ms
    is the median time of a token of all texts, ratio the median, over tokens, of the first's time by this."""
    if config.steps > c.block_size - 2:
        raise UserError(f"steps is {config.steps}: give --steps 1 to {c.block_size - 2}, block_size - 2")
    device, shape = pick_device(config.device), (config.batch_size, c.block_size - config.steps - 1)
    prompt, runs, caches = torch.randint(c.vocab_size, shape, device=device), {}, {}
    for n in [c.n_head // i for i in (1, 2, 4, 8) if c.n_head % i == 0]:
        model = Llama(replace(c, n_kv_head=n, k_groups=None, v_groups=None)).to(device).eval()
        caches[n] = KVCache(model.config, c.block_size)
        for part in prompt.split(128, dim=1):  # the scores of a whole prompt would need much memory
            model(part, cache=caches[n])
        runs[n] = lambda model=model, cache=caches[n]: model(prompt[:, :1], cache=cache).sum().item()
    rows, seconds = [], in_turns(runs, config.steps)
    for n, own in seconds.items():
        size = sum(x.nbytes for x in (*caches[n].keys, *caches[n].values))
        ratio = statistics.median(first / one for first, one in zip(seconds[c.n_head], own))
        rows.append({"heads": n, "cache_bytes": size, "ms": 1000 * statistics.median(own), "ratio": ratio})
    return rows


def decode_main() -> None:
    config, c = configs(__doc__, BenchConfig, ModelConfig)
    show(config, decode_rows(c, config))


def write_rows(models: dict[str, Llama], new: int, config: WriteConfig) -> list[dict]:
    """A row for each model: milliseconds of batch_size greedy texts of `new` tokens, and tokens a second."""
    for model in models.values():
        how, device = TrainConfig(compile=config.compile), model.tok_embeddings.weight.device
        if compiling_pays(how, 0, device):  # an error where it cannot work
            model.compile_step()
    prompts, rows = [[1]] * config.batch_size, []
    runs = {name: partial(model.generate, prompts, new) for name, model in models.items()}
    for name, seconds in in_turns(runs, config.steps).items():
        p5, median, p95 = (1000 * np.percentile(seconds, (5, 50, 95))).tolist()
        row = {"ckpt": name, "params": models[name].num_params(), "layers": models[name].config.n_layer}
        row |= {"median": median, "p5": p5, "p95": p95, "tokens": new}
        rows.append({**row, "tok_s": 1000 * config.batch_size * new / median})
    return rows


def write_main() -> None:
    config, c = configs(__doc__, WriteConfig, ModelConfig)
    device, new = pick_device(config.device), c.block_size - 1
    if config.ckpts:
        models = {path: build_model(load(path), device) for path in config.ckpts}  # in its own number format
        new = min(64, *(model.config.block_size - 1 for model in models.values()))
    else:
        models = {"random": Llama(c).to(device, pick_dtype("auto", device)).eval()}
    show(config, write_rows(models, new, config))
