"""Merge the key and value heads of a trained model into groups of any size: a smaller KV cache.

    python gqa.py ckpt.pt --out grouped.pt --kv_budget 0.5           # half the cache, spread over the layers
    python gqa.py ckpt.pt --out grouped.pt --groups groups.json      # as search_groups.py found best
    python gqa.py ckpt.pt --out latent.pt --kv_budget 0.5 --latent   # latents of any width instead of groups
    python gqa.py ckpt.pt --out mean.pt --n_kv_head 4 --merge mean --grouping neighbour --refit none

An attention layer has two symmetries, under which its weights change and its function does not:

    values  W_v^h may be multiplied by any invertible S, if W_o^h is multiplied by its inverse
    keys    each RoPE pair of a head, a complex number, may be multiplied by any complex z but 0, if the same
            pair of the query is divided by conj(z); a more general map would not commute with RoPE

Averaging heads (`--merge mean`; GQA, arXiv 2305.13245) destroys those that differ by such a symmetry. Here:

    groups          share the head of least squared error over the inputs of a text, by a truncated SVD
                    (Eckart-Young); no alignment (arXiv 2408.08454, 2412.20677) can reach a smaller one
    --latent        the cache holds the strongest directions of all keys of a layer, and of what keys leave
                    of values, any number; every head reads all of them, by coefficients of its own
    --cache_tokens  a layer's inputs x are mostly a linear map `told` of the token's embedding e
                    (refit.token_maps): the cache holds the token, from which the part of keys and values
                    that told e makes is computed, and latents hold that of x - told e
"""

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from checkpoint import build_model, load, picture, save, with_model
from common import UserError, bounded, exit_cleanly, is_a, parse, pick_device, require, writable
from data.tokenizer import read_tokenizer
from eval_ppl import mean_nll, perplexity, split_tokens, window_nll
from lora import plain
from model import Attention, Llama, Maps, ModelConfig, scores
from partition import (
    TINY, Counts, Groups, Slot, budget, choose, complex_heads, even_counts, head_counts, knapsack, numbered,
    real_rows, value_heads, weighted_rows,
)  # fmt: skip
from refit import STEPS, Statistics, refit, sensitivity, statistics, token_maps

Directions = dict[Slot, tuple[torch.Tensor, ...]]  # (order, z, mix), see `directions`
NOISE = 1e-3  # added to E[k k^T], of its mean diagonal, where values read keys: or small errors break them
MOST_CONTEXT = 1024  # longest calibration block, tokens; longer ones change few choices


