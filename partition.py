"""Which heads share: what that costs, the cheapest groups, and how a budget is spent.

A set costs the squared error, over a text's inputs, of the best head that it can share (gqa.py).
Costs add over groups. Up to 12 heads dynamic programming over sets finds the optimum: the cheapest partition
of a set is a subset that holds its first head, and the cheapest partition of the rest. With more, the two
groups whose union adds least merge until g are left; then heads move and change places while it helps.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import combinations, product

import numpy as np
import torch

from common import require
from model import Attention, Llama, Maps
from refit import Statistics

EXACT = 12  # 4,095 sets, 3^12 / 2 ways to cut one in two
TINY = 1e-300  # keeps weights that are zero from becoming nan
Groups = list[list[int]]  # the members of each group, in ascending order
Cost = Callable[[np.ndarray], np.ndarray]  # (N, s) heads of N sets of s members -> (N,) costs
Partitions = dict[int, tuple[float, Groups]]  # number of groups -> total cost, groups
Slot = tuple[int, str]  # (layer, "k", "v" or "kv"): heads that form groups; kv: both kinds alike
Counts = dict[Slot, int]  # groups in each slot, or the size of its latent


def complex_heads(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """wq or wk (n D, C) -> (n, D/2, C): the rows of a RoPE pair as one complex row."""
    pairs = weight.double().unflatten(0, (-1, head_dim // 2, 2)).transpose(2, 3)
    return torch.view_as_complex(pairs.contiguous())


def real_rows(z: torch.Tensor) -> torch.Tensor:
    """Complex rows (..., C) as the rows of wq or wk (2 ..., C)."""
    return torch.view_as_real(z).mT.flatten(0, -2).contiguous()


def value_heads(attention: Attention, stats: Statistics) -> tuple:
    """Of each value head wv (G, D, C), of each query head wo (H, C, D), and for each value head the sum over
    its readers of E[gate^2] wo^T wo (G, D, D), with its trace (G,)."""
    values = attention.wv.weight.double().unflatten(0, (-1, attention.head_dim))
    outputs = attention.wo.weight.double().unflatten(1, (-1, attention.head_dim)).transpose(0, 1)
    squares = stats.gates[:, None, None] * (outputs.mT @ outputs)
    grams = torch.zeros_like(squares[: len(values)]).index_add_(0, attention.v_groups.of_head, squares)
    return values, outputs, grams, grams.diagonal(dim1=1, dim2=2).sum(1)


def weighted_rows(attention: Attention, kind: str, stats: Statistics) -> tuple[torch.Tensor, ...]:
    """One layer's key or value rows (F, n, C), the same weighted, and E[x x^T], for values E[m m^T] (C, C).
    Keys: a complex row a head for each of F = D/2 RoPE pairs, times sqrt(E|q_f|^2). Values: F = 1, D rows a
    head, R W_v, where R^T R sums its readers' E[gate^2] W_o^T W_o (before a novel layer |W_o| W_v)."""
    if kind == "k":
        rows = complex_heads(attention.wk.weight, attention.head_dim).transpose(0, 1)
        F, n, _ = rows.shape
        energy = stats.energy.new_zeros(n, F).index_add_(0, attention.k_groups.of_head, stats.energy)
        # a head whose queries are all near zero still gets a direction
        energy = energy.clamp(min=max(1e-6 * energy.mean().item(), TINY))
        return rows, energy.sqrt().T[..., None] * rows, stats.inputs.to(rows.dtype)
    values, _, grams, sizes = value_heads(attention, stats)
    if attention.novel is None:
        energies, U = torch.linalg.eigh(grams)
        weighted = energies.clamp(min=0).sqrt()[..., None] * (U.mT @ values)
    else:
        weighted = sizes.clamp(min=TINY).sqrt()[:, None, None] * values
    return values.flatten(0, 1)[None], weighted.flatten(0, 1)[None], stats.mixed


