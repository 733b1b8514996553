"""Perplexity against Hugging Face's and float64, each protocol against its definition; streamed text."""

import json
import math
import random
import string

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, assert_close, run, sharp_model, to_hugging_face, tokens_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from checkpoint import build, load, save
from data.tokenizer import read_tokenizer
from eval_ppl import EvalConfig, evaluate, mean_nll, split_tokens, window_nll
from sample import readable


def scored(path, *flags) -> dict:
    return json.loads(run("eval_ppl.py", path, "--json", *flags).stdout)


@pytest.mark.parametrize("settings", [{}, {"n_kv_head": 2, "tie_embeddings": False}])
def test_perplexity_equals_hugging_face_on_the_same_tokens(settings):
    model, tokens, context = sharp_model(**settings), tokens_of((1000,)).numpy(), 48
    twin, nll, block_ppl = to_hugging_face(model), [], []
    for start in range(0, 999, context):
        x = torch.from_numpy(tokens[start : start + context + 1])[None]
        nll.append(F.cross_entropy(twin(x[:, :-1]).logits[0], x[0, 1:], reduction="none").double())
        block_ppl += [nll[-1].mean().exp().item()] if len(nll[-1]) == context else []
    how = {"context": context, "stride": context, "batch_size": 4, "method": "all"}
    record, _ = evaluate(EvalConfig("", **how), model, tokens, torch.float32)
    assert abs(record["blocks"] / torch.cat(nll).mean().exp().item() - 1) < 1e-5
    assert abs(record["block_mean"] / np.mean(block_ppl) - 1) < 1e-5
    assert record["block_mean"] > record["blocks"] == pytest.approx(record["sliding"], rel=1e-7)


@torch.no_grad()
def test_losses_at_49152_classes_equal_float64():
    model = sharp_model(vocab_size=49152, tie_embeddings=False, n_layer=1)
    x = tokens_of((257,), vocab_size=49152)
    model.output.weight *= 2.5 / model(x[:-1].view(4, 64)).std()  # a trained model's spread
    logits = model(x[:-1].view(4, 64)).flatten(0, 1)  # the softmax is tested, not the model
    exact = F.cross_entropy(logits.double(), x[1:], reduction="none")
    found = window_nll(model, x.numpy(), 64, 64, torch.float32)
    assert abs(mean_nll(found) - exact.mean().item()) < 1e-6
    assert_close(torch.cat(found), exact, 1e-6, "losses")


def test_products_in_bfloat16_come_near_float64(tiny_run):
    """Some 15 products before a logit each round operands and results by up to 2^-9, together by sqrt(3 * 15)
    2^-9 / sqrt(3) = 0.8% of it, and a loss by as much of the logits' spread; the mean is far closer."""
    model, tokenizer = build(load(tiny_run))
    tokens = split_tokens(load(tiny_run), tokenizer, None, "val")[0][:4097]
    found = window_nll(model, tokens, 32, 32, torch.bfloat16)
    exact = window_nll(model.double(), tokens, 32, 32, torch.float64)
    one = 0.008 * model(torch.from_numpy(tokens[:-1].astype(np.int64)).view(-1, 32)).std(-1).mean()
    difference = torch.cat(found) - torch.cat(exact)
    assert 0.1 * one < difference.square().mean().sqrt() < one  # it was rounded, but not more
    assert difference.mean().abs() < 0.1 * one
    assert (torch.cat(found).bfloat16() != torch.cat(found)).any(), "the losses themselves were rounded"


@pytest.mark.parametrize("context, stride, number", [(32, 32, 200), (32, 8, 200), (32, 1, 60), (48, 20, 3)])
def test_every_token_is_scored_once_with_enough_past(context, stride, number):
    model, tokens = sharp_model(), tokens_of((number,)).numpy()
    windows, place = window_nll(model, tokens, context, stride, torch.float32, batch_size=3), 1
    for i, window in enumerate(windows):
        first, end = i * stride, place + len(window)  # it reads from `first` on, predicts tokens[place:end]
        assert len(window) > 0 and place - first >= min(place, context - stride), f"token {place}"
        x = torch.from_numpy(tokens[first:end])[None]
        expected = F.cross_entropy(model(x[:, :-1])[0], x[0, 1:], reduction="none")[-len(window) :]
        torch.testing.assert_close(window, expected, rtol=1e-4, atol=1e-5)
        place = end
    assert place == number, "some tokens were not scored"