def directions(rows: torch.Tensor, weighted: torch.Tensor, C: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Order, z (..., n, C) and mix (..., n, n) of n `rows` and the same `weighted`. For any r, the last r
    columns of mix times the last r of z are the rows but for the least weighted squared error over inputs x,
    the sum of all other energies (Eckart-Young). `order` has the places in z, of large energies first.

    With N the weighted rows, C = E[x x^H] and N C N^H = U diag(s) U^H, the energies s ascending, the best
    approximation of rank r of N C^(1/2) lies in the last r columns of U: z = U^H N, and least squares
    restores a row w from U^H N x as w C N^H U / s. z is scaled to E|z x|^2 ~ sqrt(s), which loses least if
    all z x are rounded alike, and to the length of `rows`.
    """
    energies, U = torch.linalg.eigh(weighted @ C @ weighted.mH)
    strength = energies.clamp(min=max(1e-12 * energies.max().item(), TINY))
    z = strength[..., None] ** -0.25 * (U.mH @ weighted)
    size = (rows.abs().square().sum() / z.abs().square().sum()).sqrt().nan_to_num(1)  # all zero: any size
    mix = rows @ C @ weighted.mH @ U / (size * strength**0.75)[..., None, :]
    return energies.flatten().argsort(descending=True), size * z, mix


# ---- groups ----


def merge_keys(attention: Attention, groups: Groups, stats: Statistics) -> tuple[torch.Tensor, ...]:
    """wq, of its old shape, and wk (g D, C), when the key heads of each group share one.

    For a RoPE pair f one key row p' replaces the rows p_h of all heads h of the group: p_h ~ c_h p', c_h
    complex, and wq takes the factor conj(c_h). If pairs, queries and keys were independent (what this misses,
    refit.py corrects), the squared error of the scores would be in proportion to

        sum_h E|q_h,f|^2 E|(p_h - c_h p') x|^2
    """
    rows, weighted, C = weighted_rows(attention, "k", stats)
    q = complex_heads(attention.wq.weight, attention.head_dim)
    shared = rows[:, [group[0] for group in groups]].transpose(0, 1)  # (g, D/2, C)
    for g, group in enumerate(groups):
        if len(group) > 1:  # a head of its own stays as it is, bit for bit
            _, z, mix = directions(rows[:, group], weighted[:, group], C)
            shared[g] = z[:, -1]
            for head, factor in zip(group, mix[..., -1].T):
                q[attention.k_groups.of_head == head] *= factor.conj()[:, None]
    return real_rows(q), real_rows(shared)


def merge_values(attention: Attention, groups: Groups, stats: Statistics) -> tuple[torch.Tensor, ...]:
    """wv (g D, C) and wo, of its old shape, when the value heads of each group share one.

    The stack of W_o^h W_v^h C^(1/2) gets its best approximation of rank D, where C = E[m m^T] of the inputs
    as attention mixes them, averaged over all heads; the heads' errors are taken to be independent. A novel
    layer behind wv leaves no symmetry: its heads share the mean, weighted by |W_o^h|^2.
    """
    values, outputs, _, sizes = value_heads(attention, stats)
    _, rows, C = weighted_rows(attention, "v", stats)
    outputs, rows, D = outputs.clone(), rows.reshape(values.shape), attention.head_dim
    shared = values[[group[0] for group in groups]]  # (g, D, C)
    for g, group in enumerate(groups):
        if len(group) > 1 and attention.novel is not None:
            share = sizes[group] / sizes[group].sum().clamp(min=TINY)
            shared[g] = torch.einsum("s,sdc->dc", share, values[group])
        elif len(group) > 1:
            _, z, mix = directions(values[group].flatten(0, 1), rows[group].flatten(0, 1), C)
            shared[g] = z[-D:]
            for head, part in zip(group, mix[:, -D:].split(D)):
                outputs[attention.v_groups.of_head == head] @= part
    return shared.flatten(0, 1), outputs.transpose(0, 1).flatten(1)


# ---- latents ----


def latent_units(c: ModelConfig) -> tuple[int, Counts]:
    """The unit of latent sizes, in numbers, and how many units each layer's K and V take in the cache."""
    unit = c.head_dim // 4 if c.head_dim % 8 == 0 else 2
    return unit, {(i, kind): n // unit for i, both in enumerate(c.kv_widths) for kind, n in zip("kv", both)}


def all_directions(model: Llama, stats: list[Statistics]) -> Directions:
    """`directions` of each layer's K, and of its V without a latent key."""
    layers, slots = [layer.attention for layer in model.layers], latent_units(model.config)[1]
    return {(i, kind): directions(*weighted_rows(layers[i], kind, stats[i])) for i, kind in slots}


def latent(found: tuple[torch.Tensor, ...], size: int) -> tuple[list[int], torch.Tensor, torch.Tensor]:
    """The strongest R `directions` that fit `size` cached numbers: how many of each f, their rows (R, C), and
    the coefficients (n, R) that restore the n rows from them."""
    order, z, mix = found
    kept = order[: size // 2 if z.is_complex() else size].sort().values  # a complex number is two
    f, i = torch.unravel_index(kept, z.shape[:2])
    return torch.bincount(f, minlength=len(z)).tolist(), z[f, i], mix[f, :, i].T


def latent_value(attention: Attention, stats: Statistics, keys: torch.Tensor, size: int) -> tuple:
    """wv (R, C) of a latent value beside a latent key of wk `keys` (n, C), and coefficients (G D, R + n) that
    restore all heads' values from both: of m less its least-squares estimate from the key (with NOISE), the
    strongest directions; the key's coefficients follow."""
    rows, weighted, C = weighted_rows(attention, "v", stats)
    squares = keys @ C @ keys.T
    squares.diagonal().add_(NOISE * squares.diagonal().mean())
    by_keys = C @ keys.T @ torch.linalg.pinv(squares, hermitian=True)
    _, z, mix = latent(directions(rows, weighted, C - by_keys @ keys @ C), size)
    like = keys if keys.any() else rows[0]  # as large as these, or healing would diverge
    scale = ((like.square().mean() + TINY) / (z.square().mean() + TINY)).sqrt()
    return scale * z, torch.cat((mix / scale, (rows[0] - mix @ z) @ by_keys), 1)


@torch.no_grad()
def to_latents(model: Llama, stats: list[Statistics], found: Directions, sizes: Counts) -> Llama:
    """The model with latents of these sizes (numbers cached) for heads. A layer with both, and `stats` of
    x - told e, gets the token's part, too. wq and wo (not before it a novel layer) take over the size of a
    head's coefficients: those of a RoPE pair get length 1, those of values orthonormal columns (if wide
    enough), for `refit` gets further where coefficients are alike."""
    c, weights, D = model.config, model.state_dict(), model.config.head_dim
    k_latent, v_latent, t_latent = list(c.k_latent), list(c.v_latent), list(c.t_latent)
    for (layer, kind), size in sizes.items():
        attention, name = model.layers[layer].attention, f"layers.{layer}.attention."
        told = stats[layer].told if {(layer, "k"), (layer, "v")} <= sizes.keys() else None
        ranks, z, mix = latent(found[layer, "k"], sizes.get((layer, "k"), 0))
        keys, new = real_rows(z), {}
        if kind == "k":
            k_latent[layer], pairs = ranks, [f for f, r in enumerate(ranks) for _ in range(r)]
            z, mix = keys, mix.conj()[attention.k_groups.of_head]
            if told is not None:
                t_latent[layer] = attention.k_groups.n_group
                new["wt.weight"] = attention.wk.weight.double() @ told
                own = torch.eye(t_latent[layer]).to(mix)[attention.k_groups.of_head]
                mix = torch.cat((mix, own.repeat_interleave(D // 2, 1)), 1)
                pairs += [*range(D // 2)] * t_latent[layer]
            mix = math.sqrt(2 * len(pairs) / D) * mix  # attention divides by the root of the key's width
            lengths, of_pair = mix.real.new_zeros(len(mix), D // 2), torch.tensor(pairs, device=z.device)
            lengths = lengths.index_add_(1, of_pair, mix.abs().square()).sqrt().clamp(min=TINY)
            mix = torch.view_as_real(mix / lengths[:, pairs])
            new["wq.weight"] = lengths.repeat_interleave(2, 1).flatten()[:, None] * attention.wq.weight
        else:
            z, mix = latent_value(attention, stats[layer], keys, size)
            if told is not None:
                mix = torch.cat((mix, attention.wv.weight.double() @ told), 1)
            v_latent[layer], mix = size, mix.unflatten(0, (-1, D)).mT[attention.v_groups.of_head]
            if attention.novel is None:
                U, S, Vh = torch.linalg.svd(mix, full_matrices=False)  # polar: (U Vh) (Vh^T S Vh)
                mix, readers = U @ Vh, attention.wo.weight.double().unflatten(1, (-1, D)).transpose(0, 1)
                new["wo.weight"] = (readers @ (Vh.mT * S[:, None]) @ Vh).transpose(0, 1).flatten(1)
        z = z if told is None else torch.cat((z, -z @ told), 1)
        for part, x in (new | {f"w{kind}.weight": z, f"{kind}_mix": mix}).items():
            weights[name + part] = x.contiguous().to(attention.wq.weight.dtype)
    config = replace(c, k_latent=k_latent, v_latent=v_latent, t_latent=t_latent)
    return build_model({"model": weights, "config": vars(config)}, model.tok_embeddings.weight.device)


# ---- sizes of latents ----


def size_products(keys: Attention, values: Attention, orders: list, told, unit: int, args: tuple, g):
    """g . y (B, T, units), of the output y and its gradient g (B, T, C), for each size of a latent key, then
    of a latent value: y from its first 1, 2, ... units in `orders` only. `keys`, `values`: this layer with a
    full-size latent key, or value. Of x, `told` e is kept."""
    x, *rope, e = args
    of_token = torch.zeros_like(x) if told is None else e @ told.type_as(e).T
    (q, k, _), k_told = keys.project(x, *rope), keys.project(of_token, *rope)[1]
    v, v_told = (values.project(part, *rope)[2] for part in (x, of_token))
    groups, p = values.v_groups, scores(q, k, keys.k_groups).softmax(-1)
    y = groups.scatter(groups.gather(p) @ v).requires_grad_()
    with torch.enable_grad():
        (reads,) = torch.autograd.grad(values.wo(values.readout(y, x)), y, g)
    lost = (reads * groups.scatter(groups.gather(p) @ (v - v_told))).sum(1)
    of_values = lost[..., orders[1]].cumsum(-1)[..., unit - 1 :: unit]
    gains, of_keys, q = reads @ v.mT, [], q * q.shape[-1] ** -0.5
    score = torch.full_like(gains, -math.inf).triu(1) + q @ k_told.mT
    q, k = (x.unflatten(-1, (-1, 2))[..., orders[0], :].flatten(-2) for x in (q, k - k_told))
    for q_part, k_part in zip(q.split(unit, -1), k.split(unit, -1)):
        score = score + q_part @ k_part.mT
        of_keys.append((score.softmax(-1) * gains).sum((1, 3)))
    return torch.stack(of_keys, -1), of_values


@torch.no_grad()
def latent_losses(model: Llama, stats: list[Statistics], found: Directions, tokens: torch.Tensor) -> list:
    """[2 layer + (0 for K, 1 for V)] -> (units,): the KL divergence if only this latent had 1, 2, ... units,
    predicted by one backward pass: `divergence` for all sizes, in novel layers to first order."""
    (unit, whole), losses = latent_units(model.config), []
    alone = [{slot: unit * n for slot, n in whole.items() if slot[1] == kind} for kind in "kv"]
    layers = zip(*(to_latents(model, stats, found, sizes).layers for sizes in alone))
    for i, (of_layer, (keys, values)) in enumerate(zip(sensitivity(model, tokens), layers)):
        how = keys.attention, values.attention, [found[i, kind][0] for kind in "kv"], stats[i].told, unit
        of_batch = [size_products(*how, args, g) for args, _, g in of_layer]
        for products in map(torch.cat, zip(*of_batch)):
            errors = products - products[..., -1:]
            losses.append(errors.square().mean((0, 1)).double().cpu().numpy() / 2)
    return losses


def beside_keys(keys: torch.Tensor, values: torch.Tensor, C: torch.Tensor, unit: int, alone: np.ndarray):
    """(units of K, units of V): the predicted loss of a latent value that can also read a latent key: that of
    a wider one without a key that drops as much energy of V, read off `alone`, the losses of 1, 2, ... units.
    keys (n, C) are all directions, the strongest first, values (n, C) the weighted rows, C = E[m m^T]."""
    strength, U = torch.linalg.eigh(C)
    C = U * strength.clamp(min=0) @ U.T  # rounding leaves energies below 0, of inputs that the text lacks
    squares, left, dropped = keys @ C @ keys.T, values @ C @ values.T, []
    squares.diagonal().add_(1e-9 * squares.diagonal().mean() + TINY)
    by_keys = torch.linalg.solve_triangular(torch.linalg.cholesky(squares), keys @ C @ values.T, upper=False)
    for of_unit in (by_keys[:0], *by_keys.split(unit)):  # no key; then each unit tells more
        left = left - of_unit.T @ of_unit
        dropped.append(torch.linalg.eigvalsh(left).clamp(min=0).cumsum(0).flip(0)[unit::unit])
    lost = np.pad(torch.stack(dropped).cpu().numpy(), ((0, 0), (0, 1)))  # units of all values lose nothing
    return np.interp(lost[1:], lost[0, ::-1], alone[::-1])


def latent_sizes(model: Llama, stats: list[Statistics], found: dict, losses: list, share: float) -> Counts:
    """The sizes of each layer's latent key and value, together a share of the cache, of the least sum of
    `latent_losses`, the values' as they are `beside_keys`; none for a layer that stays as it is."""
    (unit, whole), choices = latent_units(model.config), []
    for i, (of_keys, of_values) in enumerate(zip(losses[::2], losses[1::2])):
        order, k, _ = found[i, "k"]
        _, v, C = weighted_rows(model.layers[i].attention, "v", stats[i])
        lost = of_keys[:, None] + beside_keys(real_rows(k.flatten(0, 1)[order]), v[0], C, unit, of_values)
        choices.append([(loss, a + b + 2, (a + 1, b + 1)) for (a, b), loss in np.ndenumerate(lost)])
    picked = enumerate(knapsack(choices)[budget(whole, share)][1])
    full = [(whole[i, "k"], whole[i, "v"]) for i in range(len(choices))]
    return {(i, kind): unit * n for i, both in picked if both != full[i] for kind, n in zip("kv", both)}


# ---- the new model ----


def source_groups(of_source: list[int], of_target: list[int]) -> Groups:
    """For each target group the source K or V heads that it unites. Raises UserError if it splits one."""
    pairs = sorted(set(zip(of_target, of_source)))
    require(len(pairs) == max(of_source) + 1, f"{of_target} splits groups of {of_source}: unite them only")
    return [[source for target, source in pairs if target == g] for g in range(max(of_target) + 1)]


@torch.no_grad()
def merge(model: Llama, maps: tuple[Maps, Maps], stats: list[Statistics], how: str = "closed") -> Llama:
    """The model, its heads merged in "closed" form or as the "mean" (arXiv 2305.13245) into `maps`, k_groups
    and v_groups; it shares all other weights."""
    c, weights = replace(model.config, k_groups=maps[0], v_groups=maps[1]), model.state_dict()
    for layer, block in enumerate(model.layers):
        attention, new = block.attention, {}
        k = source_groups(attention.k_groups.of_list, maps[0][layer])
        v = source_groups(attention.v_groups.of_list, maps[1][layer])
        if how == "closed":
            new["wq"], new["wk"] = merge_keys(attention, k, stats[layer])
            new["wv"], new["wo"] = merge_values(attention, v, stats[layer])
        else:
            for name, groups in (("wk", k), ("wv", v)):
                heads = getattr(attention, name).weight.unflatten(0, (-1, c.head_dim))
                new[name] = torch.cat([heads[group].double().mean(0) for group in groups])
        for name, weight in new.items():
            weights[f"layers.{layer}.attention.{name}.weight"] = weight.to(attention.wq.weight.dtype)
    return build_model({"model": weights, "config": vars(c)}, model.tok_embeddings.weight.device)


# ---- the command ----


@dataclass
class MergeConfig:
    """What grouping and the search share."""

    ckpt: str  # the checkpoint; an adapter is merged first
    out: str = "grouped.pt"  # the file to write
    kv_budget: float | None = bounded(None, 0, 1)  # share of the KV cache to keep, spread over the layers
    joint: bool = False  # one map for keys and values, as in other work
    merge: Literal["closed", "mean"] = "closed"  # how: the best shared head, or the mean of GQA's paper
    refit: Literal["none", "output", "all"] = "all"  # fit wo, or also wq, wk and wv, to the original
    calibration_tokens: int = bounded(65536, 1)  # at most, of the train split
    dataset: str | None = None  # prepared data of the same tokenizer (default: the checkpoint's own)
    seed: int = bounded(0, 0, 2**32 - 1)  # of the calibration text, and of random groups
    device: str = "auto"  # cuda, mps, cpu or auto
    overwrite: bool = False  # replace an existing file


@dataclass
class GroupConfig(MergeConfig):
    """grouping"""

    groups: str | None = None  # a JSON file with k_groups and v_groups, from search_groups.py
    n_kv_head: int | None = bounded(None, 1)  # or: K and V groups of every layer; it need not divide n_head
    latent: bool = False  # with kv_budget: cache latent keys and values of any width instead of groups
    cache_tokens: bool = False  # with latent: cache the tokens, too, and else only what they do not tell
    grouping: Literal["best", "neighbour", "random"] = "best"  # which heads: the cheapest; or baselines
    eval_tokens: int = bounded(65536, 1)  # of the val split, for the perplexities before and after

    def __post_init__(self):
        if [self.groups, self.kv_budget, self.n_kv_head].count(None) != 2:
            raise UserError("which groups? give one of --kv_budget 0.5, --n_kv_head N and --groups FILE.json")
        which = self.joint or self.grouping != "best"
        wrong = self.latent and (self.kv_budget is None or which or self.merge != "closed")
        require(not wrong, "--latent takes --kv_budget and no other flag of groups")
        require(self.latent or not self.cache_tokens, "--cache_tokens is of latents: give --latent, too")
        require(not (self.groups and which), f"--groups {self.groups} says which: drop --joint, --grouping")


def open_model(path: str, device: str) -> tuple[dict, Llama]:
    """A checkpoint and its model, adapter merged, float32 or wider, in eval mode, on the device of that name
    (an Apple GPU has no float64: on the CPU)."""
    place, checkpoint = pick_device(device), load(path)
    model = plain(build_model(checkpoint))
    c = model.config
    require(not any(c.k_latent + c.v_latent), f"{path} has latent keys or values: start from its original")
    wide = torch.promote_types(model.tok_embeddings.weight.dtype, torch.float32)
    return checkpoint, model.to("cpu" if place.type == "mps" else place, wide).eval().requires_grad_(False)


def calibration_blocks(tokens: np.ndarray, model: Llama, count: int, seed: int) -> torch.Tensor:
    """(N, T) tokens, at most `count`, from N places of the text, T the model's context up to 1,024."""
    T = min(model.config.block_size, MOST_CONTEXT, len(tokens))
    rows, least = min(count, len(tokens)) // T, math.ceil(4 * model.config.dim / T)
    few = f"{rows * T:,} tokens of the {len(tokens):,} in the train split are too few"
    require(rows >= least, f"{few}: give --calibration_tokens {least * T} or more, and enough text")
    blocks = tokens[: len(tokens) // T * T].reshape(-1, T)
    blocks = blocks[np.random.default_rng(seed).choice(len(blocks), rows, replace=False)]
    return torch.from_numpy(blocks.astype(np.int64)).to(model.tok_embeddings.weight.device)


def open_inputs(config: MergeConfig) -> tuple[dict, Llama, torch.Tensor, np.ndarray, str]:
    """The checkpoint, its model, calibration blocks of the train split, the val split and its name."""
    other = Path(config.out).resolve() != Path(config.ckpt).resolve()
    require(other, f"--out {config.out} is the checkpoint itself: give the name of a new file")
    checkpoint, model = open_model(config.ckpt, config.device)
    source = checkpoint, read_tokenizer(checkpoint["tokenizer"]), config.dataset
    (train, _), (val, name) = split_tokens(*source, "train"), split_tokens(*source, "val")
    blocks = calibration_blocks(train, model, config.calibration_tokens, config.seed)
    return checkpoint, model, blocks, val, name


def read_groups(path: Path, c: ModelConfig) -> tuple[Maps, Maps]:
    """The maps of a group file. Raises UserError for one that is damaged, or of another model."""
    try:
        record = json.loads(path.read_text())
        maps = record["k_groups"], record["v_groups"]
        require(all(m and is_a(m, Maps) for m in maps), "not [layer][query head] -> group")
        maps = tuple([numbered(of_head) for of_head in of_kind] for of_kind in maps)
        replace(c, k_groups=maps[0], v_groups=maps[1])
        for old, new in zip(c.k_groups + c.v_groups, maps[0] + maps[1]):
            source_groups(old, new)
        return maps
    except Exception as error:
        reason = f"{type(error).__name__} {error}"[:200]
        raise UserError(f"{path} has no groups for this model ({reason}): use search_groups.py's") from None


def asked_counts(config: GroupConfig, model: Llama) -> Counts:
    heads = latent_units(model.config)[1] if config.latent else head_counts(model, config.joint)
    if config.kv_budget is not None:
        return even_counts(heads, budget(heads, config.kv_budget))
    most = min(heads.values())
    require(config.n_kv_head <= most, f"n_kv_head is {config.n_kv_head}: give --n_kv_head 1 to {most}")
    return dict.fromkeys(heads, config.n_kv_head)


def perplexity_on(tokens: np.ndarray, model: Llama) -> float:
    context = min(model.config.block_size, 2048)
    return perplexity(mean_nll(window_nll(model, tokens, context, context, torch.float32)))


def main() -> None:
    config = GroupConfig(**parse(__doc__, GroupConfig))
    out = Path(config.out)
    writable(out, config.overwrite)
    checkpoint, model, blocks, val, name = open_inputs(config)
    maps = read_groups(Path(config.groups), model.config) if config.groups else None
    counts = {} if maps else asked_counts(config, model)  # with --latent only to check the budget
    stats = statistics(model, blocks, token_maps(model, blocks) if config.cache_tokens else None)
    if config.latent:
        found = all_directions(model, stats)
        losses = latent_losses(model, stats, found, blocks)
        sizes = latent_sizes(model, stats, found, losses, config.kv_budget)
        small = to_latents(model, stats, found, sizes)
    else:
        maps = maps or choose(model, stats, counts, config.grouping, config.seed)
        small = merge(model, maps, stats, config.merge)
    if config.refit != "none":
        refit(small, model, blocks, STEPS if config.refit == "all" else 0, quiet=False)
    stored, weight = checkpoint["model"]["norm.weight"].dtype, model.norm.weight
    saved = with_model(checkpoint, small.to("cpu", stored)) | {"grouped": asdict(config)}
    save(out, saved)
    small = build_model(saved, weight.device).to(weight.dtype)  # what is measured is what was saved
    val = val[: config.eval_tokens + 1]
    before, after = perplexity_on(val, model), perplexity_on(val, small)
    print(*picture(small.config), sep="\n")
    old, new = (m.config.kv_bytes_per_token(stored.itemsize) for m in (model, small))
    print(f"KV cache: {old:,} -> {new:,} bytes a token ({100 * new / old:.1f}%)")
    ratio = f"perplexity {before:.4f} -> {after:.4f}, x {after / before:.4f}"
    read = ", which a search may have read" * (config.groups is not None)
    print(f"{ratio} | {len(val) - 1:,} tokens of {name}{read}")
    heal = f"--init_from {out} --teacher {config.ckpt} --distil_weight 1 --batch_size 4 --max_steps 100"
    heal += f" --dataset {config.dataset}" if config.dataset else ""
    if after > 1.01 * before:  # healing costs up to 1%
        print(f"--- next:\npython train.py {heal} --out_dir {out.with_suffix('')}-healed")


if __name__ == "__main__":
    exit_cleanly(main)
