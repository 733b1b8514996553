"""Timing and memory tables.

    python bench.py memory                                         # what each memory saver saves, and what it costs
    python bench.py memory --n_layer 12 --dim 768 --batch_size 4   # of a larger model
    python bench.py decode --block_size 1024                       # what fewer K/V heads buy in generation
    python bench.py attention --init_from ckpt.pt                  # attention x pretraining_tp, in a short QLoRA run
    python bench.py kernel                                         # the Triton kernels by themselves; needs a GPU
    python bench.py train                                          # speed of training and evaluation, and its limits
    python bench.py generate --batch 16                            # speed of writing
    python bench.py latency --ckpts a/ckpt.pt b/ckpt.pt --steps 20 # how long a text takes, checkpoints in turns

`memory` trains a model of random weights for some steps, each row in a process of its own and with the same number of
tokens a step: everything in float32; an adapter alone; the adapter with one saver more at a time; the base in 4 bits;
all together.
Of a tiny model, or in a step or two, it measures overheads.

    weights    bytes of the model's tensors, adapter included
    optimizer  bytes of AdamW's two moments
    peak       the most memory that a step takes, weights included, beyond that of a process that has warmed torch up;
               on a Mac, which does not reset it, the most since the process began

`decode` fills the caches of models of random weights, with all K/V heads and with a half, a quarter and an eighth of
them, up to `steps` tokens before block_size, and then adds a token at a time to each in turn.

`train` takes some steps on random tokens, in the number format and compiled as train.py would for a long run, and says
which part of a step takes how long, from the profiler, and how near the whole comes to the rate of its largest product.
`generate` writes greedy texts with the KV cache and counts the tokens that they have together. `latency` writes 64
tokens `steps` times with each of some checkpoints.

`attention` fine-tunes a checkpoint with train.py, each row from the same seed and in a process of its own, and then
times greedy texts of 100 tokens. It fails if another attention than the row's was computed even once.

`kernel` compares the fused kernels with PyTorch's and with the textbook, for as many K/V heads as query heads, for
equal groups, and for uneven ones, K and V apart. The last column is the share of what this GPU does in a large product
(forward, backward) or a large copy (decode).
"""

import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from bench_attention import alone, attention_table, kernel_table, print_attention, print_kernel
from bench_speed import generate_speed, latencies, print_generate, print_latencies, print_train, train_speed
from checkpoint import load, save
from config import UserError, exit_cleanly, parse, pick
from device import autocast, memory_bytes, peak_memory_bytes, pick_device, pick_dtype, reset_peak_memory
from lora import LoRAConfig
from model import KVCache, Llama, ModelConfig
from settings import TrainConfig
from train import forward_backward, make_optimizers, starting_model, update

SAVERS = ("lora", "amp", "accumulation", "checkpointing", "nf4")
ROWS = {  # what is measured, and the savers that it has
    "full fine-tune": (),
    "LoRA": ("lora",),
    "LoRA + AMP": ("lora", "amp"),
    "LoRA + accumulation": ("lora", "accumulation"),
    "LoRA + activation checkpointing": ("lora", "checkpointing"),
    "QLoRA": ("lora", "nf4"),
    "LoRA + AMP + accumulation + checkpointing": SAVERS[:4],
    "all together": SAVERS,
}


@dataclass
class BenchConfig:
    """benchmark"""

    action: Literal["memory", "decode", "attention", "kernel", "train", "generate", "latency"]  # the table to print
    batch: int = 1  # generate, latency: texts that are written at a time
    batch_size: int = 16  # sequences of a step, of block_size tokens each
    grad_accum: int = 4  # memory: micro-batches of a step, where a row accumulates
    steps: int = 5  # steps, decoded tokens or texts that are timed, after one more; attention: 10 x steps, 4 x texts
    init_from: str | None = None  # attention: the ckpt.pt to fine-tune
    ckpts: list[str] | None = None  # latency: the checkpoints that take turns
    dataset: str | None = None  # attention: the data to fine-tune on (default: the checkpoint's own)
    optimizer: Literal["adamw", "muon"] = "adamw"  # train: as for train.py
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # train, generate: as for train.py
    compile: bool | None = None  # train, generate (default: as train.py in a long run), latency (default: no)
    device: str = "auto"  # cuda, mps, cpu or auto
    json: bool = False  # print one JSON object and nothing else