def test_the_command_prints_what_it_measures(tiny_run, tiny_data, tmp_path):
    checkpoint, text = load(tiny_run), tmp_path / "text.md"
    model, _ = build(checkpoint)
    text.write_bytes((ROOT / "README.md").read_bytes().replace(b"\n", b"\r\n"))
    flags = ["--text", text, "--method", "all"]
    record = scored(tiny_run, *flags)
    bits = math.log2(record["blocks"]) * record["tokens"] / text.stat().st_size
    assert record["bits_per_byte"] == pytest.approx(bits, rel=1e-9)
    assert record["params"] == sum(p.numel() for p in set(model.parameters()))
    assert f"perplexity {record['sliding']:.4f} | sliding" in run("eval_ppl.py", tiny_run, *flags).stdout
    half = {name: x.bfloat16() for name, x in checkpoint["model"].items()}
    save(tmp_path / "half.pt", checkpoint | {"model": half})
    ids = np.fromfile(tiny_data / "test.bin", np.uint16)[:101]
    for path, dtype, size, most in (
        (tiny_run, "bfloat16", 2, 1e-6),
        (tmp_path / "half.pt", "float32", 4, 1e-9),
    ):
        found = scored(path, "--max_tokens", 100, "--split", "test", "--dtype", dtype)
        nll = window_nll(build(load(path))[0].float(), ids, 32, 32, getattr(torch, dtype))
        assert math.log(found["blocks"]) == pytest.approx(mean_nll(nll), abs=most)
        assert found["tokens"] == 100 and found["sliding"] is None
        assert found["kv_bytes_per_token"] == 2 * 2 * 32 * size  # K and V, 2 layers, width 32
        assert found["stride"] == 16 and found["products"] == dtype
    assert scored(tiny_run, "--kv_bits", 8, "--max_tokens", 9)["kv_bytes_per_token"] == 2 * 2 * (32 + 4 * 2)
    assert "KV cache in 8 bits" in run("eval_ppl.py", tiny_run, "--kv_bits", 8, "--max_tokens", 9).stdout
    other = {name: {**part, "sha256": "0"} for name, part in checkpoint["data"]["splits"].items()}
    save(tmp_path / "other.pt", checkpoint | {"data": {"splits": other}})
    for path, told in ((tiny_run, False), (tmp_path / "other.pt", True)):
        assert ("prepared anew" in run("eval_ppl.py", path, "--max_tokens", 9).stderr) == told
    assert scored(tiny_run)["blocks"] < 0.6 * model.config.vocab_size  # far better than a uniform guess


def test_a_seed_gives_the_same_text_again_and_the_next_sample_has_the_next_seed(tiny_run):
    flags = ["--num_samples", 3, "--max_new_tokens", 20, "--seed"]
    printed = [run("sample.py", tiny_run, *flags, seed).stdout for seed in (0, 1)]
    zero, one = ([part.split("\n", 1)[1] for part in text.split("--- sample")[1:]] for text in printed)
    assert zero[1:] == one[:2] and zero[0] != zero[1]


def json_tokenizer(byte_level: bool) -> bytes:
    """A tokenizer.json whose tokens are the 256 bytes, written as GPT-2's, or as Llama's beside letters."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = letters if byte_level else [*(f"<0x{byte:02X}>" for byte in range(256)), *string.ascii_letters]
    backend = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], byte_fallback=True))
    backend.decoder = decoders.ByteLevel() if byte_level else decoders.ByteFallback()
    return backend.to_str().encode()


@pytest.mark.parametrize("kind", ["learned", "prefixed", "GPT-2", "Llama"])
def test_streamed_text_of_random_tokens_is_the_decoded_text(tiny_data, prefixed, kind):
    learned, spaced = (tiny_data / "tokenizer.model").read_bytes(), prefixed.serialized_model_proto()
    data = {"learned": learned, "prefixed": spaced}.get(kind) or json_tokenizer(kind == "GPT-2")
    tokenizer = read_tokenizer(data)
    count = 0
    for seed in range(100):
        ids = random.Random(seed).choices(range(tokenizer.vocab_size), k=35)
        # what a new byte makes of the prompt's last bytes is not taken back: the prompt ends with a letter
        prompt, new = tokenizer.prompt(tokenizer.decode(ids[:5]) + "a"), ids[5:]
        pieces = list(readable(list(prompt), iter(new), tokenizer))
        assert tokenizer.decode(prompt) + "".join(pieces) == tokenizer.decode(prompt + new)
        count += len(pieces)
    assert count > 300, "text is held back to the end"
