"""The model against Hugging Face's Llama, PyTorch's loss and float64, and against itself without a cache."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, assert_close, sharp_model, to_hugging_face, tokens_of

from common import IGNORE, UserError, compiler_missing
from model import CrossEntropy, KVCache, Llama, ModelConfig, RMSNorm, pick_token, rope_angles, widen
from sample import compile_step

UNEVEN = {"k_groups": [[0, 1, 1, 1], [0, 1, 0, 2]], "v_groups": [[0, 0, 0, 0], [2, 1, 0, 2]]}
# the 4 pairs turn once in 6, 63, 628 and 6283 tokens: the first stays, the second is interpolated
SCALED = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALED["original_max_position_embeddings"] = 128
SHAPES = {
    "mha": {}, "gqa": {"n_kv_head": 2}, "mqa": {"n_kv_head": 1}, "uneven": UNEVEN, "novel": {"novel": True},
    "novel uneven": {"novel": True, **UNEVEN}, "gated": {"gated": True}, "scaled": {"rope_scaling": SCALED},
    "latents": {"k_latent": [[2, 1, 0, 1], []], "v_latent": [0, 6]},
    "tokens": {"k_latent": [[2, 1, 0, 1], [1] * 4], "v_latent": [6, 6], "t_latent": [4, 4]},
}  # fmt: skip
TOLERANCE = 1e-5  # ten times what sums of 64 terms in another order lose through 2 layers in float32


@pytest.mark.parametrize("attention", ["naive", "sdpa"])
@pytest.mark.parametrize("how", [
    {}, {"n_kv_head": 2}, {"n_kv_head": 1, "head_dim": 12, "rope_theta": 5e5}, {"rope_scaling": SCALED},
])  # fmt: skip
@pytest.mark.parametrize("tied", [True, False])
def test_logits_loss_and_gradients_equal_hugging_face(how, tied, attention):
    model = sharp_model(**how, tie_embeddings=tied, attention=attention)
    twin = to_hugging_face(model)
    x, y = tokens_of((3, 50)), tokens_of((3, 50), seed=1)
    assert_close(model(x), twin(x).logits, TOLERANCE, "logits")
    loss, their_loss = model(x, y) / y.numel(), F.cross_entropy(twin(x).logits.flatten(0, 1), y.flatten())
    assert_close(loss, their_loss, TOLERANCE, "loss")
    loss.backward()
    their_loss.backward()
    gradients = Llama(model.config)  # what maps weights maps gradients, too
    gradients.load_state_dict({name: p.grad for name, p in model.named_parameters(remove_duplicate=False)})
    ours = to_hugging_face(gradients).state_dict()
    for name, p in twin.named_parameters():
        assert_close(ours[name], p.grad, TOLERANCE, f"gradient of {name}")


@pytest.mark.parametrize("name", ["mha", "gqa", "scaled"])
def test_greedy_text_equals_hugging_face_generate(name):
    model, prompt = sharp_model(**SHAPES[name]), [1, 5, 9, 2]
    theirs = to_hugging_face(model).generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)
    assert model.generate([prompt], 40)[0] == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", SHAPES)
def test_greedy_text_with_the_cache_is_the_text_without_it(name):
    model = sharp_model(**SHAPES[name])
    prompts = [[1, 5, 9], [2], [7, 7, 7, 7, 3, 1]]  # padded at the left to one length
    prompts += [tokens_of((length,), seed=length).tolist() for length in (60, 40, 63)]
    cached = model.generate(prompts, 40)
    assert [len(ids) for ids in cached] == [40, 40, 40, 4, 24, 1], "each fills its own context"
    for prompt, text in zip(prompts, cached):
        assert text == model(torch.tensor([prompt + text]))[0, len(prompt) - 1 : -1].argmax(-1).tolist()
    assert cached == [model.generate([prompt], 40)[0] for prompt in prompts]
    assert len({token for row in cached for token in row}) > 10, "the text is too uniform to tell anything"
    stopped = model.generate(prompts, 40, stop=[TINY["vocab_size"], stop := cached[0][4]])
    assert stopped == [row[: row.index(stop)] if stop in row else row for row in cached]


@pytest.mark.parametrize("attention", ["naive", "sdpa", "auto"])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("padding", [None, [0, 3, 25]])
def test_a_prompt_read_in_parts_equals_the_whole(name, attention, padding):
    model, x = sharp_model(**SHAPES[name], attention=attention).double(), tokens_of((3, 50))
    padding = padding and torch.tensor(padding)
    cache, whole = KVCache(model.config, 50), model.hidden(x, padding=padding)
    parts = [model.hidden(part, cache, padding) for part in x.split([7, 1, 20, 22], dim=1)]
    seen = torch.arange(50) >= (torch.zeros(3) if padding is None else padding)[:, None]
    assert_close(torch.cat(parts, dim=1)[seen], whole[seen], 1e-12, "hidden states")


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_the_step_that_is_compiled_computes_what_the_model_does(name, rows, uncompiled):
    model, padding = sharp_model(**SHAPES[name]).double(), torch.tensor([0, 4, 7])[:rows]
    cache, token = KVCache(model.config, 40), tokens_of((rows, 1), seed=1)
    model(tokens_of((rows, 30)), cache=cache, padding=padding)
    compile_step(model)
    ours = model.compiled_step(token, cache=copy.deepcopy(cache), padding=padding)
    assert_close(ours, model(token, cache=cache, padding=padding), 1e-12, "logits")


@pytest.mark.parametrize("novel", [False, True])
@torch.no_grad()
def test_the_step_that_is_compiled_computes_in_float32_what_is_stored_in_bfloat16(novel, uncompiled):
    model, cache = sharp_model(novel=novel, **UNEVEN).bfloat16(), KVCache(ModelConfig(**TINY), 40)
    model(tokens_of((1, 30)), cache=cache)
    exact, caches = copy.deepcopy(model).double(), [copy.deepcopy(cache) for _ in range(3)]
    caches[0].keys, caches[0].values = [x.double() for x in cache.keys], [x.double() for x in cache.values]
    compile_step(model)
    steps = (exact, model, model.compiled_step)
    truth, rough, fine = (step(torch.tensor([[7]]), cache=past) for step, past in zip(steps, caches))
    assert fine.dtype == torch.float32 and caches[2].length == 31 and torch.compile.called
    assert (fine - truth).abs().max() < 0.5 * (rough - truth).abs().max() < 0.05 * truth.abs().max()


@pytest.mark.skipif(bool(compiler_missing(torch.device("cpu"))), reason="needs a C++ compiler")
def test_compiled_models_write_their_own_text_and_do_not_compile_anew():
    """Of the same shapes, but with other groups: what one has compiled would fit the other."""
    torch._dynamo.reset()
    prompts = [[3], [7, 7, 7, 3, 1], [2, 4], [5], [6, 6], [9, 8, 7]]
    # another order of sums may round a number to the next integer, and later the texts part
    for groups, bits, n in (([0, 0, 1, 1], 16, 30), ([0, 1, 1, 1], 16, 30), ([0, 1, 1, 1], 8, 9)):
        model = sharp_model(n_layer=1, k_groups=[groups], v_groups=[groups], kv_bits=bits)
        expected = [model.generate(prompts, 5), model.generate(prompts[:5], n)]
        compile_step(model)
        assert model.generate(prompts, 5) == expected[0]
        with torch.compiler.set_stance("fail_on_recompile"):  # of another batch, another length
            assert model.generate(prompts[:5], n) == expected[1]


def test_sampling_follows_the_temperature_and_top_p_leaves_the_smallest_sufficient_set():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(2000, 1)
    draw = {p: set(pick_token(logits, 1.0, p).flatten().tolist()) for p in (0, 0.4, 0.6, 0.9, 1.0)}
    assert draw == {0: {0}, 0.4: {0}, 0.6: {0, 1}, 0.9: {0, 1, 2}, 1.0: {0, 1, 2, 3}}
    logits, generator = torch.tensor([[2.0, 1.0, 0.0]]).repeat(20000, 1), torch.Generator().manual_seed(0)
    for top_p, left in ((1.0, 3), (0.7, 2)):
        share = torch.bincount(pick_token(logits, 2.0, top_p, generator).flatten(), minlength=left) / 20000
        exact = (logits[0, :left] / 2).softmax(-1)
        assert_close(share, exact, 0.021, "share")  # three standard errors, 0.0106, of 0.51
    assert set(pick_token(logits[:100], 1e-46, 1.0).flatten().tolist()) == {0}


def test_dropout_falls_on_the_embeddings_and_on_both_branches():
    model, shares = sharp_model(dropout=0.5).train(), []
    for module in [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]:
        module.register_forward_hook(lambda m, _, x: shares.append((x == 0).float().mean().item()))
    model(tokens_of((2, 30)))
    assert len(shares) == 1 + 2 * TINY["n_layer"] and all(0.4 < share < 0.6 for share in shares)


@pytest.mark.parametrize("name, parameters", [("novel", 8 * 8 + 8), ("gated", 4 * 32)])
def test_extra_layers_computed_by_hand(name, parameters):
    """silu(W y + b) of each head's output y; y times a sigmoid of the layer's input."""
    plain, other = sharp_model(n_layer=1).double(), sharp_model(n_layer=1, **{name: True}).double()
    other.load_state_dict(plain.state_dict(), strict=False)
    assert other.num_params() - plain.num_params() == parameters
    attention, ours = plain.layers[0].attention, other.layers[0].attention
    x = torch.randn(2, 9, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    angles = rope_angles(plain.config, torch.arange(9))
    heads = attention.head_outputs(x, *angles).unflatten(-1, (4, 8))
    if name == "novel":
        heads = F.silu(F.linear(heads, ours.novel.weight, ours.novel.bias))
    else:
        heads = heads * F.linear(x, ours.gate.weight).sigmoid()[..., None]
    assert_close(ours(x, *angles), heads.flatten(2) @ attention.wo.weight.T, 1e-12)


@pytest.mark.parametrize("name", ["mha", "tokens"])
def test_activation_checkpointing_gives_identical_gradients(name):
    grads = []
    for on in (False, True):
        model = sharp_model(dropout=0.2, **SHAPES[name]).train()
        model.checkpoint_activations = on
        torch.manual_seed(3)
        model(tokens_of((2, 30)), tokens_of((2, 30), seed=1)).backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_angles_and_norms_are_float32_whatever_the_model_is():
    model, x = sharp_model(block_size=2048), tokens_of((1, 600))
    far = model.bfloat16()(x).float()
    assert_close(far, model.float()(x), 0.05, "bfloat16 logits at position 600")
    x = 3 * torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = F.rms_norm(x.double(), (256,), eps=1e-5)
    assert torch.equal(RMSNorm(256, 1e-5).bfloat16()(x), exact.bfloat16())  # rounded once, at the end


def test_the_start_is_a_uniform_guess_and_residual_projections_shrink_with_depth():
    torch.manual_seed(0)
    model, x = Llama(ModelConfig(vocab_size=1000, n_layer=8, dim=128)), tokens_of((8, 64), vocab_size=1000)
    loss = model(x, tokens_of((8, 64), seed=1, vocab_size=1000)).item() / x.numel()
    assert loss == pytest.approx(math.log(1000), rel=0.01)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            expected = 0.02 / 4 if name.endswith(("wo.weight", "w2.weight")) else 0.02
            assert abs(p.std().item() / expected - 1) < 0.05, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_cross_entropy_in_chunks_equals_pytorchs(dtype, monkeypatch):
    monkeypatch.setattr("model.CHUNK", 3 * 11)  # the last chunk of 20 rows has 2
    plain = (3 * torch.randn(20, 11, generator=torch.Generator().manual_seed(0))).to(dtype)
    y = tokens_of((20,), 0, 11)
    y[[0, 4, 19]] = IGNORE
    ours, theirs = plain.clone().requires_grad_(), plain.clone().requires_grad_()
    loss = CrossEntropy.apply(ours.clone(), y)
    their_loss = F.cross_entropy(widen(theirs), y, ignore_index=IGNORE, reduction="sum")
    (loss / 7).backward()
    (their_loss / 7).backward()
    two_roundings = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
    assert_close(loss, their_loss, min(two_roundings[dtype], 1e-6), "loss")
    assert_close(ours.grad, theirs.grad, two_roundings[dtype], "gradient")
    assert not ours.grad[y == IGNORE].any()
    with torch.no_grad():
        assert CrossEntropy.apply(plain, y) == loss and torch.equal(plain, theirs)  # which overwrites nothing


def test_cross_entropy_at_49152_classes_equals_float64():
    ours = 2.5 * torch.randn(256, 49152, generator=torch.Generator().manual_seed(0))
    exact, y = ours.double().requires_grad_(), tokens_of((256,), vocab_size=49152)
    loss = CrossEntropy.apply(ours.requires_grad_().clone(), y)
    their_loss = F.cross_entropy(exact, y, reduction="sum")
    loss.backward()
    their_loss.backward()
    assert abs(loss - their_loss) / 256 < 2e-6, "nats a token"
    assert_close(ours.grad, exact.grad, 1e-6, "gradient")
    small = exact.grad.abs() < 1e-5
    assert_close(ours.grad[small], exact.grad[small], 1e-5, "gradient of unlikely classes")


def test_cross_entropy_keeps_what_float16_would_lose():
    logits, y = torch.tensor([[12.0, 0.0, -4.0]]).half().requires_grad_(), torch.tensor([0])
    (CrossEntropy.apply(logits.clone(), y) * 2.0**12).backward()
    exact = logits.detach().double().softmax(-1)[0, 1:] * 2.0**12  # probabilities down to 1e-7
    assert_close(logits.grad[0, 1:], exact, 2**-10, "gradient")


@pytest.mark.parametrize("settings, prompts, word", [
    ({"dim": 36}, [[1]], "head_dim is 9"), ({"k_groups": [[0, 0, 0, 0]]}, [[1]], "n_layer"),
    ({"k_groups": [[0, 2, 2, 2]] * 2}, [[1]], "skip none"), ({"v_groups": [[0] * 3] * 2}, [[1]], "4 group"),
    ({"rope_scaling": {**SCALED, "factor": 0.0}}, [[1]], "rope_scaling"), ({}, [[1] * 64], "context 64"),
    ({}, [[1], []], "empty prompt"), ({}, [], "empty prompt"),
])  # fmt: skip
def test_impossible_shapes_and_prompts_are_refused_by_name(settings, prompts, word):
    with pytest.raises(UserError, match=word):
        sharp_model(**settings).generate(prompts, 5)
