"""LoRA and QLoRA: peft's outputs, gradients and files; merging by request alone; a base frozen to the bit."""

import gc
import json

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import TINY, assert_close, quick, refused, sharp_model, small_run, to_hugging_face

from checkpoint import build_model, load, save
from config import UserError
from lora import TARGETS, LoRAConfig, LoRALinear, adapt, adapters, apply_lora, merge, plain, quantize_blocks, unmerge
from model import Llama, ModelConfig
from nf4 import NF4, NF4Linear, dequantize, dynamic_values, quantize
from projection import Projection

TOKENS = torch.randint(64, (2, 24), generator=torch.Generator().manual_seed(1))
TARGET_SETS = [TARGETS[:4], TARGETS, *((name,) for name in TARGETS)]


def trained(model, seed=3):
    """The model with an adapter whose B is not zero, as after training."""
    generator = torch.Generator().manual_seed(seed)
    for layer in adapters(model):
        with torch.no_grad():
            layer.lora_B.copy_(0.2 * torch.randn(layer.lora_B.shape, generator=generator))
    return model


def adapted(targets=TARGETS[:4], r=3, alpha=5.0, quantized=False, **settings):
    model = sharp_model(**settings)
    if quantized:
        quantize_blocks(model)
    apply_lora(model, r, alpha, targets=targets)
    return trained(model)


@pytest.mark.parametrize("targets", TARGET_SETS, ids="-".join)
@pytest.mark.parametrize("shape", [{"n_kv_head": 2, "tie_embeddings": False}, {"k_groups": [[0, 1, 1, 1]] * 2}])
def test_outputs_and_gradients_equal_peft(targets, shape):
    """float64: sums of at most 64 terms round at 1e-16 each, and two layers amplify that little."""
    from peft import LoraConfig, get_peft_model

    ours = adapted(targets, **shape).double()
    base = sharp_model(**shape).double()
    theirs = get_peft_model(base, LoraConfig(r=3, lora_alpha=5, target_modules=list(targets), lora_dropout=0.0))
    twins = {name: layer for name, layer in theirs.named_modules() if hasattr(layer, "lora_A")}
    pairs = [
        (layer, twins["base_model.model." + name]) for name, layer in ours.named_modules() if hasattr(layer, "lora_A")
    ]
    assert len(pairs) == len(twins)
    for layer, twin in pairs:
        twin.lora_A.default.weight.data.copy_(layer.lora_A)
        twin.lora_B.default.weight.data.copy_(layer.lora_B)
    assert_close(ours(TOKENS), theirs(TOKENS), 1e-10, "logits")
    assert (ours(TOKENS) - sharp_model(**shape).double()(TOKENS)).abs().max() > 1e-3  # the adapter does something
    targets_of = TOKENS.roll(-1, 1)
    ours(TOKENS, targets_of).backward()
    theirs(TOKENS, targets_of).backward()
    for layer, twin in pairs:
        assert_close(layer.lora_A.grad, twin.lora_A.default.weight.grad, 1e-10, "A")
        assert_close(layer.lora_B.grad, twin.lora_B.default.weight.grad, 1e-10, "B")
    assert {name for name, p in ours.named_parameters() if p.grad is not None} == {
        name for name, p in ours.named_parameters() if name.endswith(("lora_A", "lora_B"))
    }


def test_a_new_adapter_changes_nothing_and_has_the_published_defaults():
    model = sharp_model()
    before = model(TOKENS)
    apply_lora(model)
    assert torch.equal(model(TOKENS), before)
    assert {name for name, layer in model.named_modules() if isinstance(layer, LoRALinear)} == {
        f"layers.{layer}.attention.{name}" for layer in range(2) for name in ("wq", "wk", "wv", "wo")
    }
    layer = model.layers[0].attention.wq
    assert layer.lora_A.shape == (8, 32) and layer.scale == 2.0 and not layer.lora_B.any()
    bound = 1 / 32**0.5  # kaiming-uniform with a = sqrt 5: gain 1/sqrt 3, times sqrt(3 / in)
    assert 0.9 * bound < layer.lora_A.abs().max() <= bound


