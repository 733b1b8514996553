"""Perplexity of a checkpoint, with the protocol printed beside the number.

    python eval_ppl.py out/RUN/ckpt.pt                     # on the val split of the data that it was trained on
    python eval_ppl.py out/RUN/ckpt.pt --split test --method all
    python eval_ppl.py out/RUN/ckpt.pt --text my.txt --method sliding --stride 64

Three methods, over the same N tokens x_0 .. x_(N-1), of which all but the first are predicted once:

    blocks       exp(mean NLL): non-overlapping blocks of `context` predictions, each block starting without a past
    sliding      exp(mean NLL): every token has at least `context - stride` tokens before it, where the text has them
    block_mean   the mean over the whole blocks of each block's own exp(mean NLL). By Jensen's inequality it lies above
                 `blocks` and depends on the block length; some published numbers are of this kind.

Perplexities compare between models only with the same tokenizer; bits per byte compare always.
"""

import hashlib
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from checkpoint import build, load, trained_on
from config import UserError, exit_cleanly, parse
from cross_entropy import widen
from data.corpora import whole_file
from dataset import open_split, read_meta
from device import autocast, pick_device, pick_dtype
from model import Llama
from parallel import add_up, in_turn, note, processes, rank
from tokenizer import Tokenizer

METHODS = ("blocks", "sliding", "block_mean")
MOST_LOGITS = 2**27  # computed at a time; in float32 they take half a GiB, and their loss as much again


@dataclass
class EvalConfig:
    """evaluation"""

    ckpt: str  # the checkpoint
    split: Literal["val", "test"] = "val"  # which part of the checkpoint's own data set
    dataset: str | None = None  # another prepared data set, of the same tokenizer
    text: str | None = None  # a UTF-8 text file instead, taken as one document: BOS and its tokens
    method: Literal["blocks", "sliding", "block_mean", "all"] = "blocks"  # see above
    context: int | None = None  # tokens that the model sees at most (default: its block_size, up to 2048)
    stride: int | None = None  # tokens that a sliding window moves (default: half the context)
    max_tokens: int | None = None  # stop after so many tokens (default: all)
    batch_size: int = 16  # windows computed at a time; fewer where long ones of a large vocabulary fill the memory
    device: str = "auto"  # cuda, mps, cpu or auto
    dtype: Literal["own", "auto", "float32", "bfloat16", "float16"] = "own"  # of matrix products; own: the weights'
    json: bool = False  # print one JSON object and nothing else


