"""Latent keys and values: exact at full rank, never worse than groups, and used like any other model."""

import copy
import gc
import weakref
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close, run
from foreign import checkpoint_of, export_of, logits
from test_gqa import SHAPES, TOKENS, frozen, traffic
from transformers import LlamaForCausalLM

import gqa
from checkpoint import build_model, check_tensors, load
from gqa import all_directions, beside_keys, latent, latent_losses, latent_sizes, latent_units, to_latents
from lora import LoRAConfig, adapt, plain
from model import KVCache, hartley, pack, unpack
from partition import Costs, exact_partitions, weighted_rows
from refit import RIDGE, divergence, refit, sensitivity, statistics, token_maps
from sample import compile_step
from study.plot import attention_weights


def observed(model, beside=False, tokens=TOKENS):
    """Statistics; with `beside`, of what the token does not tell."""
    return statistics(model, tokens, token_maps(model, tokens) if beside else None)


def half(model, beside=False, tokens=TOKENS):
    stats = observed(model, beside, tokens)
    found = all_directions(model, stats)
    sizes = latent_sizes(model, stats, found, latent_losses(model, stats, found, tokens), 0.5)
    return to_latents(model, stats, found, sizes)


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, "novel"])
def test_full_rank_changes_nothing(shape, beside):
    """So every grouping is a latent of the same size. By budget, what keeps all numbers stays as heads.
    Beside tokens the cache holds these, too, and fewer numbers of keys cost what was predicted."""
    model = frozen(**SHAPES.get(shape, {"novel": True})).double()
    stats, (unit, whole) = observed(model, beside), latent_units(model.config)
    found, sizes = all_directions(model, stats), {slot: unit * n for slot, n in whole.items()}
    small = to_latents(model, stats, found, sizes)
    assert small.config.kv_bytes_per_token(1) == model.config.kv_bytes_per_token(1) + 4 * beside
    assert_close(small(TOKENS), model(TOKENS), 1e-7 if beside else 1e-9)
    assert_close(*(attention_weights(m, TOKENS[0].tolist()) for m in (small, model)), 1e-7)
    attention = small.layers[0].attention
    lengths = attention.k_mix.square().sum(-1) @ F.one_hot(attention.pairs).double()  # (H, D/2)
    assert_close(lengths, torch.ones_like(lengths), 1e-9)
    losses = latent_losses(model, stats, found, TOKENS)
    assert latent_sizes(model, stats, found, losses, 1.0) == {}
    if shape == "novel":  # which keeps other coefficients, and whose losses are of first order
        return
    products = attention.v_mix.mT @ attention.v_mix
    assert_close(products, torch.eye(attention.head_dim).double().expand_as(products), 1e-9)
    for layer, of_keys in enumerate(losses[::2] if beside else ()):
        few = {(layer, "k"): unit, (layer, "v"): sizes[layer, "v"]}
        attention = to_latents(model, stats, found, few).layers[layer].attention
        right = divergence(attention, sensitivity(model, TOKENS)[layer])
        assert of_keys[0] == pytest.approx(right, rel=1e-4)


def test_what_tokens_tell_is_what_regression_on_their_embeddings_tells():
    """Of each layer's attention inputs, behind the first layer without the first token's, by numpy's least
    squares, ridge as rows."""
    model = frozen(seed=3).double()
    seen = [x for x, _ in traffic(model, TOKENS, "layers.0.attention", "layers.1.attention")]
    normed = F.normalize(model.tok_embeddings(TOKENS), dim=-1) * model.config.dim**0.5
    for layer, (x, told, left) in enumerate(zip(seen, token_maps(model, TOKENS), observed(model, True))):
        first = min(layer, 1)
        e, rest = normed[:, first:].flatten(0, 1), x[:, :first].flatten(0, 1)
        ridge = (RIDGE * e.square().sum(0).mean()).sqrt() * torch.eye(e.shape[1]).double()
        goal = torch.cat((x[:, first:].flatten(0, 1), 0 * ridge))
        rows = [part.detach().numpy() for part in (torch.cat((e, ridge)), goal)]
        right = torch.from_numpy(np.linalg.lstsq(*rows, rcond=None)[0])
        assert_close(told, right.T, 1e-3)  # norms differ by norm_eps
        rest = torch.cat((rest, x[:, first:].flatten(0, 1) - e @ right))
        tolerance = 1e-3 if layer else 0.005  # hardly anything is left of embeddings
        assert_close(left.inputs, rest.T @ rest / len(rest), tolerance)


