"""Training against transformers and torch.optim; accumulation, resuming, stopping, and what a run leaves."""

import errno
import math
import signal
import time
from collections import Counter
from functools import partial
from types import SimpleNamespace
from unittest import mock

import conftest
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, assert_close, logged, quick, refused, run, sharp_model, small_run, tokens_of

from checkpoint import load, model_config, save
from common import IGNORE, UserError, autocast, exit_cleanly, held, replacing
from data.loader import Text, read_meta
from lora import LoRAConfig, adapt
from model import Llama, ModelConfig
from muon import orthogonalised
from train import TrainConfig, begin_embeddings, distilled, make_optimizers, settle, train_step

CPU = torch.device("cpu")


def batch(rows):
    tokens = tokens_of((rows, 33))
    return tokens[:, :-1], tokens[:, 1:].clone()


def train_py(data, out, *flags):
    run("train.py", *small_run(data, out), *flags)


def weights(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def their_optimizers(twin, with_muon: bool, decay: float) -> list:
    blocks, rest = [], []
    for name, p in twin.named_parameters():
        rates = {"q_proj": 2, "k_proj": 2, "mlp": 0.7} if with_muon else {}
        rate = next((rate for part, rate in rates.items() if part in name), 1)
        group = {"params": [p], "weight_decay": decay * (p.dim() == 2), "rate": rate}
        (blocks if "_proj" in name and with_muon else rest).append(group)
    muon = [torch.optim.Muon(blocks, momentum=0.8, adjust_lr_fn="match_rms_adamw")] if with_muon else []
    return [torch.optim.AdamW(rest, betas=(0.8, 0.99) if with_muon else (0.9, 0.95)), *muon]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_ten_steps_equal_those_of_transformers_and_torch_optim(tiny_data, tmp_path, optimizer, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda x: x)  # both Muons in float32, without noise
    lr, clip, decay = 0.02, 2.5, 0.3
    flags = f"--n_kv_head 2 --no-tie_embeddings --optimizer {optimizer} --batch_size 3 --grad_accum 2"
    flags += f" --grad_clip {clip} --weight_decay {decay} --lr {lr} --min_lr {lr / 20} --warmup_steps 3"
    flags += " --max_steps 10 --seed 5 --eval_tokens 0 --dtype float32 --device cpu"
    train_py(tiny_data, tmp_path, *flags.split())
    checkpoint = load(tmp_path / "ckpt.pt")
    torch.manual_seed(5)
    model, losses, norms = Llama(model_config(checkpoint)), [], []
    data = Text(*read_meta(str(tiny_data)), "train", 32)
    begin_embeddings(model, data.tokens)
    start, twin = conftest.to_hugging_face(model).state_dict(), conftest.to_hugging_face(model).train()
    optimizers = their_optimizers(twin, optimizer == "muon", decay)
    for step in range(10):
        ((x, y),) = data.step_batches(6, 1, seed=5, step=step)
        loss = F.cross_entropy(twin(x).logits.flatten(0, 1), y.flatten())
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(twin.parameters(), clip).item())
        losses.append(loss.item())
        now = lr * (step + 1) / 3 if step < 3 else lr / 20 + lr * 0.95 * (10 - step) / 7
        for o in optimizers:
            for group in o.param_groups:
                group["lr"] = now * group["rate"]
            o.step()
            o.zero_grad()
    assert min(norms) < clip < max(norms), f"clipping is not tested: {norms}"
    for key, theirs in (("loss", losses), ("norm", norms)):
        assert list(logged(tmp_path, key).values()) == pytest.approx(theirs, rel=1e-4), key
    model.load_state_dict(checkpoint["model"])
    for name, ours in conftest.to_hugging_face(model).state_dict().items():
        change = twin.state_dict()[name] - start[name]
        difference = (ours - start[name] - change).norm() / change.norm()
        assert difference < 2e-4, f"{name} differs by {difference:.1e} of its change"


