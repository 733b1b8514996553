"""The Triton kernels, on a GPU where there is one, else under Triton's interpreter, against float64."""

import random

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close, command, sharp_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from model import HeadGroups, naive, sdpa

triton = pytest.importorskip("triton", reason="Triton is for Linux")
import flash_attention as flash
from flash_attention import flash_attention as ours

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = flash.INTERPRETED.value
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
UNEVEN = {"dim": 64, "k_groups": [[0, 1, 1, 1], [0, 0, 1, 2]], "v_groups": [[0, 0, 0, 1], [0, 0, 0, 0]]}


def a_map(rng: random.Random, H: int) -> torch.Tensor:
    """The group of each of H heads, at random; no group is empty."""
    G = rng.randint(1, H)
    of_head = [*range(G), *(rng.randrange(G) for _ in range(H - G))]
    return torch.tensor(rng.sample(of_head, H), device=DEVICE)


def a_case(seed: int):
    """q, k, v, a gradient, k_groups, v_groups: of random shape, groups, dtype and memory layout."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    B, H, T = rng.randint(1, 3), rng.randint(1, 4), rng.choice([1, 2, 16, 17, 31, 32, 33, 40, 48])
    D, dtype = (16, 20, 48, 64, 80, 96, 128)[seed % 7], DTYPES[seed % 3]  # all pairs of them in 21 seeds
    k_map = a_map(rng, H)
    v_map = k_map if rng.random() < 0.4 else a_map(rng, H)  # one tensor: K's and V's gradients in one pass
    tensors = []
    for heads in (H, int(k_map.max()) + 1, int(v_map.max()) + 1, H):
        order = rng.choice([(0, 1, 2, 3), (0, 2, 1, 3), (0, 1, 3, 2)])  # of the axes in memory
        shape = [(B, heads, T, 2 * D)[axis] for axis in order]
        x = torch.randn(shape, device=DEVICE, dtype=dtype).permute(order)
        tensors.append(x[..., ::2] if rng.random() < 0.3 else x[..., :D])
    *qkv, grad = tensors
    if rng.random() < 0.2:
        grad = grad[:, :1, :1].expand_as(grad)  # as from a sum
    return qkv, (grad, k_map, v_map)


def pytorch(q, k, v, k_groups, v_groups):
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k[:, k_groups], v[:, v_groups], is_causal=True)


def results(attend, q, k, v, grad, *rest) -> dict[str, torch.Tensor]:
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attend(*inputs, *rest)
    out = out[0] if attend is ours else out  # it returns lse, too
    return dict(zip(("out", "q", "k", "v"), (out, *torch.autograd.grad(out, inputs, grad.to(out.dtype)))))


@pytest.mark.parametrize("seed", range(21))
def test_kernels_err_at_most_twice_as_much_as_pytorch(seed, monkeypatch):
    if INTERPRETED and seed % 2:  # blocks that are wider than high, and the contrary
        for kernel in (flash.forward_kernel, flash.grad_q_kernel, flash.grad_kv_kernel):
            monkeypatch.setattr(kernel.configs[0], "kwargs", {"M": 16, "N": 32})
    qkv, rest = a_case(seed)
    exact = results(pytorch, *(x.double() for x in qkv), *rest)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # its products are to be of that dtype, too
    theirs = results(pytorch, *qkv, *rest)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(False)
    times = 2 if INTERPRETED else 3  # cuBLAS adds up float32 in more parts
    for name, x in results(ours, *qkv, *rest).items():
        error, allowed = ((y.double() - exact[name]).square().mean().sqrt() for y in (x, theirs[name]))
        # the error of a few numbers is a matter of luck
        luck = 4 * torch.finfo(x.dtype).eps * max(1, x.abs().max().item()) * (x.shape[2] <= 2)
        assert x.dtype == qkv[0].dtype
        assert error <= times * allowed + luck, f"{name}: {error:.2e}, PyTorch's {allowed:.2e}"


@pytest.mark.parametrize("seed", range(9))
def test_decoding_equals_float64_for_texts_of_several_lengths(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    H, S = (2, 5, 18, 33)[seed % 4], (300, 1, 65, 16)[(seed - seed // 4) % 4]
    D = rng.choice([16, 20, 48, 64, 128])
    like, maps = {"device": DEVICE, "dtype": DTYPES[seed % 3]}, (a_map(rng, H), a_map(rng, H))
    q = torch.randn(3, 1, H, D, **like).transpose(1, 2)
    k, v = (torch.randn(3, int(x.max()) + 1, S + 9, D, **like)[:, :, :S] for x in maps)
    begins = torch.tensor([0, S // 2, S - 1], device=DEVICE)
    scores = q.double() @ k[:, maps[0]].double().mT * D**-0.5
    hidden = torch.arange(S, device=DEVICE) < begins[:, None, None, None]
    for first, seen in ((begins, scores.masked_fill(hidden, -torch.inf)), (None, scores)):
        exact = seen.softmax(-1) @ v[:, maps[1]].double()
        found = flash.flash_decode(q, k, v, *maps, first)
        assert_close(found.double(), exact, 8 * torch.finfo(q.dtype).eps)


def test_the_operators_pass_opcheck():
    q, k, v = (torch.randn(2, n, 6, 16, device=DEVICE, requires_grad=True) for n in (3, 2, 1))
    case = q, k, v, *torch.tensor([[0, 1, 0], [0, 0, 0]], device=DEVICE)
    torch.library.opcheck(ours, case)
    saved = [x.detach() for x in (*case, *ours(*case), q)]
    torch.library.opcheck(flash.flash_attention_backward, tuple(saved))


@pytest.mark.parametrize("T", [1, 4, 9])
def test_masks_and_gradients_are_the_textbooks(T):
    heads = [HeadGroups([0, 1, 0]).to(DEVICE), HeadGroups([0, 0, 0]).to(DEVICE)]
    q, k, v = (torch.randn(3, n, t, 16, device=DEVICE) for n, t in ((3, T), (2, 9), (1, 9)))
    causal = torch.ones(T, 9, dtype=torch.bool, device=DEVICE).tril(9 - T)
    begins = torch.tensor([0, 2, 4], device=DEVICE)[:, None, None, None]
    late = causal & (torch.arange(9, device=DEVICE) >= begins)
    for mask in {1: (None, causal, late), 4: (causal, late), 9: (None, causal)}[T]:
        for x in (q, k, v):
            x.requires_grad_()
            found, exact = (attend(q, k, v, *heads, mask) for attend in (flash.fused, naive))
            assert_close(found, exact, 1e-6)
            assert_close(*(torch.autograd.grad(y.sum(), x)[0] for y in (found, exact)), 1e-5)
            x.requires_grad_(False)
            assert_close(flash.fused(q, k, v, *heads, mask), exact, 1e-6)


def test_a_model_compiled_or_not_has_the_gradients_and_the_text_of_the_textbook():
    model = sharp_model(attention="triton", **UNEVEN).to(DEVICE)
    flash.use_kernels(model)
    assert all(layer.attention.attend is flash.fused for layer in model.layers)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    textbook, x = sharp_model(attention="naive", **UNEVEN).to(DEVICE), torch.arange(20, device=DEVICE)[None]
    losses = [f(x).logsumexp(-1).sum() for f in (compiled, model, textbook)]
    grads = [torch.autograd.grad(y, [*m.parameters()]) for y, m in zip(losses, (model, model, textbook))]
    for x, y, exact in zip(*grads):
        assert_close(x, y, 1e-6)
        assert_close(x, exact, 1e-5)
    assert model.generate([[1, 5], [7, 7, 7, 3]], 12) == textbook.generate([[1, 5], [7, 7, 7, 3]], 12)


@pytest.mark.skipif(DEVICE == "cuda", reason="counts the CPU's memory")
@pytest.mark.parametrize("attend", [naive, sdpa, flash.fused])
@pytest.mark.parametrize("maps", [([0] + [1] * 7, [0] * 8), ([0] + [1] * 7,) * 2, ([0] * 4 + [1] * 4,) * 2])
def test_decoding_makes_no_keys_or_values_for_every_head(attend, maps):
    maps = [HeadGroups(of_head) for of_head in maps]
    q, cache = torch.randn(2, 8, 1, 32), [torch.randn(2, groups.n_group, 200, 32) for groups in maps]
    k, v = (x[:, :, :150] for x in cache)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        attend(q, k, v, *maps, None)
    made = max(event.self_cpu_memory_usage for event in seen.events())
    assert 0 < made < min(k.nbytes, v.nbytes) / 2, "not even a copy of the cache as it is"


@pytest.mark.parametrize("settings, dtype, word", [
    ({"n_head": 1, "dim": 160}, torch.float32, "head_dim 16 to 128"),
    ({"n_head": 2, "dim": 160}, torch.float64, "head_dim 16 to 128"),
    ({"k_latent": [[1] * 8] * 2, "v_latent": [6, 6], "dim": 64}, torch.float32, "latent"),
])  # fmt: skip
def test_what_the_kernels_cannot_take_is_left_to_sdpa(settings, dtype, word, capsys):
    model = sharp_model(**settings, attention="triton").to(DEVICE, dtype)
    flash.use_kernels(model)
    assert word in capsys.readouterr().err
    assert all(layer.attention.attend is sdpa for layer in model.layers)


def test_kernels_compile_for_real_gpus_without_spills():
    """Triton's interpreter is kept out: a process of its own."""
    done = command("tests/compile_kernels.py", "--first", timeout=None)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert {row[0] for row in rows} == {"sm_80", "sm_90", "sm_100"} and len(rows) == 3 * 6 + 7


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")
@pytest.mark.parametrize("D", [32, 64, 128])
def test_long_texts_on_a_gpu_and_again_with_the_same_bits(D):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 4096, D, device="cuda", dtype=torch.bfloat16) for n in (8, 3, 2))
    maps = torch.tensor([[0, 1, 1, 2, 2, 2, 0, 1], [0, 0, 0, 0, 1, 1, 0, 0]], device="cuda")
    exact = results(pytorch, q.float(), k.float(), v.float(), q, *maps)
    found, again = (results(ours, q, k, v, q, *maps) for _ in range(2))
    for name, x in found.items():
        assert_close(x.float(), exact[name], 0.02, name)
        assert torch.equal(x, again[name])
