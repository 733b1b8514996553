"""Slices of products equal the whole; of the benchmarks' tables, what can be predicted."""

import json
import math
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import adapted, assert_close, quick, records, refused, run, sharp_model, small_run
from torch.utils.flop_counter import FlopCounterMode

from checkpoint import load
from common import UserError, peak_memory_bytes
from lora import TARGETS
from model import Llama, ModelConfig, rope_angles
from study.attention import kernel_rows, prepare, slice_model
from study.bench import ROWS as MEMORY_ROWS
from study.bench import in_turns
from study.compare_groups import ROWS as COMPARED
from study.variants import change

SHAPE = ["--n_layer", 1, "--n_head", 4, "--dim", 32, "--vocab_size", 64, "--block_size", 40]


def table(*args) -> list[dict]:
    return json.loads(run("study", *args, "--json").stdout)["rows"]


@pytest.mark.parametrize("kind", ["full", "lora", "qlora"])
def test_slices_equal_the_whole(kind):
    tokens, found, products, names = torch.randint(64, (2, 20)), {}, {}, set()
    for n in (1, 2, 4):
        small = sharp_model(k_groups=[[0, 1, 1, 1]] * 2, v_groups=[[0, 0, 0, 0]] * 2)
        how = {"quantize": "nf4" if kind == "qlora" else "none", "lora_r": 3 * (kind != "full")}
        small = adapted(small, lora_targets=list(TARGETS), **how).double()
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
    with pytest.raises(UserError, match="3 slices do not divide the 32 of"):
        slice_model(sharp_model(vocab_size=66), 3)


def test_each_attention_trains_to_the_same_loss(tiny_run):
    some = [("naive", 1), ("naive", 2), ("sdpa", 1)]
    here = mock.patch.multiple("study.attention", product=lambda *_: some, alone=lambda _, f, *args: f(*args))
    with here, mock.patch("study.attention.slice_model", wraps=slice_model) as sliced:
        rows = table("attention", "--init_from", tiny_run, "--steps", 1, "--batch_size", 4)
    assert sliced.call_count == 2, "it trained or wrote in whole products"
    assert [(row["attention"], row["pretraining_tp"]) for row in rows] == some
    assert 1 < max(row["val_loss"] for row in rows) / min(row["val_loss"] for row in rows) < 1.001
    with pytest.raises(AssertionError, match=r"naive computed .'sdpa'"):  # not the row's attention
        prepare(sharp_model(attention="sdpa"), "naive", 1)


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
@mock.patch.multiple("study.attention", H=8, D=16)
def test_kernel_rows_count_the_operations_of_half_the_scores():
    def counted(run):  # by PyTorch: of the textbook all scores, and 4 products in the backward, not 5
        with FlopCounterMode(display=False) as seen:
            run()
        return max(1, seen.get_total_flops())

    rows = kernel_rows(1, 20, torch.device("cuda" if torch.cuda.is_available() else "cpu"), counted)
    found = {(row["groups"], row["attention"], row["direction"]): 1e9 * row["tflops"] for row in rows}
    parts = [found["every head", "naive", part] for part in ("forward", "backward", "decode")]
    assert parts == [1 / 2, 5 / 4 / 2, 1] and len(found) == len(rows) == 27


def test_each_memory_saver_changes_what_it_should(monkeypatch):
    names = ("LoRA", "all together")
    monkeypatch.setattr("study.bench.ROWS", {name: MEMORY_ROWS[name] for name in names})
    shape = "--n_layer 6 --dim 64 --n_head 4 --vocab_size 64 --block_size 128 --batch_size 32 --steps 1"
    rows = {row["row"]: row for row in table("memory", *shape.split())}  # activations are most of it
    lora = rows["LoRA"]
    assert all(row["optimizer"] == 8 * row["trainable"] for row in rows.values()) and len(rows) == 2
    matrices, maps = 6 * (4 * 64 * 64 + 3 * 64 * 192), 6 * 2 * 3 * 4 * 8  # of the blocks; bytes of HeadGroups
    rest = 64 * 64 + 13 * 64 + 6 * 4 * 8 * (64 + 64)  # embeddings, norms, adapter
    assert lora["weights"] == 4 * (matrices + rest) + maps
    saved = lora["weights"] - rows["all together"]["weights"]
    assert saved == pytest.approx(matrices * (4 - 4.127 / 8), rel=0.01)
    # a quarter of the rows, of one block of six: either alone leaves 0.37 or 0.63
    assert rows["all together"]["peak"] < 0.3 * lora["peak"]


