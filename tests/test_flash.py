"""The fused kernels, on a GPU where there is one and under Triton's interpreter elsewhere, against float64."""

import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ONE_THREAD, ROOT, assert_close, command, sharp_model, small_run
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from attention import HeadGroups, attend, naive, sdpa
from model import Llama
from settings import TrainConfig
from train import make_optimizers, update

triton = pytest.importorskip("triton", reason="Triton is for Linux")
import flash_attention as flash
from flash_attention import flash_attention, flash_decode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
UNEVEN = {"k_groups": [[0, 1, 1, 1], [0, 0, 1, 2]], "v_groups": [[0, 0, 0, 1], [0, 0, 0, 0]]}


@pytest.fixture(autouse=True, scope="module")
def rounded_bfloat16():
    """The interpreter cuts float32 off where it makes bfloat16 of it; GPUs round to nearest."""
    if DEVICE == "cuda":
        yield
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain = InterpreterBuilder.cast_impl

    def cast(self, source, kind):
        if source.dtype.scalar == triton.language.float32 and kind.scalar == triton.language.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.int16)
            return TensorHandle(rounded.numpy().view(np.uint16), kind.scalar)
        return plain(self, source, kind)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "cast_impl", cast)
        yield


def a_case(seed: int):
    """q, k, v, k_groups, v_groups, causal (mostly), scale and a gradient, of random shape, groups, dtype and layout."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    B, H, T = rng.randint(1, 3), rng.randint(1, 4), rng.choice([1, 2, 16, 17, 31, 32, 33, 40, 48, 70])
    D, dtype = (16, 32, 48, 64, 80, 96, 128)[seed % 7], DTYPES[seed % 3]  # all pairs of them in 21 seeds
    maps = []
    for _ in range(2):
        G = rng.randint(1, H)
        of_head = [*range(G), *(rng.randrange(G) for _ in range(H - G))]
        rng.shuffle(of_head)
        maps.append(torch.tensor(of_head, device=DEVICE))
    if rng.random() < 0.4:
        maps[1] = maps[0]  # one map, one tensor: K's and V's gradients in one pass
    tensors = []
    for heads in (H, int(maps[0].max()) + 1, int(maps[1].max()) + 1, H):
        layout = rng.choice(["plain", "projection", "gap", "transposed"])
        shape = {"projection": (B, T, heads, D), "gap": (B, heads, T, 2 * D), "transposed": (B, heads, D, T)}
        x = torch.randn(shape.get(layout, (B, heads, T, D)), device=DEVICE, dtype=dtype)
        x = x.transpose(1, 2) if layout == "projection" else x.mT if layout == "transposed" else x
        tensors.append(x[..., ::2] if layout == "gap" else x)
    q, k, v, grad = tensors
    if rng.random() < 0.2:
        grad = grad[:, :1, :1].expand_as(grad)  # as from a sum
    return q, k, v, *maps, rng.random() < 0.75, rng.uniform(0.5, 2) * D**-0.5, grad


def results(attend, q, k, v, grad, *rest):
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attend(*inputs, *rest)
    return out, *torch.autograd.grad(out, inputs, grad.to(out.dtype))


def pytorch_math(q, k, v, k_groups, v_groups, causal=True, scale=None):
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k[:, k_groups], v[:, v_groups], is_causal=causal, scale=scale)


@pytest.mark.parametrize("seed", range(42))
def test_kernel_errs_at_most_twice_as_much_as_pytorch(seed, monkeypatch):
    if flash.INTERPRETED.value and seed % 2:  # blocks that are wider than high, and the contrary
        for kernel in (flash.forward_kernel, flash.grad_q_kernel, flash.grad_kv_kernel):
            monkeypatch.setattr(kernel.configs[0], "kwargs", {"M": 16, "N": 32})
    q, k, v, *rest, grad = a_case(seed)
    how = (grad, *rest)
    exact = results(pytorch_math, q.double(), k.double(), v.double(), *how)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # its products, too, are to be of that dtype
    try:
        theirs = results(pytorch_math, q, k, v, *how)
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(False)
    ours = results(flash_attention, q, k, v, *how)
    for name, x, y, z in zip(("out", "grad q", "grad k", "grad v"), ours, theirs, exact):
        error, allowed = ((w.double() - z).square().mean().sqrt().item() for w in (x, y))
        # of a few numbers, or of none (the gradients of a single query and key are 0), the error is a matter of luck
        luck = 4 * torch.finfo(q.dtype).eps * max(1, z.abs().max().item()) * (q.shape[2] <= 2)
        assert x.dtype == q.dtype and error <= 2 * allowed + luck, f"{name}: {error:.2e}, PyTorch's {allowed:.2e}"


@pytest.mark.parametrize("seed", range(9))
def test_decoding_equals_float64_for_texts_of_several_lengths(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    B, H, S, D = 3, (2, 5, 18, 40)[seed % 4], rng.choice([1, 16, 65, 600]), rng.choice([16, 48, 64, 128])
    maps = [
        torch.tensor([*range(G), *(rng.randrange(G) for _ in range(H - G))]) for G in (rng.randint(1, H), 1 + seed % 2)
    ]
    k_groups, v_groups = (x.to(DEVICE) for x in maps)
    dtype = DTYPES[seed % 3]
    q = torch.randn(B, 1, H, D, device=DEVICE, dtype=dtype).transpose(1, 2)
    # the cache has room for more
    k, v = (torch.randn(B, int(x.max()) + 1, S + 9, D, device=DEVICE, dtype=dtype)[:, :, :S] for x in maps)
    begins = torch.tensor([0, S // 2, S - 1], device=DEVICE)
    scores = q.double() @ k[:, k_groups].double().mT * 0.3
    seen = torch.arange(S, device=DEVICE) >= begins[:, None, None, None]
    exact = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v[:, v_groups].double()
    ours = flash_decode(q, k, v, k_groups, v_groups, begins, scale=0.3)
    assert_close(ours.double(), exact, 4 * torch.finfo(dtype).eps)
    whole = scores.softmax(-1) @ v[:, v_groups].double()
    assert_close(flash_decode(q, k, v, k_groups, v_groups, scale=0.3).double(), whole, 4 * torch.finfo(dtype).eps)


@pytest.mark.skipif(DEVICE == "cuda", reason="float64 is the interpreter's")
@pytest.mark.parametrize("causal", [True, False])
def test_gradients_pass_gradcheck(causal):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, n, 5, 16, dtype=torch.float64, requires_grad=True) for n in (3, 2, 1))
    groups = torch.tensor([0, 1, 0]), torch.tensor([0, 0, 0])
    # in random directions: every number of 16 x 5 x 6 would take minutes under the interpreter
    assert torch.autograd.gradcheck(lambda *x: flash_attention(*x, *groups, causal, 0.3), (q, k, v), fast_mode=True)


def test_operator_passes_opcheck():
    q, k, v = (torch.randn(2, n, 6, 16, device=DEVICE, requires_grad=True) for n in (3, 2, 1))
    groups = torch.tensor([0, 1, 0], device=DEVICE), torch.tensor([0, 0, 0], device=DEVICE)
    torch.library.opcheck(flash.attention, (q, k, v, *groups, True, 0.2))
    out, lse = (x.detach() for x in flash.attention(q, k, v, *groups, True, 0.2))
    saved = [x.detach() for x in (out, q, k, v, out, lse)]
    torch.library.opcheck(flash.attention_backward, (*saved, *groups, True, 0.2))


def test_a_gradient_reaches_values_and_keys_alone():
    """As when only wv has an adapter; and one token is no reason to decode."""
    q, k, v = (torch.randn(1, n, 1, 16, device=DEVICE) for n in (2, 1, 1))
    groups = HeadGroups([0, 0]).to(DEVICE)
    for x in (k, v):
        x.requires_grad_()
        assert attend(q, k, v, groups, groups, None, "triton").requires_grad
        x.requires_grad_(False)


def test_a_mask_of_all_sequences_hides_the_first_tokens():
    groups = HeadGroups([0, 0]).to(DEVICE)
    q, k, v = torch.randn(3, 2, 1, 16, device=DEVICE), *torch.randn(2, 3, 1, 9, 16, device=DEVICE)
    mask = torch.arange(9, device=DEVICE)[None] >= 4
    ours, theirs = (attend(q, k, v, groups, groups, mask, name) for name in ("triton", "naive"))
    assert_close(ours, theirs, 1e-6)


def test_a_compiled_model_is_the_model():
    model, tokens = sharp_model(dim=64, attention="triton", **UNEVEN).to(DEVICE), torch.arange(12, device=DEVICE)[None]
    whole = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(whole(tokens, tokens), model(tokens, tokens), 1e-6)


def test_compiled_as_one_operator():
    q, k, v = (torch.randn(1, n, 20, 16, device=DEVICE, requires_grad=True) for n in (3, 2, 2))
    groups = torch.tensor([0, 1, 0], device=DEVICE)
    whole = torch.compile(lambda *x: flash_attention(*x, groups, groups).sin(), fullgraph=True, backend="aot_eager")
    eager = flash_attention(q, k, v, groups, groups).sin()
    assert torch.equal(whole(q, k, v), eager)
    for ours, theirs in zip(*(torch.autograd.grad(x.sum(), (q, k, v)) for x in (whole(q, k, v), eager))):
        assert torch.equal(ours, theirs)


def test_backward_gives_the_same_bits_each_time():
    T = 2048 if DEVICE == "cuda" else 40  # many programs at a time, where there are some
    q, k, v, grad = (torch.randn(2, n, T, 32, device=DEVICE) for n in (6, 2, 1, 6))
    groups = torch.tensor([0, 0, 1, 0, 1, 0], device=DEVICE), torch.zeros(6, dtype=torch.int64, device=DEVICE)
    runs = [results(flash_attention, q, k, v, grad, *groups) for _ in range(2)]
    assert all(torch.equal(x, y) for x, y in zip(*runs))


def test_training_follows_the_textbook():
    models = [
        sharp_model(dim=64, n_layer=1, attention=name, **{k: v[:1] for k, v in UNEVEN.items()})
        for name in ("naive", "triton")
    ]
    losses = [[], []]
    for model, seen in zip(models, losses):
        model.to(DEVICE).train()
        config = TrainConfig(optimizer="adamw", lr=0.003)
        optimizers, generator = make_optimizers(model, config), torch.Generator().manual_seed(0)
        for _ in range(20):
            tokens = torch.randint(8, (1, 20), generator=generator).to(DEVICE)
            loss = model(tokens[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()
            loss.backward()
            update(model, optimizers, torch.amp.GradScaler(DEVICE, enabled=False), config, 0.003)
            seen.append(loss.item())
    assert max(abs(a - b) for a, b in zip(*losses)) < 1e-5 * losses[0][0] and losses[0][-1] < 0.95 * losses[0][0]
    assert losses[0] != losses[1], "both ran the same attention"


def test_greedy_text_is_the_textbooks():
    models = [sharp_model(dim=64, attention=name, **UNEVEN).to(DEVICE) for name in ("naive", "sdpa", "triton")]
    prompts = [[1, 5, 9], [2], [7, 7, 7, 7, 3, 1]]  # padded at the left to one length
    texts = [model.generate(prompts, 12) for model in models]
    assert texts[0] == texts[1] == texts[2]
    texts = [model.generate([prompts[2]], 12) for model in models]
    assert texts[0] == texts[1] == texts[2]


# ---- memory ----


def allocations(run) -> list[int]:
    """Bytes of every tensor that `run` makes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    return [event.self_cpu_memory_usage for event in seen.events() if event.self_cpu_memory_usage > 0]


