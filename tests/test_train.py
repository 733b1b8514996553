"""Training: accumulation, resuming, stopping, and what a run leaves behind."""

import json
import math
import signal
import time

import numpy as np
import pytest
import torch
from conftest import TINY, command, quick, sharp_model, small_run, start_command

import device
import settings
from checkpoint import load
from config import UserError
from cross_entropy import IGNORE
from dataset import step_batches
from lora import LoRAConfig, adapt
from model import Llama, ModelConfig
from train import Log, TrainConfig, forward_backward, learning_rate, make_optimizers, update

NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("masked", [False, True])
def test_accumulation_equals_big_batch(masked):
    model = sharp_model().double().train()
    x = torch.randint(64, (16, 24), generator=torch.Generator().manual_seed(0))
    y = torch.randint(64, (16, 24), generator=torch.Generator().manual_seed(1))
    if masked:  # micro-batches of very different token counts, one of them empty
        for row in range(16):
            y[row, : 24 if 4 <= row < 8 else row] = IGNORE
    losses, grads = [], []
    for size in (16, 4):
        model.zero_grad()
        losses.append(forward_backward(model, list(zip(x.split(size), y.split(size))), torch.float64, NO_SCALER))
        grads.append(gradients(model))
    difference = (grads[0] - grads[1]).abs().max().item()
    assert difference < 1e-12 and abs(losses[0] - losses[1]) < 1e-12, f"gradients differ by {difference:.1e}"
    each = -model(x).log_softmax(-1).gather(-1, y.clamp(min=0)[..., None])[..., 0]
    assert abs(losses[0] - each[y != IGNORE].mean().item()) < 1e-12


def test_an_epoch_shows_every_block_once_and_steps_are_reproducible():
    tokens, T = np.arange(1000, dtype=np.uint16), 16
    blocks, steps = (len(tokens) - T) // T, [step_batches(tokens, T, 3, 2, seed=5, step=step) for step in range(21)]
    starts = [x[row, 0].item() for batches in steps for x, _ in batches for row in range(3)]
    assert len(starts) >= 2 * blocks
    for epoch in (starts[:blocks], starts[blocks : 2 * blocks]):
        assert len(set(epoch)) == blocks and len({start % T for start in epoch}) == 1
    assert starts[:blocks] != starts[blocks : 2 * blocks]
    for (x, y), (again, _) in zip(steps[4], step_batches(tokens, T, 3, 2, seed=5, step=4)):
        assert torch.equal(x, again) and torch.equal(y, x + 1)
    assert not torch.equal(steps[4][0][0], step_batches(tokens, T, 3, 2, seed=6, step=4)[0][0])


def test_learning_rate_warms_up_and_falls_to_its_minimum():
    config = TrainConfig(lr=1.0, warmup_steps=10, max_steps=111)
    rates = [learning_rate(config, step) for step in range(111)]
    assert rates[0] == 0.1 and rates[9] == 1.0 and rates[60] == pytest.approx(0.55) and rates[110] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_decay_is_on_matrices_only_and_every_parameter_is_stepped_once(optimizer):
    model = Llama(ModelConfig(**TINY, novel=True))
    optimizers = make_optimizers(model, TrainConfig(optimizer=optimizer, weight_decay=0.3))
    groups = [group for o in optimizers for group in o.param_groups]
    stepped = [id(p) for group in groups for p in group["params"]]
    assert sorted(stepped) == sorted(id(p) for p in model.parameters())
    assert all(group["weight_decay"] == (0.3 if p.dim() == 2 else 0) for group in groups for p in group["params"])


