"""Fused attention in Triton: softmax(q k^T / sqrt(D)) v, its gradients and decoding, without a T x T matrix.

A kernel runs as a grid of programs, each on one processor of the GPU. A program takes M queries of one head
and reads keys and values in blocks of N (FlashAttention-2, arXiv 2307.08691). Its softmax is *online*: for
each query it keeps, of the keys read so far,

    top = max(scores)   total = sum(exp(scores - top))   acc = sum(exp(scores - top) * values)

and when a block raises `top`, total and acc shrink by exp(old top - new top). At the end, acc / total is the
output. The backward recomputes weights = exp(scores - lse) from one number a query, lse = top + log(total).
It also needs sum_j weights_j * grad_weights_j over all keys of a query. But grad_weights_j is grad_out .
values_j, so the sum is delta = grad_out . out, and the backward works block by block as well:

    grad_s = weights * (grad_out values^T - delta)
    grad_v = weights^T grad_out    grad_k = grad_s^T q / sqrt(D)    grad_q = grad_s k / sqrt(D)

Query heads share keys and values in groups of any size, and K's groups may differ from V's: a program looks
up its head's groups. In the backward it owns a block of keys of one group and loops over the heads that read
it: no copy for each head, no atomic additions, but few programs for large groups.
Decoding splits a long cache into parts and combines their results (Flash-Decoding).

    use_kernels(model)                                   # what train.py --attention triton does
    TRITON_INTERPRET=1 python ...                        # runs the kernels without a GPU, slowly
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

from common import compiler_missing, note
from model import HeadGroups, Llama, sdpa

HEAD_DIMS = range(16, 129)  # a tensor core takes no less, the registers of a program hold no more
BOTH = 64  # the widest head whose K and V gradients fit into one program's registers together
LOG2_E = constexpr(1.4426950408889634)  # the hardware has 2^x: below, scores and lse are in base 2, not e
SIZES = ["T", "S", "H", "G_K", "G_V", "PART"]  # Triton would compile anew for sizes that 16 divides
INTERPRETED = constexpr(triton.knobs.runtime.interpret)


class View(NamedTuple):  # a tensor (B, heads, T, D) of any strides; a kernel's other tensors are contiguous
    data: Tensor
    strides: tuple[int, int, int, int]
    dtype = property(lambda self: self.data.dtype)  # for the autotuner, which tunes each dtype separately


def tuned(narrow: list, wide: list):
    """Time these blocks (M queries, N keys, warps, stages) once for each head width and dtype, and keep the
    fastest: `narrow` up to a width of 64, `wide` above. In bfloat16 none spills registers, and all
    fit the shared memory of an A100 (tests/compile_kernels.py). float32 needs twice the room."""
    float32, key = [(32, 32, 8, 1), (16, 32, 8, 1)], ["D", "KEYS", "VALUES", "PAD_H"]

    def configs(blocks: list) -> list[triton.Config]:
        return [triton.Config({"M": m, "N": n}, warps, stages) for m, n, warps, stages in blocks]

    def fitting(_, values: dict, D: int, **how) -> list[triton.Config]:
        half = narrow if D <= 64 else wide
        return configs(half if values["q"].dtype.itemsize == 2 else float32)

    # the interpreter has nothing to time, and with small blocks short texts cross their borders
    blocks = [(32, 16, 4, 1)] if INTERPRETED.value else narrow + wide + float32
    return triton.autotune(configs(blocks), key, prune_configs_by={"early_config_prune": fitting})


@triton.jit
def tile(x, b, h, rows, T, D: constexpr):
    """Pointers to x[b, h, rows], with columns up to a power of two, and which of them lie inside x."""
    columns = tl.arange(0, triton.next_power_of_2(D))
    head = x.data + tl.cast(b, tl.int64) * x.strides[0] + tl.cast(h, tl.int64) * x.strides[1]
    at = head + rows[:, None] * x.strides[2] + columns[None, :] * x.strides[3]
    return at, (rows[:, None] < T) & (columns[None, :] < D)


@triton.jit
def load(x, b, h, rows, T, D: constexpr):
    """x[b, h, rows], zero outside x."""
    at, inside = tile(x, b, h, rows, T, D)
    loaded = tl.load(at, mask=inside, other=0.0)
    # the interpreter would multiply the bits of bfloat16 as integers
    return loaded.to(tl.float32) if INTERPRETED and loaded.dtype == tl.bfloat16 else loaded


@triton.jit
def store(x, b, h, rows, T, result, D: constexpr):
    """x[b, h, rows] = result, in the type of x."""
    at, inside = tile(x, b, h, rows, T, D)
    tl.store(at, result.to(x.data.dtype.element_ty), mask=inside)


@tuned([(128, 64, 8, 3), (128, 64, 4, 3), (128, 32, 4, 3), (64, 128, 4, 2)],
       [(64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 2)])  # fmt: skip
@triton.jit(do_not_specialize=SIZES)
def forward_kernel(q, k, v, out, k_groups, v_groups, lse, T, D: constexpr,
                   PRECISION: constexpr, M: constexpr, N: constexpr):  # fmt: skip
    """M rows of out (B, H, T, D) and of lse (B, H, T); grid (blocks of rows, H, B)."""
    # the last rows, which have the most keys, start first
    first, h, b = (tl.num_programs(0) - 1 - tl.program_id(0)) * M, tl.program_id(1), tl.program_id(2)
    k_group, v_group = tl.load(k_groups + h), tl.load(v_groups + h)
    rows = first + tl.arange(0, M)
    queries = load(q, b, h, rows, T, D)
    top, total = tl.full((M,), -float("inf"), tl.float32), tl.zeros((M,), tl.float32)
    acc = tl.zeros(queries.shape, tl.float32)
    for start in range(0, tl.minimum(first + M, T), N):
        columns = start + tl.arange(0, N)  # the < T below is implied, but spares registers
        keys = load(k, b, k_group, columns, T, D)
        scores = tl.dot(queries, tl.trans(keys), None, PRECISION) * (D**-0.5 * LOG2_E)
        scores = tl.where((columns[None, :] < T) & (columns[None, :] <= rows[:, None]), scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))  # finite: every query sees the first key
        weights, shrink = tl.exp2(scores - new_top[:, None]), tl.exp2(top - new_top)
        values = load(v, b, v_group, columns, T, D)
        acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], PRECISION)
        top, total = new_top, total * shrink + tl.sum(weights, 1)
    store(out, b, h, rows, T, acc / total[:, None], D)
    tl.store(lse + (b.to(tl.int64) * tl.num_programs(1) + h) * T + rows, top + tl.log2(total), mask=rows < T)


@tuned([(128, 64, 8, 2), (128, 32, 8, 2), (64, 64, 4, 2)], [(64, 64, 4, 2), (128, 32, 8, 2), (64, 32, 4, 2)])
@triton.jit(do_not_specialize=SIZES)
def grad_q_kernel(q, k, v, out, grad_out, grad_q, k_groups, v_groups, lse, delta, T, D: constexpr,
                  PRECISION: constexpr, M: constexpr, N: constexpr):  # fmt: skip
    """M rows of grad_q (B, H, T, D) and of delta (B, H, T); grid (blocks of rows, H, B)."""
    first, h, b = (tl.num_programs(0) - 1 - tl.program_id(0)) * M, tl.program_id(1), tl.program_id(2)
    k_group, v_group = tl.load(k_groups + h), tl.load(v_groups + h)
    rows = first + tl.arange(0, M)
    at = (b.to(tl.int64) * tl.num_programs(1) + h) * T + rows
    queries, grads = load(q, b, h, rows, T, D), load(grad_out, b, h, rows, T, D)
    its_delta = tl.sum(load(out, b, h, rows, T, D).to(tl.float32) * grads.to(tl.float32), 1)
    tl.store(delta + at, its_delta, mask=rows < T)
    its_lse = tl.load(lse + at, mask=rows < T, other=0.0)
    acc = tl.zeros(queries.shape, tl.float32)
    for start in range(0, tl.minimum(first + M, T), N):
        columns = start + tl.arange(0, N)
        keys, values = load(k, b, k_group, columns, T, D), load(v, b, v_group, columns, T, D)
        scores = tl.dot(queries, tl.trans(keys), None, PRECISION) * (D**-0.5 * LOG2_E)
        scores = tl.where(columns[None, :] <= rows[:, None], scores, -float("inf"))
        grad_s = tl.exp2(scores - its_lse[:, None])
        grad_s *= tl.dot(grads, tl.trans(values), None, PRECISION) - its_delta[:, None]
        acc = tl.dot(grad_s.to(keys.dtype), keys, acc, PRECISION)
    store(grad_q, b, h, rows, T, acc * D**-0.5, D)


@tuned([(32, 64, 4, 1), (16, 64, 4, 3), (16, 128, 8, 2)], [(16, 64, 8, 2), (32, 64, 4, 1), (16, 64, 4, 1)])
@triton.jit(do_not_specialize=SIZES)
def grad_kv_kernel(q, k, v, grad_out, grad_k, grad_v, k_groups, v_groups, lse, delta, T, H, D: constexpr,
                   KEYS: constexpr, VALUES: constexpr, PRECISION: constexpr,
                   M: constexpr, N: constexpr):  # fmt: skip
    """N rows of grad_k (KEYS), of grad_v (VALUES) or of both, of one group; grid (blocks of keys, G, B)."""
    start, g, b = tl.program_id(0) * N, tl.program_id(1), tl.program_id(2)
    columns = start + tl.arange(0, N)
    acc_k = tl.zeros((N, triton.next_power_of_2(D)), tl.float32)
    acc_v = tl.zeros_like(acc_k)
    for h in range(H):
        if tl.load((k_groups if KEYS else v_groups) + h) == g:
            keys = load(k, b, tl.load(k_groups + h), columns, T, D)
            values = load(v, b, tl.load(v_groups + h), columns, T, D)
            for first in range(start // M * M, T, M):
                rows = first + tl.arange(0, M)
                queries, grads = load(q, b, h, rows, T, D), load(grad_out, b, h, rows, T, D)
                at = (b.to(tl.int64) * H + h) * T + rows
                its_lse = tl.load(lse + at, mask=rows < T, other=float("inf"))  # past the end: weights 0
                # all blocks are (keys, queries) here, so that no result has to be transposed
                scores = tl.dot(keys, tl.trans(queries), None, PRECISION) * (D**-0.5 * LOG2_E)
                if first < start + N:
                    scores = tl.where(columns[:, None] <= rows[None, :], scores, -float("inf"))
                weights = tl.exp2(scores - its_lse[None, :])
                if VALUES:
                    acc_v = tl.dot(weights.to(grads.dtype), grads, acc_v, PRECISION)
                if KEYS:
                    its_delta = tl.load(delta + at, mask=rows < T, other=0.0)
                    grad_s = weights * (tl.dot(values, tl.trans(grads), None, PRECISION) - its_delta[None, :])
                    acc_k = tl.dot(grad_s.to(queries.dtype), queries, acc_k, PRECISION)
    if KEYS:
        store(grad_k, b, g, columns, T, acc_k * D**-0.5, D)
    if VALUES:
        store(grad_v, b, g, columns, T, acc_v, D)


@tuned([(1, 64, 4, 3), (1, 64, 4, 2), (1, 32, 4, 2)], [(1, 32, 4, 3), (1, 32, 4, 2)])
@triton.jit(do_not_specialize=SIZES)
def decode_kernel(q, k, v, k_groups, v_groups, parts, lse, begins, S, H, G_K, G_V, PART, D: constexpr,
                  PRECISION: constexpr, PAD_H: constexpr, M: constexpr, N: constexpr):  # fmt: skip
    """One part of the cache for one sequence and PAD_H heads: its own attention, parts (B, parts, H, D), and
    lse (B, parts, H), natural here; grid (parts, B, blocks of heads). It reads each group once, whichever its
    heads, for a product in which the rows of other groups' heads are zero: a tensor core takes 16 rows."""
    part, b = tl.program_id(0), tl.program_id(1)
    heads = tl.program_id(2) * PAD_H + tl.arange(0, PAD_H)
    k_of = tl.load(k_groups + heads, mask=heads < H, other=-1)
    v_of = tl.load(v_groups + heads, mask=heads < H, other=-1)
    queries = load(q, b, 0, heads, H, D)  # q is (B, 1, H, D) here: its rows are heads
    top, total = tl.full((PAD_H,), -float("inf"), tl.float32), tl.zeros((PAD_H,), tl.float32)
    acc = tl.zeros(queries.shape, tl.float32)
    end = tl.minimum((part + 1) * PART, S)
    for start in range(tl.maximum(part * PART, tl.load(begins + b)), end, N):
        columns = start + tl.arange(0, N)
        scores = tl.zeros((PAD_H, N), tl.float32)
        for g in range(G_K):
            keys = load(k, b, g, columns, end, D)
            scores = tl.dot(tl.where(k_of[:, None] == g, queries, 0.0), tl.trans(keys), scores, PRECISION)
        scores = tl.where(columns[None, :] < end, scores * (D**-0.5 * LOG2_E), -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))  # finite: a block begins with a key that is there
        weights, shrink = tl.exp2(scores - new_top[:, None]), tl.exp2(top - new_top)
        acc *= shrink[:, None]
        for g in range(G_V):
            values = load(v, b, g, columns, end, D)
            mine = tl.where(v_of[:, None] == g, weights, 0.0).to(values.dtype)
            acc = tl.dot(mine, values, acc, PRECISION)
        top, total = new_top, total * shrink + tl.sum(weights, 1)
    total = tl.maximum(total, 1.0)  # it is at least 1, or 0 where the part lies wholly before the first key
    at = (b.to(tl.int64) * tl.num_programs(0) + part) * H + heads
    tl.store(lse + at, (top + tl.log2(total)) / LOG2_E, mask=heads < H)
    # contiguous, so that D is a constant here: with `store` and its strides one target spills
    columns = tl.arange(0, acc.shape[1])
    inside = (heads[:, None] < H) & (columns[None, :] < D)
    tl.store(parts + at[:, None] * D + columns[None, :], acc / total[:, None], mask=inside)


