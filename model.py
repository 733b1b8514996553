"""A small Llama, whole: RMSNorm, RoPE, attention over head groups, SwiGLU, KV cache, loss, generation.

Llama (arXiv 2302.13971) is a stack of pre-norm residual blocks without biases. Modules carry Meta's names, so
public checkpoints load by name. What differs from the paper:

    groups   query heads read key and value groups of any size, given for K and for V by one list a layer:
             multi-head, grouped-query, multi-query and uneven grouping are one path (`HeadGroups`)
    novel    a small linear layer + SiLU on each head's output, shared by a layer's heads (experimental)
    gated    a sigmoid gate on each head's output (arXiv 2505.06708, head-wise), for comparison
    latents  low-rank keys and values of all heads of a layer, or of what cached tokens do not tell
    kv_bits  a cache of integers

Shapes: B batch, T time (tokens), S cached time, C model width, H query heads, G key/value groups, D head
width, V vocabulary.

    model = Llama(ModelConfig(n_layer=6, novel=True))
    loss = model(tokens, targets)                        # training: nats, summed over targets
    new_tokens = model.eval().generate([[1, 15, 7]], max_new_tokens=20)
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from common import IGNORE, NO_FLAG, bounded, require

ROPE_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
CHUNK = 2**19  # logits widened at a time: 2 MiB in float32 stay in a CPU's cache; a GPU takes 64 times more
RAISED = 2.0**14  # scale of the gradient stored for the backward: float16 underflows below 6e-8
MOST = 2**20  # widest layer, largest vocabulary: a damaged file may ask for more
WIDEST = 2**13  # widest head or latent
Maps = list[list[int]]  # [layer][query head] -> the group that it reads


@dataclass
class ModelConfig:
    """model"""

    n_layer: int = bounded(6, 1, 1024)  # transformer blocks
    n_head: int = bounded(8, 1, 1024)  # query heads of a layer
    n_kv_head: int | None = bounded(None, 1, 1024)  # K/V heads, of equal runs of query heads (default: all)
    dim: int = bounded(256, 1, MOST)  # model width
    head_dim: int | None = bounded(None, 2, WIDEST)  # width of one head, even (default: dim / n_head)
    hidden_dim: int | None = bounded(None, 1, MOST)  # feed-forward width (default: 8/3 dim, rounded up to 32)
    block_size: int = bounded(256, 2, 2**24)  # longest context, tokens
    vocab_size: int = bounded(4096, 1, MOST)  # tokens in the vocabulary (train.py: as many as the data have)
    rope_theta: float = bounded(10000.0, 1e-6, 1e30)  # base of the rotary wavelengths
    # Llama 3's stretching of long wavelengths, see ROPE_SCALING
    rope_scaling: dict[str, float] | None = field(default=None, metadata=NO_FLAG)
    norm_eps: float = bounded(1e-5, 1e-30, 1)  # keeps RMSNorm from dividing by zero
    tie_embeddings: bool = True  # one matrix for the token embeddings and the output
    novel: bool = False  # a head_dim x head_dim linear layer + SiLU on each head's attention output
    gated: bool = False  # a sigmoid of the layer's input, one number a head, multiplies each head's output
    dropout: float = bounded(0.0, 0, 0.99)  # on the embeddings and on both residual branches
    attention: Literal["auto", "naive", "sdpa", "triton"] = "auto"  # how it is computed
    kv_bits: int = bounded(16, 4, 16)  # of a number in the KV cache: 8 or 4, integers; 16, floats as computed
    k_groups: Maps | None = field(default=None, metadata=NO_FLAG)  # default: equal runs; replace() keeps them
    v_groups: Maps | None = field(default=None, metadata=NO_FLAG)
    # latents (see Attention), not groups: complex numbers cached, [layer][RoPE pair]; numbers, [layer]
    k_latent: Maps | None = field(default=None, metadata=NO_FLAG)
    v_latent: list[int] | None = field(default=None, metadata=NO_FLAG)
    # [layer] -> key heads of which the cached token tells a part: all of the layer's, or 0
    t_latent: list[int] | None = field(default=None, metadata=NO_FLAG)

    def __post_init__(self):
        H, dim = self.n_head, self.dim
        remedy = f"give --n_head a divisor of {dim}, or set --head_dim"
        require(self.head_dim or dim % H == 0, f"n_head {H} does not divide dim {dim}: {remedy}")
        self.head_dim = self.head_dim or dim // H
        remedy = "RoPE turns pairs, so give an even --head_dim, or change --dim or --n_head"
        require(self.head_dim % 2 == 0, f"head_dim is {self.head_dim}: {remedy}")
        self.hidden_dim = self.hidden_dim or 32 * math.ceil(8 * dim / 3 / 32)
        if scaling := self.rope_scaling:
            sound = set(scaling) == set(ROPE_SCALING) and all(0 < x < math.inf for x in scaling.values())
            sound = sound and scaling["low_freq_factor"] < scaling["high_freq_factor"]
            require(sound, f"rope_scaling is {scaling}: give {', '.join(ROPE_SCALING)}, low below high")
        G = self.n_kv_head or H
        require(H % G == 0, f"n_kv_head {G} does not divide n_head {H}: give --n_kv_head a divisor of {H}")
        uniform = [[h * G // H for h in range(H)]] * self.n_layer
        self.k_groups, self.v_groups = self.k_groups or uniform, self.v_groups or uniform
        for name, groups in (("k_groups", self.k_groups), ("v_groups", self.v_groups)):
            require(len(groups) == self.n_layer, f"{name} has {len(groups)} lists, n_layer is {self.n_layer}")
            for of_head in groups:
                dense = len(of_head) == H and set(of_head) == set(range(len(set(of_head))))
                require(dense, f"{name} has {of_head}: give {H} group numbers that skip none from 0 on")
        self.k_latent = [r if any(r) else [] for r in self.k_latent or [[]] * self.n_layer]
        self.v_latent, self.t_latent = (x or [0] * self.n_layer for x in (self.v_latent, self.t_latent))
        wrong = "k_latent, v_latent or t_latent is of another model"
        require(len(self.k_latent) == len(self.v_latent) == len(self.t_latent) == self.n_layer, wrong)
        for ranks, v_rank, t_heads in zip(self.k_latent, self.v_latent, self.t_latent):
            sound = len(ranks) in (0, self.head_dim // 2) and min([*ranks, v_rank, t_heads]) >= 0
            sound = sound and (not t_heads or (ranks and v_rank)) and t_heads * self.head_dim <= WIDEST
            require(sound and max(2 * sum(ranks), v_rank) <= min(H * self.head_dim, WIDEST), wrong)
        self.k_groups = [[0] * H if r else groups for r, groups in zip(self.k_latent, self.k_groups)]
        self.v_groups = [[0] * H if r else groups for r, groups in zip(self.v_latent, self.v_groups)]
        n = max(self.k_groups[0]) + 1
        even = [[h * n // H for h in range(H)]] * self.n_layer == self.k_groups == self.v_groups
        self.n_kv_head = n if H % n == 0 and even and not any(self.k_latent + self.v_latent) else None
        require(self.kv_bits in (4, 8, 16), f"kv_bits is {self.kv_bits}: give --kv_bits 4, 8 or 16")

    @property
    def kv_widths(self) -> list[tuple[int, int]]:
        """Numbers of K and of V that each layer's cache holds for one token: G_k D, G_v D, or a latent's."""
        keys = [2 * sum(r) or (max(g) + 1) * self.head_dim for r, g in zip(self.k_latent, self.k_groups)]
        values = [r or (max(g) + 1) * self.head_dim for r, g in zip(self.v_latent, self.v_groups)]
        return list(zip(keys, values))

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes that the KV cache takes for one token, its floats being of `itemsize` bytes."""
        numbers, tokens = sum(map(sum, self.kv_widths)), 4 * any(self.t_latent)
        if self.kv_bits == 16:
            return itemsize * numbers + tokens
        scales = sum(max(groups) + 1 for groups in self.k_groups + self.v_groups)
        return numbers * self.kv_bits // 8 + 2 * scales + tokens  # see pack


