"""Controls of the novel layer: train.py, from other first weights.

    python -m study begin scaled --n_layer 6 --out_dir out/scaled
    python -m study begin torch --n_layer 6 --novel --out_dir out/torch

The novel layer multiplies what attention adds to the stream by SILU'(0) = 1/2 and by its own weights, whose
deviation is 0.02 and whose width D: at first by 0.01 sqrt(D), an 18th where D is 32. `scaled` gives a plain
block so small a beginning by its wo, and `torch` gives the novel layer the first weights of nn.Linear, of
deviation 1 / sqrt(3 D), with which it multiplies by 0.29; its bias begins as zero in both.
"""

import math
import sys
from functools import partial

import torch

import train
from common import require
from model import Llama


@torch.no_grad()
def change(model: Llama, how: str) -> None:
    """Give the model's blocks other first weights."""
    for layer in model.layers:
        attention = layer.attention
        if how == "scaled":
            attention.wo.weight.mul_(0.01 * math.sqrt(attention.head_dim))
        else:
            require(attention.novel is not None, "torch is how the novel layer may begin: give --novel")
            attention.novel.reset_parameters()
            attention.novel.bias.zero_()


def begin_main() -> None:
    how = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if how in ("-h", "--help"):
        return print(__doc__)
    require(how in ("scaled", "torch"), "begin takes scaled or torch, and then flags of train.py")
    train.main(None if "--resume" in sys.argv else partial(change, how=how))