HERE = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
DEVICES = [
    pytest.param(name, marks=pytest.mark.skipif(not here, reason=f"needs {name}")) for name, here in HERE.items()
]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("where", DEVICES)
def test_overfits_one_batch_and_again_with_the_same_bits(where, dtype, optimizer):
    x, runs = torch.randint(64, (4, 33), generator=torch.Generator().manual_seed(0)), []
    for _ in range(2 if where == "cpu" else 1):
        torch.manual_seed(0)
        model = Llama(ModelConfig(**TINY, novel=True)).to(where).train()
        config = TrainConfig(optimizer=optimizer, weight_decay=0.0)
        optimizers, scaler = make_optimizers(model, config), torch.amp.GradScaler(where, enabled=dtype == torch.float16)
        losses = []
        for _ in range(150):
            losses.append(forward_backward(model, [(x[:, :-1], x[:, 1:])], dtype, scaler))
            update(model, optimizers, scaler, config, 0.01)
        assert losses[-1] < 0.01, f"loss is still {losses[-1]:.3f}"
        runs.append(losses)
    assert runs[0] == runs[-1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_gradient_that_is_not_finite_anywhere_steps_no_parameter(dtype):
    model, config = Llama(ModelConfig(**TINY)), TrainConfig(optimizer="muon")
    optimizers, scaler = make_optimizers(model, config), torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    x = torch.randint(64, (2, 33), generator=torch.Generator().manual_seed(0))
    for bad in (math.inf, math.nan):
        before = [p.clone() for p in model.parameters()]
        forward_backward(model, [(x[:, :-1], x[:, 1:])], dtype, scaler)
        model.layers[0].attention.wq.weight.grad[0, 0] = bad  # one matrix of Muon's; all else is AdamW's or finite
        assert not math.isfinite(update(model, optimizers, scaler, config, 0.01))
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_float16_scaler_skips_an_overflowing_step():
    model, config = Llama(ModelConfig(**TINY)), TrainConfig()
    optimizers, scaler = make_optimizers(model, config), torch.amp.GradScaler("cpu", init_scale=2.0**40)
    x = torch.randint(64, (2, 33), generator=torch.Generator().manual_seed(0))
    before, steps = [p.clone() for p in model.parameters()], 0
    while all(torch.equal(a, b) for a, b in zip(before, model.parameters())):
        forward_backward(model, [(x[:, :-1], x[:, 1:])], torch.float16, scaler)
        update(model, optimizers, scaler, config, 0.01)
        steps += 1
        assert steps < 60, "no step was ever taken"
    assert steps > 3 and all(p.isfinite().all() for p in model.parameters())


def records(out, key):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


def assert_same_run(a, b):
    one, two = load(a / "ckpt.pt"), load(b / "ckpt.pt")
    assert one["step"] == two["step"] and one["tokens"] == two["tokens"]
    for name, tensor in one["model"].items():
        assert torch.equal(tensor, two["model"][name]), (
            f"{name} differs by {(tensor - two['model'][name]).abs().max():.1e}"
        )
    assert records(a, "loss") == records(b, "loss") and records(a, "val_loss") == records(b, "val_loss")


@pytest.mark.parametrize("dtype, optimizer", [("float32", "adamw"), ("bfloat16", "muon")])
def test_resume_after_kill_equals_uninterrupted(tiny_data, tmp_path, dtype, optimizer):
    flags = [
        "--max_steps",
        20,
        "--eval_every",
        5,
        "--dropout",
        0.1,
        "--dtype",
        dtype,
        "--optimizer",
        optimizer,
        "--grad_accum",
        2,
    ]
    straight, killed = ([*small_run(tiny_data, tmp_path / name), *flags] for name in ("straight", "killed"))
    assert command("train.py", *straight).returncode == 0
    process = start_command("train.py", *killed)
    log = tmp_path / "killed" / "log.jsonl"
    while process.poll() is None and not (log.exists() and '"step": 11,' in log.read_text()):
        time.sleep(0.005)
    process.kill()  # SIGKILL: nothing is saved on the way out
    assert process.wait() == -signal.SIGKILL, process.stdout.read()
    done = command("train.py", *killed, "--resume")
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "straight", tmp_path / "killed")


def test_a_run_without_evaluations_learns_the_same(tiny_data, tmp_path):
    for name, tokens in (("with", 512), ("without", 0)):
        flags = ["--max_steps", 4, "--eval_every", 2, "--eval_tokens", tokens]
        done = quick("train.py", *small_run(tiny_data, tmp_path / name), *flags)
        assert done.returncode == 0, done.stderr
    one, two = (load(tmp_path / name / "ckpt.pt")["model"] for name in ("with", "without"))
    assert all(torch.equal(p, two[name]) for name, p in one.items())
    assert len(records(tmp_path / "with", "val_loss")) == 2 and not records(tmp_path / "without", "val_loss")
    assert "perplexity" not in done.stdout and records(tmp_path / "without", "peak_memory_bytes")


def test_a_run_killed_before_its_second_checkpoint_begins_again(tiny_data, tmp_path):
    flags = [*small_run(tiny_data, tmp_path / "run"), "--eval_every", 1000, "--max_steps"]
    process = start_command("train.py", *flags, 100_000)
    log = tmp_path / "run" / "log.jsonl"
    while process.poll() is None and not (log.exists() and '"step": 3,' in log.read_text()):
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    done = command("train.py", *flags, 2, "--resume")
    assert done.returncode == 0 and load(tmp_path / "run" / "ckpt.pt")["step"] == 2, done.stderr


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_run_can_go_on(tiny_data, tmp_path, number, code):
    flags = [*small_run(tiny_data, tmp_path / "run"), "--eval_every", 1000]
    process = start_command("train.py", *flags, "--max_steps", 100_000)
    log = tmp_path / "run" / "log.jsonl"
    while process.poll() is None and not (log.exists() and '"step": 3,' in log.read_text()):
        time.sleep(0.01)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == code and "--resume" in output and "Traceback" not in output
    step = load(tmp_path / "run" / "ckpt.pt")["step"]
    assert step == max(records(tmp_path / "run", "loss")) >= 3
    done = command("train.py", *flags, "--max_steps", step + 2, "--resume")
    assert done.returncode == 0 and load(tmp_path / "run" / "ckpt.pt")["step"] == step + 2, done.stderr