@pytest.mark.parametrize("kind", ["k", "v"])
def test_at_equal_numbers_no_partition_loses_less(kind):
    model = frozen(n_head=6, dim=48).double()
    stats = statistics(model, TOKENS)
    found = all_directions(model, stats)
    for i, of_layer in enumerate(stats):
        cost, D = Costs(model.layers[i].attention, kind, of_layer), model.config.head_dim
        energies = torch.linalg.eigvalsh(cost.gram).flatten().sort().values
        for groups, (lost, _) in exact_partitions(6, cost, range(1, 7)).items():
            kept = groups * D // (2 if kind == "k" else 1)
            assert energies[: len(energies) - kept].sum() <= lost * (1 + 1e-9) + 1e-12
            ranks, rows, _ = latent(found[i, kind], groups * D)
            assert len(rows) == sum(ranks) == kept
            dropped = sum(of[: len(of) - r].sum() for of, r in zip(torch.linalg.eigvalsh(cost.gram), ranks))
            assert dropped.item() == pytest.approx(energies[: len(energies) - kept].sum().item(), abs=1e-12)


def test_sensitivities_are_freed():
    found = sensitivity(frozen(), TOKENS)
    x = weakref.ref(found[1][0][0][0])
    del found
    gc.collect()
    assert x() is None, "a hook holds them"


@pytest.mark.parametrize("shape", SHAPES)
def test_the_predicted_losses_of_all_sizes_are_divergences_of_models_of_these_sizes(shape):
    model = frozen(**SHAPES[shape]).double()
    stats, gradients = statistics(model, TOKENS), sensitivity(model, TOKENS)
    found, (unit, whole) = all_directions(model, stats), latent_units(model.config)
    for (slot, n), losses in zip(whole.items(), latent_losses(model, stats, found, TOKENS)):
        layers = [to_latents(model, stats, found, {slot: unit * i}).layers[slot[0]] for i in range(1, n + 1)]
        right = [divergence(layer.attention, gradients[slot[0]]) for layer in layers]
        assert losses.tolist() == pytest.approx(right, rel=1e-9, abs=1e-20)


@pytest.mark.parametrize("beside", [False, True])
def test_refitting_brings_latents_closer(beside):
    model = frozen()
    small = half(model, beside)
    found = [(model(TOKENS) - small(TOKENS)).square().mean().item()]
    for steps in (0, 20):
        fitted = refit(copy.deepcopy(small), model, TOKENS, steps)
        found.append((model(TOKENS) - fitted(TOKENS)).square().mean().item())
    assert found[0] > found[1] > found[2], found


@pytest.mark.parametrize("novel", [False, True])
@pytest.mark.parametrize("name", [".wq", ".wk", ".wv", ".wo", "_norm"])
def test_weights_of_zero_stay_finite(name, novel):
    model = frozen(novel=novel)
    model.get_parameter(f"layers.0.attention{name}.weight").data.zero_()
    small = half(model)
    check_tensors(small.state_dict(), 2**20)
    assert refit(small, model, TOKENS)(TOKENS).isfinite().all()


@pytest.mark.parametrize("beside", [False, True])
def test_a_text_of_few_different_tokens_is_enough(beside):
    """They span few dimensions of the first layer's inputs; rounding leaves some of the others below 0."""
    model, tokens = frozen(), TOKENS % 5
    error = (half(model, beside, tokens)(tokens) - model(tokens)).square().mean()
    assert error < 0.01 * model(tokens).var()