def test_new_embeddings_have_the_cosines_of_mutual_information():
    """Where nothing is cut off, V = C, cosines of embeddings are those of rows of counted information."""
    drawn, V = tokens_of((2, 1500), vocab_size=20), 24
    text = [*drawn[0].sort().values.view(-1, 50).T.flatten().tolist(), *drawn[1].tolist()]
    pairs = Counter(pair for far in (1, 2) for pair in zip(text, text[far:]))
    sums = [Counter(place) for place in zip(*pairs.elements())]  # of each token in first and in second place
    rows = torch.zeros(V, 2 * V, dtype=torch.float64)
    for (a, b), count in pairs.items():
        surprise = math.log(count * pairs.total() / (sums[0][a] * sums[1][b]))
        rows[a, b] = rows[b, V + a] = max(0, surprise)
    model = Llama(ModelConfig(n_layer=1, dim=V, n_head=2, vocab_size=V))
    begin_embeddings(model, np.array(text, np.uint16))
    E = model.tok_embeddings.weight.detach().double()
    ours, theirs = (F.normalize(x[:20]) @ F.normalize(x[:20]).T for x in (E, rows))
    assert theirs.std() > 0.1
    assert_close(ours, theirs, 1e-5)
    logits = model.norm.weight * E[:20].norm(dim=1, keepdim=True)
    assert_close(logits, torch.full_like(logits, 0.02 * V**0.5), 1e-6)  # as large as with init_weights
    assert not E[20:].any()


def test_orthogonalised_equals_the_svd():
    """Singular vectors stay; singular values, here from 0.02 to 1 of the largest, come to some 0.7 to 1.2."""
    torch.manual_seed(0)
    for shape in ((48, 48), (64, 32), (32, 64)):
        U, S, Vh = torch.linalg.svd(torch.randn(shape), full_matrices=False)
        inside = U.T @ orthogonalised(U * torch.logspace(0, -1.7, len(S)) @ Vh).float() @ Vh.T
        values = inside.diagonal()
        assert values.min() > 0.65 and values.max() < 1.25 and (inside - values.diag()).abs().max() < 0.05


def test_accumulation_equals_big_batch():
    (x, y), found = batch(16), []
    for row in range(16):  # micro-batches of very different token counts, one of them empty
        y[row, : 32 if 4 <= row < 8 else row] = IGNORE
    for size in (16, 4):
        model, batches = sharp_model().double().train(), list(zip(x.split(size), y.split(size)))
        sgd, scaler = [torch.optim.SGD(model.parameters())], torch.amp.GradScaler("cpu", enabled=False)
        loss, _ = train_step(model, batches, sgd, 1.0, torch.float64, scaler, grad_clip=0)
        found.append((loss, weights(model)))
    assert_close(found[1][1], found[0][1], 1e-12, "weights after the step")
    exact = F.cross_entropy(sharp_model().double()(x).flatten(0, 1), y.flatten(), ignore_index=IGNORE).item()
    assert abs(found[0][0] - exact) < 1e-12 and abs(found[1][0] - exact) < 1e-12


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_distillation_at_49152_classes_equals_float64(weight):
    noise, y = torch.Generator().manual_seed(0), tokens_of((1, 64), vocab_size=49152)
    ours = 2 * torch.randn(1, 64, 49152, generator=noise)
    theirs = ours + 0.3 * torch.randn(ours.shape, generator=noise)
    y[0, ::5] = IGNORE
    found = distilled(lambda x: ours, lambda x: theirs, None, y, weight)
    q, p = (logits[y != IGNORE].double().log_softmax(-1) for logits in (ours, theirs))
    kl, entropy = (p.exp() * (p - q)).sum(), F.nll_loss(q, y[y != IGNORE], reduction="sum")
    assert_close(found, (1 - weight) * entropy + weight * kl, 1e-5, "loss")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_gradient_that_is_not_finite_anywhere_steps_no_parameter(dtype):
    """In float16 the scale is halved each time, until nothing overflows."""
    model, half = Llama(ModelConfig(**TINY)), dtype == torch.float16
    optimizers = make_optimizers(model, TrainConfig())
    scaler, before = torch.amp.GradScaler("cpu", init_scale=2.0**40, enabled=half), weights(model)
    matrix = model.layers[0].attention.wq.weight  # of Muon's; all else is finite or AdamW's
    for bad in (math.inf, math.nan):
        hook = matrix.register_hook(lambda g, bad=bad: g.where(torch.arange(32) > 0, bad))
        _, norm = train_step(model, [batch(2)], optimizers, 0.01, dtype, scaler)
        hook.remove()
        assert not math.isfinite(norm) and torch.equal(weights(model), before)
    norms = [train_step(model, [batch(2)], optimizers, 0.01, dtype, scaler)[1] for _ in range(40)]
    assert math.isfinite(norms[0]) != half and math.isfinite(norms[-1]) and weights(model).isfinite().all()