def widen(x: torch.Tensor) -> torch.Tensor:
    """At least float32, for sums that bfloat16 and float16 would round away; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps), in float32 or wider, times the weight (arXiv 1910.07467)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = widen(x)
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight


def rope_angles(c: ModelConfig, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, positions.shape + (D/2,), of position * theta^(-2f/D) for each pair f (arXiv 2104.09864).

    Llama 3's scaling (arXiv 2407.21783 and its reference code): a pair that turns fewer than low_freq_factor
    times in the original context turns `factor` times slower, one that turns more than high_freq_factor times
    stays, and between them the speed is interpolated. Nothing is kept between calls: `model.bfloat16()` would
    round a buffer, and in bfloat16 the positions 256 and 257 are equal.
    """
    pairs = torch.arange(0, c.head_dim, 2, device=positions.device).float()
    frequencies = float(c.rope_theta) ** (-pairs / c.head_dim)
    if c.rope_scaling:
        factor, low, high, context = (c.rope_scaling[name] for name in ROPE_SCALING)
        turns = context * frequencies / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = frequencies * (kept + (1 - kept) / factor)
    angles = positions[..., None].float() * frequencies
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Multiply each pair (2f, 2f+1) of x (B, H or G, T, D), as a complex number, by cos + i sin."""
    if torch.compiler.is_compiling():  # which fuses this, but nothing complex
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).type_as(x)
    z = torch.view_as_complex(widen(x).unflatten(-1, (-1, 2)))  # one pass over x, not eight
    return torch.view_as_real(z * torch.complex(widen(cos), widen(sin))).flatten(-2).type_as(x)


# ---- attention over head groups ----


class HeadGroups(nn.Module):
    """Which of G groups each of H query heads reads: `of_list`, e.g. [0, 1, 1, 1]; as a tensor, `of_head`.

    `gather` lays the heads of each group side by side as rows, so that one batched product serves all groups
    without a copy of K or V for every head; `scatter` restores the head order. Smaller groups are padded to
    the largest with a repeated head, whose rows `scatter` never reads.
    """

    def __init__(self, of_head: list[int]):
        super().__init__()
        members = [[h for h, g in enumerate(of_head) if g == group] for group in range(max(of_head) + 1)]
        self.of_list, self.n_group, self.size = list(of_head), len(members), max(map(len, members))
        rows = [head for heads in members for head in heads + heads[:1] * (self.size - len(heads))]
        slots = [rows.index(head) for head in range(len(of_head))]
        self.in_order = slots == list(range(len(rows)))  # MHA, GQA, MQA: no head moves or repeats
        for name, index in (("of_head", of_head), ("rows", rows), ("slots", slots)):
            # on the CPU even inside `with torch.device("meta")`: a checkpoint does not hold these
            self.register_buffer(name, torch.tensor(index, device="cpu"), persistent=False)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, T, X) -> (B, G, size * T, X)."""
        x = x if self.in_order else x.index_select(1, self.rows)
        return x.unflatten(1, (self.n_group, self.size)).flatten(2, 3)

    def scatter(self, x: torch.Tensor) -> torch.Tensor:
        """(B, G, size * T, X) -> (B, H, T, X)."""
        x = x.unflatten(2, (self.size, -1)).flatten(1, 2)
        return x if self.in_order else x.index_select(1, self.slots)