def launch(kernel, length: int, block: str, others: tuple, views: tuple[Tensor, ...], *args, **how) -> None:
    """Start a kernel that takes `views` (B, heads, T, D) and `args`, on a grid (length / block, *others)."""
    q = views[0]
    assert all(x.dtype == q.dtype and x.shape[::3] == q.shape[::3] for x in views), [x.shape for x in views]
    assert all(x.shape[2] * x.stride(2) < 2**31 for x in views), f"{q.shape[2]} tokens exceed 32 bits"
    assert all(x.is_contiguous() for x in args if isinstance(x, Tensor)), "groups are not contiguous"
    # float32 products follow torch's setting: exact by default, tf32 on tensor cores where that is allowed
    how["PRECISION"] = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    with torch.cuda.device_of(q):  # Triton starts its kernels on the current device
        start = kernel[lambda sizes: (triton.cdiv(length, sizes[block]), *others)]
        start(*(View(x, x.stride()) for x in views), *args, D=q.shape[3], **how)


def outputs(q: Tensor, *_) -> tuple[Tensor, Tensor]:
    """Memory for out, laid out (B, T, H, D) as `wo` wants it, and for lse."""
    B, H, T, D = q.shape
    return q.new_empty((B, T, H, D)).transpose(1, 2), q.new_empty((B, H, T), dtype=torch.float32)


