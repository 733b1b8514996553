"""Matrices multiplied in slices, one after the other, as so many tensor-parallel ranks would.

Megatron-LM (arXiv 1909.08053) splits a block's first matrices by rows, so that each rank computes a part of
the output, and its last matrices, which read those parts, by columns, so that each rank computes a summand of
the whole. On one machine only the order of the sums changes, hence the rounding, and the time.

    slice_model(model, 2)      # in place; the parameters keep their names, so checkpoints stay the same
"""

from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import UserError
from lora import LoRALinear, replace
from model import Llama
from nf4 import FrozenProduct, NF4Linear, dequantize

ROWS, COLUMNS = ("wq", "wk", "wv", "w1", "w3", "output"), ("wo", "w2")


def product(x: torch.Tensor, weight: torch.Tensor, slices: int, columns: bool) -> torch.Tensor:
    """x W^T for x (..., in), W (out, in): `slices` of W's rows side by side, or of its columns added up."""
    if columns:
        return sum(F.linear(part, w) for part, w in zip(x.chunk(slices, -1), weight.chunk(slices, 1)))
    return torch.cat([F.linear(x, w) for w in weight.chunk(slices)], dim=-1)


class FrozenSlices(FrozenProduct):
    """The same in slices: W is dequantized in the forward and again in the backward, and gets no gradient."""

    @staticmethod
    def forward(ctx, x, codes, absmax, scales, shape, slices, columns):
        ctx.save_for_backward(codes, absmax, scales)
        ctx.shape = shape
        return product(x, dequantize(codes, absmax, scales, shape).type_as(x), slices, columns)

    @staticmethod
    def backward(ctx, grad):
        return *FrozenProduct.backward(ctx, grad), None, None


class SlicedLinear(nn.Module):
    """Takes the place of a linear layer, with its parameters under their own names."""

    def __init__(self, linear: nn.Linear | NF4Linear | LoRALinear, slices: int, columns: bool):
        super().__init__()
        self.__dict__.update(linear.__dict__)
        self.kind, self.slices, self.columns = type(linear), slices, columns
        if self.kind is LoRALinear:
            self._modules = {**linear._modules, "linear": SlicedLinear(linear.linear, slices, columns)}
            return
        width, what = (linear.in_features, "columns") if columns else (linear.out_features, "rows")
        if width % slices:
            hint = "take a model whose heads, hidden_dim and vocab_size they divide"
            raise UserError(f"{slices} slices do not divide a matrix of {width} {what}: {hint}")
        if self.kind is NF4Linear:
            self.num_weights = linear.num_weights

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        how = self.slices, self.columns
        if self.kind is nn.Linear:
            return product(x, self.weight, *how)
        if self.kind is NF4Linear:
            return FrozenSlices.apply(x, self.codes, self.absmax, self.scales, self.shape, *how)
        # a rank holds the columns of A or the rows of B that belong to its slice of W, and all of the other
        low = product(self.dropout(x), self.lora_A, self.slices if self.columns else 1, columns=True)
        high = product(low, self.lora_B, 1 if self.columns else self.slices, columns=False)
        return self.linear(x) + self.scale * high


def slice_model(model: Llama, slices: int) -> None:
    """Put a SlicedLinear in the place of every matrix. Raises UserError for a width that `slices` does not
    divide."""
    for names, columns in ((ROWS, False), (COLUMNS, True)):
        sliced = partial(SlicedLinear, slices=slices, columns=columns)
        replace(model, names, (nn.Linear, NF4Linear, LoRALinear), sliced)