def test_a_tuned_run_resumes_by_the_same_command(tiny_data, tiny_run, tmp_path):
    flags = ["--dataset", tiny_data, "--init_from", tiny_run, "--batch_size", 2, "--lr", 0.001]
    environment = {"cwd": tmp_path}
    assert command("train.py", *flags, "--max_steps", 2, **environment).returncode == 0
    done = command("train.py", *flags, "--max_steps", 3, "--resume", **environment)
    assert done.returncode == 0, done.stderr
    assert load(tmp_path / "out" / "own-2x32-tuned" / "ckpt.pt")["step"] == 3


def test_a_resumed_log_drops_what_the_checkpoint_does_not_know(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "val_loss": 1.5}\n{"step": 3, "loss": 1.0}\n{"step": 4, "lo')
    log = Log(path, resume_step=2)
    log.write({"step": 3, "loss": 1.25, "norm": math.inf})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3] and lines[2] == {"step": 3, "loss": 1.25, "norm": None}
    assert log.evaluated == {2} and not list(tmp_path.glob("*.tmp"))


def test_the_log_holds_config_batch_arithmetic_and_every_step(tiny_run):
    first, *rest = [json.loads(line) for line in tiny_run.with_name("log.jsonl").read_text().splitlines()]
    assert first["model"]["n_layer"] == 2 and first["train"]["lr"] == 0.01
    assert first["batch"]["tokens_per_step"] == 4 * 32 and first["batch"]["tokens"] == 30 * 4 * 32
    steps = [line for line in rest if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 31))
    assert {"loss", "lr", "norm", "ms", "tok_s", "tokens", "seconds"} <= set(steps[0])
    assert rest[-1]["val_loss"] > 0 and rest[-1]["peak_memory_bytes"] > 0


def test_the_last_line_of_a_run_is_the_number_that_eval_ppl_prints(tiny_run):
    final = json.loads(tiny_run.with_name("log.jsonl").read_text().splitlines()[-1])
    done = command("eval_ppl.py", tiny_run)
    assert f"perplexity {math.exp(final['val_loss']):.4f} | blocks" in done.stdout


def test_a_new_run_starts_from_other_weights(tiny_data, tiny_run, tmp_path):
    flags = [
        "--dataset",
        tiny_data,
        "--init_from",
        tiny_run,
        "--out_dir",
        tmp_path,
        "--batch_size",
        2,
        "--max_steps",
        1,
        "--lr",
        0,
    ]
    done = command("train.py", *flags)
    assert done.returncode == 0, done.stderr
    ours, theirs = load(tmp_path / "ckpt.pt"), load(tiny_run)
    assert all(torch.equal(ours["model"][name], theirs["model"][name]) for name in theirs["model"])
    assert ours["step"] == 1 and ours["config"]["n_layer"] == 2


def test_compiled_blocks_keep_the_names_and_the_loss():
    torch._dynamo.reset()
    model = sharp_model(novel=True).train()
    names, x = list(model.state_dict()), torch.randint(64, (2, 40), generator=torch.Generator().manual_seed(0))
    plain = model(x, x).item()
    for layer in model.layers:
        layer.compile(backend="aot_eager")
    assert list(model.state_dict()) == names and abs(model(x, x).item() / plain - 1) < 1e-5


def test_compiled_blocks_of_every_kind_have_the_gradients_of_the_others():
    """An adapter on 4-bit matrices, the novel layer, uneven groups, recomputed activations, half precision."""
    torch._dynamo.reset()
    model = sharp_model(novel=True, n_layer=1, k_groups=[[0, 1, 1, 1]], v_groups=[[0, 0, 0, 0]])
    adapt(model, LoRAConfig(lora_r=2, quantize="nf4")).train()
    model.checkpoint_activations = True
    x, found = torch.randint(64, (2, 40), generator=torch.Generator().manual_seed(0)), []
    for compiled in (False, True):
        if compiled:
            model.layers[0].compile(backend="aot_eager")
        model.zero_grad()
        forward_backward(model, [(x, x)], torch.bfloat16, NO_SCALER)
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert found[0].norm() > 0 and (found[0] - found[1]).norm() < 0.02 * found[0].norm()


def test_a_run_compiles_if_it_is_long_enough(monkeypatch):
    monkeypatch.setattr(device, "compiler_missing", lambda: None)
    monkeypatch.setattr(device.sys, "platform", "linux")
    enough, cpu = 200 * 1.25e11 * torch.get_num_threads() / 6e6, torch.device("cpu")  # tokens for 10^6 parameters

    def compiles(tokens, where=cpu, shape=TINY, **flags):
        return settings.compiling_pays(TrainConfig(**flags), ModelConfig(**shape), int(tokens), 10**6, where)

    assert compiles(1.01 * enough) and not compiles(0.99 * enough)
    assert compiles(1, compile=True) and not compiles(1.01 * enough, compile=False)
    assert not compiles(100 * enough, torch.device("mps"))
    two_kinds = {**TINY, "k_groups": [[0, 1, 1, 1], [0, 1, 2, 3]]}
    assert compiles(2.01 * enough, shape=two_kinds) and not compiles(1.99 * enough, shape=two_kinds)
    monkeypatch.setattr(device, "compiler_missing", lambda: "a C++ compiler, g++")
    assert not compiles(100 * enough)
    with pytest.raises(UserError, match="--no-compile"):
        compiles(1, compile=True)
