"""For developers: another project's model, trained as usual (AdamW, warm-up, cosine) on the batches of train.py, and
the loss that it has come to after how many seconds; for plot.py.

    python tests/time_to_loss.py llama2.c out/llama2c --source llama2.c/model.py --n_layer 6 --dim 288 --n_head 6
    python plot.py loss herd=out/RUN "llama2.c's model=out/llama2c" --against seconds

As in train.py, time is that of training alone, compiling included, and the evaluations are of some of the val split in
bfloat16, the last of all of it in float32.
"""

import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from compare_speed import other

from config import UserError, exit_cleanly, parse, pick
from dataset import Text, prepared
from model import ModelConfig
from progress import Log
from train import TrainConfig, learning_rate


@dataclass
class LossConfig:
    """training"""

    peer: Literal["llama2.c", "nanoGPT", "transformers"]  # whose model
    out: str  # the folder of its log.jsonl
    source: str | None = None  # model.py of llama2.c, or of nanoGPT
    dataset: str = "stdlib"  # a name that data/prepare.py knows or has prepared, or a folder
    batch_size: int = 16  # sequences of a step
    max_steps: int = 330  # optimizer steps
    eval_every: int = 25  # steps between evaluations


@torch.no_grad()
def val_loss(model, loss, tokens: np.ndarray, block: int, most: int, how) -> float:
    """Mean over non-overlapping blocks, nats a token: some `most` tokens, evenly spread."""
    stride, found = max(block, block * len(tokens) // most), []
    model.eval()
    for start in range(0, len(tokens) - block, stride):
        text = torch.from_numpy(tokens[start : start + block + 1].astype(np.int64))[None]
        with how:
            found.append(loss(model, text[:, :-1].contiguous(), text[:, 1:].contiguous()).item())
    model.train()
    return sum(found) / len(found)


def main() -> None:
    values = parse(__doc__, LossConfig, ModelConfig)
    c, config = ModelConfig(**pick(ModelConfig, values)), LossConfig(**pick(LossConfig, values))
    if config.peer != "transformers" and not Path(config.source or "").is_file():
        raise UserError(f"--source {config.source} is no file: give the model.py of {config.peer}")
    usual = TrainConfig(optimizer="adamw", max_steps=config.max_steps, eval_every=config.eval_every)
    folder, meta, _ = prepared(config.dataset)
    data, val = (Text(folder, meta, split, c.block_size) for split in ("train", "val"))
    model, loss = other(config.peer, c, config.source)
    run, rounding = torch.compile(model), torch.autocast("cpu", torch.bfloat16)
    decays = {"weight_decay": usual.weight_decay}
    optimizer = torch.optim.AdamW(model.parameters(), lr=usual.lr, betas=(0.9, 0.95), fused=True, **decays)
    Path(config.out).mkdir(parents=True, exist_ok=True)
    log, seconds = Log(Path(config.out) / "log.jsonl", None), 0.0
    for step in range(usual.max_steps):
        optimizer.param_groups[0]["lr"] = learning_rate(usual, step)
        began = time.perf_counter()
        ((x, y),) = data.step_batches(config.batch_size, 1, usual.seed, step)
        with rounding:
            found = loss(run, x, y)
        found.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), usual.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds += time.perf_counter() - began
        tokens = (step + 1) * x.numel()
        log.write({"step": step + 1, "loss": found.item(), "seconds": seconds, "tokens": tokens})
        last = step + 1 == usual.max_steps
        if last or (step + 1) % usual.eval_every == 0:
            most, how = (len(val.tokens), nullcontext()) if last else (usual.eval_tokens, rounding)
            reached = val_loss(model, loss, val.tokens, c.block_size, most, how)
            log.write({"step": step + 1, "val_loss": reached})
            print(f"step {step + 1}/{usual.max_steps} | {seconds:.1f} s | val loss {reached:.4f}", flush=True)


if __name__ == "__main__":
    exit_cleanly(main)
