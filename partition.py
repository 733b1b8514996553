"""The cheapest way to part n heads into g groups, and to spend a budget of groups over layers.

Costs add over groups, and only its members decide a group's cost. Up to 12 heads the optimum is found by
dynamic programming over sets: the cheapest partition of a set is a subset that holds its first head, and the
cheapest partition of the rest. With more heads, the two groups whose union adds least merge until g are left;
then heads move and change places while that helps.
"""

from collections.abc import Callable, Iterable
from itertools import combinations

import numpy as np

EXACT = 12  # 4,095 sets, 3^12 / 2 ways to cut one in two
Groups = list[list[int]]  # the members of each group, in ascending order
Cost = Callable[[np.ndarray], np.ndarray]  # (N, s) heads of N sets of s members -> (N,) costs
Partitions = dict[int, tuple[float, Groups]]  # number of groups -> total cost, groups


def best_partitions(n: int, cost: Cost, wanted: Iterable[int] = ()) -> Partitions:
    """For the wanted numbers of groups, or all."""
    wanted = list(wanted) or range(1, n + 1)
    assert all(1 <= g <= n for g in wanted), f"{wanted} groups of {n} heads"
    return exact_partitions(n, cost, wanted) if n <= EXACT else greedy_partitions(n, cost, wanted)


def exact_partitions(n: int, cost: Cost, wanted: Iterable[int]) -> Partitions:
    """Sets are numbers, whose bit h says whether head h is in it."""
    of_set = np.full(2**n, np.inf)
    for size in range(1, n - min(wanted) + 2):  # of g groups none has more than n - g + 1 heads
        heads = np.array(list(combinations(range(n), size)))
        of_set[(1 << heads).sum(1)] = cost(heads)
    # [g, set]: lowest cost of g groups of the set
    sets, best = np.arange(2**n), np.full((n + 1, 2**n), np.inf)
    best[0, 0] = 0
    first = np.zeros((n + 1, 2**n), dtype=np.int64)  # [g, set]: of these groups, the one with its lowest head
    for whole in sets[1:]:
        rest = whole & (whole - 1)  # all but the lowest head
        parts = sets[sets & ~rest == whole ^ rest]  # the subsets that hold it
        totals = of_set[parts] + best[:-1, whole ^ parts]  # (n, number of parts)
        choice = totals.argmin(1)
        best[1:, whole], first[1:, whole] = totals[np.arange(n), choice], parts[choice]
    found = {}
    for g in wanted:
        left, groups = 2**n - 1, []
        while left:
            part = first[g - len(groups), left]
            groups.append([head for head in range(n) if part >> head & 1])
            left ^= part
        found[g] = (float(best[g, -1]), groups)
    return found


def greedy_partitions(n: int, cost: Cost, wanted: Iterable[int]) -> Partitions:
    known: dict[tuple[int, ...], float] = {}

    def costs(sets: Groups) -> list[float]:
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
        alone, pairs = costs(groups), list(combinations(range(len(groups)), 2))
        united = costs([sorted(groups[a] + groups[b]) for a, b in pairs])
        a, b = pairs[int(np.argmin([both - alone[a] - alone[b] for both, (a, b) in zip(united, pairs)]))]
        groups[a] = sorted(groups[a] + groups.pop(b))


def improve(groups: Groups, costs: Callable[[Groups], list[float]]) -> Groups:
    """Move the head, or exchange the two, that help most, until none do."""
    groups = list(groups)
    while True:
        trials = []  # (a, b, what group a becomes, what group b becomes)
        for a, b in combinations(range(len(groups)), 2):
            A, B = groups[a], groups[b]
            pairs = [({x}, set()) for x in A if len(A) > 1] + [(set(), {y}) for y in B if len(B) > 1]
            pairs += [({x}, {y}) for x in A for y in B]
            trials += [(a, b, sorted({*A} - x | y), sorted({*B} - y | x)) for x, y in pairs]
        if not trials:
            return groups
        now, ours, theirs = costs(groups), costs([t[2] for t in trials]), costs([t[3] for t in trials])
        gains = [now[a] + now[b] - x - y for (a, b, *_), x, y in zip(trials, ours, theirs)]
        best = int(np.argmax(gains))
        if gains[best] <= 1e-9 * sum(now):
            return groups
        a, b, groups_a, groups_b = trials[best]
        groups[a], groups[b] = groups_a, groups_b


def knapsack(values: list[np.ndarray]) -> tuple[np.ndarray, list[list[int]]]:
    """values[i][g - 1], what g groups cost in slot i -> for every total number of groups the least sum (inf:
    there is none), and the groups of each slot that give it."""
    most = sum(map(len, values))
    best, counts = np.full(most + 1, np.inf), [[] for _ in range(most + 1)]  # of the slots so far
    best[0] = 0
    for value in values:
        options = np.full((len(value), most + 1), np.inf)  # [g - 1, total]
        for g in range(1, len(value) + 1):
            options[g - 1, g:] = best[: most + 1 - g] + value[g - 1]
        choice = (options.argmin(0) + 1).tolist()
        best, counts = options.min(0), [[*counts[total - g], g] for total, g in enumerate(choice)]
    return best, counts
