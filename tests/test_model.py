"""The model against Hugging Face's Llama, against itself without a cache, and against what its formulas promise."""

import copy
import math

import pytest
import torch
from conftest import TINY, assert_close, sharp_model, to_hugging_face

import attention as attention_file
import cross_entropy as cross_entropy_file
from config import UserError
from cross_entropy import IGNORE, cross_entropy, widen
from device import compiler_missing
from model import HeadGroups, KVCache, Llama, ModelConfig, RMSNorm, pick_token, rope_angles

UNEVEN = {"k_groups": [[0, 1, 1, 1], [0, 1, 0, 2]], "v_groups": [[0, 0, 0, 0], [2, 1, 0, 2]]}
SHAPES = {
    "mha": {},
    "gqa": {"n_kv_head": 2},
    "mqa": {"n_kv_head": 1},
    "uneven": UNEVEN,
    "novel": {"novel": True},
    "novel uneven": {"novel": True, **UNEVEN},
    "gated": {"gated": True},
}
# Both implementations round every product to float32, eps = 6e-8, in another order. Sums of up to 64 terms through 2
# layers leave a relative error of some 10 eps; 1e-5 of the largest value is an order above it, and far below a fault.
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(attention_file, "BLOCK", 16)  # the texts here have 60 tokens at most


def tokens_of(shape, seed=0, vocab_size=TINY["vocab_size"]):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("attention", ["naive", "blocks", "sdpa"])
@pytest.mark.parametrize("settings", [{}, {"n_kv_head": 2}, {"n_kv_head": 1, "head_dim": 12, "rope_theta": 5e5}])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_loss_and_gradients_equal_hugging_face(settings, tied, attention):
    model = sharp_model(**settings, tie_embeddings=tied, attention=attention)
    twin = to_hugging_face(model)
    x, y = tokens_of((3, 50)), tokens_of((3, 50), seed=1)
    assert_close(model(x), twin(x).logits, TOLERANCE, "logits")
    loss = model(x, y) / y.numel()
    their_loss = torch.nn.functional.cross_entropy(twin(x).logits.flatten(0, 1), y.flatten())
    assert_close(loss, their_loss, TOLERANCE, "loss")
    loss.backward()
    their_loss.backward()
    ours = to_hugging_face(with_gradients_as_weights(model)).state_dict()
    for name, p in twin.named_parameters():
        assert_close(ours[name], p.grad, TOLERANCE, f"gradient of {name}")


def with_gradients_as_weights(model: Llama) -> Llama:
    """A copy that holds the gradients where the weights were: what maps weights maps gradients too."""
    copy = Llama(model.config)
    copy.load_state_dict({name: p.grad for name, p in model.named_parameters(remove_duplicate=False)})
    return copy


@pytest.mark.parametrize("attention", ["naive", "blocks", "sdpa"])
def test_uneven_groups_equal_heads_with_repeated_weights(attention):
    grouped = sharp_model(**UNEVEN, attention=attention).double()
    full = Llama(ModelConfig(**TINY)).double().eval()
    state = grouped.state_dict()
    for i in range(TINY["n_layer"]):
        for name, groups in (("wk", UNEVEN["k_groups"][i]), ("wv", UNEVEN["v_groups"][i])):
            heads = state[f"layers.{i}.attention.{name}.weight"].unflatten(0, (-1, 8))
            state[f"layers.{i}.attention.{name}.weight"] = heads[torch.tensor(groups)].flatten(0, 1)
    full.load_state_dict(state)
    x = tokens_of((2, 40))
    assert_close(grouped(x), full(x), 1e-12, "logits")


def test_singleton_groups_equal_multi_head_attention():
    plain, mapped = sharp_model(), sharp_model(k_groups=[[0, 1, 2, 3]] * 2, v_groups=[[0, 1, 2, 3]] * 2)
    x = tokens_of((2, 30))
    assert torch.equal(plain(x), mapped(x))


def test_head_groups_gather_and_scatter_are_inverse():
    groups, x = HeadGroups([0, 1, 1, 2, 1, 0]), torch.randn(2, 6, 5, 3)
    assert groups.gather(x).shape == (2, 3, 3 * 5, 3)
    assert torch.equal(groups.scatter(groups.gather(x)), x)


