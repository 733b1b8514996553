"""Merging heads: exact where it can be, optimal where it cannot, and whole from the command to the checkpoint."""

import math
from itertools import combinations
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from conftest import assert_close, sharp_model, to_hugging_face

import merging
from attention import scores
from config import UserError
from gqa import GroupConfig, Partitioner, in_order, neighbours, predictions
from merging import Costs, convert, mean, merge_keys, merge_values, rope_of, statistics
from model import KVCache, Llama, ModelConfig
from partition import best_partitions, exact_partitions, greedy_partitions, interpolated, knapsack
from refit import refit, refit_attention, refit_output

MERGES = get_args(get_type_hints(GroupConfig)["merge"])  # with one of your own, if you have added it
GROUPINGS = get_args(get_type_hints(GroupConfig)["grouping"])
SHAPES = {
    "mha": {},
    "gqa": {"n_kv_head": 2},
    "uneven": {"k_groups": [[0, 1, 1, 2], [0, 0, 1, 2]], "v_groups": [[0, 1, 2, 2], [0, 1, 0, 1]]},
    "gated": {"gated": True},  # a gate multiplies what a head has made of its values: their symmetry stays
}


def double(seed=0, **settings) -> Llama:
    return sharp_model(seed, **settings).double().requires_grad_(False)


def some_tokens(model: Llama, rows=6, seed=1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (rows, 48), generator=generator)


def alone(of_head: list[list[int]]) -> list[list[int]]:
    return [list(layer) for layer in of_head]


