"""Controls of the novel layer: how a block begins, and what a step of each variant costs.

    python -m study begin scaled --n_layer 6                     # train.py, from other first weights
    python -m study pace "--n_layer 6" "--n_layer 6 --novel"     # ms of a compiled step, in turns

The novel layer multiplies what attention adds to the stream by SILU'(0) = 1/2 and by its own weights, whose
deviation is 0.02 and whose width D: at first by 0.01 sqrt(D), an 18th where D is 32. `scaled` gives a plain
block so small a beginning by its wo, and `torch` gives the novel layer the first weights of nn.Linear, of
deviation 1 / sqrt(3 D), with which it multiplies by 0.29; its bias begins as zero in both.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch

import train
from common import UserError, pick_device, pick_dtype, require
from model import Llama, ModelConfig
from study.bench import BenchConfig, configs, in_turns, random_step, ratios, show
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
    require(how in ("scaled", "torch"), f"begin {how}: give scaled or torch, then flags of train.py")
    train.main(None if "--resume" in sys.argv else partial(change, how=how))


@dataclass
class PaceConfig:
    """pace"""

    shapes: list[str]  # flags of train.py for each variant, in quotes


def step_of(shape: str, config: BenchConfig) -> Callable:
    """A step of train.py with these flags, on random tokens."""
    sys.argv = ["pace", "--batch_size", str(config.batch_size), *shape.split()]  # the last one counts
    (c, own), device = configs(__doc__, ModelConfig, TrainConfig), pick_device(config.device)
    size = own.batch_size * own.grad_accum, c.block_size
    model = Llama(c).to(device)
    model.checkpoint_activations = own.checkpoint_activations
    return random_step(model, own, size, pick_dtype(own.dtype, device), own.grad_accum)[0]


def pace_main() -> None:
    """ratio: the median of the first variant's time by this one's."""
    asked, config = configs(__doc__, PaceConfig, BenchConfig)
    runs = {shape: step_of(shape, config) for shape in asked.shapes}
    seconds = in_turns(runs, config.steps, warm_up=3)
    ratio = ratios(seconds)
    rows = [{"variant": v, "ms": 1000 * median(own), "ratio": ratio[v]} for v, own in seconds.items()]
    show(config, rows)