def test_dropout_falls_on_the_input_of_the_adapter_alone():
    torch.manual_seed(0)
    linear = Projection(400, 5)
    layer = LoRALinear(linear, r=2, alpha=2.0, dropout=0.25)
    layer.lora_A.data.fill_(1.0)
    layer.lora_B.data.fill_(1.0)
    x = torch.ones(2000, 400)
    kept = (layer(x) - linear(x))[:, 0] / 2 * 0.75  # each input kept is scaled by 4/3
    assert abs(kept.mean() - 300) < 1 and 7 < kept.std() < 10.5  # binomial: 300, sqrt(400 * 3/16) = 8.7
    assert torch.equal(layer.eval()(x), linear(x) + F.linear(F.linear(x, layer.lora_A), layer.lora_B))


@pytest.mark.parametrize("targets", TARGET_SETS, ids="-".join)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("quantized", [False, True])
def test_merge_equals_adapter_forward_and_unmerge_restores_every_bit(targets, tied, quantized):
    model = adapted(targets, tie_embeddings=tied, quantized=quantized).double()
    before, state = model(TOKENS), {name: x.clone() for name, x in model.state_dict().items()}
    merge(model)
    assert_close(model(TOKENS), before, 1e-10, "merged")
    model.train()
    model.eval()
    assert_close(model(TOKENS), before, 1e-10, "merged")
    assert model.state_dict().keys() != state.keys()  # a merged model cannot be taken for one that is not
    unmerge(model)
    assert torch.equal(model(TOKENS), before)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    ordinary = plain(model).double()  # dequantized weights are float32
    assert_close(ordinary(TOKENS), before, 1e-10, "plain")
    assert ordinary.state_dict().keys() == Llama(ordinary.config).state_dict().keys()
    assert ordinary.config.tie_embeddings == (tied and "output" not in targets)


def test_nothing_merges_by_itself():
    model = adapted()
    weights = [layer.linear.weight.clone() for layer in adapters(model)]
    for use in (model.train, model.eval, model.state_dict, lambda: model(TOKENS), lambda: model.generate([[1]], 3)):
        model.eval()
        use()
        assert all(torch.equal(layer.linear.weight, weight) for layer, weight in zip(adapters(model), weights))
        assert all(layer.merged is None for layer in adapters(model))


def test_settings_reach_the_layers():
    config = LoRAConfig(2, 6.0, 0.3, ["w2", "w2"])
    layers = adapters(adapt(sharp_model(), config))
    assert [(layer.scale, layer.dropout.p, layer.lora_A.shape[0]) for layer in layers] == [(3.0, 0.3, 2)] * 2
    assert config.lora_targets == ["w2"]


def test_a_layer_with_a_bias_and_the_wrong_order_are_refused():
    with pytest.raises(AssertionError, match="bias"):
        LoRALinear(nn.Linear(4, 4))
    with pytest.raises(AssertionError, match="first"):
        quantize_blocks(adapted())


def test_a_target_matches_a_whole_name_once():
    model = sharp_model()
    model.layers[0].feed_forward.w11 = nn.Linear(4, 4)  # a name that begins with a target's
    apply_lora(model, targets=("w1",))
    assert len(adapters(model)) == 2 and isinstance(model.layers[0].feed_forward.w11, nn.Linear)
    assert not any(isinstance(layer.linear, LoRALinear) for layer in adapters(model))
    with pytest.raises(AssertionError, match="already"):
        apply_lora(model)


# ---- training ----


def tuned(base, out, *flags):
    done = quick("train.py", "--init_from", base, "--out_dir", out, "--batch_size", 4, "--eval_tokens", 512, *flags)
    assert done.returncode == 0, done.stderr
    return load(out / "ckpt.pt"), done.stdout


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", ["none", "nf4"])
def test_the_base_is_frozen_to_the_bit_and_only_adapters_have_optimizer_state(tiny_run, tmp_path, dtype, stored):
    flags = [
        "--lora_r",
        4,
        "--lora_targets",
        "wq",
        "w2",
        "output",
        "--max_steps",
        50,
        "--lr",
        0.02,
        "--warmup_steps",
        5,
    ]
    after, printed = tuned(
        tiny_run, tmp_path / "run", *flags, "--checkpoint_activations", "--dtype", dtype, "--quantize", stored
    )
    base = adapt(build_model(load(tiny_run)), LoRAConfig(4, lora_targets=["wq", "w2", "output"], quantize=stored))
    wanted = {name: x for name, x in base.state_dict().items() if ".lora_" not in name}
    assert all(torch.equal(x, after["model"][name]) for name, x in wanted.items())
    learned = {name: x for name, x in after["model"].items() if ".lora_" in name}
    assert len(learned) == 2 * (2 * 2 + 1) and all(x.any() for x in learned.values())
    assert wanted.keys() | learned.keys() == after["model"].keys()
    sizes = sorted(state["exp_avg"].numel() for part in after["optimizers"] for state in part["state"].values())
    assert sizes == sorted(x.numel() for x in learned.values())
    count, c = sum(x.numel() for x in learned.values()), ModelConfig(**after["config"])
    assert f"trainable: {count:,} of {Llama(c).num_params() + count:,} parameters" in printed


