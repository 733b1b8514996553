"""Attention over head groups: which query heads read which keys and values, the KV cache, and four ways to compute it.

    naive    the textbook's softmax(q k^T / sqrt(D)) v, the reference of every test
    blocks   the same for 128 queries at a time, against the keys that they may see
    sdpa     PyTorch's fused kernels, which know groups of equal runs of heads only
    triton   flash_attention.py, which reads groups of any size; where it cannot run, sdpa takes its place
    auto     whichever of blocks and sdpa is faster here

Shapes as in model.py: q (B, H, T, D), k (B, G_k, S, D), v (B, G_v, S, D), where the T queries are the last of S tokens.
"""

import math
import os
import shutil
import sys
from functools import lru_cache

import torch
import torch.nn as nn
import torch.nn.functional as F

from cross_entropy import widen

BLOCK = 128  # queries of a block: fewer would skip more, in products too small for a CPU's full speed


class HeadGroups(nn.Module):
    """Which of G groups each of H query heads reads, e.g. [0, 1, 1, 1]; holds no parameters.

    `gather` lays the heads of each group side by side as rows, so that one batched product serves all heads of all
    groups without a copy of the keys or values for every head; `scatter` puts the rows back in head order. Groups of
    unequal size are padded to the largest with a repeated head, whose rows `scatter` never reads.
    """

    def __init__(self, of_head: list[int]):
        super().__init__()
        members: list[list[int]] = [[] for _ in range(max(of_head) + 1)]
        for head, group in enumerate(of_head):
            members[group].append(head)
        self.of_list, self.n_group, self.size = list(of_head), len(members), max(len(heads) for heads in members)
        rows = [heads[i] if i < len(heads) else heads[0] for heads in members for i in range(self.size)]
        slots = [group * self.size + members[group].index(head) for head, group in enumerate(of_head)]
        self.in_order = slots == list(range(len(rows)))  # MHA, uniform neighbours, MQA: gather and scatter are views
        for name, index in (("of_head", of_head), ("rows", rows), ("slots", slots)):
            # on the CPU even inside `with torch.device("meta")`: a checkpoint holds the weights, but not these
            self.register_buffer(name, torch.tensor(index, device="cpu"), persistent=False)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, T, X) -> (B, G, size * T, X)."""
        x = x if self.in_order else x.index_select(1, self.rows)
        return x.unflatten(1, (self.n_group, self.size)).flatten(2, 3)

    def scatter(self, x: torch.Tensor) -> torch.Tensor:
        """(B, G, size * T, X) -> (B, H, T, X)."""
        x = x.unflatten(2, (self.size, -1)).flatten(1, 2)
        return x if self.in_order else x.index_select(1, self.slots)

    def expand(self, x: torch.Tensor) -> torch.Tensor:
        """(B, G, T, D) -> (B, H, T, D), a copy for every head, for kernels that know no groups."""
        return x if self.size == 1 and self.in_order else x.index_select(1, self.of_head)


class KVCache:
    """Keys and values of the tokens so far, one head a group; `length` tokens of `capacity` are filled."""

    def __init__(self, config, capacity: int):
        self.capacity, self.length = capacity, 0
        self.keys: list[torch.Tensor | None] = [None] * config.n_layer
        self.values: list[torch.Tensor | None] = [None] * config.n_layer

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store k (B, G_k, T, D) and v (B, G_v, T, D) behind the past; return views of all, (B, G, S, D)."""
        end = self.length + k.shape[2]
        assert end <= self.capacity, f"the KV cache holds {self.capacity} tokens, {end} are needed"
        positions = torch.arange(self.length, end, device=k.device)
        for store, new in ((self.keys, k), (self.values, v)):
            if store[layer] is None:
                store[layer] = new.new_empty(new.shape[0], new.shape[1], self.capacity, new.shape[3])
            # torch.compile would make an assignment to a slice a copy of the whole cache
            store[layer].index_copy_(2, positions, new.type_as(store[layer]))
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(x.nbytes for x in self.keys + self.values if x is not None)


def attend(
    q, k, v, k_groups: HeadGroups, v_groups: HeadGroups, mask: torch.Tensor | None, backend: str
) -> torch.Tensor:
    """(B, H, T, D). `mask`, broadcast to (B, H, T, S), is True where a query looks; None is causal."""
    if backend == "auto":
        backend = faster(q)
    if backend == "triton" and not triton_runs(q.device, q.dtype, q.shape[-1]):
        backend = "sdpa"
    if q.shape[2] == 1 and torch.compiler.is_compiling() and backend != "triton":
        return one_query(q, k, v, k_groups, v_groups, mask)
    compute = {"naive": naive, "blocks": blocks, "sdpa": sdpa, "triton": triton}[backend]
    return compute(q, k, v, k_groups, v_groups, mask)


def faster(q: torch.Tensor) -> str:
    """What `--attention auto` takes for queries q (B, H, T, D): on a CPU, in half precision, up to some 1,000 tokens,
    batched products beat PyTorch's fused kernel, most of all its backward; everywhere else the fused kernel wins."""
    half = q.dtype in (torch.bfloat16, torch.float16)
    return "blocks" if q.device.type == "cpu" and half and 1 < q.shape[2] <= 1024 else "sdpa"