def transform_value(attention, head: int, seed: int) -> None:
    """W_v^h <- S W_v^h, W_o^h <- W_o^h S^-1 for a random invertible S."""
    D = attention.head_dim
    rows = slice(head * D, (head + 1) * D)
    S = torch.randn(D, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    attention.wv.weight[rows] = S @ attention.wv.weight[rows]
    attention.wo.weight[:, rows] = attention.wo.weight[:, rows] @ torch.linalg.inv(S)


def transform_key(attention, head: int, seed: int) -> None:
    """Each pair of the key times z, and of the query divided by conj(z), written with 2 x 2 real matrices."""
    D, rng = attention.head_dim, np.random.default_rng(seed)
    for f in range(D // 2):
        size, turn = rng.uniform(0.5, 2), rng.uniform(0, 2 * math.pi)
        rotation = torch.tensor(
            [[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]], dtype=torch.float64
        )
        rows = slice(head * D + 2 * f, head * D + 2 * f + 2)
        attention.wk.weight[rows] = size * rotation @ attention.wk.weight[rows]
        attention.wq.weight[rows] = rotation @ attention.wq.weight[rows] / size  # 1 / conj(z) = z / |z|^2


def test_the_two_symmetries_leave_the_logits():
    model = double()
    tokens = some_tokens(model)
    before = model(tokens)
    for layer in model.layers:
        for head in range(4):
            transform_value(layer.attention, head, head)
            transform_key(layer.attention, head, head)
    assert_close(model(tokens), before, 1e-9)


@pytest.mark.parametrize("shape", ["gqa", "uneven"])
def test_heads_equal_up_to_the_symmetries_merge_at_no_cost(shape):
    """A grouped model, written as multi-head attention whose equal heads are each disguised by a transform of its own,
    is found to be grouped, and comes back with the same logits."""
    source = double(**SHAPES[shape])
    tokens = some_tokens(source)
    c, weights = source.config, source.state_dict()
    for layer in range(c.n_layer):
        for name, groups in (("wk", c.k_groups[layer]), ("wv", c.v_groups[layer])):
            at = f"layers.{layer}.attention.{name}.weight"
            weights[at] = weights[at].unflatten(0, (-1, c.head_dim))[groups].flatten(0, 1)
    model = double(seed=5)
    model.load_state_dict(weights)
    for layer in model.layers:
        for head in range(4):
            transform_value(layer.attention, head, 10 + head)
            transform_key(layer.attention, head, 10 + head)
    found = statistics(model, tokens)
    partition_of = Partitioner(model, found)
    maps = []
    for kind, of in (("k", c.k_groups), ("v", c.v_groups)):
        counts = [max(groups) + 1 for groups in of]
        costs = [partition_of(layer, kind, g) for layer, g in enumerate(counts)]
        whole = [partition_of(layer, kind, 1)[0] for layer in range(c.n_layer)]
        assert all(cost <= 1e-9 * most for (cost, _), most in zip(costs, whole)), (costs, whole)
        maps.append(counts)
    counts = {(layer, kind): maps[kind == "v"][layer] for kind in "kv" for layer in range(c.n_layer)}
    k_groups, v_groups = partition_of.maps(counts)
    assert (k_groups, v_groups) == (c.k_groups, c.v_groups), "the planted groups are not found"
    assert_close(convert(model, k_groups, v_groups, found)(tokens), source(tokens), 1e-7)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("merge", MERGES)
def test_singletons_change_nothing_bit_for_bit(shape, merge):
    model = sharp_model(**SHAPES[shape]).requires_grad_(False)
    tokens, c = some_tokens(model), model.config
    result = convert(model, alone(c.k_groups), alone(c.v_groups), statistics(model, tokens), merge)
    refit(result, model, tokens, rope_of(model, tokens))
    for name, x in model.state_dict().items():
        assert torch.equal(result.state_dict()[name], x), name


@pytest.mark.parametrize("merge", MERGES)
def test_equal_heads_merge_to_themselves(merge):
    """Two heads of the same weights share one at no cost, however it is made."""
    model = double()
    for layer in model.layers:
        for w in (layer.attention.wq, layer.attention.wk, layer.attention.wv):
            w.weight[8:16] = w.weight[:8]
    tokens, maps = some_tokens(model), [[0, 0, 1, 2]] * 2
    result = convert(model, maps, maps, statistics(model, tokens), merge)
    assert_close(result(tokens), model(tokens), 1e-7, merge)


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("joint", [False, True])
def test_every_grouping_parts_all_heads(grouping, joint):
    model = double()
    partition = Partitioner(model, statistics(model, some_tokens(model)), grouping, joint)
    for layer, kind in partition.slots():
        for g in range(1, 5):
            groups = partition(layer, kind, g)[1]
            assert len(groups) == g and all(groups)
            assert sorted(head for group in groups for head in group) == [0, 1, 2, 3]
            assert partition(layer, kind, g)[1] == groups


def test_merging_leaves_the_original_alone():
    model = sharp_model().requires_grad_(False)
    tokens, before = some_tokens(model), {name: x.clone() for name, x in model.state_dict().items()}
    for merge in MERGES:
        one = [[0] * 4] * 2
        refit(convert(model, one, one, statistics(model, tokens), merge), model, tokens, rope_of(model, tokens))
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_statistics_are_those_of_the_text(monkeypatch):
    """Against loops over heads, tokens and pairs."""
    monkeypatch.setattr(merging, "QUERIES", 20)  # of rows of 48: at every second place
    model = double(n_kv_head=2)
    tokens, c = some_tokens(model, rows=3), model.config
    found = statistics(model, tokens)[1]
    seen = {}
    hook = model.layers[1].attention.wq.register_forward_hook(lambda _, args, out: seen.update(x=args[0], q=out))
    model(tokens)
    hook.remove()
    x, q = seen["x"], seen["q"].unflatten(-1, (4, -1))
    inputs = sum(torch.outer(row, row) for row in x.flatten(0, 1)) / x[..., 0].numel()
    assert_close(found.inputs, inputs, 1e-10, "inputs")
    energy = q.unflatten(-1, (-1, 2)).square().sum(-1).mean((0, 1))  # rotation leaves it
    assert_close(found.energy, energy, 1e-7, "energy")  # but for its float32 angles
    twin, weights = to_hugging_face(model.float()), None
    weights = twin.double()(tokens, output_attentions=True).attentions[1]
    total, count = torch.zeros_like(inputs), 0
    for b in range(3):
        for head in range(c.n_head):
            for t in range(1, 48, 2):
                m = weights[b, head, t] @ x[b]
                total, count = total + torch.outer(m, m), count + 1
    assert_close(found.mixed, total / count, 1e-5, "mixed")  # the twin's angles are float32


def value_error(attention, wv, wo, groups, C) -> float:
    """sum over heads of |(W_o^h W_v^h - W_o'^h W_v') C^(1/2)|^2, from the weights alone."""
    D, total = attention.head_dim, 0.0
    for i, group in enumerate(groups):
        for head in group:
            rows = slice(head * D, (head + 1) * D)
            before = attention.wo.weight[:, rows] @ attention.wv.weight[rows]
            E = before - wo[:, rows] @ wv[i * D : (i + 1) * D]
            total += torch.trace(E @ C @ E.T).item()
    return total


def key_error(attention, wk, coefficients, groups, statistics) -> float:
    """sum over heads and pairs of E|q|^2 |(p_h - c_h p') C^(1/2)|^2, from the weights alone."""
    D, total = attention.head_dim, 0.0
    for i, group in enumerate(groups):
        for head in group:
            for f in range(D // 2):
                a, b = attention.wk.weight[head * D + 2 * f : head * D + 2 * f + 2]
                x, y = wk[i * D + 2 * f : i * D + 2 * f + 2]
                c = coefficients[head, f]
                E = torch.complex(a, b) - c * torch.complex(x, y)
                size = (E @ statistics.inputs.to(E.dtype) @ E.conj()).real
                total += (statistics.energy[head, f] * size).item()
    return total


def ratio_of(new: torch.Tensor, old: torch.Tensor, D: int) -> torch.Tensor:
    """(H, D/2): conj(c) of q' = conj(c) q, read off the queries' weights."""
    new, old = (torch.complex(w[0::2], w[1::2]) for w in (new, old))
    return ((new * old.conj()).sum(-1) / old.abs().square().sum(-1)).unflatten(0, (-1, D // 2))


@pytest.mark.parametrize("groups", [[[0, 1, 2, 3]], [[0, 3], [1, 2]], [[0], [1, 2, 3]]])
def test_the_closed_form_is_the_least_of_all_merges(groups):
    """Its cost is the error of the weights it gives; no mean, aligned mean or random merge has a smaller one."""

    model = double(seed=3)
    attention, found = model.layers[0].attention, statistics(model, some_tokens(model))[0]
    D, C, H = attention.head_dim, found.mixed, 4
    rng = torch.Generator().manual_seed(0)
    wv, wo = merge_values(attention, groups, found)
    least = value_error(attention, wv, wo, groups, C)
    cost = sum(Costs(attention, "v", found)(np.array([g])).item() for g in groups)
    assert math.isclose(least, cost, rel_tol=1e-8)
    V = attention.wv.weight.unflatten(0, (H, D))
    W = attention.wo.weight.unflatten(1, (H, D)).transpose(0, 1)
    root = torch.linalg.cholesky(C + 1e-12 * torch.eye(len(C)))

    def best_outputs(shared: list[torch.Tensor]) -> torch.Tensor:
        """For any shared values the best wo: every other choice of wo is worse than this."""
        out = W.clone()
        for value, group in zip(shared, groups):
            for head in group:
                out[head] = W[head] @ V[head] @ C @ value.T @ torch.linalg.pinv(value @ C @ value.T)
        return out.transpose(0, 1).flatten(1)

    plain_mean = mean(attention.wv.weight, groups)
    aligned = []  # orthogonal Procrustes: heads are turned to the first one's before the mean
    for group in groups:
        turned = []
        for head in group:
            U, _, X = torch.linalg.svd(V[group[0]] @ root @ (V[head] @ root).T)
            turned.append(U @ X @ V[head])
        aligned.append(torch.stack(turned).mean(0))
    trials = [(plain_mean, attention.wo.weight), (plain_mean, best_outputs(list(plain_mean.split(D))))]
    trials += [(torch.cat(aligned), best_outputs(aligned))]
    for i in range(1000):
        spread = 0.001 if i % 2 else 1.0  # near the optimum, and anywhere
        base = wv if i % 2 else torch.zeros_like(wv)
        shared = base + spread * torch.randn(wv.shape, generator=rng, dtype=wv.dtype)
        trials.append((shared, best_outputs(list(shared.split(D)))))
    errors = [value_error(attention, *trial, groups, C) for trial in trials]
    assert least <= min(errors) * (1 + 1e-9), (least, min(errors))

    wq, wk = merge_keys(attention, groups, found)
    coefficients = ratio_of(wq, attention.wq.weight, D).conj()
    least = key_error(attention, wk, coefficients, groups, found)
    cost = sum(Costs(attention, "k", found)(np.array([g])).item() for g in groups)
    assert math.isclose(least, cost, rel_tol=1e-8)
    errors = [key_error(attention, mean(attention.wk.weight, groups), torch.ones(H, D // 2), groups, found)]
    for i in range(100):
        scale = 0.01 if i % 2 else 1.0
        shared = (wk if i % 2 else 0) + scale * torch.randn(wk.shape, generator=rng, dtype=wk.dtype)
        noise = torch.randn(H, D // 2, generator=rng, dtype=torch.complex128)
        errors.append(key_error(attention, shared, (coefficients if i % 2 else 0) + scale * noise, groups, found))
    assert least <= min(errors) * (1 + 1e-9), (least, min(errors))


def all_partitions(heads: list[int]):
    if not heads:
        yield []
        return
    for rest in all_partitions(heads[1:]):
        yield [[heads[0]], *rest]
        for i in range(len(rest)):
            yield [*rest[:i], [heads[0], *rest[i]], *rest[i + 1 :]]


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_the_partition_is_the_cheapest_of_all(n):
    rng = np.random.default_rng(n)
    table = {s: rng.random() * len(s) for size in range(1, n + 1) for s in combinations(range(n), size)}

    def cost(sets):
        return np.array([table[tuple(s)] for s in sets.tolist()])

    least = dict.fromkeys(range(1, n + 1), math.inf)
    for groups in all_partitions(list(range(n))):
        total = sum(table[tuple(sorted(g))] for g in groups)
        least[len(groups)] = min(least[len(groups)], total)
    for g, (total, groups) in best_partitions(n, cost).items():
        assert len(groups) == g and sorted(h for group in groups for h in group) == list(range(n))
        assert math.isclose(total, least[g]) and math.isclose(total, sum(table[tuple(x)] for x in groups))
        assert best_partitions(n, cost, [g]) == {g: (total, groups)}, "asked alone"


def test_many_heads_are_parted_well():
    """Above 12 heads: planted groups are found, and on small sets the answer is seldom worse than the optimum."""
    points = np.random.default_rng(0).normal(size=(5, 3))[np.arange(20) % 5]
    points = points + 0.01 * np.random.default_rng(1).normal(size=points.shape)

    def spread(sets):
        return points[sets].var(axis=1).sum(-1) * sets.shape[1]

    groups = best_partitions(20, spread, [5])[5][1]
    assert groups == [[i, i + 5, i + 10, i + 15] for i in range(5)]
    worse = []
    for seed in range(10):
        points = np.random.default_rng(seed).normal(size=(8, 2))
        exact, greedy = exact_partitions(8, spread, range(1, 9)), greedy_partitions(8, spread, range(1, 9))
        assert all(greedy[g][0] >= exact[g][0] - 1e-9 for g in exact)
        worse += [greedy[g][0] > 1.001 * exact[g][0] for g in range(2, 8)]
    assert np.mean(worse) < 0.3, f"{100 * np.mean(worse):.0f}% are not optimal"


def test_similarity_is_one_for_equal_heads_and_lies_between():
    model = double()
    attention = model.layers[0].attention
    D = attention.head_dim
    for w in (attention.wk.weight, attention.wv.weight):
        w[D : 2 * D] = w[:D]
    transform_key(attention, 1, 3)
    transform_value(attention, 1, 3)
    found = statistics(model, some_tokens(model))[0]
    for kind in "kv":
        alike = Costs(attention, kind, found).similarity()
        assert math.isclose(alike[0, 1], 1, abs_tol=1e-9) and np.allclose(alike, alike.T)
        assert (alike >= -1e-9).all() and alike[0, 2] < 0.99


# ---- refitting ----


def test_refitted_output_is_the_ridge_regression():
    model = double(seed=2)
    tokens = some_tokens(model)
    one = [[0] * 4] * 2
    ours = convert(model, one, one, statistics(model, tokens)).layers[0].attention
    theirs, rope = model.layers[0].attention, rope_of(model, tokens)
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(*tokens.shape, 32, generator=generator, dtype=torch.float64)
    b, drift = a + 0.1 * a.flip(0), 0.2 * a.flip(1)
    z, before = ours.heads(b, *rope).flatten(0, 1).detach(), ours.wo.weight.clone().detach()
    target = (theirs(a, *rope) + drift).flatten(0, 1)
    refit_output(theirs, ours, a, b, drift, rope, ridge=0.01)
    damping = math.sqrt(0.01 * z.square().mean() * len(z)) * torch.eye(z.shape[1], dtype=z.dtype)
    stacked = torch.cat((z, damping)), torch.cat((target, damping @ before.T))
    assert_close(ours.wo.weight, torch.linalg.lstsq(*stacked).solution.T, 1e-9)


@pytest.mark.parametrize("queries", [48, 16])
def test_refitted_attention_looks_where_it_looked(monkeypatch, queries):
    """The divergence of attention weights falls, of those that it was fitted to, and of those of all queries."""
    monkeypatch.setattr(merging, "QUERIES", queries)
    model = sharp_model(seed=2).requires_grad_(False)
    tokens = some_tokens(model, rows=1536 // queries)
    rope, x = rope_of(model, tokens), model.layers[0].attention_norm(model.tok_embeddings(tokens))
    theirs = model.layers[0].attention
    ours = convert(model, [[0, 0, 1, 1]] * 2, [[0, 1, 2, 3]] * 2, statistics(model, tokens)).layers[0].attention

    def divergence() -> float:
        q, k, _ = theirs.project(x, *rope)
        p, r, _ = ours.project(x, *rope)
        left, right = scores(q, k, theirs.k_groups).softmax(-1), scores(p, r, ours.k_groups).softmax(-1)
        return (left * ((left + 1e-30).log() - (right + 1e-30).log())).sum(-1).mean().item()

    before = divergence()
    refit_attention(theirs, ours, x, x, rope)
    assert divergence() < 0.85 * before, (divergence(), before)


def test_refitting_brings_the_attention_closer_on_other_text():
    model = sharp_model(seed=4, n_head=8, dim=64).requires_grad_(False)
    layer = model.layers[0]
    tokens, other = some_tokens(model, rows=48), some_tokens(model, rows=8, seed=9)
    groups = [[0, 0, 1, 1, 2, 2, 3, 3]] * 2
    errors = []
    for how in (None, False, True):
        ours = convert(model, groups, groups, statistics(model, tokens))
        if how is not None:
            refit(ours, model, tokens, rope_of(model, tokens), attention=how)
        x, rope = layer.attention_norm(model.tok_embeddings(other)), rope_of(model, other)
        errors.append((layer.attention(x, *rope) - ours.layers[0].attention(x, *rope)).square().mean().item())
    assert errors[0] > errors[1] > errors[2], errors


def test_novel_values_share_the_weighted_mean():
    """The SiLU behind the values leaves no symmetry: heads equal but for a transform are not merged for free."""
    model = double(novel=True)
    attention, tokens = model.layers[0].attention, some_tokens(model)
    D, found = attention.head_dim, statistics(model, tokens)
    result = convert(model, [[0, 1, 2, 3]] * 2, [[0, 0, 1, 2]] * 2, found).layers[0].attention
    V, W = attention.wv.weight.unflatten(0, (4, D)), attention.wo.weight.unflatten(1, (4, D)).transpose(0, 1)
    weight = W.square().sum((1, 2))
    expected = (weight[0] * V[0] + weight[1] * V[1]) / (weight[0] + weight[1])
    assert_close(result.wv.weight[:D], expected, 1e-12)
    assert torch.equal(result.wo.weight, attention.wo.weight)
    error = sum(weight[h] * torch.trace((V[h] - expected) @ found[0].mixed @ (V[h] - expected).T) for h in (0, 1))
    cost = Costs(attention, "v", found[0])(np.array([[0, 1]])).item()
    assert math.isclose(cost, error.item(), rel_tol=1e-9)


# ---- shapes and sizes ----


def test_cache_holds_one_head_a_group_and_halves_at_one_half():
    model = sharp_model().requires_grad_(False)
    tokens = some_tokens(model)
    found = statistics(model, tokens)
    partition_of, bytes_of = Partitioner(model, found), []
    for total in (16, 8, 4):
        result = convert(model, *partition_of.maps(partition_of.even(total)), found)
        cache = KVCache(result.config, 48)
        result(tokens, cache=cache)
        assert cache.nbytes == result.config.kv_numbers_per_token * 4 * 48 * len(tokens)
        bytes_of.append(cache.nbytes)
        assert result.generate([[1, 2, 3], [4]], 12) == result.generate([[1, 2, 3], [4]], 12, use_cache=False)
    assert bytes_of == [bytes_of[0], bytes_of[0] // 2, bytes_of[0] // 4]


@pytest.mark.parametrize("shape", [{}, {"n_head": 9, "n_kv_head": 3, "dim": 36}, {"n_head": 32, "dim": 64}])
def test_many_shapes_become_multi_query(shape):
    model = sharp_model(**shape).requires_grad_(False)
    tokens = some_tokens(model)
    found = statistics(model, tokens)
    for joint in (False, True):
        partition_of = Partitioner(model, found, joint=joint)
        for g in {1, 2, partition_of.heads(*partition_of.slots()[0])}:
            maps = partition_of.maps(dict.fromkeys(partition_of.slots(), g))
            result = convert(model, *maps, found)
            assert result.config.kv_numbers_per_token == 2 * 2 * g * result.config.head_dim
            assert result(tokens).isfinite().all() and (not joint or maps[0] == maps[1])
    assert result.config.n_kv_head in (1, 2, 3, 4, 9, 32)


def test_equal_neighbours_are_plain_grouped_query_attention():
    model = sharp_model().requires_grad_(False)
    found = statistics(model, some_tokens(model))
    partition_of = Partitioner(model, found, "neighbour")
    result = convert(model, *partition_of.maps(partition_of.even(8)), found, "mean")
    assert result.config == ModelConfig(**{**vars(model.config), "n_kv_head": 2, "k_groups": None, "v_groups": None})
    D = model.config.head_dim
    for ours, source in zip(result.layers, model.layers):
        for name in ("wk", "wv"):
            heads = getattr(source.attention, name).weight.view(2, 2, D, -1)
            assert torch.equal(getattr(ours.attention, name).weight, heads.double().mean(1).float().flatten(0, 1))
    assert neighbours(8, 3) == [[0, 1, 2], [3, 4, 5], [6, 7]]


# ---- many budgets ----


def test_knapsack_is_the_best_of_all_choices():
    rng = np.random.default_rng(0)
    values = [np.sort(rng.random(n))[::-1] for n in (3, 1, 4, 2)]
    least, counts = knapsack(values)
    for total in range(11):
        sums = [
            sum(value[g - 1] for value, g in zip(values, choice))
            for choice in np.ndindex(4, 2, 5, 3)
            if sum(choice) == total and all(1 <= g <= len(v) for g, v in zip(choice, values))
        ]
        assert math.isclose(least[total], min(sums, default=math.inf)), total
        if sums:
            assert sum(counts[total]) == total
            assert math.isclose(sum(v[g - 1] for v, g in zip(values, counts[total])), min(sums))


def test_interpolation_passes_through_what_was_measured():
    costs = [10.0, 5.0, 2.0, 1.0, 0.3, 0.0]
    known = {g: 0.02 * costs[g - 1] ** 1.5 for g in (1, 3, 5)}
    values = interpolated(known, costs)
    assert values[5] == 0 and np.allclose(values[:5], [0.02 * cost**1.5 for cost in costs[:5]])
    assert (np.diff(interpolated({2: 0.1}, costs)) <= 0).all()
    flat = interpolated({1: 0.0, 2: 0.0}, [0.0, 0.0, 0.0])
    assert np.isfinite(flat).all()
    assert (np.diff(interpolated({1: 0.1, 2: 0.3, 3: 0.01}, costs)) <= 0).all(), "more groups are never worse"


def test_predictions_use_the_rate_of_the_kind_where_nothing_was_measured():
    model = sharp_model().requires_grad_(False)
    partition_of = Partitioner(model, statistics(model, some_tokens(model)))
    known = {slot: {} for slot in partition_of.slots()}
    costs = {slot: partition_of.all_costs(*slot) for slot in known}
    known[0, "k"], known[0, "v"] = {2: 0.5}, {1: 2.0}
    found = predictions(partition_of, known)
    assert np.allclose(found[1, "k"], np.array(costs[1, "k"]) * 0.5 / costs[0, "k"][1])
    assert np.allclose(found[1, "v"], np.array(costs[1, "v"]) * 2.0 / costs[0, "v"][0])
    assert found[0, "k"][1] == pytest.approx(0.5) and found[0, "k"][3] == 0


def test_shares_are_spread_in_proportion_to_the_heads():
    model = sharp_model(k_groups=[[0, 1, 2, 3], [0, 0, 1, 1]], v_groups=[[0, 1, 2, 3], [0, 0, 1, 1]])
    partition_of = Partitioner(model, [])
    assert partition_of.even(6) == {(0, "k"): 2, (1, "k"): 1, (0, "v"): 2, (1, "v"): 1}
    assert partition_of.total(0.5) == 6 and partition_of.total(0.6) == 7, "never more than the share"
    assert in_order([2, 0, 2, 1]) == [0, 1, 0, 2]


# ---- where numbers end ----


@pytest.mark.parametrize("name", ["wq", "wk", "wv", "wo"])
def test_weights_of_zero_stay_finite(name):
    model = sharp_model().requires_grad_(False)
    getattr(model.layers[0].attention, name).weight.zero_()
    tokens, one = some_tokens(model), [[0, 0, 1, 1]] * 2
    result = convert(model, one, one, statistics(model, tokens))
    refit(result, model, tokens, rope_of(model, tokens))
    assert result(tokens).isfinite().all() and all(x.isfinite().all() for x in result.state_dict().values())
    if name == "wq":  # heads that never ask still have a key
        assert (
            convert(model, one, one, statistics(model, tokens)).layers[0].attention.wk.weight.norm(dim=1) > 0.1
        ).all()


@pytest.mark.parametrize("shape", [{"dim": 8, "head_dim": 16}, {"n_layer": 1, "n_head": 1}, {"dim": 8, "head_dim": 2}])
def test_odd_shapes_are_grouped(shape):
    model = sharp_model(**shape).requires_grad_(False)
    for length in (2, 48):
        tokens = some_tokens(model)[:, :length]
        partition_of = Partitioner(model, statistics(model, tokens))
        result = convert(model, *partition_of.maps(dict.fromkeys(partition_of.slots(), 1)), partition_of.found)
        refit(result, model, tokens, rope_of(model, tokens))
        assert result(tokens).isfinite().all()


def test_keys_that_several_queries_read_are_merged_best():
    """A GQA source: the energy of a key head is that of all its queries."""
    model = double(seed=3, n_head=6, n_kv_head=3, dim=36)
    attention, found = model.layers[0].attention, statistics(model, some_tokens(model))[0]
    wq, wk = merge_keys(attention, [[0, 2], [1]], found)
    D = attention.head_dim
    c = ratio_of(wq, attention.wq.weight, D).conj()
    assert torch.allclose(c[0], c[1]) and torch.equal(wk[D:], attention.wk.weight[D : 2 * D])
    error = 0.0
    for head, (source, group) in enumerate([(0, 0), (0, 0), (1, 1), (1, 1), (2, 0), (2, 0)]):
        for f in range(D // 2):
            p, q = (torch.complex(*w[at * D + 2 * f : at * D + 2 * f + 2]) for w, at in
                    ((attention.wk.weight, source), (wk, group)))  # fmt: skip
            E = p - c[head, f] * q
            error += (found.energy[head, f] * (E @ found.inputs.to(E.dtype) @ E.conj()).real).item()
    assert math.isclose(error, Costs(attention, "k", found)(np.array([[0, 2]])).item(), rel_tol=1e-8)


def test_damaged_weights_are_refused():
    model = sharp_model().requires_grad_(False)
    model.layers[0].feed_forward.w1.weight[0, 0] = math.nan
    with pytest.raises(UserError, match="not finite"):
        statistics(model, some_tokens(model))
