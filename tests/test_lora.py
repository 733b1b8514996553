"""LoRA and QLoRA: peft's outputs and gradients, bitsandbytes' codes, and a base frozen to the bit."""

import gc
import json

import peft
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import adapted, assert_close, run, sharp_model, tokens_of
from foreign import checkpoint_of

import lora
from checkpoint import build_model, load, merged, save
from lora import TARGETS, LoRAConfig, LoRALinear, adapt, adapters
from model import Llama, ModelConfig
from nf4 import DYNAMIC, NF4Linear, dequantize, quantize

TOKENS = tokens_of((2, 24), seed=1)
TARGET_SETS = [TARGETS[:4], TARGETS, *((name,) for name in TARGETS)]


@pytest.mark.parametrize("targets", TARGET_SETS, ids="-".join)
@pytest.mark.parametrize("shape", [{"tie_embeddings": False}, {"k_groups": [[0, 1, 1, 1]] * 2}])
def test_outputs_and_gradients_equal_peft(targets, shape):
    ours = adapted(sharp_model(**shape), lora_r=3, lora_alpha=5.0, lora_targets=list(targets)).double()
    base = sharp_model(**shape).double()
    before = base(TOKENS)
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=3, lora_alpha=5, target_modules=list(targets)))
    layers = ([x for x in model.modules() if hasattr(x, "lora_A")] for model in (ours, theirs))
    pairs = list(zip(*layers, strict=True))
    for layer, twin in pairs:
        twin.lora_A.default.weight.data.copy_(layer.lora_A)
        twin.lora_B.default.weight.data.copy_(layer.lora_B)
    assert_close(ours(TOKENS), theirs(TOKENS), 1e-10, "logits")
    assert (ours(TOKENS) - before).abs().max() > 1e-3  # the adapter does something
    for model in (ours, theirs):
        model(TOKENS, TOKENS.roll(-1, 1)).backward()
    for layer, twin in pairs:
        assert_close(layer.lora_A.grad, twin.lora_A.default.weight.grad, 1e-10, "A")
        assert_close(layer.lora_B.grad, twin.lora_B.default.weight.grad, 1e-10, "B")
    learned = [name for name, p in ours.named_parameters() if p.grad is not None]
    assert all(name.endswith(("lora_A", "lora_B")) for name in learned) and len(learned) == 2 * len(pairs)


def test_a_new_adapter_changes_nothing_and_has_the_published_defaults():
    model = sharp_model()
    before = model(TOKENS)
    adapt(model, LoRAConfig(8))
    assert torch.equal(model(TOKENS), before)
    names = {name for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}
    assert names == {f"layers.{i}.attention.{name}" for i in range(2) for name in ("wq", "wk", "wv", "wo")}
    layer = model.layers[0].attention.wq
    assert layer.lora_A.shape == (8, 32) and layer.scale == 2.0 and not layer.lora_B.any()
    bound = 1 / 32**0.5  # kaiming-uniform with a = sqrt 5: gain 1/sqrt 3, times sqrt(3 / in)
    assert 0.97 * bound < layer.lora_A.abs().max() <= bound


def test_dropout_falls_on_the_input_of_the_adapter_alone():
    torch.manual_seed(0)
    linear = nn.Linear(400, 5, bias=False)
    layer = LoRALinear(linear, r=2, alpha=2.0, dropout=0.25)
    layer.lora_A.data.fill_(1.0)
    layer.lora_B.data.fill_(1.0)
    x = torch.ones(2000, 400)
    kept = (layer(x) - linear(x))[:, 0] / 2 * 0.75  # each input kept is scaled by 4/3
    assert abs(kept.mean() - 300) < 1 and 7 < kept.std() < 10.5  # binomial: 300, sqrt(400 * 3/16) = 8.7
    assert torch.equal(layer.eval()(x), linear(x) + F.linear(F.linear(x, layer.lora_A), layer.lora_B))


