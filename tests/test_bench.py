"""Slices of products equal the whole; of the benchmarks' tables, what can be predicted."""

import json
import sys
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close, quick, refused, sharp_model, small_run

from common import UserError
from lora import TARGETS, LoRAConfig, adapt, adapters
from model import Llama, ModelConfig, rope_angles
from study.attention import kernel_rows, multiply, prepare, slice_model
from study.bench import ROWS as ROWS_OF_MEMORY
from study.compare_groups import ROWS
from study.variants import change

SHAPE = ["--n_layer", 1, "--n_head", 4, "--dim", 32, "--vocab_size", 64, "--block_size", 40]


def table(*args) -> list[dict]:
    done = quick("study", *args, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["rows"]


def test_slices_are_rows_side_by_side_or_columns_added_up():
    x, W = torch.randn(3, 6).double(), torch.randn(4, 6).double()
    assert torch.equal(multiply(x, W, 2, columns=False), torch.cat((x @ W[:2].T, x @ W[2:].T), dim=1))
    assert torch.equal(multiply(x, W, 2, columns=True), x[:, :3] @ W[:, :3].T + x[:, 3:] @ W[:, 3:].T)
    with pytest.raises(UserError, match="3 slices do not divide the 32 of"):
        slice_model(sharp_model(vocab_size=66), 3)


@pytest.mark.parametrize("kind", ["full", "lora", "qlora"])
def test_slices_equal_the_whole(kind):
    tokens, found, products, names = torch.randint(64, (2, 20)), {}, {}, set()
    for n in (1, 2, 4):
        small = sharp_model(k_groups=[[0, 1, 1, 1]] * 2, v_groups=[[0, 0, 0, 0]] * 2)
        how = {"quantize": "nf4" if kind == "qlora" else "none", "lora_r": 3 * (kind != "full")}
        adapt(small, LoRAConfig(lora_targets=list(TARGETS), **how))
        for layer in adapters(small):
            torch.nn.init.normal_(layer.lora_B, std=0.1)
        small.double()
        if n > 1:
            slice_model(small, n)
        with mock.patch.object(F, "linear", wraps=F.linear) as linear:
            loss = small(tokens[:, :-1], tokens[:, 1:])
        products[n] = linear.call_count
        found[n] = [loss, small(tokens)]
        found[n] += torch.autograd.grad(loss, [p for p in small.parameters() if p.requires_grad])
        names.add((*small.state_dict(), small.num_params()))
    matrices = (2 * 7 + 1) * (1 if kind == "full" else 2)  # of an adapter one of the two is sliced
    assert [products[n] - products[1] for n in (2, 4)] == [matrices, 3 * matrices] and len(names) == 1
    for n in (2, 4):
        for ours, theirs in zip(found[n], found[1], strict=True):
            assert_close(ours, theirs, 1e-12, f"{n} slices")


def test_each_attention_trains_to_the_same_loss(tiny_run):
    some = [("naive", 1), ("naive", 2), ("sdpa", 1)]
    with mock.patch.multiple("study.attention", product=lambda *_: some, alone=lambda _, f, *args: f(*args)):
        rows = table("attention", "--init_from", tiny_run, "--steps", 1, "--batch_size", 4)
    assert [(row["attention"], row["pretraining_tp"]) for row in rows] == some
    assert 1 < max(row["val_loss"] for row in rows) / min(row["val_loss"] for row in rows) < 1.001
    with pytest.raises(AssertionError, match=r"naive computed .'sdpa'"):  # not the row's attention
        prepare(sharp_model(attention="sdpa"), "naive", 1)


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
@mock.patch.multiple("study.attention", H=8, D=16)
def test_kernel_rows_are_of_all_groups_directions_and_ways():
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = kernel_rows(1, 20, device, lambda run: 1.0 + 0 * len(run()))
    assert len({(row["groups"], row["direction"], row["attention"]) for row in rows}) == len(rows) == 27


def test_each_memory_saver_changes_what_it_should(monkeypatch):
    names = ("full fine-tune", "LoRA", "LoRA + accumulation", "LoRA + activation checkpointing", "QLoRA")
    monkeypatch.setattr("study.bench.ROWS", {name: ROWS_OF_MEMORY[name] for name in names})
    shape = "--n_layer 6 --dim 64 --n_head 4 --vocab_size 64 --block_size 128 --batch_size 32 --steps 1"
    rows = {row["row"]: row for row in table("memory", *shape.split())}  # activations are most of it
    lora = rows["LoRA"]
    assert all(row["optimizer"] == 8 * row["trainable"] for row in rows.values()) and len(rows) == 5
    assert lora["weights"] == rows["full fine-tune"]["weights"] + 4 * 6 * 4 * 8 * (64 + 64)
    saved = lora["weights"] - rows["QLoRA"]["weights"]
    assert saved == pytest.approx(6 * (4 * 64 * 64 + 3 * 64 * 192) * (4 - 4.127 / 8), rel=0.01)
    for how in ("accumulation", "activation checkpointing"):  # fewer rows, or those of one block of six
        assert rows[f"LoRA + {how}"]["peak"] < 0.85 * lora["peak"]


def test_decoding_training_and_texts_are_timed(tiny_run, monkeypatch):
    rows = table("decode", *SHAPE, "--batch_size", 4, "--steps", 3)
    assert [(r["model"], r["cache_bytes"]) for r in rows] == [(n, 4 * 40 * 2 * n * 8 * 4) for n in (4, 2, 1)]
    rows = table("decode", "--ckpts", tiny_run, "--kv_bits", 8, "--block_size", 40, "--steps", 3)
    assert [r["cache_bytes"] for r in rows] == [16 * 40 * 4 * 128, 16 * 40 * (128 + 2 * 16)]  # 16 scales
    refused(quick("study", "decode", *SHAPE, "--steps", 39), "steps is 39", "1 to 38")
    rows = table("latency", "--ckpts", tiny_run, "--steps", 3) + table("generate", *SHAPE, "--steps", 3)
    assert all(0 < row["p5"] <= row["median"] <= row["p95"] for row in rows)
    monkeypatch.setattr("study.bench.compiling_pays", lambda *_: False)  # it takes half a minute
    (row,) = table("train", *SHAPE, "--batch_size", 4)
    assert min(row.values()) > 0


def test_comparisons_have_their_rows(tiny_run, tiny_data, tmp_path):
    done = quick("study", "compare-groups", tiny_run, "--calibration_tokens", 2048, "--shares", 0.5)
    assert all(f"| {name} | " in done.stdout for name in ROWS), done.stderr
    run = [*small_run(tiny_data, tmp_path / "run"), "--max_steps", 2]
    done = quick("study", "time-to-loss", "transformers", "-", *run)
    assert done.returncode == 0 and "val perplexity" in done.stdout, done.stderr


def test_a_scaled_block_begins_as_small_as_a_novel_one():
    def spread_of(how: str) -> float:
        torch.manual_seed(0)
        c = ModelConfig(n_layer=8, n_head=8, novel=how in ("novel", "torch"))
        model, x = Llama(c), torch.randn(4, 32, c.dim)
        if how in ("scaled", "torch"):
            change(model, how)
        angles = rope_angles(c, torch.arange(32))
        return torch.stack([layer.attention(x, *angles).std() for layer in model.layers]).mean().item()

    found = {how: spread_of(how) for how in ("plain", "novel", "scaled", "torch")}
    assert found["scaled"] == pytest.approx(found["novel"], rel=0.1)
    assert found["plain"] == pytest.approx(18 * found["novel"], rel=0.1)
    assert found["torch"] == pytest.approx(0.29 * found["plain"], rel=0.1)


def test_pace_times_variants_in_turns():
    shape = " ".join(map(str, SHAPE))
    rows = table("pace", f"{shape} --no-compile", f"{shape} --dim 512 --no-compile", "--steps", 3)
    assert rows[0]["ratio"] == 1.0 and rows[1]["ratio"] < 1, "256 times the products"
