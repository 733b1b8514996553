"""Fused attention in Triton, forward, backward and decoding: softmax(q k^T / sqrt(D)) v without the T x T scores.

The textbook writes the scores of all queries and keys to memory, reads them for the softmax, writes the weights, and
reads them again for the sum of values. Here (FlashAttention-2, arXiv 2307.08691) a program takes M queries of one head
and walks over the keys in blocks of N, in the fast memory of its processor. Of the blocks so far it keeps, for a query,

    top = max(scores)   total = sum(exp(scores - top))   out = sum(exp(scores - top) * values)

and when a block has a score above `top`, total and out shrink by exp(old top - new top): a softmax that never sees
more than a block of its row. At the end out / total is the answer. Of the weights nothing is stored but one number a
query, lse = top + log(total); the backward makes them again from it, weights = exp(scores - lse), and then with
slopes = weights * (grad_out values^T - sum(grad_out * out)), the softmax's own derivative,

    grad_v = weights^T grad_out    grad_k = scale * slopes^T q    grad_q = scale * slopes k

Key and value heads are shared by groups of query heads, of any size and for K apart from V. A program looks up the
groups of its head and reads them where they are. In the backward a program owns a block of keys of one *group* and
walks over the heads that read it, so its sum needs no copy for every head and no atomic addition, and gives the same
bits each time. Decoding, one query against a long cache, is split over the cache (Flash-Decoding).

What a layer costs, causal, B sequences, itemsize 2 (bfloat16), of a T x T half that is skipped:

    forward    2 B H T^2 D operations              bytes 2 B T D (2 H + G_k + G_v)
    backward   7 B H T^2 D, K and V of one map     bytes 2 B T D (5 H + 4 G)
               8 B H T^2 D, of two maps            bytes 2 B T D (6 H + 3 G_k + 3 G_v)
    decode     4 B H S D                           bytes 2 B S D (G_k + G_v)

so at least max(operations / peak, bytes / bandwidth) seconds; an A100 does 312e12 operations and moves 2.0e12 bytes a
second, an H100 989e12 and 3.35e12. At T = 2048, H = 32, D = 128 and B = 1 the forward needs 0.11 ms of an A100's tensor
cores and 0.03 ms of its memory: it is bound by products from a few hundred tokens on, and decoding by bytes, always.

    y = flash_attention(q, k, v, k_groups, v_groups)     # as --attention triton calls it
    TRITON_INTERPRET=1 python ...                        # runs it without a GPU, slowly, to look inside
"""

import math

import torch
import triton
import triton.language as tl

HEAD_DIMS = range(16, 129)  # what a program's registers hold, and what a tensor core takes
LOG2_E = tl.constexpr(math.log2(math.e))  # the hardware has 2^x: scores and `lse` are in base 2
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def tuned(*, narrow: list, wide: list, key: list[str]):
    """Time these blocks (M queries, N keys, warps, stages) once for each head width and dtype, and take the fastest:
    `narrow` up to a width of 64, `wide` above it. Of these, none spills registers in 16 bits, and all fit the shared
    memory of an A100; tests/compile_kernels.py says so. Float32 needs twice the room, and gets one small block."""
    some, more, float32 = (
        [triton.Config({"M": m, "N": n}, num_warps=warps, num_stages=stages) for m, n, warps, stages in sizes]
        for sizes in (narrow, wide, [(32, 32, 4, 1)])
    )
    if INTERPRETED.value:  # there is nothing to time; small blocks make short texts cross their borders
        return triton.autotune([triton.Config({"M": 32, "N": 16})], key)

    def fitting(configs, values: dict, **how) -> list[triton.Config]:
        return float32 if values["q"].itemsize > 2 else more if how["PAD"] > 64 else some

    return triton.autotune(some + more + float32, key, prune_configs_by={"early_config_prune": fitting})