@pytest.mark.parametrize("stored", ["none", "nf4"])
def test_a_stopped_adapter_run_resumes_exactly(tiny_run, tmp_path, stored):
    flags = ["--lora_r", 2, "--lora_dropout", 0.2, "--quantize", stored, "--eval_every", 5, "--lr", 0.01]
    whole, _ = tuned(tiny_run, tmp_path / "whole", *flags, "--max_steps", 10)
    partial, _ = tuned(tiny_run, tmp_path / "run", *flags, "--max_steps", 10, "--eval_every", 10)
    assert all(torch.equal(x, partial["model"][name]) for name, x in whole["model"].items())
    tuned(tiny_run, tmp_path / "parts", *flags, "--max_steps", 5, "--min_lr", 0.01)
    tuned(tiny_run, tmp_path / "once", *flags, "--max_steps", 10, "--min_lr", 0.01)
    resumed = quick("train.py", "--resume", "--out_dir", tmp_path / "parts", "--max_steps", 10)
    assert resumed.returncode == 0, resumed.stderr
    ends = [load(tmp_path / name / "ckpt.pt")["model"] for name in ("once", "parts")]
    assert all(torch.equal(x, ends[1][name]) for name, x in ends[0].items())
    refused(quick("train.py", "--resume", "--out_dir", tmp_path / "parts", "--lora_r", 8), "--lora_r 8", "has 2")
    refused(
        quick("train.py", "--resume", "--out_dir", tmp_path / "parts", "--lora_alpha", 8), "--lora_alpha 8", "has 16"
    )
    again = quick("train.py", "--resume", "--out_dir", tmp_path / "parts", "--quantize", stored, "--max_steps", 10)
    assert again.returncode == 0, again.stderr


def test_activation_checkpointing_gives_identical_gradients_of_adapters():
    grads = []
    for checkpointed in (False, True):
        model = adapted(TARGETS, quantized=True).train()
        model.checkpoint_activations = checkpointed
        model(TOKENS, TOKENS.roll(-1, 1)).backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert torch.equal(*grads)


def test_an_adapter_is_trained_further_and_then_merged(tiny_run, tmp_path):
    first, _ = tuned(tiny_run, tmp_path / "first", "--lora_r", 2, "--max_steps", 5, "--warmup_steps", 1)
    second, printed = tuned(tmp_path / "first/ckpt.pt", tmp_path / "second", "--max_steps", 5, "--warmup_steps", 1)
    assert second["lora"] == first["lora"] and "LoRA of rank 2 on wq wk wv wo" in printed
    name = "layers.0.attention.wq.lora_B"
    assert not torch.equal(first["model"][name], second["model"][name])
    done = quick("lora.py", "merge", tmp_path / "second/ckpt.pt", "--out", tmp_path / "merged.pt")
    assert done.returncode == 0 and "LoRA: none" in done.stdout
    whole = build_model(load(tmp_path / "merged.pt"))
    tokens = torch.arange(20)[None]
    assert_close(whole(tokens), build_model(second)(tokens), 1e-5, "merged in float32")
    refused(quick("train.py", "--init_from", tmp_path / "first/ckpt.pt", "--lora_r", 8), "--lora_r 8", "has 2")


