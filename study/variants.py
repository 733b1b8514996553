"""Controls of the novel layer: how a block begins, and what a step of each variant costs.

    python -m study begin scaled --n_layer 6                     # train.py, from other first weights
    python -m study pace "--n_layer 6" "--n_layer 6 --novel"     # ms of a compiled step, in turns

The novel layer multiplies what attention adds to the stream by SILU'(0) = 1/2 and by its own weights, whose
deviation is 0.02 and whose width D: at first by 0.01 sqrt(D), an 18th where D is 32. `scaled` gives a plain
block so small a beginning by its wo, and `torch` gives the novel layer the first weights of nn.Linear, of
deviation 1 / sqrt(3 D), with which it multiplies by 0.29; its bias begins as zero in both.
"""

import math
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch

import train
from common import UserError, parse, pick, pick_device, pick_dtype
from model import Llama, ModelConfig
from study.bench import BenchConfig, configs, in_turns, show
from train import TrainConfig


@torch.no_grad()
def change(model: Llama, how: str) -> None:
    """Give the model's blocks other first weights."""
    for layer in model.layers:
        attention = layer.attention
        if how == "scaled":
            attention.wo.weight.mul_(0.01 * math.sqrt(attention.head_dim))
        elif attention.novel is None:
            raise UserError("torch is how the novel layer may begin: give --novel")
        else:
            attention.novel.reset_parameters()
            attention.novel.bias.zero_()


def begin_main() -> None:
    how = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if how not in ("scaled", "torch"):
        raise UserError(f"begin {how}: give scaled or torch, then flags of train.py")
    train.main(None if "--resume" in sys.argv else partial(change, how=how))


@dataclass
class PaceConfig:
    """pace"""

    shapes: list[str]  # flags of train.py for each variant, in quotes


def compiled_step(shape: str, config: BenchConfig) -> Callable:
    """A step of train.py's optimizers on random tokens, compiled where train.py would compile it."""
    sys.argv = ["pace", *shlex.split(shape)]
    flags, device = parse(__doc__, ModelConfig, TrainConfig), pick_device(config.device)
    c, own = (cls(**pick(cls, flags)) for cls in (ModelConfig, TrainConfig))
    model, rows = Llama(c).to(device).train(), flags.get("batch_size", config.batch_size)
    if train.compiling_pays(own, math.inf, device):
        for layer in model.layers:
            layer.compile()
    dtype, optimizers = pick_dtype("auto", device), train.make_optimizers(model, own)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    text = torch.randint(c.vocab_size, (rows, c.block_size + 1), device=device)
    batch = text[:, :-1].contiguous(), text[:, 1:].contiguous()
    return partial(train.train_step, model, [batch], optimizers, 1e-4, dtype, scaler)


def pace_main() -> None:
    """ratio: the median of the first variant's time by this one's."""
    asked, config = configs(__doc__, PaceConfig, BenchConfig)
    seconds = in_turns(
        {shape: compiled_step(shape, config) for shape in asked.shapes}, config.steps, warm_up=3
    )
    first, rows = next(iter(seconds.values())), []
    for shape, own in seconds.items():
        ratio = median(a / b for a, b in zip(first, own))
        rows.append({"variant": shape, "ms": 1000 * median(own), "ratio": ratio})
    show(config, rows)