@triton.jit
def load(x, strides, b, h, rows, T, D: tl.constexpr, PAD: tl.constexpr):
    """x[b, h, rows] (rows, PAD), zero where T ends inside a block or D is below the power of two that a block needs."""
    columns = tl.arange(0, PAD)
    x += tl.cast(b, tl.int64) * strides[0] + tl.cast(h, tl.int64) * strides[1]
    there = (rows[:, None] < T) & (columns[None, :] < D)
    tile = tl.load(x + rows[:, None] * strides[2] + columns[None, :] * strides[3], mask=there, other=0.0)
    if INTERPRETED and x.dtype.element_ty == tl.bfloat16:  # whose bits the interpreter would multiply as integers
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def store(x, strides, b, h, rows, T, tile, D: tl.constexpr, PAD: tl.constexpr):
    """x[b, h, rows] = tile, in the type of x and without its padding."""
    columns = tl.arange(0, PAD)
    x += tl.cast(b, tl.int64) * strides[0] + tl.cast(h, tl.int64) * strides[1]
    there = (rows[:, None] < T) & (columns[None, :] < D)
    tl.store(x + rows[:, None] * strides[2] + columns[None, :] * strides[3], tile.to(x.dtype.element_ty), mask=there)


@triton.jit
def log_weights(queries, keys, rows, columns, T, scale: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
                wide: tl.constexpr):  # fmt: skip
    """Scores of a block in base 2; -inf behind the end of the text and, when causal, behind the query."""
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION, out_dtype=wide) * (scale * LOG2_E)
    seen = columns[None, :] < T
    if CAUSAL:
        seen &= columns[None, :] <= rows[:, None]
    return tl.where(seen, scores, -float("inf"))


@tuned(
    narrow=[(128, 64, 8, 3), (128, 64, 4, 3), (128, 32, 4, 3), (64, 128, 4, 2)],
    wide=[(64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 2)], key=["D", "CAUSAL"],
)  # fmt: skip
@triton.jit
def forward_kernel(
    q, k, v, out, lse, k_groups, v_groups, q_strides, k_strides, v_strides, out_strides, T,
    scale: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """M rows of out (B, H, T, D) and of lse (B, H, T); grid (blocks of rows, H, B)."""
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * M  # the last rows have the most keys: they begin first
    h, b = tl.program_id(1), tl.program_id(2)
    wide: tl.constexpr = lse.dtype.element_ty
    k_group, v_group = tl.load(k_groups + h), tl.load(v_groups + h)
    rows = first + tl.arange(0, M)
    queries = load(q, q_strides, b, h, rows, T, D, PAD)
    top, total = tl.full((M,), -float("inf"), wide), tl.zeros((M,), wide)
    acc = tl.zeros((M, PAD), wide)
    end = tl.minimum(first + M, T) if CAUSAL else T
    for start in range(0, end, N):
        columns = start + tl.arange(0, N)
        keys = load(k, k_strides, b, k_group, columns, T, D, PAD)
        scores = log_weights(queries, keys, rows, columns, T, scale, CAUSAL, PRECISION, wide)
        new_top = tl.maximum(top, tl.max(scores, 1))  # finite: every row sees the first key
        weights, shrink = tl.exp2(scores - new_top[:, None]), tl.exp2(top - new_top)
        values = load(v, v_strides, b, v_group, columns, T, D, PAD)
        acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision=PRECISION, out_dtype=wide)
        top, total = new_top, total * shrink + tl.sum(weights, 1)
    store(out, out_strides, b, h, rows, T, acc / total[:, None], D, PAD)
    tl.store(lse + (b.to(tl.int64) * tl.num_programs(1) + h) * T + rows, top + tl.log2(total), mask=rows < T)


