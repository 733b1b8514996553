"""Let heads of an attention layer share one key or one value head, at the least loss: the mathematics of gqa.py.

An attention layer has two symmetries, under which its weights change and its function does not:

    values  W_v^h may be multiplied by any invertible S, if W_o^h is multiplied by its inverse
    keys    each RoPE pair of a head is a complex number, and may be multiplied by any complex z, if the same pair of
            the query is divided by conj(z); a more general map would not pass through RoPE

The mean of two heads that are equal up to these is noise. Here a group gets the shared head that is best over all of
them, inputs weighted as they occur in some text: a truncated SVD (Eckart-Young). It includes the mean, norm-weighting
and Procrustes alignment (arXiv 2305.13245, 2408.08454, 2412.20677) as choices that it could have made.

The heads that are merged are the K and V heads that the model has, each with all query heads that read it.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from attention import scores
from config import UserError
from model import Attention, Llama, ModelConfig, rope_angles
from partition import Groups

Rope = tuple[torch.Tensor, torch.Tensor]  # cos and sin, (T, D/2)
Maps = list[list[int]]  # [layer][query head] -> group, as in ModelConfig
SLICE = 8  # rows of calibration text computed at a time
QUERIES = 64  # of a row, evenly spread, at which attention is observed: neighbours tell little more, and cost as much
TINY = 1e-300  # keeps weights that are zero from becoming nan

# ---- statistics: one pass over some text ----


@dataclass
class Statistics:
    """What merging needs to know of a layer's attention inputs x and queries q, summed up in float64."""

    inputs: torch.Tensor  # (C, C) E[x x^T]; not centred, for RoPE turns a constant key, too, into one that is not
    mixed: torch.Tensor  # (C, C) E[m m^T] over observed queries and heads, m = sum_s a_s x_s: what attention makes of x
    energy: torch.Tensor  # (H, D/2) E|q_f|^2 of each RoPE pair f


@torch.no_grad()
def statistics(model: Llama, tokens: torch.Tensor) -> list[Statistics]:
    """Those of every layer, over tokens (N, T). Raises UserError for a model that computes inf or nan."""
    rope, found, x = rope_of(model, tokens), [], model.tok_embeddings(tokens)
    for layer in model.layers:
        found.append(observe(layer.attention, layer.attention_norm(x), rope))
        x = torch.cat([layer(part, *rope) for part in x.split(SLICE)])
    if not x.isfinite().all():
        raise UserError("the model's activations are not finite: its weights are damaged, or its training diverged")
    return found


def observe(attention: Attention, x: torch.Tensor, rope: Rope) -> Statistics:
    """Those of a layer over its normed inputs x (N, T, C)."""
    inputs = torch.zeros(x.shape[-1], x.shape[-1], dtype=torch.float64, device=x.device)
    mixed, energy, count, (some, mask) = torch.zeros_like(inputs), 0, 0, observed(x.shape[1], x.device)
    for part in x.split(SLICE):
        q, k, _ = attention.project(part, *rope)
        energy = energy + q.unflatten(-1, (-1, 2)).square().sum(dim=(0, 2, 4), dtype=torch.float64)
        inputs += part.flatten(0, 1).T @ part.flatten(0, 1)
        m = (scores(q[:, :, some], k, attention.k_groups, mask).softmax(-1) @ part[:, None]).flatten(0, 2)
        mixed, count = mixed + m.T @ m, count + len(m)
    tokens = x.shape[0] * x.shape[1]
    return Statistics(inputs / tokens, mixed / count, energy / tokens)


