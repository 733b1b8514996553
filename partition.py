"""The cheapest way to part n heads into g groups, when costs add over groups and only a set's members decide its cost.

Up to 12 heads it is found exactly, for every g at once, by dynamic programming over all 2^n - 1 subsets: the cheapest
partition of a set is some subset that holds the set's first head, and the cheapest partition of the rest. Beyond that
the two groups whose union adds least are merged until g are left, then heads move and change places while that helps.
"""

import math
from collections.abc import Callable, Iterable
from itertools import combinations

import numpy as np

EXACT = 12  # 4,095 subsets, and 3^12 / 2 ways to cut one off another
Groups = list[list[int]]  # the members of each group, in ascending order
Cost = Callable[[np.ndarray], np.ndarray]  # (N, s) heads of N sets of s members -> (N,) costs


def best_partitions(n: int, cost: Cost, wanted: Iterable[int] | None = None) -> dict[int, tuple[float, Groups]]:
    """{g: (total cost, groups)} for every number of groups g, or the `wanted` ones; the best there is up to 12 heads,
    good ones above."""
    wanted = range(1, n + 1) if wanted is None else wanted
    assert all(1 <= g <= n for g in wanted), f"{n} heads cannot be parted into {list(wanted)} groups"
    return exact_partitions(n, cost, wanted) if n <= EXACT else greedy_partitions(n, cost, wanted)


def exact_partitions(n: int, cost: Cost, wanted: Iterable[int]) -> dict[int, tuple[float, Groups]]:
    """The optimum. A set of heads is a number whose bit h says whether head h is in it."""
    of_set = np.full(2**n, np.inf)
    for size in range(1, n - min(wanted) + 2):  # of g groups none has more than n - g + 1 heads; large sets cost most
        sets = np.array(list(combinations(range(n), size)))
        of_set[(1 << sets).sum(1)] = cost(sets)
    best = np.full((n + 1, 2**n), np.inf)  # [g, set]: cost of its cheapest partition into g groups
    best[0, 0] = 0
    first = np.zeros((n + 1, 2**n), dtype=np.int64)  # the group of it that holds the set's lowest head
    for whole in range(1, 2**n):
        rest = whole & (whole - 1)
        parts = subsets(rest) | (whole ^ rest)
        totals = of_set[parts] + best[:-1, whole ^ parts]  # (n, number of parts)
        choice = totals.argmin(1)
        best[1:, whole], first[1:, whole] = totals[np.arange(n), choice], parts[choice]
    found = {}
    for g in wanted:
        left, groups = 2**n - 1, []
        for k in range(g, 0, -1):
            part = int(first[k, left])
            groups.append([head for head in range(n) if part >> head & 1])
            left ^= part
        found[g] = (float(best[g, -1]), groups)
    return found


def subsets(whole: int) -> np.ndarray:
    """All subsets of a set of bits, itself and the empty one among them."""
    found = np.zeros(1, dtype=np.int64)
    while whole:
        low = whole & -whole
        found, whole = np.concatenate((found, found | low)), whole ^ low
    return found


def greedy_partitions(n: int, cost: Cost, wanted: Iterable[int]) -> dict[int, tuple[float, Groups]]:
    """Agglomeration, then moves and swaps."""
    known: dict[tuple[int, ...], float] = {(): 0.0}

    def costs(sets: list[list[int]]) -> list[float]:
        """Of any sets; the new ones are computed together with others of their size."""
        new = {tuple(s) for s in sets} - set(known)
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
        pairs = list(combinations(range(len(groups)), 2))
        united = costs([sorted(groups[a] + groups[b]) for a, b in pairs])
        alone = costs(groups)
        a, b = pairs[int(np.argmin([both - alone[i] - alone[j] for both, (i, j) in zip(united, pairs)]))]
        groups[a] = sorted(groups[a] + groups.pop(b))


def improve(groups: Groups, costs: Callable[[Groups], list[float]]) -> Groups:
    """Move the head, or exchange the two, that helps most, until none helps."""
    groups = [list(g) for g in groups]
    while True:
        trials = []  # (a, b, what a becomes, what b becomes)
        for a, b in combinations(range(len(groups)), 2):
            A, B = groups[a], groups[b]
            trials += [(a, b, without(A, x), sorted([*B, x])) for x in A if len(A) > 1]
            trials += [(a, b, sorted([*A, y]), without(B, y)) for y in B if len(B) > 1]
            trials += [(a, b, sorted([*without(A, x), y]), sorted([*without(B, y), x])) for x in A for y in B]
        if not trials:
            return groups
        now, ours, theirs = costs(groups), costs([t[2] for t in trials]), costs([t[3] for t in trials])
        gains = [now[a] + now[b] - x - y for (a, b, *_), x, y in zip(trials, ours, theirs)]
        best = int(np.argmax(gains))
        if gains[best] <= 1e-9 * sum(now):
            return groups
        a, b, groups_a, groups_b = trials[best]
        groups[a], groups[b] = groups_a, groups_b


def without(heads: list[int], head: int) -> list[int]:
    return [h for h in heads if h != head]


# ---- how many groups where ----


def interpolated(known: dict[int, float], costs: list[float]) -> np.ndarray:
    """KL divergence for 1 .. n groups, from that measured for some numbers of groups. It is nearly a power of the
    closed form's cost, so between measurements it is a straight line in their logarithms; n groups cost nothing."""
    n = len(costs)
    x = np.log(np.maximum(costs, 1e-12 * max(costs) + 1e-300))
    sizes = sorted(known)
    points = [(x[g - 1], math.log(max(known[g], 1e-9))) for g in reversed(sizes)]
    (xs, ys), values = np.array(points).T, np.zeros(n)
    for g in range(1, n):
        i = int(np.clip(np.searchsorted(xs, x[g - 1]), 1, max(1, len(xs) - 1)))
        rise = xs[i] - xs[i - 1] if len(xs) > 1 else 0
        slope = (ys[i] - ys[i - 1]) / rise if rise > 1e-9 else 1.0
        values[g - 1] = math.exp(min(ys[i - 1] + max(0.0, slope) * (x[g - 1] - xs[i - 1]), 700))
    return np.maximum.accumulate(values[::-1])[::-1]  # fewer groups are never better


def knapsack(values: list[np.ndarray]) -> tuple[np.ndarray, list[list[int]]]:
    """values[i][g - 1], what g groups cost in slot i -> for every total number of groups the least sum (inf where there
    is none), and the groups of each slot that give it."""
    most = sum(map(len, values))
    best, choices = np.full(most + 1, np.inf), []
    best[0] = 0
    for value in values:
        options = np.full((len(value), most + 1), np.inf)
        for g in range(1, len(value) + 1):
            options[g - 1, g:] = best[: most + 1 - g] + value[g - 1]
        choices.append(options.argmin(0) + 1)
        best = options.min(0)
    counts = [[0] * len(values) for _ in range(most + 1)]
    for total in np.flatnonzero(np.isfinite(best)):
        left = total
        for i in reversed(range(len(values))):
            counts[total][i] = int(choices[i][left])
            left -= counts[total][i]
    return best, counts