def hartley(n: int) -> torch.Tensor:
    """(n, n), (cos + sin)(2 pi i j / n) / sqrt(n): symmetric, its own inverse. It spreads outliers, as keys
    have, over all n numbers (QuaRot, arXiv 2404.00456, with Hadamard's matrix, which not every n has)."""
    fourier = torch.fft.fft(torch.eye(n, device="cpu"), norm="ortho")
    return fourier.real - fourier.imag


def spread(x: torch.Tensor, matrix: torch.Tensor | None) -> torch.Tensor:
    """x in Hartley's basis, or back."""
    return x if matrix is None else x @ matrix.type_as(x)


def pack(x: torch.Tensor, bits: int) -> torch.Tensor:
    """x (B, G, T, X) -> uint8 (B, G, T, X * bits / 8 + 2): integers x / scale, and behind them the scale, a
    bfloat16 for each token and head. The number furthest from zero becomes the lowest integer."""
    least, x = -(2 ** (bits - 1)), widen(x)
    scale = (x.gather(-1, x.abs().argmax(-1, keepdim=True)) / least).bfloat16()
    codes = (x / scale).nan_to_num().round().clamp(least, -1 - least).to(torch.int8)
    if bits == 4:
        codes = codes[..., 0::2] << 4 | codes[..., 1::2] & 15
    return torch.cat((codes.view(torch.uint8), scale.view(torch.uint8)), dim=-1)


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """What `pack` has rounded, float32."""
    codes, scale = packed[..., :-2].view(torch.int8), packed[..., -2:]
    scale = scale.clone(memory_format=torch.contiguous_format).view(torch.bfloat16)  # aligned anew
    if bits == 4:
        codes = torch.stack((codes >> 4, codes << 4 >> 4), dim=-1).flatten(-2)  # shifts keep the sign
    return codes * scale.float()