def test_evaluation_sampling_and_merging_work_on_a_quantized_base(tiny_run, tmp_path):
    flags = ["--lora_r", 2, "--quantize", "nf4", "--max_steps", 20, "--lr", 0.01, "--warmup_steps", 2]
    after, _ = tuned(tiny_run, tmp_path / "run", *flags)
    path = tmp_path / "run/ckpt.pt"
    assert after["model"]["layers.0.feed_forward.w1.codes"].dtype == torch.uint8
    assert not [name for name in after["model"] if name.endswith("w1.weight")]
    shown = quick("checkpoint.py", "show", path).stdout
    assert "LoRA: 1,024 parameters on wq wk wv wo, r 2, alpha 16, dropout 0, not merged" in shown
    assert "NF4: the 26,624 weights" in shown and "4.1" in shown
    assert quick("sample.py", path, "--max_new_tokens", 5).returncode == 0
    ppl = [json.loads(quick("eval_ppl.py", file, "--max_tokens", 2000, "--json").stdout)["blocks"] for file in (path,)]
    done = quick("lora.py", "merge", path)
    assert done.returncode == 0, done.stderr
    merged = json.loads(quick("eval_ppl.py", path.with_name("ckpt-merged.pt"), "--max_tokens", 2000, "--json").stdout)
    assert merged["blocks"] == pytest.approx(ppl[0], rel=1e-5)
    refused(quick("checkpoint.py", "export", path, tmp_path / "hf"), "has an adapter", "lora.py merge")


# ---- NF4 ----


def weight(shape=(96, 200), seed=0, scale=0.02):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_nf4_values_are_quantiles_of_a_normal_distribution():
    """Section 3 of QLoRA: 2^k values, half of them each side of an exact zero, the outermost at an offset of
    1 - (1/32 + 1/30) / 2."""
    offset, normal = 1 - (1 / 32 + 1 / 30) / 2, torch.distributions.Normal(0.0, 1.0)
    positive = normal.icdf(torch.linspace(offset, 0.5, 9).double())[:-1]
    negative = -normal.icdf(torch.linspace(offset, 0.5, 8).double())[:-1]
    values = torch.cat((negative, torch.zeros(1), positive)).sort().values
    assert_close(NF4.double(), values / values.max(), 1e-6)
    assert dynamic_values().unique().numel() == 256


@pytest.mark.parametrize("shape", [(96, 200), (64, 64), (3, 5), (7, 9), (130, 127)])
@pytest.mark.parametrize("scale", [0.02, 1.0, 30.0])
def test_codes_and_round_trip_equal_bitsandbytes(shape, scale):
    F4 = pytest.importorskip("bitsandbytes").functional
    w = weight(shape, scale=scale)
    codes, absmax, scales = quantize(w)
    theirs, state = F4.quantize_4bit(w, blocksize=64, compress_statistics=True, quant_type="nf4")
    assert torch.equal(codes, theirs.flatten())
    mean, scale = scales.view(torch.float32)[0], scales.view(torch.float32)[1:]
    assert torch.equal(mean, state.offset) and torch.equal(scale, state.state2.absmax)
    ours = dequantize(theirs.flatten(), state.absmax, scales, w.shape)  # of their codes, the same numbers
    assert torch.equal(ours, F4.dequantize_4bit(theirs, state))
    # the codes of absmax: their kernel for the CPU rounds by a table, ours takes the nearest value
    true, values = w.flatten().abs(), dynamic_values()
    true = F.pad(true, (0, -len(true) % 64)).view(-1, 64).amax(-1)
    of_block = scale.repeat_interleave(256)[: len(true)]
    errors = [(values[code.int()] * of_block + mean - true).abs() for code in (absmax, state.absmax)]
    assert ((absmax.int() - state.absmax.int()).abs()[of_block > 0] <= 1).all() and (errors[0] <= errors[1]).all()
    every = (values[:, None] * of_block + mean - true).abs().amin(0)
    assert_close(errors[0], every, 1e-6, "not the nearest")


def test_the_round_trip_is_as_close_as_16_values_allow():
    w = weight((512, 512))
    stored = quantize(w)
    back = dequantize(*stored, w.shape)
    absmax = w.flatten().view(-1, 64).abs().amax(-1, keepdim=True)
    gap = NF4.diff().max() / 2
    # half the widest gap, of an absmax that is off by half a step of 1% of the largest difference from the mean
    assert ((back - w).flatten().view(-1, 64).abs() <= 1.03 * gap * absmax + 0.03 * absmax).all()
    error = ((back - w).square().mean() / w.square().mean()).sqrt()
    assert 0.08 < error < 0.11, error  # 4-bit NormalFloat of normal numbers in blocks of 64 loses 9.5%
    assert torch.equal(quantize(back)[0], stored[0])
    counts = torch.bincount(torch.cat((stored[0] >> 4, stored[0] & 15)).int(), minlength=16) / w.numel()
    assert counts.max() < 0.1, counts  # no code is used much more often than the others