@pytest.mark.parametrize("targets", TARGET_SETS, ids="-".join)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("stored", ["none", "nf4"])
def test_a_plain_model_computes_what_the_adapters_did(targets, tied, stored):
    how = {"lora_r": 3, "lora_alpha": 5.0, "lora_targets": list(targets), "quantize": stored}
    model = adapted(sharp_model(tie_embeddings=tied), **how).double()
    before = model.train().eval()(TOKENS)
    ordinary = lora.plain(model).double()  # dequantized weights are float32
    assert_close(ordinary(TOKENS), before, 1e-10)
    assert ordinary.state_dict().keys() == Llama(ordinary.config).state_dict().keys()
    assert ordinary.config.tie_embeddings == (tied and "output" not in targets)
    assert all(p.requires_grad for p in ordinary.parameters())


def test_settings_reach_whole_names_once():
    model = sharp_model()
    model.layers[0].feed_forward.w22 = nn.Linear(4, 4)  # a name that begins with a target's
    layers = adapters(adapt(model, LoRAConfig(2, 6.0, 0.3, ["w2", "w2"])))
    assert [(layer.scale, layer.dropout.p, layer.lora_A.shape[0]) for layer in layers] == [(3.0, 0.3, 2)] * 2
    with pytest.raises(AssertionError, match="already"):
        adapt(model, LoRAConfig(2))


def tuned(base, out, *flags):
    how = ["--batch_size", 4, "--eval_tokens", 512, "--lr", 0.02, "--warmup_steps", 2]
    run("train.py", "--init_from", base, "--out_dir", out, *how, *flags)
    return load(out / "ckpt.pt")


@pytest.mark.parametrize("dtype, stored", [("float32", "nf4"), ("bfloat16", "none"), ("float16", "nf4")])
def test_only_adapters_learn_and_have_optimizer_state(tiny_run, tmp_path, dtype, stored):
    how, targets = ["--quantize", stored, "--dtype", dtype], ["wq", "w2", "output"]
    what = ["--lora_r", 4, "--lora_targets", *targets, "--max_steps", 20, "--checkpoint_activations"]
    after = tuned(tiny_run, tmp_path / "run", *what, *how)
    base = adapt(build_model(load(tiny_run)), LoRAConfig(4, lora_targets=targets, quantize=stored))
    assert isinstance(base.output.linear, nn.Linear), "4 bits are for the blocks"
    frozen = {name: x for name, x in base.state_dict().items() if ".lora_" not in name}
    assert all(torch.equal(x, after["model"][name]) for name, x in frozen.items()), "not frozen to the bit"
    learned = {name: x for name, x in after["model"].items() if ".lora_" in name}
    assert len(learned) == 2 * (2 * 2 + 1) and all(x.any() for x in learned.values())
    assert frozen.keys() | learned.keys() == after["model"].keys()
    sizes = [state["exp_avg"].numel() for part in after["optimizers"] for state in part["state"].values()]
    assert sorted(sizes) == sorted(x.numel() for x in learned.values())


def test_an_adapter_is_trained_further_shown_scored_and_merged(tiny_run, tmp_path):
    first = tuned(tiny_run, tmp_path / "first", "--lora_r", 2, "--max_steps", 5, "--quantize", "nf4")
    second = tuned(tmp_path / "first/ckpt.pt", tmp_path / "second", "--max_steps", 5)
    name, path, merged = "layers.0.attention.wq.lora_B", tmp_path / "second/ckpt.pt", tmp_path / "merged.pt"
    assert second["lora"] == first["lora"] and not torch.equal(first["model"][name], second["model"][name])
    shown = run("checkpoint.py", "show", path).stdout
    assert "LoRA: 1,024 parameters" in shown and "NF4: 26,624 weights in 13,840 bytes (4.159 bits" in shown
    save(path, second | {"grouped": {"a": 1}})
    shown = run("checkpoint.py", "merge", path, "--out", merged).stdout
    assert "LoRA" not in shown and "NF4" not in shown and "grouped: a 1" in shown
    scores = (run("eval_ppl.py", x, "--max_tokens", 999, "--json").stdout for x in (path, merged))
    ours, theirs = (json.loads(score)["blocks"] for score in scores)
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_a_bfloat16_base_stays_bfloat16_beside_an_adapter_and_after_merging():
    model, settings = sharp_model().bfloat16(), LoRAConfig(3, 5.0, 0.0, list(TARGETS))
    base = model.layers[1].attention.wo.weight.clone()
    adapted(model, **vars(settings))
    weights = merged({**checkpoint_of(model), "lora": vars(settings)})["model"]
    assert {x.dtype for x in weights.values()} == {torch.bfloat16}
    layer = model.layers[1].attention.wo
    exact = base.float() + 5 / 3 * layer.lora_B @ layer.lora_A  # float32: the exact sum, rounded once
    assert torch.equal(layer.linear.weight, base)
    assert torch.equal(weights["layers.1.attention.wo.weight"], exact.bfloat16())