def measure(path: str, lora: LoRAConfig, config: BenchConfig, savers: tuple[str, ...]) -> dict:
    """Train the checkpoint for some steps with these savers. It is called in a process of its own."""
    device, dtype = pick_device(config.device), torch.float32
    if "amp" in savers:
        dtype = pick_dtype("auto", device) if device.type == "cuda" else torch.bfloat16
    for size in (64, 32):  # libraries and threads come with the first products, and are not what is measured
        with autocast(device, dtype):
            torch.nn.Linear(size, size, device=device)(torch.ones(size, size, device=device)).sum().backward()
    before = memory_bytes(device)
    checkpoint = load(path)
    c = ModelConfig(**checkpoint["config"])
    lora = replace(lora, quantize="nf4" if "nf4" in savers else "none") if "lora" in savers else LoRAConfig()
    model = starting_model(c, lora, checkpoint, device)
    del checkpoint
    model.checkpoint_activations = "checkpointing" in savers
    train = TrainConfig(optimizer="adamw", lr=1e-4)
    optimizers, scaler = make_optimizers(model, train), torch.amp.GradScaler(device.type, enabled=False)
    reset_peak_memory(device)
    seconds, generator = [], torch.Generator().manual_seed(0)
    for _ in range(config.steps + 1):
        tokens = torch.randint(c.vocab_size, (config.batch_size, c.block_size + 1), generator=generator)
        size = config.batch_size // config.grad_accum if "accumulation" in savers else config.batch_size
        batches = [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in tokens.split(size)]
        began = time.perf_counter()
        forward_backward(model, batches, dtype, scaler)
        update(model, optimizers, scaler, train, train.lr)
        seconds.append(time.perf_counter() - began)
    states = [x for optimizer in optimizers for state in optimizer.state.values() for x in state.values()]
    return {
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "weights": sum(x.nbytes for x in (*model.parameters(), *model.buffers())),
        "optimizer": sum(x.nbytes for x in states if x.dim()),
        "peak": peak_memory_bytes(device) - before,
        "tokens_per_s": config.batch_size * c.block_size / statistics.median(seconds[1:]),
    }