def test_zeros_stay_zeros():
    w = torch.zeros(64, 64)
    w[0, 0] = 1.0
    assert torch.equal(dequantize(*quantize(torch.zeros(64, 64)), w.shape), torch.zeros(64, 64))
    assert not dequantize(*quantize(w), w.shape)[0, 1:].any()


def test_a_weight_takes_4_127_bits_in_memory_and_in_the_file(tmp_path):
    c = ModelConfig(n_layer=2, dim=512, n_head=8, vocab_size=64)
    model = Llama(c)
    quantize_blocks(model)
    layers = [layer for layer in model.modules() if isinstance(layer, NF4Linear)]
    count, size = sum(layer.num_weights for layer in layers), sum(layer.nbytes for layer in layers)
    assert len(layers) == 14 and model.num_params() == Llama(c).num_params()
    assert 8 * size / count == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=0.002)
    others = sum(p.nbytes for p in model.parameters())
    assert others == 4 * (64 * 512 + 5 * 512)
    apply_lora(model, r=1)
    adapter = sum(p.nbytes for p in model.parameters()) - others
    save(tmp_path / "x.pt", {"model": model.state_dict()})
    overhead = 1024 * len(model.state_dict())  # names, and each tensor begins at a multiple of 64 bytes
    assert size + others + adapter < (tmp_path / "x.pt").stat().st_size < size + others + adapter + overhead


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantized_layer_is_its_dequantized_weight_and_keeps_none(dtype):
    linear = Projection(200, 96)
    layer, x = NF4Linear.from_linear(linear), torch.randn(4, 7, 200, requires_grad=True)
    exact = torch.nn.Parameter(layer.dequantize())
    kept = []
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            ours = layer(x)
        theirs = F.linear(x, exact)
    assert ours.dtype == dtype and torch.equal(ours, theirs)
    assert sum(t.nbytes for t in kept if t.is_floating_point()) == 0, "the weight was kept for the backward"
    alive = [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter) and t.shape == exact.shape]
    assert all(t is exact or t is linear.weight for t in alive), "the weight is kept somewhere"
    grads = [torch.autograd.grad(y.float().square().sum(), x)[0] for y in (ours, theirs)]
    assert_close(*grads, 1e-6 if dtype == torch.float32 else 2**-8, "gradient of the input")


def test_scales_survive_a_change_of_number_format():
    layer = NF4Linear.from_linear(Projection(128, 64))
    before = layer.dequantize()
    assert torch.equal(layer.bfloat16().dequantize(), before)


# ---- files ----


def saved(llama, path, **more):
    lora = LoRAConfig(3, 5.0, 0.0, list(TARGETS))
    plain_parts = {"model": llama.state_dict(), "config": vars(llama.config), "tokenizer": None}
    save(path, {**plain_parts, "lora": vars(lora), **more})
    return path


@pytest.mark.parametrize("kv", [4, 2])
def test_adapters_cross_to_peft_and_back_through_files(tmp_path, kv):
    from peft import PeftModel

    ours = adapted(TARGETS, n_kv_head=kv, tie_embeddings=False)
    base = sharp_model(n_kv_head=kv, tie_embeddings=False)
    done = quick("lora.py", "export", saved(ours, tmp_path / "ours.pt"), tmp_path / "adapter")
    assert done.returncode == 0 and "r 3 on wq wk wv wo w1 w2 w3 output" in done.stdout, done.stderr
    theirs = PeftModel.from_pretrained(to_hugging_face(base), tmp_path / "adapter")
    with torch.no_grad():
        # float32, and another order of the products: 24 tokens through two layers
        assert_close(ours(TOKENS), theirs(TOKENS).logits, 1e-5, "exported")
    with torch.no_grad():  # their training
        for name, p in theirs.named_parameters():
            if "lora_" in name:
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    theirs.save_pretrained(tmp_path / "theirs")
    save(tmp_path / "base.pt", {"model": base.state_dict(), "config": vars(base.config), "tokenizer": None})
    done = quick("lora.py", "import", tmp_path / "theirs", tmp_path / "base.pt", "--out", tmp_path / "back.pt")
    assert done.returncode == 0, done.stderr
    back = build_model(load(tmp_path / "back.pt"))
    with torch.no_grad():
        assert_close(back(TOKENS), theirs(TOKENS).logits, 1e-5, "imported")
        assert (back(TOKENS) - ours(TOKENS)).abs().max() > 1e-2
    quick("lora.py", "export", tmp_path / "back.pt", tmp_path / "again")
    from safetensors.torch import load_file

    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "again")]
    files[0].pop("base_model.model.lm_head.base_layer.weight")  # a copy of the base's
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(x, files[1][name]) for name, x in files[0].items())