@pytest.mark.parametrize("shape", SHAPES)
def test_values_beside_a_latent_key_miss_what_none_of_their_size_could_keep(shape):
    """Without a key, too: the energy that regression on the key, then principal components leave. The key has
    noise (in 64 more inputs), which `beside_keys` leaves out. Its numbers are as large as the fourth root of
    the energy they restore."""
    model = frozen(**SHAPES[shape]).double()
    stats, unit = statistics(model, TOKENS), latent_units(model.config)[0]
    found, old, C = all_directions(model, stats), model.layers[0].attention, stats[0].mixed
    order, k, _ = found[0, "k"]
    keys, root = torch.view_as_real(k.flatten(0, 1)[order]).mT.flatten(0, 1), torch.linalg.cholesky(C)
    _, (weighted,), _ = weighted_rows(old, "v", stats[0])
    alone = torch.linalg.eigvalsh(weighted @ C @ weighted.T).cumsum(0).flip(0)[unit::unit]
    lost = beside_keys(keys, weighted, C, unit, np.array([*alone, 0.0]))

    def least(told, size):
        rest = F.pad(weighted @ root, (0, told.shape[1] - len(root)))
        rest = torch.linalg.svdvals(rest - rest @ torch.linalg.pinv(told) @ told)
        return rest[size:].square().sum().item()

    for k_units, v_units in [(0, 2), (1, 1), (2, 3), (4, 1)]:
        told, size = keys[: k_units * unit] @ root, v_units * unit
        right = pytest.approx(least(told, size), rel=1e-5, abs=1e-6 * alone[0].item())
        assert not k_units or lost[k_units - 1, v_units - 1] == right
        sizes = {(0, kind): n * unit for kind, n in (("k", k_units), ("v", v_units)) if n}
        new = to_latents(model, stats, found, sizes).layers[0].attention
        like = new.wk.weight if k_units else old.wv.weight  # else AdamW's steps do not fit both
        assert new.wv.weight.square().mean().item() == pytest.approx(like.square().mean().item())
        noise = (gqa.NOISE * told.square().sum(1).mean()).sqrt() * torch.eye(len(told)).double()
        both = torch.cat((new.wv.weight, new.wk.weight[: len(told)])) @ root
        both = torch.cat((both, F.pad(noise, (0, 0, size, 0))), 1)
        before = old.wv.weight.unflatten(0, (-1, old.head_dim))[old.v_groups.of_head] @ root
        before = F.pad(before, (0, len(told)))
        wo = [one.wo.weight.unflatten(1, (-1, one.head_dim)).transpose(0, 1) for one in (new, old)]
        errors = (wo[0] @ new.v_mix.mT @ both - wo[1] @ before) * stats[0].gates.sqrt()[:, None, None]
        right = least(torch.cat((told, noise), 1), size)
        assert errors.square().sum().item() == pytest.approx(right, rel=1e-9)
    squares = (k @ stats[0].inputs.to(k.dtype) * k.conj()).real.sum(2)  # (pairs, numbers)
    ratios = squares / torch.linalg.eigvalsh(Costs(old, "k", stats[0]).gram).sqrt()
    assert ratios.max() / ratios.min() < 1 + 1e-6


def test_sizes_spend_the_budget_where_the_sum_of_losses_is_least(monkeypatch):
    model, rng = frozen().double(), np.random.default_rng(0)
    stats, (unit, whole) = statistics(model, TOKENS), latent_units(model.config)
    tables = [rng.random((whole[i, "k"], whole[i, "v"])) for i in range(2)]
    losses = [rng.random(n) for n in whole.values()]
    of_values = {id(alone): table for alone, table in zip(losses[1::2], tables)}
    monkeypatch.setattr("gqa.beside_keys", lambda *given: of_values[id(given[-1])])
    found = latent_sizes(model, stats, all_directions(model, stats), losses, 0.4)
    ways = [np.array(way) for way in product(*(range(n) for n in whole.values()))]
    fitting = [way for way in ways if sum(way + 1) == int(0.4 * sum(whole.values()))]
    first, second = (of_keys[:, None] + table for of_keys, table in zip(losses[::2], tables))
    best = min(fitting, key=lambda way: first[tuple(way[:2])] + second[tuple(way[2:])])
    assert found == {slot: unit * n for slot, n in zip(whole, best + 1)}


@pytest.mark.parametrize("beside", [False, True])
def test_latents_learn_but_for_their_coefficients(beside):
    small = half(frozen(kv_bits=8), beside)  # rounding lets gradients through
    model = build_model(checkpoint_of(small)).train()
    adapted = adapt(copy.deepcopy(model), LoRAConfig(2))
    for part, names in ((model, {"w1", "wq", "wk", "wv", "wo"}), (adapted, {"lora_A", "lora_B"})):
        part(TOKENS[:, :-1], TOKENS[:, 1:]).backward()
        learned = {x for n, p in part.named_parameters() if p.grad is not None for x in n.split(".")}
        assert names <= learned and not learned & {"k_mix", "v_mix"}
    assert model.layers[0].attention.wk.weight.grad.any()
    fixed = {name[-6:] for name, p in plain(adapted).named_parameters() if not p.requires_grad}
    assert fixed == {".k_mix", ".v_mix"}


