"""Several processes do what one does. torchrun starts this file, too: it takes ten steps then."""

import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import ONE_THREAD, TINY, adapted, command, logged, run, sharp_model, small_run, tokens_of

from checkpoint import load
from common import IGNORE, UserError, held
from model import Llama, ModelConfig
from parallel import divided, first_alone, processes, rank, whole
from train import TrainConfig, learning_rate, make_optimizers, train_step

GROUPS = {"k_groups": [[0, 1, 1, 1], [0, 0, 1, 2]], "v_groups": [[0, 0, 0, 0], [0, 1, 1, 0]]}
# rank of the adapter, optimizer, activation checkpointing
VARIANTS = [(0, "adamw", False), (4, "adamw", True), (0, "muon", False)]


@mock.patch.object(torch.Tensor, "bfloat16", lambda x: x)  # Muon in float64, as all else
def ten_steps(r: int, optimizer: str, recompute: bool, fsdp: bool) -> dict:
    """The state dict after ten steps, and the losses; whole in the first process."""
    dtype = torch.float64
    torch.manual_seed(0)
    c = ModelConfig(**TINY | GROUPS | {"hidden_dim": 47, "novel": True})  # two have 24 rows of w1, and 23
    model = adapted(Llama(c), 0.02, lora_r=r).to(dtype).train()
    model.checkpoint_activations = recompute
    config = TrainConfig(optimizer=optimizer, lr=0.01, max_steps=10, warmup_steps=3)
    learner, scaler = divided(model, fsdp, dtype, torch.device("cpu")), torch.amp.GradScaler(enabled=False)
    optimizers, losses = make_optimizers(model, config), []
    for step in range(config.max_steps):
        x, y = (tokens_of((8, 16), 2 * (step % 2) + i) for i in range(2))
        y[torch.arange(16) < 2 * torch.arange(8)[:, None]] = IGNORE  # very different numbers of targets
        batches = list(zip(x.split(7), y.split(7)))  # of 7 rows and 1
        losses.append(train_step(learner, batches, optimizers, learning_rate(config, step), dtype, scaler)[0])
    return {**whole(model.state_dict(keep_vars=True)), "losses": torch.tensor(losses, dtype=torch.float64)}


def torchrun(count: int, script: str, *args, gpus: str = ""):
    """Run one of the project's programs in `count` processes, without GPUs unless some are named."""
    line = "--standalone", "--nproc_per_node", count, script, *args
    return command("-m torch.distributed.run", *line, env={**ONE_THREAD, "CUDA_VISIBLE_DEVICES": gpus})


def test_steps_equal_those_of_one_process(tmp_path):
    """DDP and FSDP2, all weights and LoRA, with a process that has no row."""
    done = torchrun(2, "tests/test_parallel.py", tmp_path / "steps.pt")
    assert done.returncode == 0, done.stderr
    found, ours = torch.load(tmp_path / "steps.pt"), [ten_steps(*variant, fsdp=False) for variant in VARIANTS]
    for fsdp, variants in enumerate(found):
        for one, many in zip(ours, variants):
            assert one.keys() == many.keys()
            worst = torch.stack([(one[name] - x).abs().max() for name, x in many.items()]).max().item()
            assert worst < 1e-10, f"fsdp {fsdp}: weights differ by {worst:.1e}"
            assert one["losses"][8] < one["losses"][0] - 0.01, "nothing was learned"


def test_a_run_goes_on_with_another_number_of_processes(tiny_data, tmp_path):
    flags = ["--device", "cpu", "--dtype", "float32", "--optimizer", "adamw", "--grad_accum", 2, "--novel"]
    flags += ["--warmup_steps", 0, "--lr", 0.002, "--min_lr", 0.002]  # the same in each part
    one, several = ([*small_run(tiny_data, tmp_path / name), *flags] for name in ("one", "several"))
    run("train.py", *one, "--max_steps", 12)
    path = tmp_path / "several/ckpt.pt"
    sizes = []
    for count, how, last in ((1, [], 4), (2, ["--resume", "--fsdp"], 8), (1, ["--resume", "--no-fsdp"], 12)):
        line = ["train.py", *several, *how, "--max_steps", last]
        done = torchrun(2, *line) if count == 2 else run(*line)
        assert done.returncode == 0 and done.stdout.count("a sample:") == 1, done.stderr
        sizes.append(path.stat().st_size)
    assert max(sizes) < 1.01 * min(sizes), "shards or tied matrices are saved twice"
    ours, theirs = load(path), load(tmp_path / "one/ckpt.pt")
    a, b = (torch.cat([x.flatten() for x in part["model"].values()]) for part in (ours, theirs))
    # the norm: where a gradient is nearly 0, Adam divides rounding by rounding, and weights go other ways
    assert (a - b).norm() < 1e-4 * b.norm(), f"weights differ by {(a - b).norm() / b.norm():.1e}"
    assert ours["step"] == 12 and ours["tokens"] == theirs["tokens"]
    log = (tmp_path / "several/log.jsonl").read_text()
    assert log.count('"loss"') == 12, "another process wrote into the log"


def test_a_failure_is_told_once_and_ends_all(tiny_data, tmp_path):
    """What all processes see, and what only the first sees."""
    done = torchrun(2, "train.py", *small_run(tiny_data, tmp_path / "lost"), "--lr", 1e9, "--max_steps", 9)
    assert done.stderr.count("train.py: error: training diverged") == 1 and "[rank" not in done.stderr
    with held(tmp_path / "run"):
        done = torchrun(2, "train.py", *small_run(tiny_data, tmp_path / "run"), "--max_steps", 3)
    assert done.returncode != 0 and done.stderr.count("run is in use by another process") == 1, done.stderr
    assert "[rank" not in done.stderr, "a traceback of another process"
    assert not list((tmp_path / "run").glob("*"))
    with pytest.raises(UserError, match="--dtype bfloat16"):
        divided(sharp_model(), True, torch.float16, torch.device("cpu"))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("how", [[], ["--fsdp"], ["--fsdp", "--attention", "triton"]])
def test_two_gpus_train_as_one_process_does(tiny_data, tmp_path, how):
    flags = ["--dtype", "float32", "--max_steps", 8, "--n_head", 2]
    run("train.py", *small_run(tiny_data, tmp_path / "one"), *flags)
    done = torchrun(2, "train.py", *small_run(tiny_data, tmp_path / "two"), *flags, *how, gpus="0,1")
    assert done.returncode == 0 and "no triton attention" not in done.stderr, done.stderr
    assert logged(tmp_path / "two", "loss") == pytest.approx(logged(tmp_path / "one", "loss"), abs=1e-3)


@processes()
def main() -> None:
    mark = Path(sys.argv[1] + ".mark")
    with first_alone():
        time.sleep(0 if rank() else 0.5)
        assert rank() == 0 or mark.exists(), "the others did not wait for the first"
        mark.touch()
    found = [[ten_steps(*variant, fsdp) for variant in VARIANTS] for fsdp in (False, True)]
    if rank() == 0:
        torch.save(found, sys.argv[1])


if __name__ == "__main__":
    main()