@tuned(
    narrow=[(128, 64, 8, 2), (128, 32, 8, 2), (64, 64, 4, 2)],
    wide=[(64, 64, 4, 2), (128, 32, 8, 2), (64, 32, 4, 2)], key=["D", "CAUSAL"],
)  # fmt: skip
@triton.jit
def grad_q_kernel(
    q, k, v, out, grad_out, grad_q, lse, delta, k_groups, v_groups,
    q_strides, k_strides, v_strides, out_strides, grad_out_strides, grad_q_strides, T,
    scale: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """M rows of grad_q (B, H, T, D), and of delta = sum(grad_out * out) (B, H, T); grid (blocks of rows, H, B)."""
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * M
    h, b = tl.program_id(1), tl.program_id(2)
    wide: tl.constexpr = lse.dtype.element_ty
    k_group, v_group = tl.load(k_groups + h), tl.load(v_groups + h)
    rows = first + tl.arange(0, M)
    queries = load(q, q_strides, b, h, rows, T, D, PAD)
    grads = load(grad_out, grad_out_strides, b, h, rows, T, D, PAD)
    own = tl.sum(load(out, out_strides, b, h, rows, T, D, PAD).to(wide) * grads.to(wide), 1)
    at = (b.to(tl.int64) * tl.num_programs(1) + h) * T + rows
    tl.store(delta + at, own, mask=rows < T)
    level = tl.load(lse + at, mask=rows < T, other=0.0)
    acc = tl.zeros((M, PAD), wide)
    end = tl.minimum(first + M, T) if CAUSAL else T
    for start in range(0, end, N):
        columns = start + tl.arange(0, N)
        keys = load(k, k_strides, b, k_group, columns, T, D, PAD)
        values = load(v, v_strides, b, v_group, columns, T, D, PAD)
        scores = log_weights(queries, keys, rows, columns, T, scale, CAUSAL, PRECISION, wide)
        slopes = tl.exp2(scores - level[:, None])
        slopes *= tl.dot(grads, tl.trans(values), input_precision=PRECISION, out_dtype=wide) - own[:, None]
        acc = tl.dot(slopes.to(keys.dtype), keys, acc, input_precision=PRECISION, out_dtype=wide)
    store(grad_q, grad_q_strides, b, h, rows, T, acc * scale, D, PAD)


@tuned(
    narrow=[(32, 64, 4, 1), (16, 64, 4, 3), (16, 128, 8, 2)],
    wide=[(16, 64, 8, 2), (32, 64, 4, 1), (16, 64, 4, 1)], key=["D", "CAUSAL", "KEYS", "VALUES"],
)  # fmt: skip
@triton.jit
def grad_kv_kernel(
    q, k, v, grad_out, grad_k, grad_v, lse, delta, k_groups, v_groups, members, bounds,
    q_strides, k_strides, v_strides, grad_out_strides, grad_k_strides, grad_v_strides, T, H,
    scale: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """N rows of grad_k (KEYS), of grad_v (VALUES) or of both, of one group; grid (blocks of keys, G, B).

    members (H,) lists the heads of group 0, then of group 1, ...; those of group g begin at bounds[g].
    """
    start, g, b = tl.program_id(0) * N, tl.program_id(1), tl.program_id(2)
    wide: tl.constexpr = lse.dtype.element_ty
    columns = start + tl.arange(0, N)
    acc_k, acc_v = tl.zeros((N, PAD), wide), tl.zeros((N, PAD), wide)
    for i in range(tl.load(bounds + g), tl.load(bounds + g + 1)):
        h = tl.load(members + i)
        keys = load(k, k_strides, b, tl.load(k_groups + h), columns, T, D, PAD)
        values = load(v, v_strides, b, tl.load(v_groups + h), columns, T, D, PAD)
        for first in range(start // M * M if CAUSAL else 0, T, M):
            rows = first + tl.arange(0, M)
            queries = load(q, q_strides, b, h, rows, T, D, PAD)
            grads = load(grad_out, grad_out_strides, b, h, rows, T, D, PAD)
            at = (b.to(tl.int64) * H + h) * T + rows
            level = tl.load(lse + at, mask=rows < T, other=float("inf"))  # a query behind the end has no weights
            # everything is on its side, (keys, queries), so that no product needs a transposed result
            scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION, out_dtype=wide) * (scale * LOG2_E)
            if CAUSAL and first < start + N:
                scores = tl.where(columns[:, None] <= rows[None, :], scores, -float("inf"))
            weights = tl.exp2(scores - level[None, :])
            if VALUES:
                acc_v = tl.dot(weights.to(grads.dtype), grads, acc_v, input_precision=PRECISION, out_dtype=wide)
            if KEYS:
                own = tl.load(delta + at, mask=rows < T, other=0.0)
                slopes = tl.dot(values, tl.trans(grads), input_precision=PRECISION, out_dtype=wide) - own[None, :]
                slopes = (weights * slopes).to(queries.dtype)
                acc_k = tl.dot(slopes, queries, acc_k, input_precision=PRECISION, out_dtype=wide)
    if KEYS:
        store(grad_k, grad_k_strides, b, g, columns, T, acc_k * scale, D, PAD)
    if VALUES:
        store(grad_v, grad_v_strides, b, g, columns, T, acc_v, D, PAD)


def options(q: torch.Tensor, causal: bool, scale: float) -> dict:
    """What all kernels are specialized for."""
    D = q.shape[-1]
    # float32 products follow torch's own setting: exact by default, tf32 on tensor cores where that is allowed
    precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
    return {"scale": scale, "D": D, "PAD": triton.next_power_of_2(D), "CAUSAL": causal, "PRECISION": precision}


def blocks(size: str, T: int, *others: int):
    """The grid of a kernel whose first axis goes over T in blocks of M or N."""
    return lambda meta: (triton.cdiv(T, meta[size]), *others)


@torch.library.custom_op("herd::attention", mutates_args=())
def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_groups: torch.Tensor, v_groups: torch.Tensor,
    causal: bool, scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """out (B, H, T, D) and lse (B, H, T), as one operator that torch.compile does not look into."""
    B, H, T, _ = q.shape
    out, lse = like_output(q, causal)
    strides = (q.stride(), k.stride(), v.stride(), out.stride())
    how = options(q, causal, scale)
    forward_kernel[blocks("M", T, H, B)](q, k, v, out, lse, k_groups, v_groups, *strides, T, **how)
    return out, lse


@attention.register_fake
def _(q, k, v, k_groups, v_groups, causal, scale):
    return like_output(q, causal)


def like_output(q: torch.Tensor, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory for out, laid out (B, T, H, D) as `wo` wants it, and for lse in the precision of the sums."""
    B, H, T, D = q.shape
    lse = q.new_empty((B, H, T), dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty((B, T, H, D)).transpose(1, 2), lse


@torch.library.custom_op("herd::attention_backward", mutates_args=())
def attention_backward(
    grad_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
    k_groups: torch.Tensor, v_groups: torch.Tensor, causal: bool, scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of q (B, H, T, D), k (B, G_k, T, D) and v (B, G_v, T, D)."""
    B, H, T, _ = q.shape
    grad_q, grad_k, grad_v, delta = *map(torch.empty_like, (q, k, v)), torch.empty_like(lse)
    how, strides = options(q, causal, scale), (q.stride(), k.stride(), v.stride())
    grad_q_kernel[blocks("M", T, H, B)](
        q, k, v, out, grad_out, grad_q, lse, delta, k_groups, v_groups,
        *strides, out.stride(), grad_out.stride(), grad_q.stride(), T, **how,
    )  # fmt: skip
    # of one map, a program makes both gradients of its group, as long as its registers hold two sums
    one_map = k_groups.data_ptr() == v_groups.data_ptr() and how["PAD"] <= 64
    for groups, keys, values in ((k_groups, True, one_map), (v_groups, False, True))[: 1 if one_map else 2]:
        members = groups.argsort(stable=True)
        G = k.shape[1] if keys else v.shape[1]
        bounds = torch.searchsorted(groups[members], torch.arange(G + 1, device=groups.device))
        grad_kv_kernel[blocks("N", T, G, B)](
            q, k, v, grad_out, grad_k, grad_v, lse, delta, k_groups, v_groups, members, bounds,
            *strides, grad_out.stride(), grad_k.stride(), grad_v.stride(), T, H, KEYS=keys, VALUES=values, **how,
        )  # fmt: skip
    return grad_q, grad_k, grad_v


@attention_backward.register_fake
def _(grad_out, q, k, v, out, lse, k_groups, v_groups, causal, scale):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def keep(ctx, inputs, output) -> None:
    *tensors, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def differentiate(ctx, grad_out, grad_lse):
    q, k, v, k_groups, v_groups, out, lse = ctx.saved_tensors
    grads = attention_backward(grad_out, q, k, v, out, lse, k_groups, v_groups, ctx.causal, ctx.scale)
    return *grads, None, None, None, None


attention.register_autograd(differentiate, setup_context=keep)


def flash_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_groups: torch.Tensor, v_groups: torch.Tensor,
    causal: bool = True, scale: float | None = None,
) -> torch.Tensor:  # fmt: skip
    """softmax(scale q k^T) v: q (B, H, T, D), k (B, G_k, T, D), v (B, G_v, T, D) -> (B, H, T, D).

    k_groups, v_groups: (H,) int64, the key and the value group that each query head reads; the same tensor for both
    saves a product in the backward. Any strides. scale: 1 / sqrt(D) unless given.
    """
    check(q, k, v, k_groups, v_groups)
    assert k.shape[2] == v.shape[2] == q.shape[2], f"lengths {q.shape[2]}, {k.shape[2]}, {v.shape[2]} differ"
    return attention(q, k, v, k_groups, v_groups, causal, q.shape[-1] ** -0.5 if scale is None else scale)[0]


def check(q, k, v, k_groups, v_groups) -> None:
    (B, H, _, D), shapes = q.shape, f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    assert k.shape[0] == v.shape[0] == B and k.shape[3] == v.shape[3] == D, f"{shapes} do not belong together"
    assert q.dtype == k.dtype == v.dtype, f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}"
    assert k_groups.shape == v_groups.shape == (H,), f"{tuple(k_groups.shape)} groups for {H} heads"
    assert D in HEAD_DIMS, f"head_dim {D} is not from {HEAD_DIMS[0]} to {HEAD_DIMS[-1]}"


# ---- decoding ----


@tuned(
    narrow=[(0, 64, 4, 3), (0, 64, 4, 2), (0, 32, 4, 2)],
    wide=[(0, 32, 4, 3), (0, 32, 4, 2)], key=["D", "PAD_H"],
)  # fmt: skip
@triton.jit
def decode_kernel(
    q, k, v, parts, lse, k_groups, v_groups, begins, q_strides, k_strides, v_strides, S, H, G_K, G_V, PART,
    scale: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr, PRECISION: tl.constexpr,
    PAD_H: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """One part of the cache for one sequence and all its heads; grid (parts, B).

    parts (B, parts, H, D) gets the part's own attention, lse (B, parts, H) the natural logarithm of its weights' sum.
    Every group's keys and values are read once: its heads are rows of one product, in which all others are zero. Tensor
    cores take 16 rows at least, so that up to 16 heads this multiplies no more than a product for every group would.
    """
    part, b = tl.program_id(0), tl.program_id(1)
    wide: tl.constexpr = lse.dtype.element_ty
    heads = tl.arange(0, PAD_H)
    k_of = tl.load(k_groups + heads, mask=heads < H, other=-1)
    v_of = tl.load(v_groups + heads, mask=heads < H, other=-1)
    width = tl.arange(0, PAD)
    # its one query a head makes q (B, 1, H, D), with heads for rows
    queries = load(q, (q_strides[0], q_strides[2], q_strides[1], q_strides[3]), b, 0, heads, H, D, PAD)
    top, total = tl.full((PAD_H,), -float("inf"), wide), tl.zeros((PAD_H,), wide)
    acc = tl.zeros((PAD_H, PAD), wide)
    end = tl.minimum((part + 1) * PART, S)
    for start in range(tl.maximum(part * PART, tl.load(begins + b)), end, N):
        columns = start + tl.arange(0, N)
        scores = tl.zeros((PAD_H, N), wide)
        for g in range(G_K):
            keys = load(k, k_strides, b, g, columns, end, D, PAD)
            mine = tl.where(k_of[:, None] == g, queries, 0.0)
            scores = tl.dot(mine, tl.trans(keys), scores, input_precision=PRECISION, out_dtype=wide)
        scores = tl.where(columns[None, :] < end, scores * (scale * LOG2_E), -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))  # finite: a block begins with a key that is there
        weights, shrink = tl.exp2(scores - new_top[:, None]), tl.exp2(top - new_top)
        acc *= shrink[:, None]
        for g in range(G_V):
            values = load(v, v_strides, b, g, columns, end, D, PAD)
            mine = tl.where(v_of[:, None] == g, weights, 0.0).to(values.dtype)
            acc = tl.dot(mine, values, acc, input_precision=PRECISION, out_dtype=wide)
        top, total = new_top, total * shrink + tl.sum(weights, 1)
    seen = total > 0  # the part may lie wholly before the first key
    total = tl.where(seen, total, 1.0)
    row = (b.to(tl.int64) * tl.num_programs(0) + part) * H + heads
    tl.store(lse + row, tl.where(seen, (top + tl.log2(total)) / LOG2_E, -float("inf")), mask=heads < H)
    at, there = parts + row[:, None] * D + width[None, :], (heads[:, None] < H) & (width[None, :] < D)
    tl.store(at, acc / total[:, None], mask=there)


def flash_decode(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_groups: torch.Tensor, v_groups: torch.Tensor,
    begins: torch.Tensor | None = None, scale: float | None = None,
) -> torch.Tensor:  # fmt: skip
    """One new query for each sequence against its cache: q (B, H, 1, D), k (B, G_k, S, D), v (B, G_v, S, D) ->
    (B, H, 1, D). begins: (B,) the first token of each sequence that is seen, since a batch of texts of several lengths
    is padded at the left; no gradient.
    """
    check(q, k, v, k_groups, v_groups)
    (B, H, T, D), (_, G_k, S, _) = q.shape, k.shape
    assert T == 1 and v.shape[2] == S, f"{T} queries, {S} keys, {v.shape[2]} values: give one query, as many of both"
    begins = torch.zeros(B, dtype=torch.int64, device=q.device) if begins is None else begins
    # enough programs to keep every processor reading, of 64 tokens or more each
    n = max(1, min(triton.cdiv(S, 64), triton.cdiv(4 * processors(q.device), B)))
    size = triton.cdiv(S, n)
    n = triton.cdiv(S, size)
    wide = torch.promote_types(q.dtype, torch.float32)
    parts, lse = q.new_empty((B, n, H, D), dtype=wide), q.new_empty((B, n, H), dtype=wide)
    how = options(q, False, q.shape[-1] ** -0.5 if scale is None else scale)
    how.pop("CAUSAL")
    decode_kernel[(n, B)](
        q, k, v, parts, lse, k_groups, v_groups, begins, q.stride(), k.stride(), v.stride(), S, H, G_k, v.shape[1],
        size, PAD_H=max(16, triton.next_power_of_2(H)), **how,
    )  # fmt: skip
    return (lse.softmax(1)[..., None] * parts).sum(1)[:, :, None].type_as(q)


def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