@pytest.mark.parametrize("name", SHAPES)
def test_greedy_text_with_the_cache_is_the_text_without_it(name):
    model = sharp_model(**SHAPES[name])
    prompts = [[1, 5, 9], [2], [7, 7, 7, 7, 3, 1]]  # padded at the left to one length
    cached = model.generate(prompts, 40)
    assert cached == model.generate(prompts, 40, use_cache=False)
    assert cached == [model.generate([prompt], 40)[0] for prompt in prompts]
    assert len({token for row in cached for token in row}) > 10, "the text is too uniform to tell anything"


def test_the_last_queries_in_blocks_see_all_keys_before_them():
    groups = [HeadGroups(UNEVEN[name][1]) for name in ("k_groups", "v_groups")]
    q, k, v = (torch.randn(2, heads, length, 8).double() for heads, length in ((4, 30), (3, 50), (3, 50)))
    how = (q, k, v, *groups, None)
    assert_close(attention_file.blocks(*how), attention_file.naive(*how), 1e-12, "outputs")


@pytest.mark.parametrize("name", ["mha", "gqa", "novel uneven"])
def test_greedy_text_by_the_compiled_step_is_the_text_without_it(name):
    torch._dynamo.reset()
    model = sharp_model(**SHAPES[name])
    alone, together = [[1, 5, 9]], [[3], [7, 7, 7, 3, 1], [2, 4], [5], [6, 6], [9, 8, 7]]  # the second is padded
    expected = [model.generate(prompts, 30) for prompts in (alone, together, together[:5])]
    model.compiled_step = torch.compile(model.forward, dynamic=True, backend="aot_eager", fullgraph=True)
    assert [model.generate(prompts, 30) for prompts in (alone, together)] == expected[:2]
    with torch.compiler.set_stance("fail_on_recompile"):  # another batch and cache
        assert model.generate(together[:5], 30) == expected[2]


@pytest.mark.skipif(compiler_missing() is not None, reason="needs a C++ compiler and Python's headers")
@pytest.mark.parametrize("attention, novel", [("auto", False), ("naive", True), ("triton", False)])
def test_the_compiled_step_computes_in_float32_what_is_stored_in_bfloat16(attention, novel, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(attention_file, "triton_runs", lambda *where: False)
    one = {"n_layer": 1, "attention": attention, "novel": novel}
    model = sharp_model(**one, **{name: groups[:1] for name, groups in UNEVEN.items()}).bfloat16()
    exact, token = copy.deepcopy(model).double(), torch.tensor([[7]])
    model.compile_step()
    with torch.no_grad():
        cache = KVCache(model.config, 40)
        model(tokens_of((1, 30)), cache=cache)
        widened, again = copy.deepcopy(cache), copy.deepcopy(cache)
        widened.keys, widened.values = ([x.double() for x in stores] for stores in (cache.keys, cache.values))
        truth, rough, fine = (
            exact(token, cache=widened),
            model(token, cache=again),
            model.compiled_step(token, cache=cache),
        )
    assert fine.dtype == torch.float32 and cache.length == 31
    assert (fine - truth).abs().max() < 0.5 * (rough - truth).abs().max() < 0.05 * truth.abs().max()


@pytest.mark.skipif(compiler_missing() is not None, reason="needs a C++ compiler and Python's headers")
def test_two_compiled_models_write_each_its_own_text():
    """Of the same shapes, but with other groups: what one has compiled would fit the other, and be wrong."""
    torch._dynamo.reset()
    for groups in ([0, 0, 1, 1], [0, 1, 1, 1]):
        model = sharp_model(n_layer=1, k_groups=[groups], v_groups=[groups])
        expected = model.generate([[1, 5, 9]], 30)
        model.compile_step()
        assert model.generate([[1, 5, 9]], 30) == expected


@pytest.mark.parametrize("name", ["mha", "gqa", "mqa"])
def test_greedy_text_equals_hugging_face_generate(name):
    model = sharp_model(**SHAPES[name])
    prompt = [1, 5, 9, 2]
    theirs = to_hugging_face(model).generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)
    assert model.generate([prompt], 40)[0] == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", SHAPES)
def test_cache_bytes_are_those_of_the_groups(name):
    model = sharp_model(**SHAPES[name])
    cache = KVCache(model.config, capacity=20)
    model(tokens_of((3, 11)), cache=cache)
    groups = sum(len(set(layer)) for layer in model.config.k_groups + model.config.v_groups)
    assert cache.nbytes == 3 * 20 * groups * model.config.head_dim * 4
    assert cache.nbytes == 3 * 20 * model.config.kv_numbers_per_token * 4


