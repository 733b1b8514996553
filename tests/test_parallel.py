"""Several processes, as torchrun starts them, do what one does."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ONE_THREAD, ROOT, command, quick, refused, sharp_model, small_run

from checkpoint import load
from config import UserError
from files import held
from parallel import divided

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]


def together(count: int, script: str, *args, gpus: str = "") -> subprocess.CompletedProcess:
    """Run one of the project's programs in `count` processes, without GPUs unless some are named."""
    line = [*TORCHRUN, str(count), str(ROOT / script), *map(str, args)]
    return subprocess.run(
        line, capture_output=True, text=True, timeout=240, env={**ONE_THREAD, "CUDA_VISIBLE_DEVICES": gpus}, cwd=ROOT
    )


def largest_difference(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max((a[name].double() - x.double()).abs().max().item() for name, x in b.items())


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> list[dict]:
    """What one process makes of divided_steps.py."""
    path = tmp_path_factory.mktemp("steps") / "alone.pt"
    done = command("tests/divided_steps.py", path)
    assert done.returncode == 0, done.stderr
    return torch.load(path)[0]


@pytest.mark.parametrize("count", [2, 4])
def test_steps_equal_those_of_one_process(alone, tmp_path, count):
    """DDP and FSDP2, all weights and LoRA, two micro-batches of unequal size, with unequal numbers of targets."""
    done = together(count, "tests/divided_steps.py", tmp_path / "steps.pt")
    assert done.returncode == 0, done.stderr
    for fsdp, variants in enumerate(torch.load(tmp_path / "steps.pt")):
        for one, many in zip(alone, variants):
            double = one["tok_embeddings.weight"].dtype == torch.float64
            # Muon computes in bfloat16 and magnifies what is small in a gradient, rounding too: seen are 4e-3
            worst, tolerance = largest_difference(one, many), 1e-10 if double else 0.01
            assert worst < tolerance, f"{count} processes, fsdp {fsdp}: weights differ by {worst:.1e}"
            assert one["losses"][-1] < one["losses"][0] - 0.01, "nothing was learned"


def test_a_run_goes_on_with_another_number_of_processes(tiny_data, tmp_path):
    """Two that share the weights, then one, then four with all of them; its file is like that of one."""
    flags = ["--device", "cpu", "--dtype", "float32", "--optimizer", "adamw", "--grad_accum", 2, "--dataset", tiny_data]
    flags += ["--warmup_steps", 0, "--lr", 0.002, "--min_lr", 0.002, "--novel"]
    one, several = (small_run(tiny_data, tmp_path / name) + flags for name in ("one", "several"))
    assert command("train.py", *one, "--max_steps", 12).returncode == 0
    for count, how in ((2, ["--fsdp", "--max_steps", 4]), (1, ["--max_steps", 8]), (4, ["--max_steps", 12])):
        resume = ["--resume", "--no-fsdp"] if "--fsdp" not in how else []
        line = ["train.py", *several, *resume, *how]
        done = command(*line) if count == 1 else together(count, *line)
        assert done.returncode == 0 and done.stdout.count("a sample:") == 1, done.stderr
        assert ("2 processes that share the weights" if count == 2 else "4 processes ->") in done.stdout or count == 1
    ours, theirs = (load(tmp_path / name / "ckpt.pt") for name in ("several", "one"))
    a, b = (torch.cat([x.flatten() for x in part["model"].values()]) for part in (ours, theirs))
    # the norm: where a gradient is nearly 0, Adam divides rounding by rounding, and single weights go other ways
    assert (a - b).norm() < 1e-4 * b.norm(), f"weights differ by {(a - b).norm() / b.norm():.1e} of their size"
    assert {key: type(value) for key, value in ours.items()} == {key: type(value) for key, value in theirs.items()}
    assert ours["step"] == 12 and ours["tokens"] == theirs["tokens"]
    for state, other in zip(ours["optimizers"], theirs["optimizers"], strict=True):
        shapes = [{k: x.shape for k, x in moments.items()} for moments in (state["state"][0], other["state"][0])]
        assert state["param_groups"] == other["param_groups"] and shapes[0] == shapes[1]
    assert (tmp_path / "several" / "ckpt.pt").stat().st_size < 1.01 * (tmp_path / "one" / "ckpt.pt").stat().st_size
    steps = [json.loads(line).get("loss") for line in (tmp_path / "several" / "log.jsonl").read_text().splitlines()]
    assert sum(loss is not None for loss in steps) == 12, "another process wrote into the log"


def test_an_evaluation_is_divided(tiny_run):
    flags = ["eval_ppl.py", tiny_run, "--method", "all", "--json", "--batch_size", 3, "--device", "cpu"]
    one, two = (json.loads(run.stdout) for run in (quick(*flags), together(2, *flags)))
    for record in (one, two):
        del record["tokens_per_s"]
    assert one == two  # to the last bit


def test_a_search_is_divided(tiny_run, tmp_path):
    """The groupings of chance are the same; the knapsack's, several at a time, are new each."""
    found = {}
    for count, method in ((1, "random"), (2, "random"), (2, "knapsack")):
        flags = [
            tiny_run,
            "--device",
            "cpu",
            "--kv_budget",
            0.5,
            "--method",
            method,
            "--max_evals",
            7,
            "--search_tokens",
            512,
        ]
        flags += ["--calibration_tokens", 512, "--refit", "none", "--out", tmp_path / f"{method}-{count}.json"]
        run = quick if count == 1 else (lambda *line: together(2, *line))
        done = run("search_groups.py", *flags)
        assert done.returncode == 0 and done.stdout.count("--- next:") == 1, done.stderr
        log = (tmp_path / f"{method}-{count}.jsonl").read_text().splitlines()
        found[count, method] = [json.loads(line) for line in log][1:]
    one, two = ([(r["k_groups"], r["v_groups"], r["loss"]) for r in found[count, "random"]] for count in (1, 2))
    assert one == two and len(one) >= 5
    assert len({str(r["k_groups"] + r["v_groups"]) for r in found[2, "knapsack"]}) == len(found[2, "knapsack"]) >= 5


def test_a_mistake_is_told_once_and_ends_all(tiny_data, tmp_path):
    done = together(2, "train.py", *small_run(tiny_data, tmp_path), "--max_stepz", 2)
    assert done.returncode != 0 and done.stderr.count("train.py: error:") == 1 and "--max_steps?" in done.stderr


def test_a_failure_of_one_process_ends_all_with_its_message(tiny_data, tmp_path):
    """The first may not write into the folder, the second waits for it."""
    with held(tmp_path / "run"):
        done = together(2, "train.py", *small_run(tiny_data, tmp_path / "run"), "--max_steps", 3)
    assert done.returncode != 0 and done.stderr.count("run is in use by another process") == 1, done.stderr
    assert "[rank" not in done.stderr, "a traceback of another process"
    assert not list((tmp_path / "run").iterdir())


def test_what_cannot_be_shared_is_refused(tiny_data, tmp_path):
    refused(quick("train.py", *small_run(tiny_data, tmp_path), "--fsdp"), "--no-fsdp", "torchrun")
    with pytest.raises(UserError, match="--dtype bfloat16"):
        divided(sharp_model(), True, torch.float16, torch.device("cpu"))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("how", [[], ["--fsdp"]])
def test_two_gpus_train_as_one_process_does(tiny_data, tmp_path, how):
    losses = []
    for name, run in (
        ("one", lambda *line: command(*line)),
        ("two", lambda *line: together(2, *line, *how, gpus="0,1")),
    ):
        flags = [*small_run(tiny_data, tmp_path / name), "--dtype", "float32", "--max_steps", 8]
        done = run("train.py", *flags)
        assert done.returncode == 0, done.stderr
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines()
        losses.append(torch.tensor([json.loads(line)["loss"] for line in lines if '"loss"' in line]))
    assert (losses[0] - losses[1]).abs().max() < 1e-3
