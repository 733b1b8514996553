"""Merging heads against brute force in float64: exact where it can be, else optimal; and the command."""

import copy
import json
import math
import re
import shutil
from functools import partial
from itertools import combinations, product
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import adapted, assert_close, run, sharp_model, to_hugging_face, tokens_of
from torch.func import functional_call, grad

import gqa
import refit as refitting
from checkpoint import build_model, check_tensors, load, picture, save
from common import UserError, sha256_of
from gqa import all_directions, merge, to_latents
from lora import LoRAConfig
from model import ROPE_SCALING, Llama, ModelConfig, rope_angles, scores
from partition import Costs, choose, head_counts, slot_costs
from refit import refit, refit_attention, statistics, token_maps
from study.plot import similarity

SHAPES = {"mha": {}, "gqa": {"n_kv_head": 2}, "gated": {"gated": True}}
SHAPES["uneven"] = {"k_groups": [[0, 1, 1, 2], [0, 0, 1, 2]], "v_groups": [[0, 1, 2, 2], [0, 1, 0, 1]]}
SCALING = dict(zip(ROPE_SCALING, (8.0, 1.0, 4.0, 24)))  # strong within the 48 tokens
ONE, TOKENS = [[0] * 4] * 2, tokens_of((6, 48), seed=1)
# what these flags of gqa.py offer; one of your own is tested with the others
MERGES, GROUPINGS = (get_args(get_type_hints(gqa.GroupConfig)[name]) for name in ("merge", "grouping"))


def frozen(seed=0, **settings) -> Llama:
    return sharp_model(seed, **settings).requires_grad_(False)