def test_novel_adds_head_dim_squared_plus_head_dim_parameters_a_layer():
    for n_layer in (5, 6, 7, 8):
        sizes = [
            Llama(ModelConfig(**{**TINY, "n_layer": n_layer}, novel=novel)).num_params() for novel in (True, False)
        ]
        assert sizes[0] - sizes[1] == n_layer * (8 * 8 + 8)


def test_a_gate_is_one_number_a_head_and_of_the_layers_input():
    """By hand, in the basis of heads: wo of head h times the head's output times sigmoid of row h of the gate."""
    plain, gated = sharp_model(n_layer=1).double(), sharp_model(n_layer=1, gated=True).double()
    gated.load_state_dict(plain.state_dict(), strict=False)
    assert gated.num_params() - plain.num_params() == 4 * 32
    attention, ours = plain.layers[0].attention, gated.layers[0].attention
    x = torch.randn(2, 9, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    angles = rope_angles(torch.arange(9), 8, 10000.0)
    heads = attention.heads(x, *angles).unflatten(-1, (4, 8))
    strength = 1 / (1 + torch.exp(-(x @ ours.gate.weight.T)))
    assert_close(ours(x, *angles), (heads * strength[..., None]).flatten(2) @ attention.wo.weight.T, 1e-12)


@pytest.mark.parametrize("name", SHAPES)
def test_later_tokens_do_not_change_earlier_logits(name):
    model, x = sharp_model(**SHAPES[name]), tokens_of((1, 30))
    changed = x.clone()
    changed[0, 20:] = (x[0, 20:] + 1) % TINY["vocab_size"]
    assert torch.equal(model(x)[:, :20], model(changed)[:, :20])
    assert not torch.equal(model(x)[:, 20:], model(changed)[:, 20:])


def test_loss_sums_over_targets_and_leaves_out_ignored_ones():
    model, x, y = sharp_model().double(), tokens_of((2, 20)), tokens_of((2, 20), seed=1)
    masked = y.clone()
    masked[:, ::3] = IGNORE
    each = -model(x).log_softmax(-1).gather(-1, y[..., None])[..., 0]
    assert_close(model(x, masked), each[masked != IGNORE].sum(), 1e-12, "loss")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_cross_entropy_in_chunks_equals_pytorchs(dtype, monkeypatch):
    monkeypatch.setattr(cross_entropy_file, "CHUNK", 3 * 11)  # the last chunk of 20 rows has 2
    plain, y = (3 * torch.randn(20, 11, generator=torch.Generator().manual_seed(0))).to(dtype), tokens_of((20,), 0, 11)
    y[[0, 4, 19]] = IGNORE
    ours, theirs = plain.clone().requires_grad_(), plain.clone().requires_grad_()
    loss = cross_entropy(ours.clone(), y)
    their_loss = torch.nn.functional.cross_entropy(widen(theirs), y, ignore_index=IGNORE, reduction="sum")
    (loss / 7).backward()
    (their_loss / 7).backward()
    two_roundings = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
    tight = two_roundings[dtype]
    assert_close(loss, their_loss, min(tight, 1e-6), "loss")
    assert_close(ours.grad, theirs.grad, tight, "gradient")
    assert not ours.grad[y == IGNORE].any()
    with torch.no_grad():
        assert cross_entropy(plain, y) == loss and torch.equal(plain, theirs), "an evaluation overwrites nothing"


def test_cross_entropy_keeps_what_float16_would_lose():
    logits, y = torch.tensor([[12.0, 0.0, -4.0]]).half().requires_grad_(), torch.tensor([0])  # probabilities to 1e-7
    (cross_entropy(logits.clone(), y) * 2.0**12).backward()
    exact = logits.detach().double().softmax(-1)[0, 1:] * 2.0**12
    assert_close(logits.grad[0, 1:], exact, 2**-10, "gradient")


def test_cross_entropy_widens_a_chunk_at_a_time(monkeypatch):
    sizes = []
    monkeypatch.setattr(cross_entropy_file, "CHUNK", 4 * 64)
    monkeypatch.setattr(cross_entropy_file, "widen", lambda x: sizes.append(x.numel()) or widen(x))
    sharp_model()(tokens_of((2, 30)), tokens_of((2, 30), seed=1)).backward()
    assert sizes == [4 * 64] * 15


def test_initial_loss_is_that_of_a_uniform_guess():
    torch.manual_seed(0)
    model, x = Llama(ModelConfig(vocab_size=1000, dim=64, n_layer=4)), tokens_of((8, 64), vocab_size=1000)
    loss = model(x, tokens_of((8, 64), seed=1, vocab_size=1000)).item() / x.numel()
    assert abs(loss - math.log(1000)) < 0.01 * math.log(1000)


def test_residual_projections_start_smaller_with_depth():
    model = Llama(ModelConfig(n_layer=8, dim=128))
    for name, p in model.named_parameters():
        if p.dim() == 2:
            expected = 0.02 / 4 if name.endswith(("wo.weight", "w2.weight")) else 0.02
            assert abs(p.std().item() / expected - 1) < 0.05, name


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_activation_checkpointing_gives_identical_gradients(dropout):
    grads = []
    for on in (False, True):
        model = sharp_model(dropout=dropout).train()
        model.checkpoint_activations = on
        torch.manual_seed(3)
        model(tokens_of((2, 30)), tokens_of((2, 30), seed=1)).backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_angles_are_float32_whatever_the_model_is():
    model = sharp_model(block_size=2048)
    x = tokens_of((1, 600))
    far = model.bfloat16()(x).float()
    assert_close(far, model.float()(x), 0.05, "bfloat16 logits at position 600")


def test_norms_are_computed_in_float32_whatever_the_model_is():
    x, norm = 3 * torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).bfloat16(), RMSNorm(256, 1e-5)
    exact = torch.nn.functional.rms_norm(x.double(), (256,), eps=1e-5)
    assert torch.equal(norm.bfloat16()(x), exact.bfloat16())  # rounded once, at the end