def observed(T: int, device: torch.device) -> tuple[slice, torch.Tensor]:
    """The observed queries among T, the last one of them, and which keys they see, (queries, T)."""
    every = max(1, T // QUERIES)
    some = slice((T - 1) % every, None, every)
    return some, torch.ones(T, T, dtype=torch.bool, device=device).tril()[some]


def rope_of(model: Llama, tokens: torch.Tensor) -> Rope:
    c = model.config
    return rope_angles(torch.arange(tokens.shape[1], device=tokens.device), c.head_dim, c.rope_theta, c.rope_scaling)


# ---- keys ----


def complex_heads(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """wq or wk (n D, C) -> (n, D/2, C): the rows of a RoPE pair as one complex row."""
    return torch.view_as_complex(weight.double().unflatten(0, (-1, head_dim // 2, 2)).transpose(2, 3).contiguous())


def real_rows(heads: torch.Tensor) -> torch.Tensor:
    """The inverse of `complex_heads`."""
    return torch.view_as_real(heads).transpose(2, 3).flatten(0, 2)


def weighted_keys(attention: Attention, statistics: Statistics) -> torch.Tensor:
    """(D/2, G, C) sqrt(E|q_f|^2) p: the rows of every pair of every key head, weighted by the energy of its queries."""
    of_head = attention.k_groups.of_head
    energy = statistics.energy.new_zeros(attention.k_groups.n_group, attention.head_dim // 2)
    energy.index_add_(0, of_head, statistics.energy)
    # a head that never asks still gets a key of its own kind
    energy = energy.clamp(min=max(1e-6 * energy.mean().item(), TINY))
    return (energy.sqrt()[..., None] * complex_heads(attention.wk.weight, attention.head_dim)).transpose(0, 1)


def merge_keys(attention: Attention, groups: Groups, statistics: Statistics) -> tuple[torch.Tensor, torch.Tensor]:
    """wq, of the same shape, and wk (g D, C), when the key heads of each group share one.

    For a pair f, p_h of the heads h is to be near c_h p' with one row p'. If pairs, queries and keys were independent,
    the score's error would be E|q_h,f|^2 times E|(p_h - c_h p') x|^2 (that they are not is what refit.py mends). So
    the rows sqrt(E|q_h,f|^2) p_h C^(1/2) get their best approximation of rank 1, and since
    Re(q conj(c p' x)) = Re(q conj(c) conj(p' x)), the queries take conj(c_h).
    """
    rows, C = weighted_keys(attention, statistics), statistics.inputs.to(torch.complex128)
    p, q = (complex_heads(w.weight, attention.head_dim) for w in (attention.wk, attention.wq))
    of_head, shared = attention.k_groups.of_head, []
    for group in groups:
        if len(group) == 1:  # stays as it is, bit for bit
            shared.append(p[group[0]])
            continue
        N = rows[:, group]  # (D/2, s, C)
        a = torch.linalg.eigh(N @ C @ N.mH).eigenvectors[..., -1]  # (D/2, s)
        key = torch.einsum("fs,fsc->fc", a.conj(), N)
        size, sizes = (torch.einsum("...c,cd,...d->...", x, C, x.conj()).real for x in (key, p[group]))
        key = key * (sizes.mean(0) / size.clamp(min=TINY)).sqrt()[:, None]  # as large as those it stands for
        c = torch.einsum("sfc,cd,fd->sf", p[group], C, key.conj()) / sizes.mean(0).clamp(min=TINY)
        for head, of in zip(group, c):
            q[of_head == head] = q[of_head == head] * of.conj()[:, None]
        shared.append(key)
    return real_rows(q), real_rows(torch.stack(shared))


# ---- values ----


def output_of(attention: Attention) -> torch.Tensor:
    """(H, C, D): the columns of wo of each query head."""
    return attention.wo.weight.double().unflatten(1, (-1, attention.head_dim)).transpose(0, 1)


def output_sizes(attention: Attention) -> torch.Tensor:
    """(G,) |W_o|^2 summed over the query heads that read each value head."""
    wo, of_head = output_of(attention), attention.v_groups.of_head
    return torch.stack([wo[of_head == head].square().sum() for head in range(attention.v_groups.n_group)])


def weighted_values(attention: Attention) -> torch.Tensor:
    """(G, D, C): R W_v of every value head, as large in each direction as wo makes it: R^T R = sum of W_o^T W_o over
    the query heads that read it."""
    wo, of_head = output_of(attention), attention.v_groups.of_head
    values = attention.wv.weight.double().unflatten(0, (-1, attention.head_dim))
    stacks = [wo[of_head == head].flatten(0, 1) for head in range(len(values))]
    missing = max(0, attention.head_dim - wo.shape[1])  # a stack of fewer rows than columns has a wide R
    roots = [torch.linalg.qr(F.pad(stack, (0, 0, 0, missing)), mode="r").R for stack in stacks]
    return torch.stack([R @ v for R, v in zip(roots, values)])


def merge_values(attention: Attention, groups: Groups, statistics: Statistics) -> tuple[torch.Tensor, torch.Tensor]:
    """wv (g D, C) and wo, of its old shape, when the value heads of each group share one.

    The stack of W_o^h W_v^h C^(1/2) gets its best approximation of rank D: P^T, its strongest right singular vectors,
    gives W_v' = P^T C^(-1/2) and W_o'^h = W_o^h W_v^h C^(1/2) P. With N the stack without C^(1/2), after a QR of each
    W_o^h, and N C N^T = U diag(e) U^T, that is W_v' = e^(-1/2) U^T N and W_o'^h = W_o^h W_v^h C N^T U e^(-1/2): no
    inverse of C is needed. The rows of W_v' are then made as long as those they stand for.

    The novel layer between wv and wo leaves no symmetry: its heads share the mean, weighted by the size of W_o^h.
    """
    values = attention.wv.weight.double().unflatten(0, (-1, attention.head_dim))
    wo, of_head, D, C = output_of(attention).clone(), attention.v_groups.of_head, attention.head_dim, statistics.mixed
    weight, rows, shared = output_sizes(attention), weighted_values(attention), []
    for group in groups:
        if len(group) == 1:
            shared.append(values[group[0]])
            continue
        if attention.novel is not None:
            share = weight[group] / weight[group].sum().clamp(min=TINY)
            shared.append(torch.einsum("s,sdc->dc", share, values[group]))
            continue
        N = rows[group].flatten(0, 1)
        e, U = torch.linalg.eigh(N @ C @ N.T)
        e, U = e[-D:].clamp(min=max(1e-12 * e[-1].item(), TINY)), U[:, -D:]
        value, length = U.T @ N, values[group].square().sum(-1).mean().sqrt()
        scale = length.clamp(min=TINY) / value.square().sum(-1).sqrt().clamp(min=max(1e-12 * length.item(), TINY))
        for head in group:
            wo[of_head == head] = wo[of_head == head] @ (values[head] @ C @ N.T @ U / (e * scale))
        shared.append(value * scale[:, None])
    return torch.cat(shared), wo.transpose(0, 1).flatten(1)


# ---- which heads ----


class Costs:
    """What it costs a layer that sets of its K heads, or of its V heads, share one: the part of the weights, times the
    inputs, that the shared head cannot represent."""

    @torch.no_grad()
    def __init__(self, attention: Attention, kind: Literal["k", "v"], statistics: Statistics):
        self.mean_weights = None  # of the novel layer's values, which share a mean
        if kind == "k":
            rows = weighted_keys(attention, statistics)
            self.gram, self.rank = rows @ statistics.inputs.to(rows.dtype) @ rows.mH, 1  # (D/2, G, G)
        elif attention.novel is None:
            rows = weighted_values(attention).flatten(0, 1)
            self.gram, self.rank = (rows @ statistics.mixed @ rows.T)[None], attention.head_dim  # (1, G D, G D)
        else:
            values = attention.wv.weight.double().unflatten(0, (-1, attention.head_dim))
            sizes = output_sizes(attention).clamp(min=TINY).sqrt()
            self.mean_weights, rows = sizes.cpu(), values * sizes[:, None, None]
            self.gram = torch.einsum("gdc,ce,hde->gh", rows, statistics.mixed, rows)[None]
            self.rank = 1
        self.n = self.gram.shape[-1] // self.rank
        self.gram = self.gram.cpu()
        if kind == "v" and self.gram.shape[-1] > 512:  # float32 takes two thirds of the time
            self.gram = self.gram.to(torch.float32)

    def __call__(self, sets: np.ndarray) -> np.ndarray:
        """sets (N, s) of s heads each -> (N,)"""
        if sets.shape[1] == 1:
            return np.zeros(len(sets))
        index = (torch.from_numpy(sets)[..., None] * self.rank + torch.arange(self.rank)).flatten(1)
        parts = index.split(max(1, 2**22 // (len(self.gram) * index.shape[1] ** 2)))
        if len(parts) == 1:
            return self.tails(parts[0]).numpy()
        # a thread for each part: within such small eigenproblems threads wait for each other more than they work
        threads = torch.get_num_threads()
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            found = list(pool.map(self.tails, parts))
        torch.set_num_threads(threads)  # also of threads that begin later
        return torch.cat(found).numpy()

    def tails(self, index: torch.Tensor) -> torch.Tensor:
        """index (N, s rank) of rows of the gram -> (N,) costs"""
        grams = self.gram[:, index[:, :, None], index[:, None, :]]  # (F, N, s rank, s rank)
        if self.mean_weights is None:
            found = torch.linalg.eigvalsh(grams)[..., : -self.rank].sum(-1)
        else:
            u = self.mean_weights[index]
            kept = torch.einsum("ns,fnst,nt->fn", u, grams, u) / u.square().sum(-1)
            found = grams.diagonal(dim1=-2, dim2=-1).sum(-1) - kept
        return found.sum(0).clamp(min=0)

    def similarity(self) -> np.ndarray:
        """(n, n): 1 where two heads share one at no cost, 0 where one of the two is lost as if they had nothing in
        common."""
        n, found = self.n, np.ones((self.n, self.n))
        blocks = self.gram.unflatten(-1, (n, -1)).unflatten(-3, (n, -1)).diagonal(dim1=-4, dim2=-2)
        sizes = blocks.diagonal(dim1=-3, dim2=-2).real.sum(dim=(0, 2)).numpy()
        pairs = np.array([(a, b) for a in range(n) for b in range(a)])
        if len(pairs):
            a, b = pairs.T
            found[a, b] = found[b, a] = 1 - self(pairs) / np.maximum(np.minimum(sizes[a], sizes[b]), 1e-300)
        return found


# ---- the new model ----


def merged_config(c: ModelConfig, k_groups: Maps, v_groups: Maps) -> ModelConfig:
    """The config with these groups; where they are those of plain grouped-query attention, n_kv_head says so."""
    for n in range(1, c.n_head + 1):
        if c.n_head % n == 0:
            even = [[head * n // c.n_head for head in range(c.n_head)]] * c.n_layer
            if k_groups == even and v_groups == even:
                return replace(c, n_kv_head=n, k_groups=k_groups, v_groups=v_groups)
    return replace(c, n_kv_head=c.n_head, k_groups=k_groups, v_groups=v_groups)


def source_groups(of_source: list[int], of_target: list[int], where: str) -> Groups:
    """For each target group the source K or V heads that it unites. Raises UserError if it would split one."""
    groups: list[set[int]] = [set() for _ in range(max(of_target) + 1)]
    for source, target in zip(of_source, of_target):
        groups[target].add(source)
    if sum(map(len, groups)) != max(of_source) + 1:
        raise UserError(f"{where} is {of_target}, and the model has {of_source} already: groups can only be united")
    return [sorted(group) for group in groups]


@torch.no_grad()
def convert(
    model: Llama, k_groups: Maps, v_groups: Maps, found: list[Statistics], merge: Literal["closed", "mean"] = "closed"
) -> Llama:
    """The model with K and V heads merged as [layer][query head] -> group say. All other weights are shared with it.

    Raises UserError for groups that split those of the model, or skip a number.
    """
    c = merged_config(model.config, k_groups, v_groups)
    weights = model.state_dict()
    for layer, block in enumerate(model.layers):
        attention, at = block.attention, f"layers.{layer}.attention."
        sources = [groups.of_head.tolist() for groups in (attention.k_groups, attention.v_groups)]
        k = source_groups(sources[0], k_groups[layer], f"k_groups[{layer}]")
        v = source_groups(sources[1], v_groups[layer], f"v_groups[{layer}]")
        if merge == "closed":
            new = zip(
                ("wq", "wk", "wv", "wo"),
                merge_keys(attention, k, found[layer]) + merge_values(attention, v, found[layer]),
            )
        else:
            new = [
                (name, mean(w.weight, groups)) for name, w, groups in (("wk", attention.wk, k), ("wv", attention.wv, v))
            ]
        for name, weight in new:
            weights[f"{at}{name}.weight"] = weight.to(getattr(attention, name).weight.dtype)
    with torch.device("meta"):
        result = Llama(c)
    result.load_state_dict(weights, assign=True)
    if c.tie_embeddings:
        result.output.weight = result.tok_embeddings.weight
    return result.to(model.tok_embeddings.weight.device).eval()  # the groups' index buffers, too


def mean(weight: torch.Tensor, groups: Groups) -> torch.Tensor:
    """wk or wv whose groups share the mean of their heads' weights: GQA, arXiv 2305.13245."""
    heads = weight.unflatten(0, (sum(map(len, groups)), -1))
    return torch.cat([heads[group].double().mean(0) for group in groups])