def test_an_epoch_shows_every_block_once_and_accumulation_cuts_a_batch():
    tokens, T = np.arange(1000, dtype=np.uint16), 16
    batches_of = partial(Text.step_batches, SimpleNamespace(tokens=tokens, block_size=T))
    steps = [batches_of(3, 2, seed=5, step=step) for step in range(21)]
    starts = [x[row, 0].item() for batches in steps for x, _ in batches for row in range(3)]
    blocks = (len(tokens) - T) // T
    for epoch in (starts[:blocks], starts[blocks : 2 * blocks]):
        assert len(set(epoch)) == blocks and len({start % T for start in epoch}) == 1
    assert starts[0] % T != starts[blocks] % T, "each epoch cuts the text at other places"
    for step in (0, 4, 20):  # --grad_accum 2 --batch_size 3 reads the rows of 1 x 6
        ((x, y),) = batches_of(6, 1, seed=5, step=step)
        assert torch.equal(x, torch.cat([part for part, _ in steps[step]])) and torch.equal(y, x + 1)
        assert not torch.equal(x, batches_of(6, 1, seed=6, step=step)[0][0])
    some = Text.some(SimpleNamespace(tokens=tokens, block_size=T), 160)  # evenly spread
    assert [prompt.tolist() for prompt, _ in some] == [[at] for at in range(0, 1000, 100)]


@pytest.mark.parametrize("sent, how, step", [
    ([signal.SIGKILL], "--dtype float32 --init_from {} --lora_r 2 --lora_dropout 0.2 --quantize nf4", 11),
    ([signal.SIGKILL], "--dtype bfloat16 --teacher {} --dropout 0.1", 3),  # before its second checkpoint
    ([signal.SIGINT, signal.SIGTERM], "--optimizer adamw", 3),  # a batch system may send two
    ([signal.SIGTERM], "--novel", 3),
])  # fmt: skip
def test_resume_after_a_signal_equals_uninterrupted(tiny_data, tiny_run, tmp_path, sent, how, step):
    straight, ended = tmp_path / "straight", tmp_path / "ended"
    flags = ["--max_steps", 40, "--eval_every", 5, "--grad_accum", 2, *how.format(tiny_run).split()]
    train_py(tiny_data, straight, *flags)
    process = conftest.start_command("train.py", *small_run(tiny_data, ended), *flags)
    while process.poll() is None and step not in logged(ended, "loss"):
        time.sleep(0.005)
    for number in sent:
        process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    killed = signal.SIGKILL in sent
    assert process.returncode == (-sent[0] if killed else 128 + sent[0]) and "Traceback" not in output, output
    if not killed:  # it was saved on the way out
        assert load(ended / "ckpt.pt")["step"] == max(logged(ended, "loss")) and "--resume" in output
    with open(ended / "log.jsonl", "a") as log:
        log.write('{"step": 12, "model": {"dim": 8}')  # half a line, which ends like a whole one
    train_py(tiny_data, ended, *flags, "--resume")
    assert conftest.content(straight / "ckpt.pt") == conftest.content(ended / "ckpt.pt")
    assert all(logged(straight, key) == logged(ended, key) for key in ("loss", "val_loss", "lr", "tokens"))
    seconds = list(logged(ended, "seconds").values())
    assert seconds == sorted(seconds)


