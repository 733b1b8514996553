"""Perplexity of a checkpoint, with the protocol printed beside the number.

    python eval_ppl.py out/RUN/ckpt.pt                     # on the val split of the data it was trained on
    python eval_ppl.py out/RUN/ckpt.pt --split test --method all
    python eval_ppl.py out/RUN/ckpt.pt --text my.txt --method sliding --stride 64

Three methods over N tokens x_0 .. x_(N-1); all but the first are predicted, each once:

    blocks       exp(mean NLL): non-overlapping blocks of `context` predictions, each starting without a past
    sliding      exp(mean NLL): each token has more than `context - stride` before it, where the text has them
    block_mean   the mean over the whole blocks of each block's exp(mean NLL). It lies above exp(mean NLL) of
                 the same blocks (Jensen) and depends on their length; some published numbers are of it.

Perplexities compare by one method on the same tokens; bits per byte also across tokenizers, on all of a text.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from checkpoint import build, load, split_checksum
from common import UserError, autocast, bounded, exit_cleanly, note, parse, pick_device, pick_dtype, require
from data.loader import open_split, read_meta
from data.tokenizer import Tokenizer
from model import Llama, widen

METHODS = ("blocks", "sliding", "block_mean")
MOST_LOGITS = 2**27  # computed at a time: half a GiB in float32, and their loss takes as much again


@dataclass
class EvalConfig:
    """evaluation"""

    ckpt: str  # the checkpoint
    split: Literal["val", "test"] = "val"  # part of the data set
    dataset: str | None = None  # another prepared data set, of the same tokenizer
    text: str | None = None  # a UTF-8 text file instead, taken as one document: BOS and its tokens
    method: Literal["blocks", "sliding", "block_mean", "all"] = "blocks"  # see above
    context: int | None = bounded(None, 1)  # most tokens seen at once (default: block_size, up to 2048)
    stride: int | None = bounded(None, 1)  # tokens that a sliding window moves (default: half the context)
    max_tokens: int | None = bounded(None, 1)  # stop after so many tokens (default: all)
    batch_size: int = bounded(16, 1)  # windows at a time; fewer where their logits would fill the memory
    device: str = "auto"  # cuda, mps, cpu or auto
    dtype: Literal["own", "auto", "float32", "bfloat16", "float16"] = "own"  # of products; own: the weights'
    kv_bits: int | None = bounded(None, 4, 16)  # as if the KV cache held integers of 8 or 4 bits; 16: floats
    json: bool = False  # print one JSON object and nothing else


@torch.no_grad()
def window_nll(model: Llama, tokens: np.ndarray, context: int, stride: int, dtype, batch_size=16) -> list:
    """Negative log-likelihoods, nats, of tokens[1:], window by window, on the CPU.

    A window of `context` inputs begins `stride` tokens after the one before and keeps the predictions that
    the one before did not make: every token is scored once. stride = context gives non-overlapping blocks.
    """
    assert 1 <= stride <= context and not model.training, f"stride {stride}, context {context}"
    device, last = model.tok_embeddings.weight.device, len(tokens) - 1
    starts = range(0, max(1, last - context + stride), stride)
    batch_size = max(1, min(batch_size, MOST_LOGITS // (context * model.config.vocab_size)))
    batches, losses = [starts[i : i + batch_size] for i in range(0, len(starts), batch_size)], []
    for batch in tqdm(batches, desc="evaluating", disable=None, leave=False):
        T = min(context, last - batch[0])
        ids = torch.zeros(len(batch), T + 1, dtype=torch.int64)  # padded behind, where no one looks
        for row, start in enumerate(batch):
            ids[row, : last + 1 - start] = torch.from_numpy(tokens[start : start + T + 1].astype(np.int64))
        with autocast(device, dtype):
            logits = widen(model(ids[:, :-1].to(device)))
        # over the last axis: over a strided one float32 sums 49,152 classes 1e-4 nats too low
        nll = -logits.log_softmax(-1).gather(-1, ids[:, 1:, None].to(device))[..., 0].cpu()  # (B, T)
        for row, start in enumerate(batch):  # the window before has made the first predictions
            losses.append(nll[row, (context - stride) * (start > 0) : last - start].clone())
    return losses


def perplexity(nats: float) -> float:
    """exp, and infinity where a float ends."""
    return math.inf if nats >= 709 else math.exp(nats)


def mean_nll(windows: list[torch.Tensor]) -> float:
    """Nats a token, every token weighing the same; the float32 losses are averaged in float64."""
    return torch.cat(windows).double().mean().item()


def split_tokens(checkpoint: dict, tokenizer: Tokenizer, dataset, split: str) -> tuple[np.ndarray, str]:
    """A split of a prepared data set, the checkpoint's own unless another is named, and a word for it.
    Raises UserError for a data set that is not there, of instructions, or of another tokenizer."""
    own = checkpoint.get("train", {}).get("dataset")
    name = dataset or own
    require(isinstance(name, str), "the checkpoint names no data set: give --dataset (or eval_ppl.py --text)")
    folder, meta = read_meta(name)
    require(meta["kind"] == "text", f"{folder} holds instructions: give --dataset of text, or study score")
    same = (folder / "tokenizer.model").read_bytes() == tokenizer.data
    require(same, f"{folder} has another tokenizer than the checkpoint: give --dataset of the same")
    changed = split_checksum(checkpoint, split) != meta["splits"][split].get("sha256")
    if changed and name == own and split != "train":
        note(f"{folder} was prepared anew since training, which may have seen this text")
    return open_split(folder, meta, split), f"{name} {split}"


def bits_per_byte(nats: float, tokens: np.ndarray, tokenizer: Tokenizer) -> float:
    """Bits for each UTF-8 byte of the text that the predicted tokens, all but the first, stand for."""
    predicted = tokens if tokens[0] == tokenizer.bos else tokens[1:]  # a BOS counts 0 bytes, or -1
    text_bytes = tokenizer.token_bytes()[predicted].sum().item()
    return nats / math.log(2) * (len(tokens) - 1) / max(1, text_bytes)


def evaluate(config: EvalConfig, model: Llama, tokens: np.ndarray, dtype: torch.dtype) -> tuple[dict, float]:
    """{method: perplexity, or None if not asked for}, and nats a token: of `blocks`, or else of `sliding`."""
    asked = METHODS if config.method == "all" else (config.method,)
    context, how, record = config.context, (dtype, config.batch_size), {}
    if "sliding" in asked:
        nats = mean_nll(window_nll(model, tokens, context, config.stride, *how))
        record["sliding"] = perplexity(nats)
    if config.method != "sliding":
        blocks = window_nll(model, tokens, context, context, *how)
        nats = mean_nll(blocks)
        whole = [block for block in blocks if len(block) == context] or blocks  # a rest would weigh as much
        record["blocks"] = perplexity(nats)
        record["block_mean"] = float(np.mean([perplexity(mean_nll([block])) for block in whole]))
    return {method: record[method] if method in asked else None for method in METHODS}, nats


def read_tokens(config: EvalConfig, checkpoint: dict, tokenizer: Tokenizer) -> tuple[np.ndarray, str]:
    """The tokens that the flags name, and a word for them."""
    require(not (config.text and config.dataset), "--text is a file, --dataset a prepared folder: give one")
    if config.text:
        try:
            text = Path(config.text).read_bytes().decode()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--text {config.text} is no UTF-8 text file: {error}") from None
        tokens, source = np.array(tokenizer.prompt(text)), config.text
    else:
        tokens, source = split_tokens(checkpoint, tokenizer, config.dataset, config.split)
    require(len(tokens) > 1, f"{source} is too short to predict a token: give more text")
    most = config.max_tokens or len(tokens)
    return tokens[: most + 1], source  # the first is not predicted


def main() -> None:
    config = EvalConfig(**parse(__doc__, EvalConfig))
    device, checkpoint = pick_device(config.device), load(config.ckpt)
    model, tokenizer = build(checkpoint, device, config.kv_bits)
    own = model.tok_embeddings.weight.dtype
    dtype = own if config.dtype == "own" else pick_dtype(config.dtype, device)
    if dtype != own:
        model.float()  # autocast rounds operands of matrix products only
    require(not config.stride or config.method in ("sliding", "all"), "--stride: give --method sliding")
    config.context = config.context or min(2048, model.config.block_size)
    config.stride = config.stride or max(1, config.context // 2)
    require(config.stride <= config.context, f"stride {config.stride}: give --stride 1 to {config.context}")
    if config.context > model.config.block_size:
        note(f"context {config.context} is beyond the {model.config.block_size} of the training")
    if not tokenizer.is_exact():
        note("the tokenizer does not return every text as it was: bits per byte are inexact")
    tokens, source = read_tokens(config, checkpoint, tokenizer)
    digest = hashlib.sha256(tokenizer.data).hexdigest()[:8]
    record, nats = evaluate(config, model, tokens, dtype)
    kv = model.config.kv_bytes_per_token(dtype.itemsize)
    record |= {"bits_per_byte": bits_per_byte(nats, tokens, tokenizer), "tokens": len(tokens) - 1}
    record |= {"context": config.context, "stride": config.stride, "params": model.num_params()}
    record |= {"products": str(dtype).removeprefix("torch."), "kv_bits": model.config.kv_bits}
    record |= {"tokenizer": f"{tokenizer.kind} {tokenizer.vocab_size:,} {digest}", "kv_bytes_per_token": kv}
    if config.json:
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        print(json.dumps(finite))
        return
    rounded = f", KV cache in {record['kv_bits']} bits" * (record["kv_bits"] < 16)
    print(f"{config.ckpt} on {source}, {record['products']} products{rounded}")
    protocol = f"{record['tokens']:,} tokens, context {config.context}, {record['tokenizer']}"
    cut = ", whole blocks only" * (record["tokens"] >= config.context)
    more = {"blocks": "", "sliding": f", stride {config.stride}", "block_mean": cut}
    for method in METHODS:
        if record[method] is not None:
            print(f"perplexity {record[method]:.4f} | {method} | {protocol}{more[method]}")
    print(f"bits per byte {record['bits_per_byte']:.4f} | loss {nats:.4f} nats a token")
    print(f"parameters {record['params']:,} | KV cache {kv:,} bytes a token")


if __name__ == "__main__":
    exit_cleanly(main)