@pytest.mark.skipif(DEVICE == "cuda", reason="counts the CPU's memory")
def test_training_makes_no_keys_or_values_for_every_head():
    q, k, v = (torch.randn(1, n, 16, 32, requires_grad=True) for n in (8, 2, 1))
    groups, expanded, kept = (torch.tensor([0] + [1] * 7), torch.tensor([0] * 8)), 8 * 16 * 32 * 4, []
    forward = allocations(lambda: kept.append(flash_attention(q, k, v, *groups)))
    grad = torch.ones_like(kept[0])
    backward = allocations(lambda: kept.extend(torch.autograd.grad(kept[0], (q, k, v), grad)))
    assert [size for size in forward if size >= expanded] == [kept[0].nbytes], "more than the output is that large"
    assert [size for size in backward if size >= expanded] == [kept[1].nbytes], "more than q's gradient is that large"
    copies = allocations(lambda: sdpa(q, k, v, *map(HeadGroups, ([0] + [1] * 7, [0] * 8)), None))
    assert sum(size >= expanded for size in copies) > 1, "a copy for every head would not be seen"


@pytest.mark.skipif(DEVICE == "cuda", reason="counts the CPU's memory")
@pytest.mark.parametrize("backend", ["naive", "sdpa", "triton"])
@pytest.mark.parametrize("maps", [([0] + [1] * 7, [0] * 8), ([0] + [1] * 7, [0] + [1] * 7), ([0] * 4 + [1] * 4,) * 2])
def test_decoding_makes_no_keys_or_values_for_every_head(backend, maps):
    k_groups, v_groups = map(HeadGroups, maps)
    q, cache = torch.randn(2, 8, 1, 32), [torch.randn(2, groups.n_group, 200, 32) for groups in (k_groups, v_groups)]
    k, v = (x[:, :, :150] for x in cache)
    made = allocations(lambda: attend(q, k, v, k_groups, v_groups, None, backend))
    assert max(made) < min(k.nbytes, v.nbytes) / 2, "not even a copy of the cache as it is"


