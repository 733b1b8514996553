"""Fused attention in Triton, forward, backward and decoding: softmax(q k^T / sqrt(D)) v without the T x T scores.

The textbook writes the scores of all queries and keys to memory (268 MB of 32 heads and 2048 tokens in bfloat16), reads
them for the softmax, writes the weights, and reads them again. A kernel is started as a grid of programs, each on one
of the GPU's hundred-odd processors, whose registers and shared memory hold some hundred KB. Here (FlashAttention-2,
arXiv 2307.08691) a program takes M queries of one head and walks over the keys in blocks of N. Of those so far it keeps

    top = max(scores)   total = sum(exp(scores - top))   acc = sum(exp(scores - top) * values)

for each query, and when a block has a score above `top`, total and acc shrink by exp(old top - new top): a softmax that
never sees more than a block of its row. At the end acc / total is the output. Of the weights nothing is stored but one
number a query, lse = top + log(total), from which the backward makes them again, weights = exp(scores - lse).

The derivative of a softmax needs, for each query, one sum over all its keys, sum_j weights_j * grad_weights_j. Since
grad_weights_j is grad_out . values_j, that sum is grad_out . (sum_j weights_j values_j) = grad_out . out: one number a
query, `delta`, known before any key is read. So the slopes of the scores are made block by block, too:

    slopes = weights * (grad_out values^T - delta)
    grad_v = weights^T grad_out    grad_k = scale * slopes^T q    grad_q = scale * slopes k

Key and value heads are shared by groups of query heads, of any size and for K apart from V. A program looks up the
groups of its head and reads them where they are. In the backward a program owns a block of keys of one *group* and
walks over the heads that read it, so its sum needs no copy for every head and no atomic addition, and has the same bits
each time in a process (another may choose other blocks). The price is that a large group has few programs.
Decoding, one query against a long cache, is split over the cache (Flash-Decoding).

What a layer costs for B texts, causal (half of T x T is skipped), in 16 bits, if each kernel reads everything once:

    forward    2 B H T^2 D operations                    bytes 2 B T D (2 H + G_k + G_v)
    backward   7 B H T^2 D, D <= 64, K and V of one map  bytes 2 B T D (6 H + 6 G)
               8 B H T^2 D, else                         bytes 2 B T D (8 H + 4 G_k + 3 G_v)
    decode     4 B H S D                                 bytes 2 B S D (G_k + G_v)

so at least max(operations / peak, bytes / bandwidth) seconds; an A100 does 312e12 operations and moves 2.0e12 bytes a
second, an H100 989e12 and 3.35e12. At T = 2048, D = 128 and 32 heads, each with its own K and V, the forward needs
0.110 ms of an A100's tensor cores and 0.034 ms of its memory, of an H100's 0.035 and 0.020: products bind it from some
600 and 1200 tokens on. Decoding is bound by bytes, whatever the length.

    y = flash_attention(q, k, v, k_groups, v_groups)     # as --attention triton calls it
    TRITON_INTERPRET=1 python ...                        # runs it without a GPU, slowly, to look inside
"""

import math

import torch
import triton
import triton.language as tl

HEAD_DIMS = range(16, 129)  # what a program's registers hold, and what a tensor core takes
FUSED = 64  # the widest head whose K and V gradients one program's registers hold together
LOG2_E = tl.constexpr(math.log2(math.e))  # the hardware has 2^x: in the kernels scores and lse are logarithms in base 2
SIZES = ["T", "S", "H", "G_K", "G_V", "PART"]  # not to compile anew for each that 16 divides, as Triton would
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def tuned(key: list[str], narrow: list, wide: list):
    """Time these blocks (M queries, N keys, warps, stages) once for each head width and dtype, and take the fastest:
    `narrow` up to a width of 64, `wide` above it. None of them spills registers in bfloat16, causal, and all fit the
    shared memory of an A100 (tests/compile_kernels.py). Exact float32 has no tensor cores and needs twice the room."""

    def configs(*sizes: tuple[int, int, int, int]) -> list[triton.Config]:
        names = ("M", "N") if narrow[0][0] else ("N",)  # decoding has one query
        blocks = [({"M": m, "N": n}, warps, stages) for m, n, warps, stages in sizes]
        return [triton.Config({x: b[x] for x in names}, num_warps=w, num_stages=s) for b, w, s in blocks]

    if INTERPRETED.value:  # there is nothing to time; small blocks make short texts cross their borders
        return triton.autotune(configs((32, 16, 4, 1)), key)
    some, more, float32 = configs(*narrow), configs(*wide), configs((32, 32, 8, 1), (16, 32, 8, 1))

    def fitting(_, values: dict, PAD: int, **how) -> list[triton.Config]:
        if values["q"].itemsize > 2:
            return float32
        return some if PAD <= 64 else more

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


