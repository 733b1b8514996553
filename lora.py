"""LoRA and QLoRA by hand: a small trainable product beside each of a model's frozen matrices (arXiv 2106.09685).

A frozen layer y = W x becomes y = W x + (alpha / r) B A dropout(x), with A (r, in) and B (out, r): r (in + out) numbers
learn instead of in * out. A begins random and B at zero, so that the model begins as it was. After training the product
can be added into W (`merge`), which costs nothing at inference. In QLoRA (arXiv 2305.14314) W is stored in 4 bits
(nf4.py). Nothing here merges, freezes or quantizes unless it is called.

    python train.py --init_from ckpt.pt --lora_r 8                     # a run that trains only the adapter
    python train.py --init_from ckpt.pt --lora_r 8 --quantize nf4      # QLoRA
    python lora.py merge out/RUN/ckpt.pt --out merged.pt               # an ordinary checkpoint, dequantized
    python lora.py export out/RUN/ckpt.pt adapter.pt                   # the adapter alone
    python lora.py export out/RUN/ckpt.pt FOLDER                       # the adapter alone, in PEFT's format
    python lora.py import FOLDER ckpt.pt --out with_adapter.pt         # either of these, beside a base's weights
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn

from config import UserError, exit_cleanly
from cross_entropy import widen
from model import Llama
from nf4 import NF4Linear
from projection import Projection, sliced_linear

TARGETS = ("wq", "wk", "wv", "wo", "w1", "w2", "w3", "output")
ATTENTION = TARGETS[:4]


@dataclass
class LoRAConfig:
    """adapter"""

    lora_r: int = 0  # rank of the adapter, which alone is trained; 8 is usual, 0 trains the whole model
    lora_alpha: float = 16.0  # the adapter's product is scaled by lora_alpha / lora_r: twice the rank is usual
    lora_dropout: float = 0.0  # on the adapter's input
    lora_targets: list[str] | None = None  # any of wq wk wv wo w1 w2 w3 output (default: wq wk wv wo)
    quantize: Literal["none", "nf4"] = "none"  # how the frozen matrices of the blocks are stored

    def __post_init__(self):
        self.lora_targets = list(dict.fromkeys(self.lora_targets or ATTENTION))
        check_targets(self.lora_targets)
        if not 0 <= self.lora_r <= 2**20 or not 0 < self.lora_alpha < math.inf or not 0 <= self.lora_dropout < 1:
            values = f"lora_r {self.lora_r}, lora_alpha {self.lora_alpha}, lora_dropout {self.lora_dropout}"
            raise UserError(f"{values}: give --lora_r 1 or more, --lora_alpha above 0, --lora_dropout from 0 below 1")
        if self.quantize != "none" and not self.lora_r:
            raise UserError("--quantize freezes the model: give --lora_r 8, so that an adapter learns")


def check_targets(names: Sequence[str]) -> None:
    if unknown := [name for name in names if name not in TARGETS]:
        raise UserError(f"--lora_targets {unknown[0]}: no such layer; take any of {' '.join(TARGETS)}, with spaces")


class LoRALinear(nn.Module):
    """A frozen linear layer and a low-rank product beside it; as it is made, equal to the layer alone."""

    def __init__(self, linear: Projection | NF4Linear, r: int = 8, alpha: float = 16.0, dropout: float = 0.0):
        super().__init__()
        assert getattr(linear, "bias", None) is None, "a Llama's matrices have no bias, and merging would lose it"
        self.linear, self.scale = linear.requires_grad_(False), alpha / r
        weight = linear.codes if isinstance(linear, NF4Linear) else linear.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)  # of a bfloat16 base, too, the adapter is float32
        like = {"device": weight.device, "dtype": dtype}
        self.lora_A = nn.Parameter(torch.empty(r, linear.in_features, **like))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, r, **like))
        # nn.Linear's own start, uniform within +-1 / sqrt(in), as in loralib and PEFT; the paper says Gaussian
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.dropout = nn.Dropout(dropout)
        self.merged: Projection | None = None  # a submodule, so that a state dict shows that the model is merged

    def forward(self, x: torch.Tensor, slices: int = 1, columns: bool = False) -> torch.Tensor:
        if self.merged is not None:
            return self.merged(x, slices, columns)
        # a rank holds the columns of A or the rows of B that belong to its slice of W, and all of the other
        low = sliced_linear(self.dropout(x), self.lora_A, slices if columns else 1, columns=True)
        high = sliced_linear(low, self.lora_B, 1 if columns else slices)
        return self.linear(x, slices, columns) + self.scale * high

    @torch.no_grad()
    def merge(self) -> None:
        """From now on one product with W + (alpha / r) B A, a sum made in float32 or wider; W itself stays as it is."""
        assert self.merged is None, "merged already"
        weight = plain_linear(self.linear).weight
        total = widen(weight) + self.scale * widen(self.lora_B) @ widen(self.lora_A)
        self.merged = linear_of(total if isinstance(self.linear, NF4Linear) else total.to(weight.dtype))

    def unmerge(self) -> None:
        """The layer and its adapter again, bit for bit."""
        assert self.merged is not None, "not merged"
        self.merged = None


def linear_of(weight: torch.Tensor) -> Projection:
    """A frozen layer with this weight (out, in)."""
    linear = Projection(weight.shape[1], weight.shape[0], device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def plain_linear(layer: Projection | NF4Linear) -> Projection:
    return linear_of(layer.dequantize()) if isinstance(layer, NF4Linear) else layer


def replace(model: nn.Module, names: Iterable[str], kinds: type | tuple, make) -> None:
    """Put make(layer) in the place of every layer of these kinds whose own name, not a part of it, is among `names`."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if name in names and isinstance(layer, kinds):
                setattr(parent, name, make(layer))