@torch.no_grad()
def window_nll(
    model: Llama, tokens: np.ndarray, context: int, stride: int, dtype: torch.dtype, batch_size: int = 16, quiet=True
) -> list[torch.Tensor]:
    """Negative log-likelihoods, nats, of tokens[1:], window by window, on the CPU; computed by all processes.

    A window of `context` inputs begins `stride` tokens behind the one before, and keeps only the predictions that the
    one before did not make: every token is scored once. stride = context gives non-overlapping blocks, and a larger
    stride a sample of blocks, evenly spread.
    """
    assert stride >= 1 and context >= 1 and not model.training, f"stride {stride}, context {context}, eval mode only"
    device, last = model.tok_embeddings.weight.device, len(tokens) - 1  # inputs are tokens[0:last]
    starts = [start for start in range(0, last, stride) if start == 0 or start - stride + context < last]
    ends = [min(start + context, last) for start in starts]
    windows = [(start, end, end - max(start, before)) for start, end, before in zip(starts, ends, [0, *ends])]
    wide = torch.promote_types(model.tok_embeddings.weight.dtype, torch.float32)
    # all losses in one tensor: small ones kept from every batch would pin the heap between the freed logits
    losses = torch.zeros(sum(new for _, _, new in windows), dtype=wide)
    result = list(losses.split([new for _, _, new in windows]))
    batch_size = max(1, min(batch_size, MOST_LOGITS // (context * model.config.vocab_size)))
    mine = list(in_turn(math.ceil(len(windows) / batch_size)))
    for number, kept in tqdm(mine, desc="evaluating", disable=quiet or rank() > 0 or None, leave=False):
        first = number * batch_size
        batch = windows[first : first + batch_size]
        longest = max(end - start for start, end, _ in batch)
        x = torch.zeros(len(batch), longest, dtype=torch.int64)  # short windows are padded behind, where no one looks
        y = torch.zeros_like(x)
        for row, (start, end, _) in enumerate(batch):
            piece = torch.from_numpy(tokens[start : end + 1].astype(np.int64))
            x[row, : end - start], y[row, : end - start] = piece[:-1], piece[1:]
        with autocast(device, dtype):
            logits = widen(model(x.to(device)))
        nll = F.cross_entropy(logits.transpose(1, 2), y.to(device), reduction="none").cpu()  # (B, T)
        for row, (start, end, new) in enumerate(batch if kept else []):
            result[first + row].copy_(nll[row, end - start - new : end - start])
    add_up(losses)  # the others' are 0 here
    return result


def perplexity(nats: float) -> float:
    """exp, and infinity where a float ends."""
    return math.exp(nats) if nats < 709 else math.inf


def mean_nll(windows: list[torch.Tensor]) -> float:
    """Nats a token, every token weighing the same; summed in float64."""
    return torch.cat(windows).double().mean().item()


def text_tokens(path: Path, tokenizer: Tokenizer) -> np.ndarray:
    """A whole UTF-8 file as one document."""
    if not path.is_file():
        raise UserError(f"--text {path}: {'a folder, give one file' if path.is_dir() else 'no such file'}")
    text = "".join(whole_file(path).documents())
    return np.array(tokenizer.prompt(text))


def split_tokens(
    checkpoint: dict, tokenizer: Tokenizer, dataset: str | None, split: str, remedy: str = "give --dataset NAME"
) -> tuple[np.ndarray, str]:
    """A split of a prepared data set, the checkpoint's own unless another is named, and a word for it.

    Raises UserError for a data set that is not there, of instructions, or of another tokenizer."""
    name = dataset or checkpoint.get("train", {}).get("dataset")
    if not name or not isinstance(name, str):
        raise UserError(f"this checkpoint names no data set: {remedy}")
    folder, meta = read_meta(name)
    if meta.get("kind") == "instructions":
        scored = "eval_text.py scores them"
        raise UserError(f"{folder} holds instructions, whose answers alone count ({scored}): {remedy} of text")
    if (folder / "tokenizer.model").read_bytes() != tokenizer.data:
        raise UserError(f"{folder} has another tokenizer than the checkpoint: {remedy}, or prepare it again")
    if not dataset and trained_on(checkpoint, split) != meta["splits"][split]["sha256"]:
        note(f"{folder} was prepared anew since training, which may have seen this text")
    return open_split(folder, meta, split), f"{name} {split}"


def tokens_to_score(config: EvalConfig, checkpoint: dict, tokenizer: Tokenizer) -> tuple[np.ndarray, str]:
    """The tokens that the flags name, and a word for them."""
    if config.text:
        tokens, source = text_tokens(Path(config.text), tokenizer), config.text
    else:
        remedy = "give --text FILE or --dataset NAME"
        tokens, source = split_tokens(checkpoint, tokenizer, config.dataset, config.split, remedy)
    tokens = tokens if config.max_tokens is None else tokens[: config.max_tokens + 1]
    if len(tokens) < 2:
        raise UserError(f"{source} is too short to predict a token from the one before it: give more text")
    return tokens, source


def perplexities(
    model: Llama, tokens: np.ndarray, methods: list[str], context: int, stride: int, dtype: torch.dtype, batch_size: int
) -> tuple[dict, float]:
    """{method: perplexity, or None if not asked for}, and nats a token: of `blocks`, or of `sliding` alone."""
    record, nats = dict.fromkeys(METHODS), math.nan
    if "sliding" in methods:
        nats = mean_nll(window_nll(model, tokens, context, stride, dtype, batch_size, quiet=False))
        record["sliding"] = perplexity(nats)
    if "blocks" in methods or "block_mean" in methods:
        blocks = window_nll(model, tokens, context, context, dtype, batch_size, quiet=False)
        nats = mean_nll(blocks)
        whole_blocks = [
            block for block in blocks if len(block) == context
        ] or blocks  # a short rest would weigh as much
        record["blocks"] = perplexity(nats) if "blocks" in methods else None
        if "block_mean" in methods:
            record["block_mean"] = float(np.mean([perplexity(mean_nll([block])) for block in whole_blocks]))
    return record, nats


def bits_per_byte(nats: float, tokens: np.ndarray, tokenizer: Tokenizer) -> float:
    """Bits for each UTF-8 byte of the text that the predicted tokens, all but the first, stand for."""
    predicted = tokens if tokens[0] == tokenizer.bos else tokens[1:]  # a BOS stands for no byte, or cancels one
    text_bytes = tokenizer.token_bytes()[predicted].sum().item()
    return nats / math.log(2) * (len(tokens) - 1) / max(1, text_bytes)


def evaluate(config: EvalConfig) -> tuple[dict, str]:
    """The JSON record, and a line about the text and the arithmetic."""
    device, checkpoint = pick_device(config.device), load(config.ckpt)
    model, tokenizer = build(checkpoint, device)
    dtype = own = model.tok_embeddings.weight.dtype
    if config.dtype != "own" and (dtype := pick_dtype(config.dtype, device)) != own:
        model.float()  # autocast rounds the operands of matrix products, and leaves all else in the weights' dtype
    if not tokenizer.is_exact():
        note("the tokenizer does not return every text as it was: bits per byte are not exact")
    context = min(2048, model.config.block_size) if config.context is None else config.context
    stride = max(1, context // 2) if config.stride is None else config.stride
    for name in ("max_tokens", "batch_size"):
        if getattr(config, name) is not None and getattr(config, name) < 1:
            raise UserError(f"{name} is {getattr(config, name)}: give --{name} 1 or more")
    if context < 1 or not 1 <= stride <= context:
        raise UserError(f"context {context}, stride {stride}: give --context 1 or more, --stride from 1 to the context")
    if context > model.config.block_size:
        note(f"context {context} is beyond the {model.config.block_size} of the training")
    tokens, source = tokens_to_score(config, checkpoint, tokenizer)
    methods, began = list(METHODS) if config.method == "all" else [config.method], time.perf_counter()
    record, nats = perplexities(model, tokens, methods, context, stride, dtype, config.batch_size)
    passes = ("sliding" in methods) + (set(methods) != {"sliding"})
    return {
        **record,
        "bits_per_byte": bits_per_byte(nats, tokens, tokenizer),
        "tokens": len(tokens) - 1,
        "context": context,
        "stride": stride if "sliding" in methods else None,
        "tokenizer": f"{tokenizer.kind} {tokenizer.vocab_size:,} {hashlib.sha256(tokenizer.data).hexdigest()[:8]}",
        "params": model.num_params(),
        "kv_bytes_per_token": model.config.kv_numbers_per_token * model.tok_embeddings.weight.itemsize,
        "tokens_per_s": passes * (len(tokens) - 1) / (time.perf_counter() - began),
    }, f"{config.ckpt} on {source}, {str(dtype).removeprefix('torch.')} products"


@processes()
def main() -> None:
    config = EvalConfig(**parse(__doc__, EvalConfig))
    record, what = evaluate(config)
    if config.json:
        print(json.dumps({k: None if v in (math.inf, -math.inf) or v != v else v for k, v in record.items()}))
        return
    print(what)
    protocol = f"{record['tokens']:,} tokens, context {record['context']}, {record['tokenizer']}"
    for method in METHODS:
        if record[method] is not None:
            stride = f", stride {record['stride']}" if method == "sliding" else ""
            loss = f" | loss {math.log(record[method]):.4f} nats a token" if method != "block_mean" else ""
            print(f"perplexity {record[method]:.4f} | {method} | {protocol}{stride}{loss}")
    print(f"bits per byte {record['bits_per_byte']:.4f}")
    kv, rate = record["kv_bytes_per_token"], record["tokens_per_s"]
    print(f"parameters {record['params']:,} | KV cache {kv:,} bytes a token | {rate:,.0f} tokens/s")


if __name__ == "__main__":
    exit_cleanly(main)
