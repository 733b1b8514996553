"""4-bit NormalFloat with double quantization, by hand: how QLoRA stores its frozen base (arXiv 2305.14314).

Trained weights look like a sample of a normal distribution, so NF4's 16 values are quantiles of one: all
codes are used about equally often. The weights, row after row, are cut into blocks of 64; a block is divided
by its largest absolute value (absmax), and each weight becomes the code of the nearest value. The absmaxes
are quantized in turn: their mean is subtracted, and in blocks of 256 they become 8 bits of a dynamic data
type (arXiv 1511.04561) that has small steps where most of them are.

    4 bits of code + 8/64 of its block's absmax + 32/(64 * 256) of that one's = 4.127 bits a weight

Codes of weights, and the values that codes stand for, are those of bitsandbytes, bit for bit.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

BLOCK, ABSMAX_BLOCK = 64, 256
BUFFERS = ("codes", "absmax", "scales")  # what takes the place of a weight in a state dict, all uint8

# the paper's appendix E: 8 quantiles of N(0, 1), evenly spaced from 1 - (1/32 + 1/30) / 2 down to 1/2,
# exclusive; 7 such ones with a minus; and 0, which must be exact. All are divided by the largest.
NF4 = torch.tensor([
    -1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
])  # fmt: skip
# the dynamic data type: for each power of ten from 1 down to 10^-6 the centres of half as many intervals as
# for the one above it, of both signs; 0 and 1
EDGES = [torch.linspace(0.1, 1, 2**i + 1) for i in range(7)]
CENTRES = torch.cat([10 ** (i - 6) * (x[:-1] + x[1:]) / 2 for i, x in enumerate(EDGES)])
DYNAMIC = torch.cat((torch.tensor([0.0, 1.0]), CENTRES, -CENTRES)).sort().values
# both NF4 values of each possible byte, (256, 2), so that one lookup gives two weights
PAIRS = NF4[torch.stack((torch.arange(256) >> 4, torch.arange(256) & 15), dim=-1)]


def nearest(x: torch.Tensor, values: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x (N,) float32 -> the code (N,) uint8 of the value nearest to each x / absmax; and the absmaxes."""
    blocks = F.pad(x, (0, -len(x) % block)).view(-1, block)
    absmax = blocks.abs().amax(-1)
    # multiplied by the inverse, as in bitsandbytes; a block of zeros stays one
    scaled = blocks * (1 / absmax.clamp(min=1e-38))[:, None]
    borders = ((values[:-1] + values[1:]) / 2).to(x.device)
    return torch.bucketize(scaled.flatten()[: len(x)], borders).to(torch.uint8), absmax


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """weight, any shape of N numbers -> the uint8 tensors `codes` (N/2,), `absmax` (N/64,) and `scales`: the
    bytes of the float32 mean of all absmaxes, then of the absmax of each 256 of them. Odd ends are rounded
    up."""
    codes, absmax = nearest(weight.detach().flatten().float(), NF4, BLOCK)
    codes = F.pad(codes, (0, len(codes) % 2), value=7)  # of 0.0
    mean = absmax.mean()
    absmax, scales = nearest(absmax - mean, DYNAMIC, ABSMAX_BLOCK)
    return codes[0::2] << 4 | codes[1::2], absmax, torch.cat((mean[None], scales)).view(torch.uint8)


def dequantize(codes: torch.Tensor, absmax: torch.Tensor, scales: torch.Tensor, shape) -> torch.Tensor:
    """The float32 weight of `shape` that `quantize` stored."""
    pairs, dynamic = (x.to(codes.device, non_blocking=True) for x in (PAIRS, DYNAMIC))  # no GPU waits
    mean, scale = scales.clone().view(torch.float32).tensor_split((1,))  # cloned: a file's may be unaligned
    of_block = dynamic[absmax.int()] * scale.repeat_interleave(ABSMAX_BLOCK)[: len(absmax)] + mean
    values = pairs.index_select(0, codes.int()).flatten()  # (N,), or one more
    values = F.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
    return (values * of_block[:, None]).flatten()[: shape.numel()].view(shape)


class FrozenProduct(torch.autograd.Function):
    """product(x, W) = x W^T, computed in one piece or in study/attention.py's slices. W, which gets no
    gradient, is dequantized in the forward, and again in the backward, so that it need not be kept."""

    @staticmethod
    def forward(ctx, x, codes, absmax, scales, shape, product):
        ctx.save_for_backward(codes, absmax, scales)
        ctx.shape = shape
        return product(x, dequantize(codes, absmax, scales, shape).type_as(x))  # autocast rounds both

    @staticmethod
    def backward(ctx, grad):
        return grad @ dequantize(*ctx.saved_tensors, ctx.shape).type_as(grad), None, None, None, None, None


class NF4Linear(nn.Module):
    """A frozen linear layer without bias, its weight (out, in) rounded to NF4."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.shape = linear.weight.shape
        self.num_weights = self.shape.numel()  # `parameters()` does not count them
        for name, x in zip(BUFFERS, quantize(linear.weight)):
            # floats among them would be rounded by model.bfloat16(), so these are bytes
            self.register_buffer(name, x)

    def to_linear(self) -> nn.Linear:
        """A layer with the dequantized weight, float32."""
        return linear_of(dequantize(self.codes, self.absmax, self.scales, self.shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return FrozenProduct.apply(x, self.codes, self.absmax, self.scales, self.shape, F.linear)


def linear_of(weight: torch.Tensor) -> nn.Linear:
    """A layer with this weight (out, in)."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight)
    return linear