def memory(c: ModelConfig, lora: LoRAConfig, config: BenchConfig) -> dict:
    """{row: what `measure` says}."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.pt"
        save(path, {"model": Llama(c).state_dict(), "config": asdict(c), "tokenizer": None})
        for name, savers in tqdm(ROWS.items(), desc="measuring", disable=None, leave=False):
            found[name] = alone(name, measure, str(path), lora, config, savers)
    return found


def print_memory(c: ModelConfig, lora: LoRAConfig, config: BenchConfig) -> None:
    if config.batch_size % config.grad_accum:
        values = f"batch_size {config.batch_size}, grad_accum {config.grad_accum}"
        raise UserError(f"{values}: give --grad_accum a divisor of --batch_size")
    if lora.quantize != "none" or lora.lora_r < 1:
        raise UserError("bench.py measures with and without NF4: give --lora_r 1 or more, and drop --quantize")
    found = memory(c, lora, config)
    if config.json:
        print(json.dumps({"model": asdict(c), "lora": asdict(lora), "bench": asdict(config), "rows": found}))
        return
    count = Llama(c).num_params()
    print(f"{count:,} parameters, {config.batch_size} x {c.block_size} tokens a step, LoRA of rank {lora.lora_r}")
    print(f"{'':42}{'trainable':>13}{'weights':>12}{'optimizer':>12}{'peak':>12}{'tokens/s':>12}")
    for name, row in found.items():
        sizes = "".join(f"{row[key] / 2**20:8.1f} MiB" for key in ("weights", "optimizer", "peak"))
        print(f"{name:42}{row['trainable']:>13,}{sizes}{row['tokens_per_s']:>12,.0f}")


@torch.no_grad()
def decode(c: ModelConfig, config: BenchConfig) -> list[dict]:
    """{heads, cache_bytes, ms, ratio} of each number of K/V heads; ms is the median time of a token of all rows, ratio
    the median, over tokens, of the first model's time by this one's."""
    device, rows = pick_device(config.device), []
    heads = [n for n in (c.n_head, c.n_head // 2, c.n_head // 4, c.n_head // 8) if n and c.n_head % n == 0]
    models = [Llama(replace(c, n_kv_head=n, k_groups=None, v_groups=None)).to(device).eval() for n in heads]
    caches = [KVCache(model.config, c.block_size) for model in models]
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(c.vocab_size, (config.batch_size, c.block_size - config.steps - 1), generator=generator)
    for model, cache in zip(models, caches):
        for part in prompt.to(device).split(128, dim=1):  # the scores of a whole prompt would need much memory
            model(part, cache=cache)
    ms = [[] for _ in models]
    for _ in range(config.steps + 1):
        token = torch.randint(c.vocab_size, (config.batch_size, 1), generator=generator).to(device)
        for times, model, cache in zip(ms, models, caches):
            began = time.perf_counter()
            model(token, cache=cache).sum().item()
            times.append(1000 * (time.perf_counter() - began))
    for n, times, cache in zip(heads, ms, caches):
        ratios = [first / own for first, own in zip(ms[0][1:], times[1:])]
        row = {"heads": n, "cache_bytes": cache.nbytes, "ms": statistics.median(times[1:])}
        rows.append({**row, "ratio": statistics.median(ratios)})
    return rows


def print_decode(c: ModelConfig, config: BenchConfig) -> None:
    if config.steps > c.block_size - 2:
        raise UserError(f"steps {config.steps} of block_size {c.block_size}: give --steps 1 to {c.block_size - 2}")
    rows = decode(c, config)
    if config.json:
        print(json.dumps({"model": asdict(c), "bench": asdict(config), "rows": rows}))
        return
    print(f"{config.batch_size} sequences, {config.steps} tokens after {c.block_size - config.steps:,}")
    print(f"{'K/V heads':>12}{'KV cache':>14}{'a token':>12}{'speed':>10}")
    for row in rows:
        size, ms, ratio = row["cache_bytes"] / 2**20, row["ms"], row["ratio"]
        print(f"{row['heads']:>5} of {c.n_head:<4}{size:>10.1f} MiB{ms:>9.1f} ms{ratio:>8.2f} x")


def main() -> None:
    flags = parse(__doc__, BenchConfig, ModelConfig, LoRAConfig)
    config = BenchConfig(**pick(BenchConfig, flags))
    model, adapter = pick(ModelConfig, flags), pick(LoRAConfig, flags)
    used = {  # by each table, besides --device and --json
        "memory": {"batch_size", "grad_accum", "steps", *model, *adapter},
        "decode": {"batch_size", "steps", *model} - {"n_kv_head"},
        "attention": {"init_from", "dataset", "batch_size", "steps", *adapter} - {"quantize"},
        "kernel": {"batch_size", "n_head", "head_dim"},
        "train": {"batch_size", "steps", "optimizer", "dtype", "compile", *model},
        "generate": {"batch", "steps", "dtype", "compile", *model},
        "latency": {"ckpts", "batch", "steps", "compile"},
    }
    if surplus := sorted(set(flags) - used[config.action] - {"action", "device", "json"}):
        raise UserError(f"{config.action} does not use --{surplus[0]}: leave it out")
    for name in ("batch", "batch_size", "grad_accum", "steps"):
        if getattr(config, name) < 1:
            raise UserError(f"{name} is {getattr(config, name)}: give --{name} 1 or more")
    lora = LoRAConfig(**{"lora_r": 8, **adapter})
    if config.action == "memory":
        print_memory(ModelConfig(**model), lora, config)
    elif config.action == "decode":
        print_decode(ModelConfig(**model), config)
    elif config.action in ("train", "generate"):
        training = config.action == "train"
        found = (train_speed if training else generate_speed)(ModelConfig(**model), config)
        show = print_train if training else print_generate
        print(json.dumps(found)) if config.json else show(found)
    elif config.action == "latency":
        rows = latencies(config)
        print(json.dumps({"bench": asdict(config), "rows": rows})) if config.json else print_latencies(rows)
    elif config.action == "attention":
        rows = attention_table(config, lora)
        found = {"lora": asdict(lora), "bench": asdict(config), "rows": rows}
        print(json.dumps(found)) if config.json else print_attention(rows)
    else:
        found = kernel_table(config, model.get("n_head", 16), model.get("head_dim", 64))
        print(json.dumps(found)) if config.json else print_kernel(found)


if __name__ == "__main__":
    exit_cleanly(main)