class KVCache:
    """Keys and values of the tokens so far, one head a group; `length` tokens of `capacity` are filled."""

    def __init__(self, config: ModelConfig, capacity: int):
        self.capacity, self.length, self.bits = capacity, 0, config.kv_bits
        self.keys: list[torch.Tensor | None] = [None] * config.n_layer
        self.values: list[torch.Tensor | None] = [None] * config.n_layer
        self.tokens: torch.Tensor | None = None  # (B, S) int32, with t_latent

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store k (B, G_k, T, D) and v (B, G_v, T, D) behind the past; return all, (B, G, S, D)."""
        end = self.length + k.shape[2]
        assert end <= self.capacity, f"the KV cache holds {self.capacity} tokens, {end} are needed"
        positions = torch.arange(self.length, end, device=k.device)
        for store, new in ((self.keys, k), (self.values, v)):
            new = new if self.bits == 16 else pack(new, self.bits)
            if store[layer] is None:
                self.dtype = k.dtype  # what unpacked numbers become
                store[layer] = new.new_empty(*new.shape[:2], self.capacity, new.shape[3])
            # compiled, a slice assignment would copy the whole cache; sample.RowLinear's k is float32
            store[layer].index_copy_(2, positions, new.type_as(store[layer]))
        kept = self.keys[layer][:, :, :end], self.values[layer][:, :, :end]
        return kept if self.bits == 16 else tuple(unpack(x, self.bits).to(self.dtype) for x in kept)


def scores(q, k, k_groups: HeadGroups, mask: torch.Tensor | None = None) -> torch.Tensor:
    """q k^T / sqrt(D), (B, H, T, S), and -inf where the mask hides a key from a query; None is causal."""
    if mask is None:
        T, S = q.shape[2], k.shape[2]
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    raw = k_groups.scatter(k_groups.gather(q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2))
    return raw + raw.new_zeros(mask.shape).masked_fill(~mask, -math.inf)  # an added mask has no backward


def naive(q, k, v, k_groups: HeadGroups, v_groups: HeadGroups, mask: torch.Tensor | None) -> torch.Tensor:
    """The textbook's softmax(q k^T / sqrt(D)) v, the reference of every test."""
    weights = scores(q, k, k_groups, mask).softmax(-1).type_as(v)
    return v_groups.scatter(v_groups.gather(weights) @ v)


def sdpa(q, k, v, k_groups: HeadGroups, v_groups: HeadGroups, mask: torch.Tensor | None) -> torch.Tensor:
    """PyTorch's kernel takes equal runs of query heads only; other groups cost a copy of K and V for every
    head. For one query against a cache that copy would cost more than all else: there the heads of a group
    are the queries of one sequence if K and V have the same groups; if not, `naive` needs no copy either."""
    one_map = k_groups.of_list == v_groups.of_list
    if q.shape[2] == 1 and not one_map:
        return naive(q, k, v, k_groups, v_groups, mask)
    if q.shape[2] == 1:
        return k_groups.scatter(F.scaled_dot_product_attention(k_groups.gather(q), k, v, attn_mask=mask))
    if not (one_map and k_groups.in_order):
        k, v = k.index_select(1, k_groups.of_head), v.index_select(1, v_groups.of_head)
    grouped = k.shape[1] < q.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)


def auto(q, k, v, k_groups: HeadGroups, v_groups: HeadGroups, mask: torch.Tensor | None) -> torch.Tensor:
    """On a CPU, in half precision and up to 512 queries, `naive` is faster than PyTorch's fused kernel, most
    of all in the backward, though it also rounds scores and weights; everywhere else the kernel wins."""
    small = q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16) and 1 < q.shape[2] <= 512
    return (naive if small else sdpa)(q, k, v, k_groups, v_groups, mask)


