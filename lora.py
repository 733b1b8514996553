"""LoRA and QLoRA by hand: a small trainable product beside each frozen matrix (arXiv 2106.09685).

A frozen layer y = W x becomes y = W x + (alpha / r) B A dropout(x), with A (r, in) and B (out, r): r (in +
out) numbers learn instead of in * out. A starts random and B at zero, so the model starts unchanged. After
training the product can be added to W (checkpoint.py merge). In QLoRA (arXiv 2305.14314) W is stored in 4
bits (nf4.py).

    python train.py --init_from ckpt.pt --lora_r 8                     # trains the adapter only
    python train.py --init_from ckpt.pt --lora_r 8 --quantize nf4      # QLoRA
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import bounded
from model import Llama, widen
from nf4 import NF4Linear, linear_of

Target = Literal["wq", "wk", "wv", "wo", "w1", "w2", "w3", "output"]
TARGETS = get_args(Target)


@dataclass
class LoRAConfig:
    """adapter"""

    lora_r: int = bounded(0, 0, 2**20)  # rank of the adapter; 8 is usual, 0 trains the whole model
    lora_alpha: float = bounded(16.0, 1e-9, 1e9)  # the product is scaled by lora_alpha / lora_r
    lora_dropout: float = bounded(0.0, 0, 0.99)  # on the adapter's input
    lora_targets: list[Target] | None = None  # the layers that get an adapter (default: wq wk wv wo)
    quantize: Literal["none", "nf4"] = "none"  # how the frozen matrices of the blocks are stored

    def __post_init__(self):
        self.lora_targets = list(dict.fromkeys(self.lora_targets or TARGETS[:4]))


class LoRALinear(nn.Module):
    """A frozen linear layer and a low-rank product beside it, which begins as zero."""

    def __init__(self, linear: nn.Linear | NF4Linear, r: int, alpha: float, dropout: float):
        super().__init__()
        self.linear, self.scale = linear.requires_grad_(False), alpha / r
        weight = linear.codes if isinstance(linear, NF4Linear) else linear.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)  # also beside bfloat16: autocast casts both
        self.lora_A = nn.Parameter(weight.new_empty(r, linear.in_features, dtype=dtype))
        self.lora_B = nn.Parameter(weight.new_zeros(linear.out_features, r, dtype=dtype))
        # uniform within +-1 / sqrt(in), as in loralib and PEFT; the paper says Gaussian
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = F.linear(self.dropout(x), self.lora_A)  # (..., r)
        return self.linear(x) + self.scale * F.linear(low, self.lora_B)

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """One layer with W + (alpha / r) B A, summed in float32 or wider; W itself stays as it is."""
        old = self.linear.to_linear() if isinstance(self.linear, NF4Linear) else self.linear
        total = widen(old.weight) + self.scale * widen(self.lora_B) @ widen(self.lora_A)
        return linear_of(total.to(old.weight.dtype) if old is self.linear else total)


def replace(model: nn.Module, names: Iterable[str], kinds: type | tuple, make: Callable) -> None:
    """Put make(layer) in the place of every layer of these kinds whose own name is among `names`."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if name in names and isinstance(layer, kinds):
                setattr(parent, name, make(layer))


def adapt(model: Llama, config: LoRAConfig) -> Llama:
    """The model, changed as the settings say: the blocks' matrices in NF4, one after the other, and,
    with lora_r above 0, an adapter beside each layer in lora_targets, all else frozen."""
    assert not adapters(model), "the model has an adapter already"
    if config.quantize == "nf4":
        replace(model.layers, TARGETS[:7], nn.Linear, NF4Linear)
    if config.lora_r:
        how = config.lora_r, config.lora_alpha, config.lora_dropout
        replace(model, config.lora_targets, (nn.Linear, NF4Linear), lambda layer: LoRALinear(layer, *how))
        for name, p in model.named_parameters():
            p.requires_grad_(name.endswith(("lora_A", "lora_B")))
    return model


def adapters(model: nn.Module) -> list[LoRALinear]:
    return [layer for layer in model.modules() if isinstance(layer, LoRALinear)]


def plain(model: Llama) -> Llama:
    """The model, in place an ordinary Llama: adapters merged, 4 bits dequantized, the wrappers gone."""
    if isinstance(model.output, LoRALinear):  # an adapted output is no longer the embeddings
        model.config.tie_embeddings = False
    replace(model, TARGETS, (LoRALinear, NF4Linear), lambda layer: layer.to_linear())
    for name, p in model.named_parameters():
        p.requires_grad_(not name.endswith("_mix"))  # of latents, fixed
    return model