def test_the_command_halves_the_cache_and_all_else_reads_it(tiny_run, tmp_path):
    flags = ["--latent", "--kv_budget", 0.5, "--calibration_tokens", 1024, "--eval_tokens", 512]
    for how, tokens in (("none", False), ("output", False), ("all", True), ("all", False)):
        out = tmp_path / f"{how}{tokens}.pt"
        how = "--refit", how, *["--cache_tokens"] * tokens
        printed = run("gqa.py", tiny_run, "--out", out, *flags, *how).stdout
        assert f"({50 + 0.8 * tokens:.1f}%)" in printed and "| 512 tokens of" in printed
    assert build_model(load(out)).config.kv_bytes_per_token(1) == 64
    healed = ["--init_from", out, "--teacher", tiny_run, "--max_steps", 2, "--eval_tokens", 0]
    run("train.py", *healed, "--out_dir", tmp_path, "--kv_bits", 8)
    commands = ["sample.py", "eval_ppl.py", "checkpoint.py show"]
    shown = [run(*command.split(), tmp_path / "ckpt.pt").stdout for command in commands]
    assert "72 bytes a token (14% of" in shown[2]  # 64 integers and 4 scales for 128 numbers of 4 bytes


def test_an_exported_model_computes_the_same_in_transformers(tmp_path):
    model = half(frozen(tie_embeddings=False, n_kv_head=2))
    assert "cache" in export_of(model, tmp_path)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    assert_close(logits(theirs, 60), logits(model, 60), 1e-4)


@pytest.mark.parametrize("bits", [8, 4])
def test_the_cache_rounds_as_torch_does(bits):
    x, most = torch.randn(2, 3, 5, 12, generator=torch.Generator().manual_seed(0)), 2 ** (bits - 1)
    x[0, 0, 0] = 0
    packed = pack(x, bits)
    scales = packed[..., -2:].contiguous().view(torch.bfloat16).float()
    furthest = x.gather(-1, x.abs().argmax(-1, keepdim=True))  # becomes the lowest integer, whatever its sign
    assert_close(-most * scales, furthest, 0.005)
    for row, scale, ours in zip(*(part.flatten(0, 2) for part in (x, scales, unpack(packed, bits)))):
        row, ours, scale = (x * scale.sign() for x in (row, ours, scale))
        theirs = torch.fake_quantize_per_tensor_affine(row, scale.item() or 1.0, 0, -most, most - 1)
        assert_close(ours, theirs, 1e-6)
    odd = x[:1, :1, 1:3, : 7 - (bits == 4)]  # of which a lone token's scale stands at an odd byte
    assert torch.equal(unpack(pack(odd[:, :, :1], bits), bits), unpack(pack(odd, bits), bits)[:, :, :1])


def test_outliers_of_keys_are_spread_before_rounding(monkeypatch):
    """Of keys one RoPE pair is 8 times as large, of queries 8 times as small: without rounding the same."""
    errors, weights = [], frozen().state_dict()
    for name in [name for name in weights if name.endswith(("wq.weight", "wk.weight"))]:
        weights[name].unflatten(0, (4, -1))[:, :2] *= 8 if "wk" in name else 1 / 8
    for turn in (hartley, torch.eye):
        monkeypatch.setattr("model.hartley", turn)
        model = frozen(kv_bits=4)
        model.load_state_dict(weights)
        errors.append((model(TOKENS) - frozen()(TOKENS)).norm())
    assert errors[0] < 0.7 * errors[1]


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("beside", [None, False, True])  # None: heads
def test_a_cache_has_the_size_that_was_told_and_one_of_integers_changes_little(bits, beside, uncompiled):
    model = frozen(**SHAPES["uneven"], kv_bits=bits)
    model = model if beside is None else half(model, beside)
    plain, cache = build_model(checkpoint_of(model), kv_bits=16), KVCache(model.config, 48)
    steps = [model(part, cache=cache) for part in TOKENS.split([30, 10, *[1] * 8], dim=1)]
    held = sum(x[0, :, 0].nbytes for x in cache.keys + cache.values)
    held += cache.tokens[0, 0].nbytes if beside else 0
    assert model.config.kv_bytes_per_token(4) == held
    assert_close(torch.cat(steps[2:], 1), model(TOKENS)[:, 40:], 1e-4)
    change = (model(TOKENS) - plain(TOKENS)).norm() / plain(TOKENS).norm()
    assert {16: -1, 8: 0, 4: 0.02}[bits] < change < {16: 1e-9, 8: 0.02, 4: 0.3}[bits]
    compile_step(model.bfloat16())  # whose keys are float32
    model(TOKENS[:1, :30], cache=(cache := KVCache(model.config, 31)))
    assert model.compiled_step(TOKENS[:1, 30:31], cache=cache).isfinite().all()