def scores(q, k, k_groups: HeadGroups, mask: torch.Tensor | None = None) -> torch.Tensor:
    """q k^T / sqrt(D), (B, H, T, S), and -inf where the mask hides a key from a query; None is causal."""
    if mask is None:
        T, S = q.shape[2], k.shape[2]
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    found = k_groups.scatter(k_groups.gather(q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2))
    bias = torch.zeros(mask.shape, dtype=found.dtype, device=q.device).masked_fill(~mask, -math.inf)
    return found + bias  # an added mask, unlike masked_fill, has no backward


def naive(q, k, v, k_groups: HeadGroups, v_groups: HeadGroups, mask: torch.Tensor | None) -> torch.Tensor:
    weights = scores(q, k, k_groups, mask).softmax(-1).type_as(v)
    return v_groups.scatter(v_groups.gather(weights) @ v)


def blocks(q, k, v, k_groups: HeadGroups, v_groups: HeadGroups, mask: torch.Tensor | None) -> torch.Tensor:
    """Leaves out nearly all of the scores that a causal mask hides, which in a long text are almost half of them."""
    if mask is not None:
        return naive(q, k, v, k_groups, v_groups, mask)
    past, parts = k.shape[2] - q.shape[2], []
    for part in q.split(BLOCK, dim=2):
        past += part.shape[2]
        parts.append(naive(part, k[:, :, :past], v[:, :, :past], k_groups, v_groups, None))
    return torch.cat(parts, dim=2)


def sdpa(q, k, v, k_groups: HeadGroups, v_groups: HeadGroups, mask: torch.Tensor | None) -> torch.Tensor:
    """The kernel takes as many key heads as value heads, for equal runs of query heads; other groups cost a copy of K
    and V for every head. Not so one query against a cache, where that copy would outweigh all else: there the heads of
    a group are the queries of one sequence, if K and V have the same groups, else the textbook has no copy either."""
    one_map = k_groups.of_list == v_groups.of_list
    if q.shape[2] == 1 and not one_map:
        return naive(q, k, v, k_groups, v_groups, mask)
    if q.shape[2] == 1:
        return k_groups.scatter(F.scaled_dot_product_attention(k_groups.gather(q), k, v, attn_mask=mask))
    runs = one_map and k_groups.in_order
    if not runs:
        k, v = k_groups.expand(k), v_groups.expand(v)
    grouped = runs and k_groups.size > 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)


def one_query(q, k, v, k_groups: HeadGroups, v_groups: HeadGroups, mask: torch.Tensor | None) -> torch.Tensor:
    """The textbook's way for T = 1, in sums that torch.compile makes loops over the cache, in float32 or wider."""
    rows = k_groups.gather(widen(q) * q.shape[-1] ** -0.5)  # (B, G_k, heads of a group, D)
    found = k_groups.scatter((rows[:, :, :, None] * k[:, :, None]).sum(-1))  # (B, H, 1, S)
    found = found if mask is None else found.masked_fill(~mask, -math.inf)
    weights = v_groups.gather(found.softmax(-1))
    return v_groups.scatter((weights[..., None] * v[:, :, None]).sum(-2)).type_as(v)


def triton(q, k, v, k_groups: HeadGroups, v_groups: HeadGroups, mask: torch.Tensor | None) -> torch.Tensor:
    """The kernels know causal attention, and one query whose first keys are hidden: all but the first pass of a batch
    of texts of several lengths, and a text that is read in parts."""
    from flash_attention import flash_attention, flash_decode

    k_of = k_groups.of_head
    v_of = k_of if k_groups.of_list == v_groups.of_list else v_groups.of_head
    learning = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if q.shape[2] == 1 and not learning:
        begins = None if mask is None else mask.int().argmax(-1).flatten().expand(len(q))
        return flash_decode(q.type_as(k), k, v, k_of, v_of, begins)
    if mask is not None or q.shape[2] < k.shape[2]:
        return sdpa(q, k, v, k_groups, v_groups, mask)
    return flash_attention(q, k, v, k_of, v_of)


@torch.compiler.assume_constant_result
def triton_runs(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether flash_attention.py can compute this; says once on stderr why not."""
    reason = why_not_triton(device, dtype, head_dim)
    note(reason) if reason else None
    return reason is None


@lru_cache
def note(reason: str) -> None:
    print(f"note: no triton attention: {reason}; sdpa takes its place", file=sys.stderr, flush=True)


@lru_cache
def why_not_triton(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    try:
        from flash_attention import HEAD_DIMS, INTERPRETED
    except ImportError as error:
        return f"{error}: pip install triton, on Linux"
    if head_dim not in HEAD_DIMS:
        return f"head_dim {head_dim} is not from {HEAD_DIMS[0]} to {HEAD_DIMS[-1]}"
    if INTERPRETED.value:
        return None
    if device.type != "cuda":
        return f"it needs a GPU, not {device.type} (TRITON_INTERPRET=1 runs it on a CPU, very slowly)"
    if torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs an NVIDIA GPU of compute capability 8.0 or more"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler: install gcc"
    return "it takes bfloat16, float16 and float32, not float64" if dtype == torch.float64 else None
