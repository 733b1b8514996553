"""Timing and memory tables, each row measured in a process of its own.

    python bench.py memory                                         # what each memory saver saves, and what it costs
    python bench.py memory --n_layer 12 --dim 768 --batch_size 4   # of a larger model

`memory` trains a model of random weights for some steps, with the same number of tokens a step in every row:
everything in float32; an adapter alone; the adapter with one saver more at a time; the base in 4 bits; all together.
Of a tiny model, or in a step or two, it measures overheads.

    weights    bytes of the model's tensors, adapter included
    optimizer  bytes of AdamW's two moments
    peak       the most memory that a step takes, weights included, beyond that of a process that has warmed torch up;
               on a Mac, which does not reset it, the most since the process began
"""

import json
import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from checkpoint import load, save
from config import UserError, exit_cleanly, parse, pick
from device import autocast, memory_bytes, peak_memory_bytes, pick_device, pick_dtype, reset_peak_memory
from lora import LoRAConfig
from model import Llama, ModelConfig
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
    "all together": SAVERS,
}


@dataclass
class BenchConfig:
    """benchmark"""

    action: Literal["memory"]  # the table to print
    batch_size: int = 16  # sequences of a step, of block_size tokens each
    grad_accum: int = 4  # micro-batches of a step, where a row accumulates
    steps: int = 5  # steps that are timed; one more comes before them
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
        forward_backward(model, batches, dtype, scaler).item()
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
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                try:
                    found[name] = process.submit(measure, str(path), lora, config, savers).result()
                except BrokenProcessPool:
                    raise UserError(f"out of memory in {name!r}: give a smaller --batch_size or model") from None
    return found


def main() -> None:
    flags = parse(__doc__, BenchConfig, ModelConfig, LoRAConfig)
    config, c = BenchConfig(**pick(BenchConfig, flags)), ModelConfig(**pick(ModelConfig, flags))
    lora = LoRAConfig(**{"lora_r": 8, **pick(LoRAConfig, flags)})
    if config.grad_accum < 1 or config.batch_size < 1 or config.batch_size % config.grad_accum or config.steps < 1:
        values = f"batch_size {config.batch_size}, grad_accum {config.grad_accum}, steps {config.steps}"
        raise UserError(f"{values}: give each 1 or more, --grad_accum a divisor of --batch_size")
    if lora.quantize != "none" or lora.lora_r < 1:
        raise UserError("bench.py measures with and without NF4: give --lora_r 1 or more, and drop --quantize")
    found = memory(c, lora, config)
    if config.json:
        print(json.dumps({"model": asdict(c), "lora": asdict(lora), "bench": asdict(config), "rows": found}))
        return
    count = Llama(c).num_params()
    print(f"{count:,} parameters, {config.batch_size} x {c.block_size} tokens a step, LoRA of rank {lora.lora_r}")
    print(f"{'':32}{'trainable':>13}{'weights':>12}{'optimizer':>12}{'peak':>12}{'tokens/s':>12}")
    for name, row in found.items():
        sizes = "".join(f"{row[key] / 2**20:8.1f} MiB" for key in ("weights", "optimizer", "peak"))
        print(f"{name:32}{row['trainable']:>13,}{sizes}{row['tokens_per_s']:>12,.0f}")


if __name__ == "__main__":
    exit_cleanly(main)