@pytest.mark.parametrize("shape", [(96, 200), (64, 64), (3, 5), (7, 9), (130, 127)])
def test_codes_and_round_trip_equal_bitsandbytes(shape):
    F4 = pytest.importorskip("bitsandbytes").functional
    w = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    codes, absmax, scales = quantize(w)
    theirs, state = F4.quantize_4bit(w, blocksize=64, compress_statistics=True, quant_type="nf4")
    assert torch.equal(codes, theirs.flatten())
    mean, scale = scales.view(torch.float32)[0], scales.view(torch.float32)[1:]
    assert torch.equal(mean, state.offset) and torch.equal(scale, state.state2.absmax)
    ours = dequantize(theirs.flatten(), state.absmax, scales, w.shape)  # of their codes, the same numbers
    assert torch.equal(ours, F4.dequantize_4bit(theirs, state))
    # absmax: their kernel for the CPU rounds by a table, ours takes the nearest value
    true = F.pad(w.flatten().abs(), (0, -w.numel() % 64)).view(-1, 64).amax(-1)
    of_block = scale.repeat_interleave(256)[: len(true)]
    errors = [(DYNAMIC[code.int()] * of_block + mean - true).abs() for code in (absmax, state.absmax)]
    assert (errors[0] <= errors[1]).all()
    every = (DYNAMIC[:, None] * of_block + mean - true).abs().amin(0)
    assert_close(errors[0], every, 1e-6, "not the nearest")


def test_a_weight_takes_4_127_bits_and_loses_9_5_percent():
    w = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    w[0, :64] = 0  # a block of zeros stays one
    back = dequantize(*quantize(w), w.shape)
    assert 0.08 < (back - w).norm() / w.norm() < 0.11 and not back[0, :64].any()  # published: 9.5%
    model = Llama(c := ModelConfig(n_layer=2, dim=512, n_head=8, vocab_size=64))
    lora.replace(model.layers, TARGETS, nn.Linear, NF4Linear)
    layers = [layer for layer in model.modules() if isinstance(layer, NF4Linear)]
    count = sum(layer.num_weights for layer in layers)
    size = sum(x.nbytes for layer in layers for x in layer.buffers())
    assert len(layers) == 14 and model.num_params() == Llama(c).num_params()
    assert 8 * size / count == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=0.002)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantized_layer_is_its_dequantized_weight_and_keeps_none(dtype):
    linear = nn.Linear(200, 96, bias=False)
    layer, x = NF4Linear(linear), torch.randn(4, 7, 200, requires_grad=True)
    exact, kept = nn.Parameter(layer.to_linear().weight), []
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            ours = layer(x)
        theirs = F.linear(x, exact)
    assert ours.dtype == dtype and torch.equal(ours, theirs)
    assert sum(t.nbytes for t in kept if t.is_floating_point()) == 0, "the weight was kept for the backward"
    tensors = (t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter))
    alive = [t for t in tensors if t.shape == exact.shape]
    assert all(t is exact or t is linear.weight for t in alive), "the weight is kept somewhere"
    grads = [torch.autograd.grad(y.float().square().sum(), x)[0] for y in (ours, theirs)]
    assert_close(*grads, 1e-6 if dtype == torch.float32 else 2**-8, "gradient of the input")
    assert torch.equal(layer.bfloat16().to_linear().weight, exact), "scales were rounded"