def test_a_resumed_run_takes_some_flags_and_refuses_others(tiny_data, tiny_run, tmp_path):
    train_py(tiny_data, tmp_path, "--max_steps", 2, "--grad_accum", 2, "--momentum", 0.7)
    before = (tmp_path / "ckpt.pt").read_bytes()
    fixed = {"seed": 1, "batch_size": 2, "grad_accum": 1, "momentum": 0.9, "optimizer": "adamw", "dim": 64}
    fixed |= {"dropout": 0.1, "n_layer": 3, "lora_r": 4, "dataset": "stdlib", "init_from": tiny_run}
    fixed |= {"teacher": tiny_run, "distil_weight": 0.9, "max_steps": 1}
    for name, value in fixed.items():
        refused(quick("train.py", "--resume", "--out_dir", tmp_path, f"--{name}={value}"), f"--{name}")
    assert (tmp_path / "ckpt.pt").read_bytes() == before
    (tmp_path / "log.jsonl").unlink()  # a resumed run does without
    free = ["--max_steps", 4, "--attention", "naive", "--lr", 0.001, "--dtype", "bfloat16", "--eval_every", 1]
    run("train.py", "--resume", "--out_dir", tmp_path, *free)
    after = load(tmp_path / "ckpt.pt")
    assert after["step"] == 4 and after["config"]["attention"] == "naive" and after["train"]["lr"] == 0.001
    assert after["train"]["grad_accum"] == 2 and after["train"]["momentum"] == 0.7
    assert list(logged(tmp_path, "loss")) == [3, 4]


def test_epochs_are_passes_over_the_train_split(tiny_data, tmp_path):
    tokens, size = read_meta(str(tiny_data))[1]["splits"]["train"]["tokens"], ["--batch_size", 8, "--epochs"]
    for epochs, more in ((0.1, ["--grad_accum", 2]), (0.3, ["--resume"])):
        train_py(tiny_data, tmp_path, *size, epochs, *more)
        assert 0 <= max(logged(tmp_path, "tokens").values()) - epochs * tokens <= 16 * 32, "a step more"
    assert logged(tmp_path, "epochs")[0] == pytest.approx(0.1, abs=16 * 32 / tokens)
    assert settle({"resume": True, "max_steps": 99}, load(tmp_path / "ckpt.pt"))[2].epochs is None
    refused(quick("train.py", "--epochs", 0.2, "--resume", "--out_dir", tmp_path), "--max_steps")
    refused(quick("train.py", "--epochs", 1, "--max_steps", 9, "--dataset", tiny_data), "--epochs")


def test_a_tuned_run_resumes_by_the_same_command(tiny_data, tiny_run, tmp_path, monkeypatch):
    """From bfloat16 weights, in float32."""
    monkeypatch.chdir(tmp_path)
    theirs = load(tiny_run)
    theirs["model"] = {name: x.bfloat16() for name, x in theirs["model"].items()}
    save(tmp_path / "half.pt", theirs)
    flags = f"--dataset {tiny_data} --init_from half.pt --batch_size 2 --dtype float16 --lr 0".split()
    for more in (["--max_steps", 2], ["--max_steps", 3, "--resume"]):
        run("train.py", *flags, *more)
    ours = load(tmp_path / "out" / "own-2x32-tuned" / "ckpt.pt")
    assert ours["scaler"]["_growth_tracker"] == 3  # steps since the scale overflowed
    assert ours["step"] == 3 and {x.dtype for x in ours["model"].values()} == {torch.float32}
    assert all(torch.equal(x, theirs["model"][name].float()) for name, x in ours["model"].items())  # lr is 0