@tuned(["D", "CAUSAL"], narrow=[(128, 64, 8, 3), (128, 64, 4, 3), (128, 32, 4, 3), (64, 128, 4, 2)],
       wide=[(64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 2)])  # fmt: skip
@triton.jit(do_not_specialize=SIZES)
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
        # what is summed so far was measured from the old top: rescale it, then add this block
        new_top = tl.maximum(top, tl.max(scores, 1))  # finite: every row sees the first key
        weights, shrink = tl.exp2(scores - new_top[:, None]), tl.exp2(top - new_top)
        values = load(v, v_strides, b, v_group, columns, T, D, PAD)
        acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision=PRECISION, out_dtype=wide)
        top, total = new_top, total * shrink + tl.sum(weights, 1)
    store(out, out_strides, b, h, rows, T, acc / total[:, None], D, PAD)
    tl.store(lse + (b.to(tl.int64) * tl.num_programs(1) + h) * T + rows, top + tl.log2(total), mask=rows < T)


@tuned(["D", "CAUSAL"], narrow=[(128, 64, 8, 2), (128, 32, 8, 2), (64, 64, 4, 2)],
       wide=[(64, 64, 4, 2), (128, 32, 8, 2), (64, 32, 4, 2)])  # fmt: skip
@triton.jit(do_not_specialize=SIZES)
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
    own_delta = tl.sum(load(out, out_strides, b, h, rows, T, D, PAD).to(wide) * grads.to(wide), 1)
    at = (b.to(tl.int64) * tl.num_programs(1) + h) * T + rows
    tl.store(delta + at, own_delta, mask=rows < T)
    own_lse = tl.load(lse + at, mask=rows < T, other=0.0)
    acc = tl.zeros((M, PAD), wide)
    end = tl.minimum(first + M, T) if CAUSAL else T
    for start in range(0, end, N):
        columns = start + tl.arange(0, N)
        keys = load(k, k_strides, b, k_group, columns, T, D, PAD)
        values = load(v, v_strides, b, v_group, columns, T, D, PAD)
        scores = log_weights(queries, keys, rows, columns, T, scale, CAUSAL, PRECISION, wide)
        slopes = tl.exp2(scores - own_lse[:, None])
        slopes *= tl.dot(grads, tl.trans(values), input_precision=PRECISION, out_dtype=wide) - own_delta[:, None]
        acc = tl.dot(slopes.to(keys.dtype), keys, acc, input_precision=PRECISION, out_dtype=wide)
    store(grad_q, grad_q_strides, b, h, rows, T, acc * scale, D, PAD)


@tuned(["D", "CAUSAL", "KEYS", "VALUES"], narrow=[(32, 64, 4, 1), (16, 64, 4, 3), (16, 128, 8, 2)],
       wide=[(16, 64, 8, 2), (32, 64, 4, 1), (16, 64, 4, 1)])  # fmt: skip