def apply_lora(
    model: Llama, r: int = 8, alpha: float = 16.0, dropout: float = 0.0, targets: Sequence[str] = ATTENTION
) -> None:
    """Give each layer of these names an adapter, and freeze everything else.

    Raises UserError for a name that no layer has.
    """
    assert not adapters(model), "the model has an adapter already"
    check_targets(targets)
    replace(model, targets, (Projection, NF4Linear), lambda layer: LoRALinear(layer, r, alpha, dropout))
    freeze(model)


def freeze(model: nn.Module) -> None:
    """Only adapters learn."""
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith(("lora_A", "lora_B")))


def quantize_blocks(model: Llama) -> None:
    """Store the matrices of the blocks in NF4, one after the other. Embeddings, output, norms and the novel layers,
    which are few or looked up, not multiplied, stay as they are."""
    assert not adapters(model), "quantize first: what has an adapter would be passed over"
    replace(model.layers, TARGETS[:7], Projection, NF4Linear.from_linear)


def adapt(model: Llama, config: LoRAConfig) -> Llama:
    """The model, changed as the settings say."""
    if config.quantize == "nf4":
        quantize_blocks(model)
    if config.lora_r:
        apply_lora(model, config.lora_r, config.lora_alpha, config.lora_dropout, config.lora_targets)
    return model


def merge(model: nn.Module) -> None:
    """Add every adapter into its layer; `unmerge` undoes it. A tied output is a matrix of its own while merged."""
    for layer in adapters(model):
        layer.merge()


def unmerge(model: nn.Module) -> None:
    for layer in adapters(model):
        layer.unmerge()


def adapters(model: nn.Module) -> list[LoRALinear]:
    return [layer for layer in model.modules() if isinstance(layer, LoRALinear)]


def plain(model: Llama) -> Llama:
    """An ordinary Llama for good: adapters merged, quantized layers dequantized, the wrappers gone."""
    tied = model.config.tie_embeddings and not isinstance(model.output, LoRALinear)
    model.config.tie_embeddings = tied  # an adapted output is no longer the embeddings
    for layer in adapters(model):
        if layer.merged is None:
            layer.merge()
    replace(model, TARGETS, LoRALinear, lambda layer: layer.merged)
    replace(model, TARGETS, NF4Linear, plain_linear)
    return model.requires_grad_(True)


def main() -> None:
    from adapter_files import run  # it imports this file once more, as a module, and uses the classes of that one

    run()


if __name__ == "__main__":
    exit_cleanly(main)
