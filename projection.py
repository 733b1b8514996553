"""A matrix without bias, multiplied whole or in slices as N tensor-parallel ranks would (`--pretraining_tp`).

Megatron-LM (arXiv 1909.08053) splits a block's first matrices by rows, so that every rank makes a part of the output,
and its last ones, which read those parts, by columns, so that every rank makes a summand of the whole. Multiplying the
slices one after the other shows, on one machine, what rounding that changes: the sums run in another order.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from cross_entropy import widen


def sliced_linear(x: torch.Tensor, weight: torch.Tensor, slices: int = 1, columns: bool = False) -> torch.Tensor:
    """x W^T, for x (..., in) and W (out, in): `slices` of W's rows, side by side, or of its columns, added up.

    One row in compiled code is an exception: a loop over the whole of W, which torch.compile can fuse with others.
    """
    if torch.compiler.is_compiling() and x.numel() == x.shape[-1]:
        return (weight * widen(x).flatten()).sum(-1).expand(*x.shape[:-1], -1)
    if slices == 1:
        return F.linear(x, weight)
    if columns:
        return sum(F.linear(part, w) for part, w in zip(x.chunk(slices, -1), weight.chunk(slices, 1)))
    return torch.cat([F.linear(x, w) for w in weight.chunk(slices)], dim=-1)


class Projection(nn.Linear):
    """nn.Linear without bias; called as layer(x, slices, columns)."""

    def __init__(self, in_features: int, out_features: int, **like):
        super().__init__(in_features, out_features, bias=False, **like)

    def forward(self, x: torch.Tensor, slices: int = 1, columns: bool = False) -> torch.Tensor:
        return sliced_linear(x, self.weight, slices, columns)