@triton.jit(do_not_specialize=SIZES)
def grad_kv_kernel(
    q, k, v, grad_out, grad_k, grad_v, lse, delta, k_groups, v_groups,
    q_strides, k_strides, v_strides, grad_out_strides, grad_k_strides, grad_v_strides, T, H,
    scale: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """N rows of grad_k (KEYS), of grad_v (VALUES) or of both, of one group; grid (blocks of keys, G, B)."""
    start, g, b = tl.program_id(0) * N, tl.program_id(1), tl.program_id(2)
    wide: tl.constexpr = lse.dtype.element_ty
    columns = start + tl.arange(0, N)
    acc_k, acc_v = tl.zeros((N, PAD), wide), tl.zeros((N, PAD), wide)
    groups = k_groups if KEYS else v_groups
    for h in range(H):
        if tl.load(groups + h) == g:
            keys = load(k, k_strides, b, tl.load(k_groups + h), columns, T, D, PAD)
            values = load(v, v_strides, b, tl.load(v_groups + h), columns, T, D, PAD)
            for first in range(start // M * M if CAUSAL else 0, T, M):
                rows = first + tl.arange(0, M)
                queries = load(q, q_strides, b, h, rows, T, D, PAD)
                grads = load(grad_out, grad_out_strides, b, h, rows, T, D, PAD)
                at = (b.to(tl.int64) * H + h) * T + rows
                its_lse = tl.load(lse + at, mask=rows < T, other=float("inf"))  # behind the end, no weights
                # everything lies on its side, (keys, queries), so that no result has to be transposed
                scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION, out_dtype=wide) * (scale * LOG2_E)
                if CAUSAL and first < start + N:
                    scores = tl.where(columns[:, None] <= rows[None, :], scores, -float("inf"))
                weights = tl.exp2(scores - its_lse[None, :])
                if VALUES:
                    acc_v = tl.dot(weights.to(grads.dtype), grads, acc_v, input_precision=PRECISION, out_dtype=wide)
                if KEYS:
                    its_delta = tl.load(delta + at, mask=rows < T, other=0.0)
                    slopes = tl.dot(values, tl.trans(grads), input_precision=PRECISION, out_dtype=wide)
                    slopes = (weights * (slopes - its_delta[None, :])).to(queries.dtype)
                    acc_k = tl.dot(slopes, queries, acc_k, input_precision=PRECISION, out_dtype=wide)
    if KEYS:
        store(grad_k, grad_k_strides, b, g, columns, T, acc_k * scale, D, PAD)
    if VALUES:
        store(grad_v, grad_v_strides, b, g, columns, T, acc_v, D, PAD)


def options(q: torch.Tensor, scale: float) -> dict:
    """What all kernels are specialized for."""
    D = q.shape[-1]
    # float32 products follow torch's own setting: exact by default, tf32 on tensor cores where that is allowed
    precision = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    return {"scale": scale, "D": D, "PAD": triton.next_power_of_2(D), "PRECISION": precision}


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
    out, lse = like_output(q)
    strides = (q.stride(), k.stride(), v.stride(), out.stride())
    with torch.cuda.device_of(q):  # Triton starts its kernels on the current device
        forward_kernel[blocks("M", T, H, B)](
            q, k, v, out, lse, k_groups, v_groups, *strides, T, CAUSAL=causal, **options(q, scale)
        )  # fmt: skip
    return out, lse


@attention.register_fake
def _(q, k, v, k_groups, v_groups, causal, scale):
    return like_output(q)


def like_output(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
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
    how, strides = {**options(q, scale), "CAUSAL": causal}, (q.stride(), k.stride(), v.stride())
    # one tensor for both maps, which autograd hands back as another Python object
    one_map = k_groups.data_ptr() == v_groups.data_ptr() and q.shape[-1] <= FUSED
    with torch.cuda.device_of(q):
        grad_q_kernel[blocks("M", T, H, B)](
            q, k, v, out, grad_out, grad_q, lse, delta, k_groups, v_groups,
            *strides, out.stride(), grad_out.stride(), grad_q.stride(), T, **how,
        )  # fmt: skip
        for keys, values in [(True, True)] if one_map else [(True, False), (False, True)]:
            grad_kv_kernel[blocks("N", T, k.shape[1] if keys else v.shape[1], B)](
                q, k, v, grad_out, grad_k, grad_v, lse, delta, k_groups, v_groups,
                *strides, grad_out.stride(), grad_k.stride(), grad_v.stride(), T, H, KEYS=keys, VALUES=values, **how,
            )  # fmt: skip
    return grad_q, grad_k, grad_v


@attention_backward.register_fake
def _(grad_out, q, k, v, out, lse, k_groups, v_groups, causal, scale):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def keep(ctx, inputs, output) -> None:
    *tensors, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)  # lse is for the backward alone: it passes no gradient on


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

    k_groups, v_groups: (H,) integers, the key and the value group that each query head reads, below G_k and G_v; the
    same tensor for both saves a product in the backward. q, k, v may have any strides. scale: 1 / sqrt(D) unless given.
    """
    check(q, k, v, k_groups, v_groups)
    assert k.shape[2] == v.shape[2] == q.shape[2], f"lengths {q.shape[2]}, {k.shape[2]}, {v.shape[2]} differ"
    return attention(q, k, v, k_groups, v_groups, causal, q.shape[-1] ** -0.5 if scale is None else scale)[0]


def check(q, k, v, k_groups, v_groups) -> None:
    (B, H, _, D), shapes = q.shape, f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    assert k.shape[0] == v.shape[0] == B and k.shape[3] == v.shape[3] == D, f"{shapes} do not belong together"
    assert q.dtype == k.dtype == v.dtype, f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}"
    for groups in (k_groups, v_groups):
        fits = groups.shape == (H,) and groups.is_contiguous() and not groups.is_floating_point()
        assert fits and groups.device == q.device, f"groups {groups} are not {H} integers in a row on {q.device}"
    for x in (q, k, v):
        assert x.shape[2] * x.stride(2) < 2**31, f"{x.shape[2]} tokens, {x.stride(2)} apart: too far for 32 bits"
    assert D in HEAD_DIMS, f"head_dim {D} is not from {HEAD_DIMS[0]} to {HEAD_DIMS[-1]}"


# ---- decoding ----


@tuned(["D", "PAD_H"], narrow=[(0, 64, 4, 3), (0, 64, 4, 2), (0, 32, 4, 2)],
       wide=[(0, 32, 4, 3), (0, 32, 4, 2)])  # fmt: skip
@triton.jit(do_not_specialize=SIZES)
def decode_kernel(
    q, k, v, parts, lse, k_groups, v_groups, begins, q_strides, k_strides, v_strides, S, H, G_K, G_V, PART,
    scale: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr, PRECISION: tl.constexpr,
    PAD_H: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """One part of the cache for one sequence and PAD_H heads; grid (parts, B, blocks of heads).

    parts (B, parts, H, D) gets the part's own attention, lse (B, parts, H) the natural logarithm of its weights' sum.
    Every group's keys and values are read once: its heads are rows of one product, in which all others are zero. Tensor
    cores take 16 rows at least, so that up to 16 heads this multiplies no more than a product for every group would.
    """
    part, b = tl.program_id(0), tl.program_id(1)
    wide: tl.constexpr = lse.dtype.element_ty
    heads = tl.program_id(2) * PAD_H + tl.arange(0, PAD_H)
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
    # contiguous, so D is a constant here: with `store` and its strides one target spills
    at, there = parts + row[:, None] * D + width[None, :], (heads[:, None] < H) & (width[None, :] < D)
    tl.store(at, acc / total[:, None], mask=there)


def flash_decode(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_groups: torch.Tensor, v_groups: torch.Tensor,
    begins: torch.Tensor | None = None, scale: float | None = None,
) -> torch.Tensor:  # fmt: skip
    """One new query for each sequence against its cache: q (B, H, 1, D), k (B, G_k, S, D), v (B, G_v, S, D) ->
    (B, H, 1, D). begins: (B,) the first token of each sequence that is seen, since a batch of texts of several lengths
    is padded at the left, below S; no gradient.
    """
    check(q, k, v, k_groups, v_groups)
    (B, H, T, D), (_, G_k, S, _) = q.shape, k.shape
    assert T == 1 and v.shape[2] == S > 0, f"{T} queries, {S} keys, {v.shape[2]} values: give 1 and as many of both"
    begins = torch.zeros(B, dtype=torch.int64, device=q.device) if begins is None else begins.contiguous()
    # enough programs to keep every processor reading; but many parts would be much to add up
    n = max(1, min(triton.cdiv(S, 256), triton.cdiv(4 * processors(q.device), B)))
    size = 64 * triton.cdiv(S, 64 * n)  # whole blocks
    n, PAD_H = triton.cdiv(S, size), min(32, max(16, triton.next_power_of_2(H)))
    wide = torch.promote_types(q.dtype, torch.float32)
    parts, lse = q.new_empty((B, n, H, D), dtype=wide), q.new_empty((B, n, H), dtype=wide)
    how = options(q, D**-0.5 if scale is None else scale)
    with torch.cuda.device_of(q):
        decode_kernel[(n, B, triton.cdiv(H, PAD_H))](
            q, k, v, parts, lse, k_groups, v_groups, begins, q.stride(), k.stride(), v.stride(), S, H, G_k, v.shape[1],
            size, PAD_H=PAD_H, **how,
        )  # fmt: skip
    return torch.einsum("bnh,bnhd->bhd", lse.softmax(1), parts)[:, :, None].type_as(q)


def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