@torch.library.custom_op("herd::flash_attention", mutates_args=())
def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, k_groups: Tensor, v_groups: Tensor
) -> tuple[Tensor, Tensor]:
    """Causal softmax(q k^T / sqrt(D)) v, (B, H, T, D), and lse (B, H, T), in base 2; opaque to torch.compile.
    q (B, H, T, D), k (B, G_k, T, D) and v (B, G_v, T, D) may have any strides. k_groups and v_groups: (H,)
    integers below G_k and G_v, the groups that each query head reads; one tensor for both saves time."""
    B, H, T, _ = q.shape
    out, lse = outputs(q)
    assert T == k.shape[2] == v.shape[2] and k_groups.shape == v_groups.shape == (H,), (k.shape, v.shape)
    launch(forward_kernel, T, "M", (H, B), (q, k, v, out), k_groups, v_groups, lse, T)
    return out, lse


@torch.library.custom_op("herd::flash_attention_backward", mutates_args=())
def flash_attention_backward(
    q: Tensor, k: Tensor, v: Tensor, k_groups: Tensor, v_groups: Tensor, out: Tensor, lse: Tensor,
    grad_out: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q (B, H, T, D), k (B, G_k, T, D) and v (B, G_v, T, D)."""
    B, H, T, D = q.shape
    grad_q, grad_k, grad_v, delta = (torch.empty_like(x) for x in (q, k, v, lse))
    views, rest = (q, k, v, out, grad_out, grad_q), (k_groups, v_groups, lse, delta, T)
    launch(grad_q_kernel, T, "M", (H, B), views, *rest)
    views = (q, k, v, grad_out, grad_k, grad_v)
    both = k_groups.data_ptr() == v_groups.data_ptr() and D <= BOTH  # one tensor, though two Python objects
    for x, dk, dv in [(k, True, True)] if both else [(k, True, False), (v, False, True)]:
        launch(grad_kv_kernel, T, "N", (x.shape[1], B), views, *rest, H, KEYS=dk, VALUES=dv)
    return grad_q, grad_k, grad_v


def differentiate(ctx, grad_out, grad_lse):  # lse is for the backward only: no gradient reaches it
    return *flash_attention_backward(*ctx.saved_tensors, grad_out), None, None


flash_attention.register_fake(outputs)
flash_attention.register_autograd(
    differentiate, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, *output)
)
flash_attention_backward.register_fake(lambda q, k, v, *_: tuple(map(torch.empty_like, (q, k, v))))


def flash_decode(q: Tensor, k: Tensor, v: Tensor, k_groups: Tensor, v_groups: Tensor, begins=None) -> Tensor:
    """One query a sequence against its cache, no gradient: q (B, H, 1, D), k (B, G_k, S, D), v (B, G_v, S, D)
    -> (B, H, 1, D). begins: (B,) the first token that each sequence sees, below S; None is 0."""
    (B, H, T, D), (_, G_k, S, _), G_v = q.shape, k.shape, v.shape[1]
    assert T == 1 and S == v.shape[2] > 0 and k_groups.shape == v_groups.shape == (H,), (k.shape, v.shape)
    begins = q.new_zeros(B, dtype=torch.int64) if begins is None else begins.contiguous()
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 1
    # enough programs to keep every processor reading, but not many parts, which have to be added up
    n = min(triton.cdiv(S, 256), triton.cdiv(4 * processors, B))
    size = 64 * triton.cdiv(S, 64 * n)  # whole blocks
    n, PAD_H = triton.cdiv(S, size), min(32, max(16, triton.next_power_of_2(H)))
    parts, lse = (q.new_empty(shape, dtype=torch.float32) for shape in ((B, n, H, D), (B, n, H)))
    views, rest = (q.transpose(1, 2), k, v), (k_groups, v_groups, parts, lse, begins, S, H, G_k, G_v, size)
    launch(decode_kernel, S, "PART", (B, triton.cdiv(H, PAD_H)), views, *rest, PAD_H=PAD_H)
    return torch.einsum("bnh,bnhd->bhd", lse.softmax(1), parts)[:, :, None].type_as(q)


def fused(q, k, v, k_groups: HeadGroups, v_groups: HeadGroups, mask: Tensor | None) -> Tensor:
    """As model.ATTENTION. The kernels compute causal attention, and one query whose first keys are hidden;
    sdpa computes the first pass of a batch of texts of several lengths, and a text that is read in parts."""
    k_of = k_groups.of_head
    v_of = k_of if k_groups.of_list == v_groups.of_list else v_groups.of_head
    learning = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if q.shape[2] == 1 and not learning:
        begins = None if mask is None else mask.int().argmax(-1).flatten().expand(len(q))
        return flash_decode(q.type_as(k), k, v, k_of, v_of, begins)
    if mask is not None or q.shape[2] < k.shape[2]:
        return sdpa(q, k, v, k_groups, v_groups, mask)
    return flash_attention(q, k, v, k_of, v_of)[0]


def why_not(model: Llama) -> str | None:
    """Why the kernels cannot run here, in words; None if they can."""
    weight, c = model.tok_embeddings.weight, model.config
    if any(c.k_latent + c.v_latent):
        return "its kernels do not support latent keys and values"
    if c.head_dim not in HEAD_DIMS or weight.dtype == torch.float64:
        return f"it takes head_dim {HEAD_DIMS[0]} to {HEAD_DIMS[-1]} (here {c.head_dim}), and no float64"
    if INTERPRETED.value:
        return None
    if not weight.is_cuda or torch.version.hip or torch.cuda.get_device_capability(weight.device) < (8, 0):
        return "it needs an NVIDIA GPU of compute capability 8.0 or more (or TRITON_INTERPRET=1, slowly)"
    missing = compiler_missing(weight.device)
    return f"Triton needs {missing}" if missing else None


def use_kernels(model: Llama) -> None:
    """Let the model's attention run in these kernels; where they cannot, print the reason and leave sdpa."""
    if reason := why_not(model):
        note(f"no triton attention: {reason}; sdpa takes its place")
        return
    for layer in model.layers:
        layer.attention.attend = fused
