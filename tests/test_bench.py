"""The tables of bench.py: what can be known of them in advance."""

import json
import mmap
import sys

import pytest
import torch
from conftest import quick, refused
from torch.utils.flop_counter import FlopCounterMode

import attention
from attention import HeadGroups
from bench_attention import kernel_rows, only
from bench_speed import operations
from device import memory_bytes, peak_memory_bytes, reset_peak_memory
from model import Llama, ModelConfig

SHAPE = ["--n_layer", 2, "--dim", 32, "--n_head", 4, "--vocab_size", 64, "--block_size", 16]


@pytest.fixture(scope="module")
def memory_rows() -> dict:
    """Of a shape whose activations are most of the memory."""
    shape = ["--n_layer", 8, "--dim", 64, "--n_head", 4, "--vocab_size", 64, "--block_size", 128, "--batch_size", 32]
    done = quick("bench.py", "memory", *shape, "--steps", 1, "--lora_r", 2, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["rows"]


def test_each_memory_saver_changes_what_it_should(memory_rows):
    full, lora, both = memory_rows["full fine-tune"], memory_rows["LoRA"], memory_rows["all together"]
    assert full["optimizer"] == 8 * full["trainable"] and lora["optimizer"] == 8 * lora["trainable"]
    assert lora["trainable"] == 8 * 4 * 2 * (64 + 64) == both["trainable"]
    assert lora["weights"] == full["weights"] + 4 * lora["trainable"]
    blocks = 8 * (4 * 64 * 64 + 3 * 64 * 192)  # weights that 4 bits hold in "QLoRA"
    saved = lora["weights"] - memory_rows["QLoRA"]["weights"]
    assert saved == pytest.approx(blocks * (4 - 4.127 / 8), rel=0.01)
    assert all(row["tokens_per_s"] > 0 for row in memory_rows.values()) and len(memory_rows) == 8


def test_accumulation_and_checkpointing_lower_the_peak(memory_rows):
    """Four times fewer rows, or one block's activations instead of eight."""
    whole = memory_rows["LoRA"]["peak"]
    peaks = {name: row["peak"] / whole for name, row in memory_rows.items()}
    assert peaks["LoRA + accumulation"] < 0.8 and peaks["LoRA + activation checkpointing"] < 0.8, peaks
    assert peaks["all together"] < 0.5, peaks


def test_the_peak_is_reset_and_seen_again():
    device, size = torch.device("cpu"), 2**28

    def touched() -> mmap.mmap:
        """Memory that goes back to the system when it is closed, as a freed tensor's need not."""
        memory = mmap.mmap(-1, size)
        memory[:: mmap.PAGESIZE] = bytes(size // mmap.PAGESIZE)
        return memory

    held = touched()
    high = peak_memory_bytes(device)
    assert high >= memory_bytes(device) >= size
    held.close()
    reset_peak_memory(device)
    low = peak_memory_bytes(device)
    assert low < high - 0.9 * size or sys.platform != "linux"
    touched()
    assert peak_memory_bytes(device) >= low + 0.9 * size


def test_mistakes_about_benchmarks_get_one_line():
    refused(quick("bench.py", "speed"), "speed", "memory")
    refused(quick("bench.py", "memory", "--batch_size", 6), "batch_size 6", "divisor")
    refused(quick("bench.py", "memory", "--quantize", "nf4"), "--quantize")
    refused(quick("bench.py", "attention"), "--init_from ckpt.pt")
    refused(quick("bench.py", "attention", "--n_layer", 3), "attention does not use --n_layer")
    refused(quick("bench.py", "kernel", "--steps", 3), "kernel does not use --steps")
    if not torch.cuda.is_available():
        refused(quick("bench.py", "kernel"), "GPU", "cpu")


def test_each_attention_is_computed_and_loses_the_same(tiny_run):
    done = quick(
        "bench.py", "attention", "--init_from", tiny_run, "--steps", 1, "--lora_r", 2, "--batch_size", 4, "--json"
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [(row["attention"], row["pretraining_tp"]) for row in rows][:6] == [
        (a, n) for a in ("naive", "blocks", "sdpa") for n in (1, 2)
    ]
    assert len({row["val_loss"] for row in rows}) > 1, "all rows computed the same"
    assert max(row["val_loss"] for row in rows) < 1.001 * min(row["val_loss"] for row in rows)
    assert all(row["generation_s"] > 0 and row["peak"] > 2**20 and row["step_ms"] > 0 for row in rows)


@pytest.mark.parametrize("backend", ["naive", "blocks", "sdpa"])
def test_another_attention_than_the_one_named_is_an_error(backend):
    x, split, shared = torch.randn(1, 2, 1, 4), HeadGroups([0, 1]), HeadGroups([0, 0])
    with only("sdpa"):  # leaves this to the textbook
        attention.attend(x, x, x[:, :1], split, shared, None, "sdpa")
    with pytest.raises(AssertionError, match="computed"), only(backend):
        attention.attend(x, x, x, split, split, None, "sdpa" if backend == "naive" else "naive")
    with pytest.raises(AssertionError, match="computed"), only(backend):
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_kernel_rows_count_operations_and_bytes():
    """The rows that a GPU would time; here once each, under the interpreter."""

    def milliseconds(run):
        run()
        return 1.0

    rows = kernel_rows(1, 8, 16, 20, torch.device("cuda" if torch.cuda.is_available() else "cpu"), milliseconds)
    assert len(rows) == 3 * 3 * 3
    of = {(row["groups"], row["direction"], row["attention"]): row for row in rows}
    assert of["equal", "forward", "triton"]["operations"] == 4 * 8 * 20 * 20 * 16 / 2
    assert of["every head", "decode", "sdpa"]["bytes"] == 20 * (8 + 8) * 16 * 2
    assert of["equal", "decode", "sdpa"]["bytes"] == of["uneven", "decode", "sdpa"]["bytes"] == 20 * (2 + 2) * 16 * 2


def test_decode_halves_the_cache_with_the_heads():
    shape = ["--n_layer", 1, "--n_head", 4, "--dim", 32, "--vocab_size", 64, "--block_size", 40]
    done = quick("bench.py", "decode", "--json", *shape, "--batch_size", 4, "--steps", 3)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [row["heads"] for row in rows] == [4, 2, 1]
    assert [row["cache_bytes"] for row in rows] == [4 * 40 * 2 * heads * 8 * 4 for heads in (4, 2, 1)]
    assert rows[0]["ratio"] == 1
    refused(quick("bench.py", "decode", *shape, "--steps", 39), "steps 39", "38")
    refused(quick("bench.py", "decode", *shape, "--lora_r", 2), "--lora_r")


def test_speeds_of_training_and_writing_are_printed():
    done = quick("bench.py", "train", *SHAPE, "--batch_size", 4, "--no-compile", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert min(found[key] for key in ("train_tok_s", "eval_tok_s", "first_step_s", "peak_gb", "matmul_gflops")) > 0
    assert sum(found["shares"].values()) == pytest.approx(1) and min(found["shares"].values()) >= 0
    assert "training" in quick("bench.py", "train", *SHAPE, "--no-compile").stdout
    done = quick("bench.py", "generate", *SHAPE, "--batch", 3, "--no-compile", "--json")
    found = json.loads(done.stdout)
    assert found["tok_s"] > 0 and found["batch"] == 3 and not found["compiled"]
    refused(quick("bench.py", "generate", "--batch", 0), "batch is 0", "--batch")
    refused(quick("bench.py", "train", "--batch", 2), "train does not use --batch")


def test_operations_are_those_of_the_products():
    """Counted by PyTorch: its counter knows no causal mask, so the scores and values count twice."""
    shape = {"n_layer": 2, "dim": 32, "n_head": 4, "vocab_size": 64, "block_size": 16}
    c = ModelConfig(**shape, attention="naive", tie_embeddings=False, novel=True)
    model, x = Llama(c), torch.zeros(1, 16, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(x, x).backward()
    attention_twice = 6 * c.n_layer * 32 * 16
    assert counter.get_total_flops() == 16 * (operations(c, model) + attention_twice)


def test_latencies_are_of_each_checkpoint(tiny_run):
    done = quick("bench.py", "latency", "--ckpts", tiny_run, "--steps", 3, "--json")
    assert done.returncode == 0, done.stderr
    [row] = json.loads(done.stdout)["rows"]
    assert 0 < row["p5"] <= row["median"] <= row["p95"] and row["layers"] == 2
    assert f"{row['params']:,}" in quick("bench.py", "latency", "--ckpts", tiny_run, "--steps", 1).stdout
    refused(quick("bench.py", "latency"), "--ckpts")