def test_peak_memory_where_the_system_does_not_tell_it(monkeypatch):
    known = peak_memory_bytes(torch.device("cpu"))
    monkeypatch.setattr(Path, "read_text", lambda path: "VmSize: 9 kB")  # as gVisor
    assert 0.5 < peak_memory_bytes(torch.device("cpu")) / known < 2


def test_rates_are_of_the_seconds_that_a_run_took(tiny_run, monkeypatch):
    """The timer is replaced: every run takes 1, 2 and 6 seconds."""

    def times(runs, *_, **how):
        for one in runs.values():
            one()
        return {name: [1.0, 2.0, 6.0] for name in runs}

    monkeypatch.setattr("study.bench.compiling_pays", lambda *_: False)  # it takes half a minute
    monkeypatch.setattr("study.bench.in_turns", times)
    rows = [list(row.values()) for row in table("decode", *SHAPE, "--batch_size", 4, "--steps", 3)]
    assert rows == [[n, 4 * 40 * 2 * n * 8 * 4, 2000, 1] for n in (4, 2, 1)]  # bytes, ms, ratio
    assert [row["model"] for row in table("decode", *SHAPE, "--n_kv_head", 2, "--steps", 3)] == [2, 1]
    rows = table("decode", "--ckpts", tiny_run, "--kv_bits", 8, "--block_size", 40, "--steps", 3)
    assert [r["cache_bytes"] for r in rows] == [16 * 40 * 4 * 128, 16 * 40 * (128 + 2 * 16)]  # 16 scales
    refused(quick("study", "decode", *SHAPE, "--steps", 39), "steps is 39", "1 to 38")
    (row,) = table("latency", "--ckpts", tiny_run)
    found = [row[key] for key in ("p5", "median", "p95", "tokens", "tok_s")]
    assert found == pytest.approx([1100, 2000, 5600, 31, 16 * 31 / 2])
    (row,) = table("train", *SHAPE, "--batch_size", 4)
    weights = 4 * 32**2 + 3 * 32 * 96 + 64 * 32 + 32 * 40  # and half of the scores
    found = [row["train_tok_s"], row["eval_tok_s"], row["reached"]]  # 6 operations for each, by 2 of w1's
    assert found == pytest.approx([4 * 40 / 2, 4 * 40 / 2, 6 * weights / (2 * 32 * 96)])


def test_comparisons_measure_what_their_rows_say(tiny_run, tiny_data, tmp_path):
    flags = ["--calibration_tokens", 2048, "--shares", 0.5, 1, "--seeds", 1]
    _, *lines = quick("study", "compare-groups", tiny_run, *flags).stdout.splitlines()
    cells = {name: cells for name, *cells in (line.strip("| ").split(" | ") for line in lines[2:])}
    assert list(cells) == list(COMPARED) and {whole for _, whole in cells.values()} == {"1.000"}
    halves = [float(half) for half, _ in cells.values()]
    assert halves[0] > halves[3] > halves[6] > halves[10], "means, closed form, refitted, latents"
    how = "transformers", *small_run(tiny_data, tmp_path / "run"), "--max_steps", 2
    assert "val perplexity" in run("study", "begin", *how).stdout
    assert records(tmp_path / "run/log.jsonl")[1]["loss"] == pytest.approx(math.log(400), rel=0.01)  # a guess
    assert "layers.0.model.model.embed_tokens.weight" in load(tmp_path / "run/ckpt.pt")["model"]


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
    seen = []
    found = in_turns({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, 2)
    assert "".join(seen) == "ababab" and [len(own) for own in found.values()] == [2, 2]  # the first warm up