@pytest.mark.parametrize("n_kv_head", [1, 2])
def test_sdpa_reads_equal_runs_of_heads_without_copies(n_kv_head):
    groups = HeadGroups([h * n_kv_head // 4 for h in range(4)])
    q, k, v = torch.randn(2, 4, 64, 32), *torch.randn(2, 2, n_kv_head, 64, 32)
    made = allocations(lambda: sdpa(q, k, v, groups, groups, None))
    assert sum(size >= q.nbytes for size in made) == 1, "more than the output is that large"
    assert_close(sdpa(q, k, v, groups, groups, None), naive(q, k, v, groups, groups, None), 1e-6)


# ---- where it cannot run ----


def test_where_triton_cannot_run_one_line_says_so_and_sdpa_computes(tiny_data, tmp_path):
    how = ["--head_dim", 16, "--max_steps", 3, "--device", "cpu"]
    done = [
        command("train.py", *small_run(tiny_data, tmp_path / name), *how, "--attention", name)
        for name in ("sdpa", "triton")
    ]
    assert all(run.returncode == 0 for run in done), done[1].stderr
    notes = [line for line in done[1].stderr.splitlines() if "triton" in line]
    assert len(notes) == 1 and "sdpa takes its place" in notes[0]
    ours, theirs = (torch.load(tmp_path / name / "ckpt.pt")["model"] for name in ("sdpa", "triton"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_head_too_wide_is_left_to_sdpa(capsys):
    model = sharp_model(n_head=1, dim=160, attention="triton").to(DEVICE)
    tokens = torch.arange(10, device=DEVICE)[None]
    expected = Llama(replace(model.config, attention="sdpa")).to(DEVICE)
    expected.load_state_dict(model.state_dict())
    assert torch.equal(model(tokens), expected.eval()(tokens))
    assert "head_dim 160 is not from 16 to 128" in capsys.readouterr().err


# ---- for real GPUs ----


def test_kernels_compile_for_real_gpus_without_spills():
    """Triton's interpreter is kept out: a process of its own."""
    line = [sys.executable, str(ROOT / "tests" / "compile_kernels.py"), "--first"]
    done = subprocess.run(line, capture_output=True, text=True, env=ONE_THREAD)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    assert {row[0] for row in rows} == {"sm_80", "sm_90", "sm_100"} and len(rows) > 100


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")
@pytest.mark.parametrize("D", [32, 64, 128])
def test_long_texts_on_a_gpu(D):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 4096, D, device="cuda", dtype=torch.bfloat16) for n in (8, 3, 2))
    k_groups, v_groups = torch.tensor([0, 1, 1, 2, 2, 2, 0, 1]).cuda(), torch.tensor([0, 0, 0, 0, 1, 1, 0, 0]).cuda()
    how = torch.randn_like(q), k_groups, v_groups
    exact = results(pytorch_math, q.float(), k.float(), v.float(), *how)
    for name, x, z in zip(("out", "grad q", "grad k", "grad v"), results(flash_attention, q, k, v, *how), exact):
        assert_close(x.float(), z, 0.02, name)
