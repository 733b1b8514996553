"""Perplexity against Hugging Face's, and each protocol against its definition."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import ROOT, quick, sharp_model, to_hugging_face

from checkpoint import build, load
from eval_ppl import EvalConfig, evaluate, mean_nll, perplexities, window_nll
from model import ModelConfig


def random_tokens(number, vocab_size=64):
    return np.random.default_rng(0).integers(vocab_size, size=number)


@pytest.mark.parametrize("settings", [{}, {"n_kv_head": 2, "tie_embeddings": False}])
def test_perplexity_equals_hugging_face_on_the_same_tokens(settings):
    model, tokens, context = sharp_model(**settings), random_tokens(1000), 48
    twin, nll, block_ppl = to_hugging_face(model), [], []
    for start in range(0, 999, context):
        x = torch.from_numpy(tokens[start : start + context + 1])[None]
        losses = torch.nn.functional.cross_entropy(twin(x[:, :-1]).logits[0], x[0, 1:], reduction="none")
        nll.append(losses.double())
        block_ppl += [losses.mean().exp().item()] if len(losses) == context else []
    record, nats = perplexities(model, tokens, ["blocks", "block_mean"], context, context, torch.float32, 4)
    theirs = torch.cat(nll).mean().exp().item()
    assert f"{record['blocks']:.4e}" == f"{theirs:.4e}" and abs(record["blocks"] / theirs - 1) < 1e-5
    assert abs(record["block_mean"] / np.mean(block_ppl) - 1) < 1e-5
    assert record["sliding"] is None and abs(math.exp(nats) - record["blocks"]) < 1e-9


@pytest.mark.parametrize(
    "context, stride, number", [(32, 32, 200), (32, 8, 200), (32, 1, 60), (48, 20, 49), (48, 20, 3)]
)
def test_every_token_is_scored_once_with_enough_past(context, stride, number):
    model, tokens = sharp_model(), random_tokens(number)
    windows, place = window_nll(model, tokens, context, stride, torch.float32, batch_size=3), 1
    for i, window in enumerate(windows):
        first, end = i * stride, place + len(window)  # this window reads from `first` on and predicts tokens[place:end]
        assert len(window) > 0 and place - first >= min(place, context - stride), f"token {place}: past {place - first}"
        x = torch.from_numpy(tokens[first:end])[None]
        expected = torch.nn.functional.cross_entropy(model(x[:, :-1])[0], x[0, 1:], reduction="none")[-len(window) :]
        torch.testing.assert_close(window, expected, rtol=1e-4, atol=1e-5)
        place = end
    assert place == number, "some tokens were not scored"


def test_a_larger_stride_samples_blocks_evenly():
    model, tokens = sharp_model(), random_tokens(1000)
    blocks, some = (window_nll(model, tokens, 32, stride, torch.float32) for stride in (32, 160))
    assert len(some) == 7 and all(torch.allclose(a, b, atol=1e-5) for a, b in zip(some, blocks[::5], strict=True))


def test_stride_of_the_context_is_blocks_and_block_mean_lies_above():
    record, _ = perplexities(
        sharp_model(), random_tokens(500), ["blocks", "sliding", "block_mean"], 32, 32, torch.float32, 8
    )
    assert record["blocks"] == pytest.approx(record["sliding"], rel=1e-7)
    assert record["block_mean"] > record["blocks"]


def test_batch_size_does_not_change_the_number():
    model, tokens = sharp_model().double(), random_tokens(333)
    losses = [mean_nll(window_nll(model, tokens, 32, 12, torch.float64, batch_size)) for batch_size in (1, 5, 64)]
    assert max(losses) - min(losses) < 1e-6


def test_bits_per_byte_counts_the_bytes_of_the_text(tiny_run):
    record, _ = evaluate(EvalConfig(str(tiny_run), text=str(ROOT / "README.md"), method="all"))
    size = (ROOT / "README.md").stat().st_size
    nats = math.log(record["blocks"]) * record["tokens"]
    assert record["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-9)


def test_json_has_the_promised_keys_and_the_text_output_the_same_number(tiny_run):
    done = quick("eval_ppl.py", tiny_run, "--split", "test", "--json")
    record = json.loads(done.stdout)
    keys = (
        "blocks sliding block_mean bits_per_byte tokens context stride tokenizer params kv_bytes_per_token tokens_per_s"
    )
    assert list(record) == keys.split() and record["sliding"] is None and record["block_mean"] is None
    model, _ = build(load(tiny_run))
    assert record["params"] == sum(p.numel() for p in set(model.parameters()))
    assert record["kv_bytes_per_token"] == 2 * 2 * 32 * 4  # K and V, 2 layers, width 32, float32
    assert f"perplexity {record['blocks']:.4f}" in quick("eval_ppl.py", tiny_run, "--split", "test").stdout


def test_max_tokens_bounds_the_tokens_scored(tiny_run):
    assert evaluate(EvalConfig(str(tiny_run), max_tokens=100))[0]["tokens"] == 100


def test_trained_model_is_far_better_than_a_uniform_guess(tiny_run):
    record, _ = evaluate(EvalConfig(str(tiny_run)))
    assert record["blocks"] < 0.6 * ModelConfig(**load(tiny_run)["config"]).vocab_size