def traffic(model: Llama, tokens: torch.Tensor, *names: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What enters these modules of a model that reads the tokens, and what leaves them."""
    modules, seen = [model.get_submodule(name) for name in names], {}
    hooks = [m.register_forward_hook(lambda m, args, y: seen.update({m: (args[0], y)})) for m in modules]
    model(tokens)
    for hook in hooks:
        hook.remove()
    return [seen[module] for module in modules]


def pairs_of(weight: torch.Tensor, D: int) -> torch.Tensor:  # (heads, D/2, C)
    return torch.complex(weight[0::2], weight[1::2]).unflatten(0, (-1, D // 2))


def disguise(attention, head: int, seed: int) -> None:
    """W_v^h <- S W_v^h, W_o^h <- W_o^h S^-1; pairs of the key times z, of the query divided by conj(z)."""
    D, rng = attention.head_dim, np.random.default_rng(seed)
    rows, S = slice(head * D, (head + 1) * D), torch.from_numpy(rng.normal(size=(D, D)))
    attention.wv.weight[rows] = S @ attention.wv.weight[rows]
    attention.wo.weight[:, rows] = attention.wo.weight[:, rows] @ torch.linalg.inv(S)
    z = rng.uniform(0.5, 2, (D // 2, 1)) * np.exp(1j * rng.uniform(0, 2 * math.pi, (D // 2, 1)))
    for linear, factor in ((attention.wk, z), (attention.wq, 1 / z.conj())):
        turned = torch.from_numpy(factor) * pairs_of(linear.weight[rows], D)[0]
        linear.weight[rows] = torch.stack((turned.real, turned.imag), 1).flatten(0, 1)


def test_heads_equal_up_to_the_symmetries_merge_at_no_cost():
    """A grouped model, written as multi-head attention and disguised, comes back with its logits."""
    source = frozen(**SHAPES["uneven"]).double()
    tokens, c, weights = TOKENS, source.config, source.state_dict()
    for layer, (name, groups) in product(range(2), (("wk", c.k_groups), ("wv", c.v_groups))):
        at = f"layers.{layer}.attention.{name}.weight"
        weights[at] = weights[at].unflatten(0, (-1, c.head_dim))[groups[layer]].flatten(0, 1)
    model = frozen(seed=5).double()
    model.load_state_dict(weights)
    for layer, head in product(model.layers, range(4)):
        disguise(layer.attention, head, 10 + head)
    stats = statistics(model, tokens)
    maps = choose(model, stats, head_counts(source))
    assert maps == (c.k_groups, c.v_groups), "the planted groups are not found"
    for layer, (kind, groups) in product(range(2), zip("kv", maps)):
        alike = similarity(Costs(model.layers[layer].attention, kind, stats[layer]))
        same = np.equal.outer(groups[layer], groups[layer])
        assert np.allclose(alike[same], 1, atol=1e-9) and np.allclose(alike, alike.T)
        assert (alike[~same] >= -1e-9).all() and (alike[~same] < 0.99).all()
        both = slot_costs(model, stats, (layer, "kv"))(np.arange(4)[None]).item()
        assert both == pytest.approx(2), "K's and V's cost are no shares of one group's"
    assert_close(merge(model, maps, stats)(tokens), source(tokens), 1e-7)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("how", MERGES)
def test_singletons_change_nothing_bit_for_bit(shape, how):
    model = frozen(**SHAPES[shape])
    c = model.config
    for tokens in (TOKENS, TOKENS.repeat(2, 1)[:9, :2]):  # then short rows, more than one slice has
        result = refit(merge(model, (c.k_groups, c.v_groups), statistics(model, tokens), how), model, tokens)
        assert all(torch.equal(result.state_dict()[name], x) for name, x in model.state_dict().items())


@pytest.mark.parametrize("how", MERGES)
def test_equal_heads_merge_to_themselves_and_the_original_does_not_change(how):
    model, maps = frozen().double(), [[0, 0, 1, 2]] * 2
    for layer, name in product(model.layers, ("wq", "wk", "wv")):
        weight = layer.attention.get_parameter(f"{name}.weight")
        weight[8:16] = weight[:8]
    before, stats = copy.deepcopy(model), statistics(model, TOKENS)
    assert_close(merge(model, (maps, maps), stats, how)(TOKENS), before(TOKENS), 1e-7, how)
    refit(merge(model, (ONE, ONE), stats, how), model, TOKENS)
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), before.parameters()))


def test_statistics_are_direct_sums_over_the_text(monkeypatch):
    """In float64, over heads, tokens and pairs; attention, with RoPE scaled, is that of transformers."""
    monkeypatch.setattr(refitting, "QUERIES", 20)  # of rows of 48: at every second place
    model = frozen(n_kv_head=2, rope_scaling=SCALING).double()
    tokens = TOKENS[:3]
    found, ((x, q),) = statistics(model, tokens)[1], traffic(model, tokens, "layers.1.attention.wq")
    assert_close(found.inputs, sum(torch.outer(row, row) for row in x.flatten(0, 1)) / tokens.numel(), 1e-12)
    energy = q.unflatten(-1, (4, -1, 2)).square().sum(-1).mean((0, 1))  # rotation leaves it
    assert_close(found.energy, energy, 1e-7, "energy")  # but for its float32 angles
    weights, total = to_hugging_face(model.float()).double()(tokens, output_attentions=True).attentions[1], 0
    for row, head, t in product(range(3), range(4), range(1, 48, 2)):
        m = weights[row, head, t] @ x[row]
        total = total + torch.outer(m, m)
    assert_close(found.mixed, total / (3 * 4 * 24), 1e-5, "mixed")  # its angles are float32
    gated = frozen(gated=True).double()
    found, ((_, gates),) = statistics(gated, tokens)[1], traffic(gated, tokens, "layers.1.attention.gate")
    assert_close(found.gates, gates.sigmoid().square().mean((0, 1)), 1e-12, "gates")


def truncated(rows: torch.Tensor, rank: int) -> tuple[torch.Tensor, float]:
    """The best approximation of this rank, and the squares that it loses (Eckart-Young)."""
    U, S, Vh = torch.linalg.svd(rows, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank], S[rank:].square().sum().item()


@pytest.mark.parametrize("shape", [*SHAPES, "narrow"])
def test_shared_heads_are_the_best_of_their_rank_and_cost_what_that_loses(shape):
    model = frozen(seed=3, **{**SHAPES, "narrow": {"dim": 8, "head_dim": 16}}[shape]).double()
    attention, stats = model.layers[1].attention, statistics(model, TOKENS)[1]
    D, C = attention.head_dim, stats.inputs.to(torch.complex128)
    V, W = attention.wv.weight.unflatten(0, (-1, D)), attention.wo.weight.unflatten(1, (4, D)).transpose(0, 1)
    gates = stats.gates.sqrt()[:, None, None]
    P, Q, sizes = pairs_of(attention.wk.weight, D), pairs_of(attention.wq.weight, D), stats.energy.sqrt()
    root, key_root = (torch.linalg.cholesky(x + 1e-14 * torch.eye(len(x))) for x in (stats.mixed, C))
    for kind, groups in (("k", attention.k_groups), ("v", attention.v_groups)):
        cost, n = Costs(attention, kind, stats), groups.n_group
        for members in (m for size in range(2, n + 1) for m in combinations(range(n), size)):
            parts = [list(members), *([head] for head in range(n) if head not in members)]
            read = [head for head, source in enumerate(groups.of_list) if source in members]
            of = [groups.of_list[head] for head in read]
            if kind == "v":
                wv, wo = gqa.merge_values(attention, parts, stats)
                best = [truncated(((gates * W)[read] @ V[of] @ root).flatten(0, 1), D)]
                outputs = gates * wo.unflatten(1, (4, D)).transpose(0, 1)
                ours = [(outputs[read] @ wv[:D] @ root).flatten(0, 1)]
            else:
                wq, wk = gqa.merge_keys(attention, parts, stats)
                c = ((pairs_of(wq, D) * Q.conj()).sum(-1) / Q.abs().square().sum(-1)).conj()  # q' = conj(c) q
                shared, w = pairs_of(wk, D)[0], sizes[read][..., None]
                rows, merged = w * P[of] @ key_root, (w * c[read][..., None] * shared) @ key_root
                best = [truncated(rows[:, f], 1) for f in range(D // 2)]
                ours = list(merged.unbind(1))
            for one, (approximation, _) in zip(ours, best):
                assert_close(one, approximation, 1e-6, f"{kind} {members}")
            lost = sum(squares for _, squares in best)
            assert math.isclose(cost(np.array([members])).item(), lost, rel_tol=1e-7, abs_tol=1e-9)
        many = np.repeat(np.arange(n)[None], 6000, axis=0)  # so many are computed in parts, by threads
        assert np.allclose(cost(many), lost, rtol=1e-7, atol=1e-9)


def test_novel_values_share_the_weighted_mean():
    model = frozen(novel=True).double()
    attention, stats = model.layers[0].attention, statistics(model, TOKENS)
    result = merge(model, ([[0, 1, 2, 3]] * 2, [[0, 0, 1, 2]] * 2), stats).layers[0].attention
    V, W = attention.wv.weight.view(4, 8, 32)[:2], attention.wo.weight.view(32, 4, 8)[:, :2]
    weight = W.square().sum((0, 2))[:, None, None]
    shared = (weight * V).sum(0) / weight.sum()
    assert_close(result.wv.weight[:8], shared, 1e-12)
    assert torch.equal(result.wo.weight, attention.wo.weight)
    error = (weight * ((V - shared) @ stats[0].mixed) * (V - shared)).sum().item()
    assert math.isclose(Costs(attention, "v", stats[0])(np.array([[0, 1]])).item(), error, rel_tol=1e-9)


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("joint", [False, True])
def test_every_choice_has_the_groups_that_it_was_asked_for(grouping, joint):
    model = frozen().double()
    stats, heads = statistics(model, TOKENS), head_counts(model, joint)
    for g in range(1, 5):
        counts = {**dict.fromkeys(heads, g), (0, "kv" if joint else "k"): 3}
        k, v = choose(model, stats, counts, grouping)
        found = head_counts(merge(model, (k, v), stats))
        assert found == {(layer, kind): counts[layer, "kv" if joint else kind] for layer, kind in found}
        assert choose(model, stats, counts, grouping) == (k, v) and (not joint or k == v)
        if grouping == "neighbour":
            assert all(of_head == sorted(of_head) for of_head in k + v)


@torch.no_grad()
def test_refitted_outputs_are_ridge_regressions_on_the_streams_of_whole_models(monkeypatch):
    """RoPE scaled: each wo by least squares, from what passes through the two models; so is what
    refit_attention gets."""
    model = frozen(seed=2, n_layer=3, rope_scaling=SCALING).double()
    maps, calls = [[0, 0, 1, 1], [0, 1, 2, 3], [0, 0, 0, 1]], []  # the second layer gets nothing but a new wo
    small = merge(model, (maps, maps), statistics(model, TOKENS))
    expected = copy.deepcopy(small)
    monkeypatch.setattr(refitting, "refit_attention", lambda *given: calls.append(given))
    refit(small, model, TOKENS, 1)
    for layer in range(3):
        names = f"layers.{layer}", f"layers.{layer}.attention.wo"
        (x, _), (_, change) = traffic(model, TOKENS, *names)
        (ours, _), (z, _) = traffic(expected, TOKENS, *names)
        block, wo = model.layers[layer], expected.layers[layer].attention.wo
        goal, weight = x + change - ours, 1 / (x + change).norm(dim=-1, keepdim=True)
        if layer != 1:
            _, b, rope, looks, _, target, size, _ = calls.pop(0)
            theirs = refitting.observed_weights(block.attention, block.attention_norm(x), rope)
            right = theirs[0], block.attention_norm(ours), goal, weight
            for given, exact in zip((looks[0], b, target, size[..., None]), right):
                assert_close(given, exact, 1e-9)
        z, goal = (weight * z).flatten(0, 1), (weight * goal).flatten(0, 1)
        damping = 2 * z.square().sum(1).mean().sqrt() * torch.eye(z.shape[1], dtype=z.dtype)
        stacked = torch.cat((z, damping)), torch.cat((goal, damping @ wo.weight.T))
        wo.weight.copy_(torch.linalg.lstsq(*stacked).solution.T)
        assert_close(small.layers[layer].attention.wo.weight, wo.weight, 1e-9, f"layer {layer}")
    assert not calls


def arguments_of_refit(x: torch.Tensor, ours, theirs, rope) -> tuple:
    """What refit_attention gets of a single layer, whose inputs, token parts and goal are the original's."""
    e = x.roll(1, 0)  # of some other text
    return ours, x, rope, refitting.observed_weights(theirs, x, rope), e, theirs(x, *rope)


def of_first_layer(model: Llama, tokens: torch.Tensor) -> tuple:
    """Its attention, the inputs on these tokens, and the angles."""
    rope = rope_angles(model.config, torch.arange(tokens.shape[1]))
    return model.layers[0].attention, model.layers[0].attention_norm(model.tok_embeddings(tokens)), rope


@pytest.mark.parametrize(
    "queries, sizes, rows, tokens",
    [(48, {}, 6, 0), (16, {"v": 10}, 4, 0), (16, {"k": 12, "v": 6}, 6, 0), (16, {"k": 8, "v": 4}, 4, 1)],
)
def test_refitted_attention_has_the_least_errors(monkeypatch, queries, sizes, rows, tokens):
    """Of observed queries in as many rows as memory allows: KL divergence of attention weights, and errors
    divided by the stream's size; a change of all of wq, wk or wv costs as much as an error at 2 C tokens. The
    gradient of that sum, written by hand, becomes zero."""
    monkeypatch.setattr(refitting, "QUERIES", queries)
    monkeypatch.setattr(refitting, "MOST_WEIGHTS", rows * 4 * queries * 48)
    model = frozen(seed=2, gated=True, attention="naive").double()
    stats = statistics(model, TOKENS, token_maps(model, TOKENS) if tokens else None)
    small = merge(model, ([[0, 1, 1, 2]] * 2, [[0, 0, 0, 1]] * 2), stats)
    if sizes:
        sizes = {(0, kind): n for kind, n in sizes.items()}
        small = to_latents(model, stats, all_directions(model, stats), sizes)
    (theirs, x, rope), ours = of_first_layer(model, TOKENS), small.layers[0].attention
    target, weight = theirs(x, *rope), torch.rand(TOKENS.shape).double()
    seen = (slice(rows), slice(48 // queries - 1, None, 48 // queries))
    given, count = arguments_of_refit(x, ours, theirs, rope), weight[seen].numel()
    e, both = given[4], ours.beside(x[:rows], given[4][:rows])
    inputs = {"wq.weight": x[:rows], "wk.weight": both, "wv.weight": both}
    before = {name: ours.get_parameter(name).clone() for name in inputs}

    def looks(one, wq: torch.Tensor, wk: torch.Tensor) -> torch.Tensor:
        k = one.beside(x[:rows], e[:rows]) @ wk.T
        q, k = one.queries(x[:rows] @ wq.T, *rope), one.keys(k, *rope, e[:rows])
        return scores(q, k, one.k_groups).softmax(-1)[:, :, seen[1]]

    def total(parts: dict) -> torch.Tensor:
        y = functional_call(ours, parts, (x, *rope, e))
        squares = (weight[..., None] * (y - target))[seen].square().sum()
        p = looks(theirs, theirs.wq.weight, theirs.wk.weight)
        q = looks(ours, parts["wq.weight"], parts["wk.weight"])
        kl = (p * ((p + 1e-30).log() - (q + 1e-30).log())).sum(-1).mean()
        changed = {n: (inputs[n] @ (w - before[n]).T).square().sum() for n, w in parts.items()}
        changes = sum(lost / (inputs[n] @ before[n].T).square().sum() for n, lost in changed.items())
        return squares / (weight[..., None] * target)[seen].square().sum() + kl + 2 * 32 / count * changes

    monkeypatch.setattr(torch.optim, "LBFGS", partial(torch.optim.LBFGS, tolerance_change=0))
    refit_attention(*given, weight, 400)
    after = {name: ours.get_parameter(name) for name in inputs}
    slopes = [nn.utils.get_total_norm([*grad(total)(parts).values()]) for parts in (before, after)]
    assert total(after) < 0.9 * total(before) and slopes[1] < 1e-3 * slopes[0], slopes


@torch.no_grad()
@pytest.mark.parametrize("kinds", ["k", "v", "kv"])
def test_a_few_steps_refit_latents_whose_numbers_have_very_different_sizes(kinds):
    """From 30 times smaller to 30 times larger, their coefficients to match: 20 steps come as far as if all
    were alike."""
    model, losses = frozen(seed=2).double(), []
    stats = statistics(model, TOKENS)
    theirs, x, rope = of_first_layer(model, TOKENS)
    found, weight = all_directions(model, stats), torch.ones(TOKENS.shape).double()
    for most in (1.5, 0):
        small = to_latents(model, stats, found, {(0, kind): 10 for kind in kinds})
        ours = small.layers[0].attention
        linear, mix, width = (ours.wk, ours.k_mix, 2) if kinds == "k" else (ours.wv, ours.v_mix, 1)
        factors = torch.logspace(-most, most, 10 // width).double()[:, None]
        linear.weight *= factors.repeat_interleave(width, 0)
        mix[:, : len(factors)] /= factors
        refit_attention(*arguments_of_refit(x, ours, theirs, rope), weight, 20)
        losses.append((ours(x, *rope) - theirs(x, *rope)).square().mean().item())
    assert losses[0] < 1.02 * losses[1], losses


@pytest.mark.parametrize("shape, zero", [
    *[({}, f"attention{name}") for name in (".wq", ".wk", ".wv", ".wo", "_norm")],
    ({"n_head": 9, "n_kv_head": 3, "dim": 36}, ""),
    ({"n_head": 16, "dim": 32}, ""), ({"dim": 8, "head_dim": 16}, ""), ({"n_layer": 1, "n_head": 1}, ""),
    ({"dim": 8, "head_dim": 2}, ""),
])  # fmt: skip
def test_all_shapes_become_multi_query_and_weights_of_zero_stay_finite(shape, zero):
    model = frozen(**shape)
    if zero:
        model.get_parameter(f"layers.0.{zero}.weight").zero_()
    for length, joint in ((2, True), (48, False)):
        tokens, heads = TOKENS[:, :length], head_counts(model, joint)
        stats = statistics(model, tokens)
        for g in {1, min(2, min(heads.values()))}:
            maps = choose(model, stats, dict.fromkeys(heads, g))
            result = merge(model, maps, stats)
            check_tensors(result.state_dict(), 2**20)  # of what could not be loaded
            if zero.endswith("wq"):  # heads that never ask still have a key
                assert (result.layers[0].attention.wk.weight.norm(dim=1) > 0.1).all()
            assert refit(result, model, tokens)(tokens).isfinite().all() and (not joint or maps[0] == maps[1])
            numbers = 2 * model.config.n_layer * g * model.config.head_dim
            assert numbers == result.config.kv_bytes_per_token(1), "K and V of one head a group"


def test_means_of_equal_neighbours_are_plain_grouped_query_attention():
    """The method of GQA's paper (arXiv 2305.13245)."""
    model = frozen()
    stats, c = statistics(model, TOKENS), vars(model.config)
    maps = choose(model, stats, dict.fromkeys(head_counts(model), 2), "neighbour")
    result = merge(model, maps, stats, "mean")
    assert result.config == ModelConfig(**{**c, "n_kv_head": 2, "k_groups": None, "v_groups": None})
    for name in ("wk", "wv"):
        ours, source = (one.get_parameter(f"layers.1.attention.{name}.weight") for one in (result, model))
        assert torch.equal(ours, source.view(2, 2, 8, 32).double().mean(1).float().flatten(0, 1))


def variant(data, out, **splits):
    """A copy of a prepared data set with other tokens in some splits."""
    shutil.copytree(data, out)
    meta = json.loads((out / "meta.json").read_text())
    for name, tokens in splits.items():
        (out / f"{name}.bin").write_bytes(np.asarray(tokens, meta["dtype"]).tobytes())
        meta["splits"][name] |= {"tokens": len(tokens), "sha256": sha256_of(out / f"{name}.bin")}
    (out / "meta.json").write_text(json.dumps(meta))
    return out


def grouped(ckpt, out, *flags):
    done = run("gqa.py", ckpt, "--out", out, "--calibration_tokens", 2048, *flags)
    return load(out), done.stdout


def test_it_calibrates_on_train_and_reports_val(tiny_run, tiny_data, tmp_path):
    weights, out = {}, tmp_path / "out.pt"
    for i, name in enumerate(("none", "train", "val", "test")):
        marked = {name: np.full(3000, 40 + i)} if i else {}
        data = variant(tiny_data, tmp_path / name, **marked)
        checkpoint, printed = grouped(tiny_run, out, "--kv_budget", 0.5, "--dataset", data, "--overwrite")
        weights[name] = torch.cat([x.flatten() for x in checkpoint["model"].values()])
        found = re.search(r"perplexity ([\d.]+) -> ([\d.]+), x ([\d.]+)", printed).groups()
        assert float(found[1]) / float(found[0]) == pytest.approx(float(found[2]), abs=1e-4)
        for path, shown in zip((tiny_run, out), found):
            done = run("eval_ppl.py", path, "--split", "val", "--dataset", data, "--json")
            assert json.loads(done.stdout)["blocks"] == pytest.approx(float(shown), abs=1e-4)
    same = [name for name in weights if torch.equal(weights[name], weights["none"])]
    assert same == ["none", "val", "test"]


def test_the_picture_shows_the_groups_of_k_then_those_of_v():
    c = ModelConfig(n_layer=2, n_head=4, dim=32, k_groups=[[0, 1, 1, 1]] * 2, v_groups=[[0, 0, 1, 2]] * 2)
    assert [line.split() for line in picture(c)][1:] == [["0-1", "ABBB", "(2)", "AABC", "(3)"]]


def test_adapters_are_merged_first_and_the_result_is_a_plain_checkpoint(tiny_run, tmp_path):
    checkpoint, lora, out = load(tiny_run), LoRAConfig(2, quantize="nf4"), tmp_path / "all.pt"
    model = adapted(build_model(checkpoint), 0.1, **vars(lora))
    save(tmp_path / "lora.pt", {**checkpoint, "model": model.state_dict(), "lora": vars(lora)})
    found, _ = grouped(tmp_path / "lora.pt", out, "--kv_budget", 1)
    x = torch.arange(5, 25)[None]
    assert not {"lora", "optimizers", "scaler"} & found.keys()
    assert_close(build_model(found)(x), model(x), 1e-5)
    assert "closed" in run("checkpoint.py", "show", out).stdout
    found["model"] = {name: x.bfloat16() for name, x in found["model"].items()}
    save(out, found)
    again, printed = grouped(out, tmp_path / "half.pt", "--kv_budget", 0.5)
    assert {x.dtype for x in again["model"].values()} == {torch.bfloat16}
    assert build_model(again).config.kv_bytes_per_token(1) == 8 * 8 and "(50.0%)" in printed
    run("sample.py", tmp_path / "half.pt", "--max_new_tokens", 8)


def test_what_cannot_be_merged_is_refused():
    model, apart = frozen(n_kv_head=2), sharp_model(k_groups=ONE, v_groups=[[0, 1, 1, 0]] * 2)
    with pytest.raises(UserError, match="split"):
        merge(model, ([[0, 1, 2, 3]] * 2, ONE), statistics(model, TOKENS))
    with pytest.raises(UserError, match="--joint"):
        head_counts(apart, joint=True)
    model.layers[0].feed_forward.w1.weight[0, 0] = math.nan
    with pytest.raises(UserError, match="nan"):
        statistics(model, TOKENS)
