"""What a training run tells: its log, what it is about to train, its loss on the val split, and its last words."""

import json
import math
import os
from dataclasses import asdict
from pathlib import Path

import torch

from dataset import Examples, Text
from device import autocast, peak_memory_bytes
from eval_ppl import bits_per_byte, mean_nll, perplexity, window_nll
from eval_text import answer_nll
from files import replacing
from lora import LoRAConfig
from model import Llama
from parallel import rank, world
from sample import readable
from settings import TrainConfig
from tokenizer import Tokenizer


class Log:
    """log.jsonl, one JSON object a line; a resumed run drops what was written behind its checkpoint."""

    def __init__(self, path: Path, resume_step: int | None):
        kept = []
        if resume_step is not None and path.exists():
            for line in path.read_text().splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:  # the last line of a killed run may be half written
                    continue
                kept += [record] if record["step"] <= resume_step else []
        self.evaluated = {record["step"] for record in kept if "val_loss" in record}
        if rank() == 0:
            with replacing(path, "w") as file:
                file.writelines(json.dumps(record) + "\n" for record in kept)
        self.file = open(os.devnull if rank() else path, "a")  # noqa: SIM115

    def write(self, record: dict) -> None:
        """Append; numbers that JSON has no word for (inf, nan) become null."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self.file.write(json.dumps(finite) + "\n")
        self.file.flush()


def describe(model: Llama, config: TrainConfig, lora: LoRAConfig, data: Text | Examples) -> dict:
    """Print what is about to be trained, and how much; return it for the log."""
    c, params = model.config, model.num_params()
    heads = f"{c.n_head} heads of {c.head_dim}" + ", novel" * c.novel + ", gated" * c.gated
    print(f"model: {params:,} parameters | {c.n_layer} layers | width {c.dim} | {heads}")
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if lora.lora_r:
        how = f"LoRA of rank {lora.lora_r} on {' '.join(lora.lora_targets)}"
        how += f", base in {lora.quantize}" if lora.quantize != "none" else ""
        print(f"trainable: {trainable:,} of {params:,} parameters ({100 * trainable / params:.2f}%) | {how}")
    rows, steps = config.batch_size * config.grad_accum, f"{config.max_steps:,} steps"
    batch = {"sequences": config.batch_size, "grad_accum": config.grad_accum}
    if isinstance(data, Text):
        per_step = rows * c.block_size
        batch |= {"tokens_per_step": per_step, "tokens": per_step * config.max_steps}
        batch["epochs"] = round(batch["tokens"] / len(data.tokens), 3)
        arithmetic = (
            f"{config.batch_size} sequences x {c.block_size} tokens x {config.grad_accum} = {per_step:,} tokens"
        )
        total = f"{steps} = {batch['tokens']:,} tokens = {batch['epochs']} epochs of {config.dataset}"
    else:
        batch["epochs"] = round(rows * config.max_steps / len(data.spans), 3)
        arithmetic = f"{config.batch_size} examples x {config.grad_accum} = {rows:,} examples"
        total = f"{steps} = {batch['epochs']} epochs of {config.dataset}'s {len(data.spans):,}, loss on answers alone"
        print(f"note: {data.note}") if data.note else None
    print(f"batch: {arithmetic} a step; {total}")
    if config.batch_size < world():
        print(f"note: {world()} processes divide micro-batches of {config.batch_size}, so some have nothing to do")
    if config.teacher:
        print(f"loss: {config.distil_weight:g} x KL divergence from {config.teacher}, the rest cross-entropy")
    if config.warmup_steps >= config.max_steps:
        print(f"note: warm-up takes {config.warmup_steps} steps: the learning rate will not reach {config.lr}")
    settings = {"model": asdict(c), "lora": asdict(lora), "train": asdict(config)}
    return {**settings, "batch": batch, "params": params, "trainable": trainable}


def validate(model: Llama, data: Text | Examples, dtype: torch.dtype, most: int | None = None) -> tuple[float, int]:
    """Mean loss, nats a token, and the number of tokens: over non-overlapping blocks of text, or over the answers of
    examples; all of them, or some `most` tokens in evenly spread ones."""
    context, whole = model.config.block_size, most is None
    model.eval()
    with torch.compiler.set_stance("force_eager"):  # compiling once more would take longer than the evaluation
        if isinstance(data, Examples):
            every = 1 if whole else max(1, len(data.tokens) // most)
            loss, count = answer_nll(model, data, dtype, every)
        else:
            stride = context if whole else max(context, context * len(data.tokens) // most)
            windows = window_nll(model, data.tokens, context, stride, dtype, quiet=not whole)
            loss, count = mean_nll(windows), sum(map(len, windows))
    model.train()
    return loss, count


def last_evaluation(model: Llama, tokenizer: Tokenizer, data: Text | Examples, dtype: torch.dtype) -> dict:
    """Print the loss on the whole val split, as the evaluations do; return it for the log."""
    loss, count = validate(model, data, dtype)
    record, products = {"val_loss": loss, "val_tokens": count}, str(dtype).removeprefix("torch.")
    if isinstance(data, Text):
        record["bits_per_byte"] = bits_per_byte(loss, data.tokens, tokenizer)
        protocol = f"blocks | {count:,} tokens, context {model.config.block_size}, {products}"
        print(f"val perplexity {perplexity(loss):.4f} | {protocol} | bits per byte {record['bits_per_byte']:.4f}")
    else:
        what = f"{count:,} tokens of the answers of {len(data.spans):,} examples"
        print(f"val loss {loss:.4f} nats a token | {what}, {products}")
    return record


def report(
    model: Llama, tokenizer: Tokenizer, data: Text | Examples, dtype: torch.dtype, position: dict, path: Path,
    evaluates: bool,
) -> dict:  # fmt: skip
    """Print the last evaluation if there is to be one, what the run took, a sample, and what to run next."""
    record = last_evaluation(model, tokenizer, data, dtype) if evaluates else {}
    device = model.tok_embeddings.weight.device
    peak = peak_memory_bytes(device)
    minutes = position["seconds"] / 60
    print(f"{position['tokens']:,} tokens in {minutes:.1f} min of training | peak memory {peak / 2**30:.2f} GiB")
    prompt, generator = tokenizer.prompt("") or [0], torch.Generator(device).manual_seed(0)
    begins, following = "a sample:", f"python eval_ppl.py {path} --split test\npython sample.py {path}"
    if isinstance(data, Examples):
        prompt = data.parts(0)[0].tolist()
        begins = f"an example of the val split:\n{tokenizer.decode(prompt)}"
        following = f"python eval_text.py {path}"
    settings = {"temperature": 0.8, "top_p": 0.95, "stop": tokenizer.stop, "generator": generator}
    print(f"--- {begins}")
    model.eval()
    with torch.compiler.set_stance("force_eager"), autocast(device, dtype):
        print("".join(readable(prompt, (row[0] for row in model.stream([prompt], 160, **settings)), tokenizer)))
    print(f"--- next:\n{following}")
    return {**record, "peak_memory_bytes": peak}