def test_the_last_evaluation_is_what_eval_ppl_prints_and_no_step_has_two(tiny_data, tmp_path):
    with mock.patch("torch.manual_seed", wraps=torch.manual_seed) as seeds:
        train_py(tiny_data, tmp_path, "--dropout", 0.1, "--max_steps", 4, "--eval_every", 2)
    assert len(set(map(str, seeds.call_args_list))) == 5, "steps drop the same numbers"
    printed = run("eval_ppl.py", tmp_path / "ckpt.pt").stdout
    assert f"perplexity {math.exp(logged(tmp_path, 'val_loss')[4]):.4f} | blocks" in printed
    for steps in (4, 5):  # the last one's, of the whole split, gives way to one of `eval_tokens`
        run("train.py", "--resume", "--out_dir", tmp_path, "--max_steps", steps)
    lines = [line for line in conftest.records(tmp_path / "log.jsonl") if "val_loss" in line]
    assert [line["step"] for line in lines] == [2, 4, 5]
    assert lines[0]["val_tokens"] == lines[1]["val_tokens"] < lines[2]["val_tokens"]


@mock.patch("train.begin_embeddings", lambda m, _: m.norm.weight.register_hook(lambda g: math.nan * g))
def test_gradients_that_stay_nan_end_a_run_in_float16(tiny_data, tmp_path):
    done = quick("train.py", *small_run(tiny_data, tmp_path), "--dtype", "float16", "--max_steps", 40)
    refused(done, "gradient norm nan")


def test_compiled_blocks_have_the_names_and_the_gradients_of_the_others():
    torch._dynamo.reset()
    model = sharp_model(novel=True, n_layer=1, k_groups=[[0, 1, 1, 1]], v_groups=[[0, 0, 0, 0]])
    adapt(model, LoRAConfig(lora_r=2, quantize="nf4")).train()
    model.checkpoint_activations = True
    names, found = list(model.state_dict()), []
    for _ in range(2):
        model.zero_grad()
        with autocast(CPU, torch.bfloat16):
            model(*batch(2)).backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        model.layers[0].compile(backend="aot_eager")
    assert list(model.state_dict()) == names and found[0].norm() > 0
    assert (found[0] - found[1]).norm() < 0.02 * found[0].norm()


def test_each_block_is_compiled_if_asked(tiny_data, tmp_path):
    there = mock.patch("train.compiler_missing", lambda device: None)
    with there, mock.patch("torch.nn.Module.compile") as compiled:
        train_py(tiny_data, tmp_path, "--compile", "--max_steps", 1)
    assert compiled.call_count == 2


def test_too_little_memory_is_one_line_and_a_bug_keeps_its_traceback(capsys):
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
    for main in (mock.Mock(side_effect=full), lambda: torch.empty(2**60)):
        with pytest.raises(SystemExit) as left:
            exit_cleanly(main)
        told = capsys.readouterr().err
        assert left.value.code == 2 and told.count("\n") == 1 and "memory" in told
    with pytest.raises(RuntimeError, match="single memory location"):
        exit_cleanly(lambda: torch.zeros(1).expand(3).add_(1))


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt(), RuntimeError("a bug")])
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, error):
    path = tmp_path / "ckpt.pt"
    save(path, {"a": 1})
    before, kind = path.read_bytes(), UserError if isinstance(error, OSError) else type(error)
    full = mock.Mock(write=mock.Mock(side_effect=[None, *[error] * 9]))  # torch.save hides what it met
    for write in (lambda: file.write(b"half"), lambda: torch.save({"a": 2}, full)):
        with pytest.raises(kind), replacing(path, "wb") as file:
            write()
            raise error
    with pytest.raises(TypeError):
        save(path, {"a": 1, "b": (i for i in "cannot be pickled")})
    path.with_name("ckpt.pt.tmp").write_bytes(b"of a killed process")
    with replacing(path, "wb") as file, pytest.raises(UserError, match="another process"):
        assert file.tell() == 0
        file.write(before)
        save(path, {"a": 2})
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["ckpt.pt"]
    with mock.patch("fcntl.flock", side_effect=OSError(errno.ENOSYS, "no locks here")), held(tmp_path):
        save(path, {"a": 3})
    assert torch.load(path)["a"] == 3