# q (B, H, T, D), k (B, G_k, S, D), v (B, G_v, S, D) -> (B, H, T, D); the T queries are the last of S tokens.
# `mask`, broadcast to (B, H, T, S), is True where a query looks; None is causal, for T = S or T = 1. Each
# computes the same function; triton is sdpa until flash_attention.use_kernels(model) puts its kernels there.
ATTENTION = {"auto": auto, "naive": naive, "sdpa": sdpa, "triton": sdpa}


class Attention(nn.Module):
    """Causal self-attention; every query head reads its own key group and its own value group.

    Latents: the cache holds one narrow vector for all heads. Pair f of a latent key has r_f complex numbers;
    a head repeats its query's pair r_f times, times its coefficients `k_mix`. `v_mix` (H, width, D) turns the
    attended latent value into a head's output. If both are latent, values read the key, too, as it is before
    RoPE: so it is cached unrotated, and rotated when read (as all keys in Slim Attention, arXiv 2503.05840).

    With t_latent the cache also holds token ids. Of their normed embeddings e (B, S, C), `wt` e is the part
    of all keys that the token tells, appended to the latent key; to values e itself is appended. wk and wv
    read [x, e] and subtract that part, so that latents hold only the rest.
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim, self.kv_bits = layer, config.head_dim, config.kv_bits
        self.attend = ATTENTION[config.attention]
        H, D, k_ranks, v_rank = config.n_head, self.head_dim, config.k_latent[layer], config.v_latent[layer]
        t_heads = config.t_latent[layer]
        self.k_groups, self.v_groups = HeadGroups(config.k_groups[layer]), HeadGroups(config.v_groups[layer])
        k_width, v_width = config.kv_widths[layer]
        self.wq = nn.Linear(config.dim, H * D, bias=False)
        self.wk = nn.Linear(config.dim * (1 + bool(t_heads)), k_width, bias=False)
        self.wv = nn.Linear(config.dim * (1 + bool(t_heads)), v_width, bias=False)
        self.wo = nn.Linear(H * D, config.dim, bias=False)
        self.wt = nn.Linear(config.dim, t_heads * D, bias=False) if t_heads else None
        pairs = [f for f, r in enumerate(k_ranks) for _ in range(r)]  # of the numbers of a latent key
        pairs += [*range(D // 2)] * t_heads
        self.k_mix = nn.Parameter(torch.randn(H, len(pairs), 2), False) if k_ranks else None  # fixed
        self.reads_keys = bool(k_ranks and v_rank)  # values read the latent key
        width = v_rank + k_width * self.reads_keys + config.dim * bool(t_heads)
        self.v_mix = nn.Parameter(torch.randn(H, width, D) * width**-0.5, False) if v_rank else None
        self.register_buffer("pairs", torch.tensor(pairs, device="cpu", dtype=torch.int64), persistent=False)
        matrix = hartley if self.kv_bits < 16 else lambda width: None
        self.register_buffer("k_hartley", matrix(k_width // self.k_groups.n_group), persistent=False)
        self.register_buffer("v_hartley", matrix(v_width // self.v_groups.n_group), persistent=False)
        self.novel = nn.Linear(D, D) if config.novel else None
        self.gate = nn.Linear(config.dim, H, bias=False) if config.gated else None

    def forward(self, x, cos, sin, e=None, mask=None, cache: KVCache | None = None) -> torch.Tensor:
        """x (B, T, C) -> (B, T, C). `mask` as for ATTENTION."""
        return self.wo(self.head_outputs(x, cos, sin, e, mask, cache))

    def project(self, x, cos, sin, e=None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x (B, T, C) -> rotated queries (B, H, T, D) and keys (B, G_k, T, D), and values (B, G_v, T, D)."""
        both = self.beside(x, e)
        q, k, v = self.wq(x), self.wk(both), self.wv(both)
        return self.queries(q, cos, sin), self.keys(k, cos, sin, e), self.values(v, k, e)

    def beside(self, x: torch.Tensor, e: torch.Tensor | None) -> torch.Tensor:
        """What wk and wv read: x (B, T, C), with t_latent e (B, S, C) of the same tokens beside it."""
        return x if self.wt is None else torch.cat((x, e[:, -x.shape[1] :].type_as(x)), dim=-1)

    def queries(self, x: torch.Tensor, cos, sin) -> torch.Tensor:
        """wq's output (B, T, H * D) -> (B, H, T, D), or as wide as a latent key, rotated."""
        q = x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        if self.k_mix is not None:
            q = q.unflatten(-1, (-1, 2)).index_select(-2, self.pairs).flatten(-2)
            q = rotate(q, *self.k_mix[:, None].unbind(-1))
            cos, sin = (x.index_select(-1, self.pairs) for x in (cos, sin))
        return rotate(q, cos, sin)

    def keys(self, x: torch.Tensor, cos, sin, e=None) -> torch.Tensor:
        """wk's output (B, T, G_k * D) -> (B, G_k, T, D), rotated; a latent key is one group."""
        x = x if self.wt is None else torch.cat((x, self.wt(e).type_as(x)), dim=-1)
        k = x.unflatten(-1, (self.k_groups.n_group, -1)).transpose(1, 2)
        if self.k_mix is not None:
            cos, sin = (x.index_select(-1, self.pairs) for x in (cos, sin))
        return rotate(k, cos, sin)

    def values(self, x: torch.Tensor, k: torch.Tensor, e=None) -> torch.Tensor:
        """wv's output (B, T, G_v * D), and wk's -> (B, G_v, T, D), or as wide as all that it holds."""
        v = torch.cat((x, k), dim=-1) if self.reads_keys else x
        v = v if self.wt is None else torch.cat((v, e.type_as(v)), dim=-1)
        return v.unflatten(-1, (self.v_groups.n_group, -1)).transpose(1, 2)

    def head_outputs(self, x, cos, sin, e=None, mask=None, cache: KVCache | None = None) -> torch.Tensor:
        """x (B, T, C) -> the outputs of all heads, side by side (B, T, H * D), which `wo` adds up. cos, sin
        are of the T tokens, but of all S = past + T where keys are cached before RoPE. e (B, S, C): with
        t_latent, the embeddings of all S tokens."""
        now = cos[-x.shape[1] :], sin[-x.shape[1] :]
        both = self.beside(x, e)
        q, k, v = self.queries(self.wq(x), *now), self.wk(both), self.wv(both)
        if self.reads_keys:
            k, v = self.stored(k[:, None], v[:, None], cache)
            k, v = spread(k, self.k_hartley)[:, 0], spread(v, self.v_hartley)[:, 0]
            k, v = self.keys(k, cos, sin, e), self.values(v, k, e)  # RoPE only now
        else:  # keys and values stay in Hartley's basis: q and y take fewer products
            k, v = self.stored(self.keys(k, *now), self.values(v, k), cache)
            q = spread(q, self.k_hartley)
        y = self.attend(q, k, v, self.k_groups, self.v_groups, mask)
        return self.readout(y if self.reads_keys else spread(y, self.v_hartley), x)

    def stored(self, k, v, cache: KVCache | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (B, G, T, D) -> all, in Hartley's basis and rounded to kv_bits (B, G, S, D)."""
        k, v, bits = spread(k, self.k_hartley), spread(v, self.v_hartley), self.kv_bits
        if cache is not None:
            return cache.append(self.layer, k, v)
        if bits == 16:
            return k, v
        return tuple(x + (unpack(pack(x, bits), bits).type_as(x) - x).detach() for x in (k, v))  # slope 1

    def readout(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Attended values (B, H, T, D or a latent's) and inputs x (B, T, C) -> the outputs (B, T, H * D)."""
        if self.v_mix is not None:
            y = y @ self.v_mix
        if self.novel is not None:
            y = F.silu(self.novel(y))
        if self.gate is not None:
            y = y * self.gate(x).transpose(1, 2)[..., None].sigmoid()  # (B, H, T, 1)
        return y.transpose(1, 2).flatten(2)


# ---- the model ----


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202): w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.w2 = nn.Linear(config.hidden_dim, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.hidden_dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attention, self.feed_forward = Attention(config, layer), FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, cos, sin, e=None, mask=None, cache=None) -> torch.Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), cos, sin, e, mask, cache))
        return x + self.dropout(self.feed_forward(self.ffn_norm(x)))