class Costs:
    """What merging a set of a layer's K or V heads costs: the squared error, on weighted rows, of the best
    shared head, which keeps the largest `rank` eigenvalues of their Gram matrix: the sum of the others. Novel
    values share their weighted mean instead."""

    @torch.no_grad()
    def __init__(self, attention: Attention, kind: str, stats: Statistics):
        _, rows, C = weighted_rows(attention, kind, stats)
        self.rank, self.weights = (attention.head_dim if kind == "v" else 1), None
        if kind == "v" and attention.novel is not None:  # whose values share a weighted mean
            rows, self.rank = rows[0].unflatten(0, (-1, self.rank)).transpose(0, 1), 1  # (D, G, C)
            self.weights = value_heads(attention, stats)[3].clamp(min=TINY).sqrt().cpu()
        self.gram = (rows @ C @ rows.mH).cpu()  # (F, n rank, n rank); costs add over F
        self.n = self.gram.shape[-1] // self.rank
        if kind == "v" and self.gram.shape[-1] > 512:  # float32 takes two thirds of the time
            self.gram = self.gram.float()

    def __call__(self, sets: np.ndarray) -> np.ndarray:
        """sets (N, s) of s heads each -> (N,)"""
        index = (torch.from_numpy(sets)[..., None] * self.rank + torch.arange(self.rank)).flatten(1)
        parts = index.split(max(1, 2**22 // (len(self.gram) * index.shape[1] ** 2)))
        threads = torch.get_num_threads()  # one a part: within such small eigenproblems they would only wait
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            tails = torch.cat(list(pool.map(self.tails, parts))).numpy()
        torch.set_num_threads(threads)  # also of threads that begin later
        return tails

    def tails(self, index: torch.Tensor) -> torch.Tensor:
        """index (N, s rank) of rows of the gram -> (N,) costs"""
        grams = self.gram[:, index[:, :, None], index[:, None, :]]  # (F, N, s rank, s rank)
        if self.weights is None:
            lost = torch.linalg.eigvalsh(grams)[..., : -self.rank].sum(-1)
        else:
            u = self.weights[index]
            kept = torch.einsum("ns,fnst,nt->fn", u, grams, u) / u.square().sum(-1)
            lost = grams.diagonal(dim1=-2, dim2=-1).sum(-1) - kept
        return lost.sum(0).clamp(min=0)


def slot_costs(model: Llama, stats: list[Statistics], slot: Slot) -> Cost:
    """What a slot's groups minimise: K's cost, V's or both, each as a share of one group's."""
    layer, kinds = slot
    costs = [Costs(model.layers[layer].attention, kind, stats[layer]) for kind in kinds]
    whole = [max(cost(np.arange(cost.n)[None]).item(), TINY) for cost in costs]
    return lambda sets: sum(cost(sets) / of_one for cost, of_one in zip(costs, whole))


# ---- the cheapest groups ----


def best_partitions(n: int, cost: Cost, wanted: Iterable[int] = ()) -> Partitions:
    """For the wanted numbers of groups, or all."""
    wanted = list(wanted) or range(1, n + 1)
    assert all(1 <= g <= n for g in wanted), f"{wanted} groups of {n} heads"
    return exact_partitions(n, cost, wanted) if n <= EXACT else greedy_partitions(n, cost, wanted)


def exact_partitions(n: int, cost: Cost, wanted: Iterable[int]) -> Partitions:
    of_set: dict[tuple[int, ...], float] = {}
    for size in range(1, n - min(wanted) + 2):  # of g groups none has more than n - g + 1 heads
        sets = list(combinations(range(n), size))
        of_set |= zip(sets, cost(np.array(sets)).tolist())

    @cache
    def best(heads: tuple[int, ...], g: int) -> tuple[float, Groups]:
        """The cheapest g groups: one that holds the first head, and the cheapest of the rest."""
        if g == 1:
            return of_set[heads], [list(heads)]
        ways = []
        for size in range(len(heads) - g + 1):
            for others in combinations(heads[1:], size):
                group = (heads[0], *others)
                total, groups = best(tuple(h for h in heads[1:] if h not in others), g - 1)
                ways.append((of_set[group] + total, [list(group), *groups]))
        return min(ways)

    return {g: best(tuple(range(n)), g) for g in wanted}


def greedy_partitions(n: int, cost: Cost, wanted: Iterable[int]) -> Partitions:
    known: dict[tuple[int, ...], float] = {}

    def costs(sets: Groups) -> list[float]:
        new = {tuple(s) for s in sets if tuple(s) not in known}
        for size in {len(s) for s in new}:
            batch = [s for s in new if len(s) == size]
            known.update(zip(batch, cost(np.array(batch)).tolist()))
        return [known[tuple(s)] for s in sets]

    groups, found = [[head] for head in range(n)], {}
    while True:
        if len(groups) in wanted:
            better = improve(groups, costs)
            found[len(groups)] = (sum(costs(better)), sorted(better))
        if len(groups) <= min(wanted):
            return found
        alone, pairs = costs(groups), list(combinations(range(len(groups)), 2))
        united = costs([sorted(groups[a] + groups[b]) for a, b in pairs])
        a, b = pairs[int(np.argmin([both - alone[a] - alone[b] for both, (a, b) in zip(united, pairs)]))]
        groups[a] = sorted(groups[a] + groups.pop(b))


def improve(groups: Groups, costs: Callable[[Groups], list[float]]) -> Groups:
    """Move the head, or exchange the two, that help most, until none do."""
    while True:
        trials = []
        for A, B in combinations(groups, 2):
            rest = [group for group in groups if group not in (A, B)]
            pairs = [({x}, set()) for x in A if len(A) > 1] + [(set(), {y}) for y in B if len(B) > 1]
            pairs += [({x}, {y}) for x in A for y in B]
            trials += [[*rest, sorted({*A} - x | y), sorted({*B} - y | x)] for x, y in pairs]
        costs([group for trial in trials for group in trial])  # all at once
        best = min(trials, key=lambda trial: sum(costs(trial)), default=groups)
        if sum(costs(best)) >= (1 - 1e-9) * sum(costs(groups)):
            return groups
        groups = best


# ---- how many, and which ----


def head_counts(model: Llama, joint: bool = False) -> Counts:
    """The model's K and V heads in each slot, keys first: they get more of an uneven share."""
    c = model.config
    require(not joint or c.k_groups == c.v_groups, "keys and values are grouped apart already: drop --joint")
    maps = {"kv": c.k_groups} if joint else {"k": c.k_groups, "v": c.v_groups}
    return {(layer, kind): max(of_head) + 1 for kind in maps for layer, of_head in enumerate(maps[kind])}


def budget(whole: Counts, share: float) -> int:
    """Groups (or units of latents) in a share of the cache. Raises UserError below one for each slot."""
    most = sum(whole.values())
    total, least = int(share * most + 1e-9), -(-1000 * len(whole) // most) / 1000
    few = f"kv_budget {share} leaves nothing for some layer's K or V: give --kv_budget {least} to 1"
    require(total >= len(whole), few)
    return total


def even_counts(heads: Counts, total: int) -> Counts:
    """`total` groups, spread as evenly over the slots as can be."""
    counts = dict.fromkeys(heads, 1)
    for _ in range(total - len(counts)):
        counts[min(counts, key=lambda slot: counts[slot] / heads[slot])] += 1
    return counts


def choose(
    model: Llama, stats: list[Statistics], counts: Counts, grouping="best", seed=0, known: dict | None = None
) -> tuple[Maps, Maps]:  # fmt: skip
    """k_groups and v_groups with so many groups in each slot: the best, runs of neighbour heads, or random.
    `known` {slot: best_partitions} keeps what was computed for later calls."""
    heads, labels = head_counts(model, any(kinds == "kv" for _, kinds in counts)), {}
    for slot, g in counts.items():
        n, labels[slot] = heads[slot], np.empty(heads[slot], int)
        if grouping == "best":
            answers = {} if known is None else known.setdefault(slot, {})
            if g not in answers:
                answers |= best_partitions(n, slot_costs(model, stats, slot), [g])
            groups = answers[g][1]
        elif grouping == "neighbour":
            groups = np.array_split(np.arange(n), g)
        elif grouping == "random":
            rng = np.random.default_rng((seed, slot[0], slot[1] == "v", g))
            order = rng.permutation(n)
            drawn = np.concatenate((np.arange(g), rng.integers(g, size=n - g)))
            groups = [order[drawn == i] for i in range(g)]
        for number, group in enumerate(groups):
            labels[slot][group] = number
    return as_maps(model, labels)


def numbered(labels: list[int]) -> list[int]:
    """Labels as numbers, from 0 on, in the order in which they first occur."""
    first = list(dict.fromkeys(labels))
    return [first.index(label) for label in labels]


def as_maps(model: Llama, labels: dict[Slot, np.ndarray]) -> tuple[Maps, Maps]:
    """k_groups and v_groups, of a label for each K or V head of each slot."""
    label = {(layer, kind): x for (layer, kinds), x in labels.items() for kind in kinds}
    maps = zip("kv", (model.config.k_groups, model.config.v_groups))
    return tuple([numbered(label[i, kind][of].tolist()) for i, of in enumerate(old)] for kind, old in maps)


def knapsack(choices: Iterable[list[tuple]]) -> dict[int, tuple[float, list]]:
    """Choices (loss, size, what) of each slot -> {total size: (least sum of losses, what of each slot)}."""
    best = {0: (0.0, [])}  # of the slots so far
    for of_slot in choices:
        least, before, best = {}, best, {}
        for loss, size, what in of_slot:
            least[size] = min(least.get(size, (np.inf,)), (loss, what))
        for (total, (lost, chosen)), (size, (more, what)) in product(before.items(), least.items()):
            if total + size not in best or lost + more <= best[total + size][0]:
                best[total + size] = lost + more, [*chosen, what]
    return best