def test_top_p_draws_from_the_smallest_sufficient_set():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(2000, 1)
    draw = {top_p: set(pick_token(logits, 1.0, top_p).flatten().tolist()) for top_p in (0.4, 0.6, 0.9, 1.0)}
    assert draw == {0.4: {0}, 0.6: {0, 1}, 0.9: {0, 1, 2}, 1.0: {0, 1, 2, 3}}


def test_sampling_follows_the_temperature():
    logits, generator = torch.tensor([[2.0, 1.0, 0.0]]).repeat(20000, 1), torch.Generator().manual_seed(0)
    drawn = pick_token(logits, 2.0, 1.0, generator).flatten()
    share = torch.bincount(drawn, minlength=3) / len(drawn)
    assert_close(share, (logits[0] / 2).softmax(-1), 0.021, "share of draws")  # three standard errors, 0.0106, of 0.51
    assert set(pick_token(logits[:100], 1e-40, 1.0).flatten().tolist()) == {0}


def test_every_row_of_a_batch_fills_its_own_context():
    """Prompts of 5 to 60 tokens in a context of 64: in a batch each gets the tokens that it gets alone."""
    model = sharp_model()
    prompts = [
        torch.randint(64, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        for length in (60, 5, 40, 63)
    ]
    for use_cache in (True, False):
        together = model.generate(prompts, 30, use_cache=use_cache)
        assert together == [model.generate([prompt], 30)[0] for prompt in prompts]
        assert [len(ids) for ids in together] == [4, 30, 24, 1]


def test_a_stop_token_ends_its_row_and_the_context_every_row():
    model = sharp_model()
    free = model.generate([[1], [2]], 30)
    stop = free[0][4]
    stopped = model.generate([[1], [2]], 30, stop=[TINY["vocab_size"], stop])
    for row, whole in zip(stopped, free):
        assert row == (whole[: whole.index(stop)] if stop in whole else whole)
    assert len(model.generate([[1] * 60], 30)[0]) == TINY["block_size"] - 60


@pytest.mark.parametrize(
    "settings, word",
    [
        ({"dim": 30}, "--n_head"),
        ({"dim": 36, "n_head": 4}, "head_dim is 9"),
        ({"n_kv_head": 3}, "--n_kv_head"),
        ({"n_layer": 0}, "--n_layer"),
        ({"dropout": 1.0}, "--dropout"),
        ({"k_groups": [[0, 2, 2, 2]] * 2}, "skip none"),
        ({"v_groups": [[0, 0, 0]] * 2}, "4 group numbers"),
        ({"k_groups": [[0, 0, 0, 0]]}, "n_layer"),
    ],
)
def test_impossible_shapes_are_refused_by_name(settings, word):
    with pytest.raises(UserError, match=word):
        ModelConfig(**{**TINY, **settings})


def test_prompts_that_cannot_be_continued_are_refused():
    model = sharp_model()
    with pytest.raises(UserError, match="empty prompt"):
        model.generate([[]], 5)
    with pytest.raises(UserError, match="context 64"):
        model.generate([[1] * 64], 5)