class Llama(nn.Module):
    """Token embeddings, `n_layer` blocks, a norm, and logits over the vocabulary."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.checkpoint_activations = False  # keep each block's input, recompute the rest in the backward
        self.compiled_step = None  # sample.compile_step's: adds a token to texts
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(TransformerBlock(config, layer) for layer in range(config.n_layer))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight
        self.init_weights()

    def init_weights(self) -> None:
        """Normal(0, 0.02); the projections that add to the residual stream shrink with depth, as in GPT-2, so
        that the stream's variance does not grow with the number of layers."""
        for name, p in self.named_parameters():
            if p.dim() == 2:
                residual = name.endswith(("wo.weight", "w2.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def embedded(self, tokens: torch.Tensor, padding=None) -> list[torch.Tensor]:
        """tokens (B, S) -> the normed embeddings (B, S, C) that each layer's latents read. Behind the first
        layer, those of padding and of a text's first token, an attention sink, are zero."""
        e = F.rms_norm(self.tok_embeddings(tokens), (self.config.dim,), eps=self.config.norm_eps)
        later = torch.arange(tokens.shape[1], device=e.device) > (0 if padding is None else padding[:, None])
        return [e] + [e * later[..., None]] * (len(self.layers) - 1)

    def hidden(self, tokens, cache: KVCache | None = None, padding=None) -> torch.Tensor:
        """tokens (B, T) int64 -> the normed residual stream behind the last block (B, T, C).

        padding: (B,) tokens at each row's left that are no text and are not seen. They shift the row's
        positions; RoPE depends only on differences of positions, so the result is the same up to rounding
        (coarse in half precision and with kv_bits below 16).
        """
        T, past = tokens.shape[1], (cache.length if cache else 0)
        seen = torch.arange(past + T, device=tokens.device)
        positions, mask = seen[past:], None
        if padding is not None or (past and T > 1):
            mask = seen <= positions[:, None]  # (T, S)
            if padding is not None:  # (B, 1, T, S); a padded query sees itself: with nothing to see it is NaN
                mask = mask & ((seen >= padding[:, None, None, None]) | (seen == positions[:, None]))
        before_rope = any(layer.attention.reads_keys for layer in self.layers)  # keys are cached so
        cos, sin = rope_angles(self.config, seen if before_rope else positions)
        e, x = [None] * len(self.layers), self.dropout(self.tok_embeddings(tokens))
        if any(self.config.t_latent):
            if cache is not None:
                past_tokens = [] if cache.tokens is None else [cache.tokens]
                tokens = cache.tokens = torch.cat([*past_tokens, tokens.int()], dim=1)
            e = self.embedded(tokens, padding)
        for layer, own in zip(self.layers, e):
            if self.checkpoint_activations and self.training:
                x = checkpoint(layer, x, cos, sin, own, mask, use_reentrant=False)
            else:
                x = layer(x, cos, sin, own, mask, cache)
        if cache is not None:
            cache.length += T
        return self.norm(x)

    def forward(self, tokens, targets=None, cache: KVCache | None = None, padding=None) -> torch.Tensor:
        """tokens (B, T) int64 -> logits (B, T, V); with `targets` (B, T) the loss instead, in nats, summed
        over the targets that are not IGNORE; with `cache` only the last token's logits (B, 1, V)."""
        x = self.hidden(tokens, cache, padding)
        logits = self.output(x if cache is None else x[:, -1:])
        if targets is None:
            return logits
        return CrossEntropy.apply(logits.flatten(0, 1), targets.flatten())

    def num_params(self) -> int:
        """How many weights: tied ones count once, and NF4's, which are no Parameters, count, too."""
        stored = sum(layer.num_weights for layer in self.modules() if hasattr(layer, "num_weights"))
        return stored + sum(p.numel() for p in self.parameters())

    @torch.no_grad()
    def stream(
        self, prompts: list[list[int]], max_new_tokens: int, *, temperature: float = 0.0, top_p: float = 1.0,
        stop: Sequence[int] = (), generator: torch.Generator | None = None,
    ) -> Iterator[list[int | None]]:  # fmt: skip
        """Yield, token by token, the next token of every prompt; None for one that has met a `stop` token.

        A text also stops after max_new_tokens, or when it fills block_size. Temperature 0 is greedy, the same
        in any batch up to rounding (see `hidden`); above it one generator draws for all texts, from the
        smallest set of probability `top_p` or more (arXiv 1904.09751). Raises UserError for an empty
        prompt, one that leaves no room, and a model that computes inf or nan.
        """
        assert not self.training, "call model.eval() first: dropout would change the text"
        require(prompts and all(prompts), "an empty prompt: give a text, or BOS")
        longest, room = max(map(len, prompts)), self.config.block_size
        require(longest < room, f"the prompt has {longest} tokens, the context {room}: shorten the prompt")
        device = self.tok_embeddings.weight.device
        before = [longest - len(p) for p in prompts]
        tokens = torch.tensor([[0] * n + p for n, p in zip(before, prompts)], device=device)
        padding = torch.tensor(before, device=device) if any(before) else None
        most = [min(max_new_tokens, room - len(p)) for p in prompts]
        cache = KVCache(self.config, longest + max(most))  # with padding, it may be beyond block_size
        stopped, stop = [False] * len(prompts), set(stop)
        for count in range(1, max(most) + 1):
            forward = self.compiled_step if self.compiled_step and cache.length else self
            logits = forward(tokens, cache=cache, padding=padding)[:, -1]
            require(math.isfinite(logits.amax()), "the model computes inf or nan: damaged, or beyond float16")
            tokens = pick_token(logits, temperature, top_p, generator)  # (B, 1)
            new = tokens[:, 0].tolist()
            stopped = [s or t in stop or count > m for s, t, m in zip(stopped, new, most)]
            if all(stopped):
                return
            yield [None if s else t for s, t in zip(stopped, new)]

    def generate(self, prompts: list[list[int]], max_new_tokens: int, **how) -> list[list[int]]:
        """The new tokens of every prompt, without the prompt and the stop token; `how` as for `stream`."""
        steps = list(self.stream(prompts, max_new_tokens, **how))
        return [[step[row] for step in steps if step[row] is not None] for row in range(len(prompts))]


class CrossEntropy(torch.autograd.Function):
    """logits (N, V), targets (N,) int64 -> nats, summed over all targets but IGNORE, in float32 or wider.

    F.cross_entropy keeps four more tensors of the logits' size for a while: with a vocabulary of 32,000, most
    of a step's memory. The gradient, softmax(logits) - onehot(target), follows from the same softmax, so
    both are computed here chunk by chunk, and the gradient overwrites the logits.
    """

    @staticmethod
    def forward(ctx, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = 0
        ctx.gradient = logits.detach() if ctx.needs_input_grad[0] else None  # the same memory
        rows = max(1, (CHUNK if logits.device.type == "cpu" else 64 * CHUNK) // logits.shape[1])
        for begin in range(0, len(logits), rows):
            log_p = widen(logits[begin : begin + rows]).log_softmax(-1)
            y = targets[begin : begin + rows, None]
            counted = y != IGNORE
            y = y.where(counted, 0)
            loss = loss - log_p.gather(-1, y).where(counted, 0).sum()
            if ctx.gradient is not None:
                p = log_p.exp_().scatter_add_(-1, y, -torch.ones_like(y, dtype=log_p.dtype))
                ctx.gradient[begin : begin + rows] = p.mul_(counted * RAISED)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss: torch.Tensor):
        gradient, ctx.gradient = ctx.gradient, None
        assert gradient is not None, "the loss can be differentiated once: its gradient has been given away"
        return gradient.mul_(grad_loss / RAISED), None


def pick_token(logits: torch.Tensor, temperature: float, top_p: float, generator=None) -> torch.Tensor:
    """logits (B, V) -> the next tokens (B, 1): the likeliest at temperature 0, else from the nucleus."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    p = ((widen(logits) - logits.amax(-1, keepdim=True)) / max(temperature, 1e-30)).softmax(-1)  # no overflow
    if top_p < 1:  # sorting may take as long as a forward
        ranked, order = p.sort(descending=True)
        before = ranked.cumsum(-1) - ranked  # mass of the likelier tokens; the first always stays
        p = p.scatter(-1, order, ranked.masked_fill(before >= max(top_p, 1e-9), 0))
    return torch.multinomial(p, 1, generator=generator)