def test_rank_stabilized_adapters_keep_their_scale(tmp_path):
    from peft import LoraConfig, get_peft_model

    base = sharp_model(n_kv_head=2)
    settings = {"r": 4, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"], "use_rslora": True}
    theirs = get_peft_model(to_hugging_face(base), LoraConfig(**settings, init_lora_weights=False)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    save(tmp_path / "base.pt", {"model": base.state_dict(), "config": vars(base.config), "tokenizer": None})
    done = quick("lora.py", "import", tmp_path / "theirs", tmp_path / "base.pt")
    assert done.returncode == 0 and "on wq w2, r 4, alpha 6" in done.stdout, done.stderr
    with torch.no_grad():
        assert_close(build_model(load(tmp_path / "base-theirs.pt"))(TOKENS), theirs(TOKENS).logits, 1e-5)


def test_a_bfloat16_base_stays_bfloat16_beside_an_adapter_and_after_merging(tmp_path):
    base = sharp_model().bfloat16()
    save(tmp_path / "base.pt", {"model": base.state_dict(), "config": vars(base.config), "tokenizer": None})
    quick("lora.py", "export", saved(adapted(TARGETS), tmp_path / "ours.pt"), tmp_path / "adapter.pt")
    done = quick("lora.py", "import", tmp_path / "adapter.pt", tmp_path / "base.pt", "--out", tmp_path / "both.pt")
    assert done.returncode == 0, done.stderr
    both = load(tmp_path / "both.pt")
    assert torch.equal(both["model"]["layers.1.attention.wo.linear.weight"], base.layers[1].attention.wo.weight)
    assert quick("lora.py", "merge", tmp_path / "both.pt", "--out", tmp_path / "merged.pt").returncode == 0
    merged = load(tmp_path / "merged.pt")
    assert {x.dtype for x in merged["model"].values()} == {torch.bfloat16}
    wide = plain(build_model(both)).state_dict()  # float32: the exact sum, rounded once
    assert all(torch.equal(x, wide[name].bfloat16()) for name, x in merged["model"].items())


def test_an_adapter_alone_is_a_file_that_fits_its_base(tmp_path):
    ours, base = adapted(TARGETS), sharp_model()
    done = quick("lora.py", "export", saved(ours, tmp_path / "ours.pt"), tmp_path / "adapter.pt")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "adapter.pt").stat().st_size < 4 * sum(
        p.numel() for p in ours.parameters() if p.requires_grad
    ) + 20000
    save(tmp_path / "base.pt", {"model": base.state_dict(), "config": vars(base.config), "tokenizer": None})
    done = quick("lora.py", "import", tmp_path / "adapter.pt", tmp_path / "base.pt", "--out", tmp_path / "back.pt")
    assert done.returncode == 0, done.stderr
    assert torch.equal(build_model(load(tmp_path / "back.pt"))(TOKENS), ours(TOKENS))
    again = ["lora.py", "import", tmp_path / "adapter.pt", tmp_path / "back.pt", "--out", tmp_path / "twice.pt"]
    refused(quick(*again), "adapter already", "merge")
    damaged = base.state_dict() | {"norm.weight": torch.ones(3)}
    save(tmp_path / "base.pt", {"model": damaged, "config": vars(base.config), "tokenizer": None})
    refused(quick("lora.py", "import", tmp_path / "adapter.pt", tmp_path / "base.pt", *again[4:]), "norm")
    assert not (tmp_path / "twice.pt").exists()


def test_an_adapter_of_a_quantized_base_comes_back_on_one(tmp_path):
    ours, base = adapted(TARGETS, quantized=True), sharp_model()
    lora = vars(LoRAConfig(3, 5.0, 0.0, list(TARGETS), "nf4"))
    done = quick("lora.py", "export", saved(ours, tmp_path / "ours.pt", lora=lora), tmp_path / "adapter.pt")
    assert "note: it was trained on a base in nf4" in done.stdout
    save(tmp_path / "base.pt", {"model": base.state_dict(), "config": vars(base.config), "tokenizer": None})
    done = quick("lora.py", "import", tmp_path / "adapter.pt", tmp_path / "base.pt", "--out", tmp_path / "back.pt")
    assert done.returncode == 0 and "NF4: the " in done.stdout, done.stderr
    assert torch.equal(build_model(load(tmp_path / "back.pt"))(TOKENS), ours(TOKENS))


def test_a_copy_of_another_output_matrix_is_noticed(tmp_path):
    from safetensors.torch import load_file, save_file

    quick("lora.py", "export", saved(adapted(TARGETS), tmp_path / "ours.pt"), tmp_path / "folder")
    path, base = tmp_path / "folder/adapter_model.safetensors", sharp_model()
    save(tmp_path / "base.pt", {"model": base.state_dict(), "config": vars(base.config), "tokenizer": None})
    for copy, code in ((base.output.weight.detach().clone(), 0), (torch.zeros(64, 32), 2)):
        save_file({**load_file(path), "base_model.model.lm_head.base_layer.weight": copy}, path)
        flags = ["--out", tmp_path / "out.pt", "--overwrite"]
        done = quick("lora.py", "import", tmp_path / "folder", tmp_path / "base.pt", *flags)
        assert done.returncode == code and ("copy of lm_head" in done.stderr) == bool(code)


# ---- bad input ----


def test_mistakes_about_adapters_get_one_line(tiny_run, tiny_data, tmp_path):
    run = ["train.py", "--init_from", tiny_run, "--out_dir", tmp_path / "run"]
    refused(
        quick(*run, "--lora_r", 2, "--lora_targets", "wq", "w9"), "--lora_targets w9", "wq wk wv wo w1 w2 w3 output"
    )
    refused(quick(*run, "--lora_r", -1), "lora_r -1")
    refused(quick(*run, "--lora_r", 2, "--lora_alpha", "nan"), "lora_alpha nan")
    refused(quick(*run, "--quantize", "nf4"), "--lora_r 8")
    refused(quick(*run, "--lora_alpha", 3), "--lora_alpha", "--lora_r 8")
    refused(quick(*run, "--lora_r", 10**18), "lora_r")
    refused(quick("lora.py", "merge", tiny_run, "--out", tmp_path / "new/m.pt"), "has no adapter")
    assert not (tmp_path / "new").exists()
    refused(quick("train.py", *small_run(tiny_data, tmp_path / "run"), "--lora_r", 2), "--init_from")
    refused(quick("lora.py", "merge", tiny_run, "--out", tmp_path / "m.pt"), "has no adapter")
    refused(quick("lora.py", "export", tiny_run, tmp_path / "m.pt"), "has no adapter", "--lora_r")
    refused(quick("lora.py", "export", tiny_run), "lora.py export CKPT")
    save(tmp_path / "adapter.pt", {"lora": {}, "adapter": {}})
    refused(quick("sample.py", tmp_path / "adapter.pt"), "is an adapter alone", "lora.py import")
    refused(quick("lora.py", "import", tmp_path / "none", tiny_run), "no such adapter")
    refused(quick("lora.py", "import", tiny_run, tiny_run, "--out", tmp_path / "m.pt"), "is no adapter")
    assert not (tmp_path / "run").exists() and not (tmp_path / "m.pt").exists()


def test_a_checkpoint_with_bytes_for_weights_or_absurd_settings_is_refused(tmp_path):
    for name, x in (("norm.weight", torch.ones(32).byte()), ("layers.0.attention.wq.lora_A", torch.ones(3))):
        path = saved(adapted(TARGETS), tmp_path / "x.pt", model={**adapted(TARGETS).state_dict(), name: x})
        refused(quick("checkpoint.py", "show", path), name)
    right, wrong = vars(LoRAConfig(3, lora_targets=list(TARGETS))), [8]
    for change in ({"lora_r": 10**30}, {"lora_r": "8"}, {"lora_targets": ["norm"]}, {"quantize": "int3"}, {"x": 1}):
        path = saved(adapted(TARGETS), tmp_path / "x.pt", lora={**right, **change})
        refused(quick("checkpoint.py", "show", path), next(iter(change)))
    refused(quick("checkpoint.py", "show", saved(adapted(TARGETS), tmp_path / "x.pt", lora=wrong)), "no checkpoint")


def test_an_adapter_of_another_model_is_refused(tmp_path):
    path = saved(adapted(TARGETS), tmp_path / "ours.pt")
    for what in ("adapter.pt", "folder"):
        assert quick("lora.py", "export", path, tmp_path / what).returncode == 0
        for other in ({"dim": 48}, {"n_layer": 3}, {"n_kv_head": 2}):
            base = Llama(ModelConfig(**{**TINY, **other}))
            save(tmp_path / "base.pt", {"model": base.state_dict(), "config": vars(base.config), "tokenizer": None})
            done = quick("lora.py", "import", tmp_path / what, tmp_path / "base.pt", "--out", tmp_path / "out.pt")
            refused(done, "an adapter of another model", "layers.")
            assert not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize("change, words", [
    ({"use_dora": True}, "use_dora"), ({"peft_type": "IA3"}, "IA3"), ({"bias": "all"}, "bias all"),
    ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"), ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"use_qalora": True}, "use_qalora"), ({"alora_invocation_tokens": [1]}, "alora"), ({"r": 5}, "another model"),
    ({"kasa_config": {"a": 1}}, "kasa"), ({"r": "four", "use_rslora": True}, "lora_r"), ({"r": None}, "lora_r"),
    ({"r": 2**62}, "lora_r"), ({"lora_alpha": -1}, "lora_alpha"),
])  # fmt: skip
def test_an_adapter_that_is_no_plain_lora_is_refused(tmp_path, change, words):
    quick("lora.py", "export", saved(adapted(TARGETS), tmp_path / "ours.pt"), tmp_path / "folder")
    path, base = tmp_path / "folder/adapter_config.json", sharp_model()
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    save(tmp_path / "base.pt", {"model": base.state_dict(), "config": vars(base.config), "tokenizer": None})
    done = quick("lora.py", "import", tmp_path / "folder", tmp_path / "base.pt", "--out", tmp_path / "out.pt")
    refused(done, words)
    assert not (tmp_path / "out.pt").exists()


def test_uneven_groups_and_the_novel_layer_have_no_peft_format(tmp_path):
    for settings, words in (({"k_groups": [[0, 1, 1, 1]] * 2}, "uneven"), ({"novel": True}, "novel")):
        path = saved(adapted(TARGETS, **settings), tmp_path / "ours.pt")
        refused(quick("lora.py", "export", path, tmp_path / "folder"), words, ".pt")
        assert not (tmp_path / "folder").exists()
        assert quick("lora.py", "export", path, tmp_path / "adapter.pt", "--overwrite").returncode == 0


# ---- slices ----


def outputs_and_gradients(model, x):
    loss = model(x[:, :-1], x[:, 1:])
    return model(x), *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("kind", ["full", "lora", "merged", "qlora"])
def test_slices_change_rounding_alone(kind, monkeypatch):
    shape = {"k_groups": [[0, 1, 1, 1]] * 2, "v_groups": [[0, 0, 0, 0]] * 2}
    found, products, plain_linear = {}, {}, F.linear
    for slices in (1, 2, 4):
        how = {**shape, "pretraining_tp": slices}
        model = sharp_model(**how) if kind == "full" else adapted(TARGETS, quantized=kind == "qlora", **how)
        model.double()
        if kind == "merged":
            merge(model)
        calls = []
        with monkeypatch.context() as patch:
            patch.setattr(F, "linear", lambda *of, calls=calls: calls.append(of) or plain_linear(*of))
            model(TOKENS)
        products[slices] = len(calls)
        found[slices] = [model(TOKENS)] if kind == "merged" else outputs_and_gradients(model, TOKENS)
    matrices = (2 * 7 + 1) * (1 if kind in ("full", "merged") else 2)  # an adapter slices one of its two as well
    assert [products[n] - products[1] for n in (2, 4)] == [matrices, 3 * matrices], "not all slices are multiplied"
    for slices in (2, 4):
        for ours, theirs in zip(found[slices], found[1], strict=True):
            assert_close(ours, theirs, 1e-12, f"{slices} slices")


def test_slices_that_do_not_divide_are_refused(tiny_data, tmp_path):
    run = small_run(tiny_data, tmp_path / "run")
    refused(
        quick("train.py", *run, "--pretraining_tp", 3), "pretraining_tp 3", "width of 4 heads, 32", "--pretraining_tp 1"
    )
    refused(quick("train.py", *run, "--pretraining_tp", 32), "pretraining_tp 32", "vocab_size, 400")
    refused(quick("train.py", *run, "--pretraining_tp", 0), "pretraining_tp 0")
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="width of 3 heads, 30"):
        ModelConfig(n_head=4, head_dim=10, k_groups=[[0, 1, 2, 2]], n_layer=1, vocab_size=64, pretraining_tp=4)
