"""Train a Llama: from nothing, on from where a run stopped (`--resume`), or from another's weights (`--init_from`).

    python train.py --n_layer 6 --novel                    # the default data, Python's own source, is prepared at once
    python train.py --n_layer 6 --novel --resume           # continue exactly, after a crash, Ctrl-C or more --max_steps
    python train.py --dataset shakespeare --dim 384 --n_kv_head 2 --max_steps 2000
    python train.py --init_from ckpt.pt --lora_r 8 --quantize nf4 --dataset alpaca        # QLoRA on instructions
    python train.py --init_from grouped.pt --teacher ckpt.pt --max_steps 40               # heal after gqa.py

A run leaves out/RUN/ckpt.pt and out/RUN/log.jsonl. The batch and the dropout of a step are functions of (seed, step)
alone, so a resumed run sees what an uninterrupted one would have seen, and ends with the same bits on a CPU.
"""

import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from checkpoint import build_model, replacing, save
from config import UserError, exit_cleanly, parse
from cross_entropy import IGNORE, widen
from dataset import Batch, Examples, Text, open_data
from device import autocast, peak_memory_bytes, pick_device, pick_dtype
from eval_ppl import bits_per_byte, mean_nll, perplexity, window_nll
from eval_text import answer_nll
from lora import LoRAConfig, adapt
from model import Llama, ModelConfig
from sample import readable
from settings import POSITION, TrainConfig, check_sizes, compiling_pays, open_teacher, settle, training_data
from tokenizer import Tokenizer

# ---- one step ----


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up to lr, then half a cosine down to min_lr at the last step."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    lowest = config.lr / 10 if config.min_lr is None else config.min_lr
    done = (step - config.warmup_steps) / max(1, config.max_steps - 1 - config.warmup_steps)
    return lowest + (config.lr - lowest) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def make_optimizers(model: Llama, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW for all that learns, or Muon for the blocks' matrices and AdamW for embeddings, output, norms, biases."""
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = [p for name, p in learning.items() if p.dim() == 2 and name.startswith("layers.")]
    matrices = matrices if config.optimizer == "muon" else []
    taken = {id(p) for p in matrices}
    rest = [p for p in learning.values() if id(p) not in taken]
    groups = [
        {"params": [p for p in rest if p.dim() == 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.dim() != 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)
    if not matrices:
        return [adamw]
    # match_rms_adamw scales an update to the size of AdamW's, so that one learning rate serves both
    muon = {"lr": config.lr, "weight_decay": config.weight_decay, "adjust_lr_fn": "match_rms_adamw"}
    return [torch.optim.Muon(matrices, **muon), adamw]


def targets(batches: list[Batch]) -> int:
    """Tokens that carry loss."""
    return max(1, sum((y != IGNORE).sum().item() for _, y in batches))


def tokens_read(batches: list[Batch]) -> int:
    """Input tokens, without the padding that follows the last target of a row."""
    return sum(((y != IGNORE).flip(1).cumsum(1) > 0).sum().item() for _, y in batches)


def distilled(model: Llama, teacher: Llama, x: torch.Tensor, y: torch.Tensor, weight: float) -> torch.Tensor:
    """(1 - weight) * cross-entropy + weight * KL(teacher || model), nats, both summed over the targets that are not
    IGNORE: knowledge distillation (arXiv 1503.02531) at temperature 1."""
    counts = (y != IGNORE).flatten()
    ours = widen(model(x)).flatten(0, 1)[counts].log_softmax(-1)
    with torch.no_grad():
        theirs = widen(teacher(x)).flatten(0, 1)[counts].log_softmax(-1)
    kl = F.kl_div(ours, theirs, log_target=True, reduction="sum")
    return (1 - weight) * F.nll_loss(ours, y.flatten()[counts], reduction="sum") + weight * kl


def forward_backward(
    model: Llama, batches: list[Batch], dtype: torch.dtype, scaler: torch.amp.GradScaler,
    teacher: Llama | None = None, distil_weight: float = 0.0,
) -> torch.Tensor:  # fmt: skip
    """Add the gradients of the mean loss over all target tokens of all micro-batches; return that mean, nats a token.

    Each micro-batch's summed loss is divided by the token count of the whole step: dividing by its own count would
    weigh tokens of short or masked micro-batches more, and accumulation would not equal the big batch.
    """
    device = model.tok_embeddings.weight.device
    count = targets(batches)
    total = torch.zeros((), device=device)
    for x, y in batches:
        with autocast(device, dtype):
            x, y = x.to(device), y.to(device)
            loss = (distilled(model, teacher, x, y, distil_weight) if teacher else model(x, y)) / count
        scaler.scale(loss).backward()
        total = total + loss.detach()
    return total


def update(model, optimizers, scaler, config: TrainConfig, lr: float) -> float:
    """Clip the gradients, step the optimizers, clear the gradients; return the length of the unclipped gradient.

    When it is not finite nothing is stepped: the scaler tries a smaller scale next time, without one it is an error
    that the caller reports.
    """
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
        for group in optimizer.param_groups:
            group["lr"] = lr
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf).item()
    if math.isfinite(norm):  # of all parameters: the scaler alone would skip one optimizer and step the other
        for optimizer in optimizers:
            scaler.step(optimizer)
    scaler.update()
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    return norm


# ---- the run ----


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
        with replacing(path, "w") as file:
            file.writelines(json.dumps(record) + "\n" for record in kept)
        self.file = open(path, "a")  # noqa: SIM115

    def write(self, record: dict) -> None:
        """Append; numbers that JSON has no word for (inf, nan) become null."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self.file.write(json.dumps(finite) + "\n")
        self.file.flush()


@contextmanager
def signals_caught() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM are put on a list, for the loop to save and leave; a second one ends the process at once."""
    caught: list[int] = []

    def catch(number, frame):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def restore(checkpoint: dict, optimizers: list[torch.optim.Optimizer], scaler: torch.amp.GradScaler) -> dict:
    """Give the optimizers and the scaler their state back; return the position in the run."""
    for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    if scaler.is_enabled() and checkpoint["scaler"]:  # the run may have had another --dtype until now
        scaler.load_state_dict(checkpoint["scaler"])
    return {key: checkpoint[key] for key in POSITION}


def starting_model(c: ModelConfig, lora: LoRAConfig, checkpoint: dict | None, device: torch.device) -> Llama:
    """The model to train: new, or a checkpoint's in float32, with the adapter that it has or gets."""
    if checkpoint is None:
        return Llama(c).to(device).train()
    model = build_model({**checkpoint, "config": asdict(c)})
    if not checkpoint.get("lora"):
        adapt(model, lora)  # layer after layer, from the mapped file: what is quantized never stands here in full
    model.float()
    for x in (*model.parameters(), *model.buffers()):  # until here they may be a view of the file
        x.data = x.data.to(device, copy=True)
    return model.train()


def describe(model: Llama, config: TrainConfig, lora: LoRAConfig, data: Text | Examples) -> dict:
    """Print what is about to be trained, and how much; return it for the log."""
    c, params = model.config, model.num_params()
    heads = f"{c.n_head} heads of {c.head_dim}" + (", novel" if c.novel else "")
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


def check_health(loss: float, norm: float | None, model: Llama, where: str, kept: str) -> None:
    """Raise UserError when training has diverged: loss or gradient not finite, or a loss of ten blind guesses."""
    if not loss < 10 * math.log(model.config.vocab_size) or not math.isfinite(norm or 0):
        values = f"loss {loss:.4g}" + (f", gradient norm {norm:.4g}" if norm else "")
        remedy = "try --overwrite with a lower --lr or a longer --warmup_steps"
        raise UserError(f"training diverged: {values} {where}; {kept}; {remedy}")


def report(model: Llama, tokenizer: Tokenizer, data: Text | Examples, position: dict, path: Path) -> dict:
    """Print the loss on the whole val split, as the evaluations do, a sample, and what to run next."""
    device = model.tok_embeddings.weight.device
    (loss, count), peak = validate(model, data, torch.float32), peak_memory_bytes(device)
    record = {"val_loss": loss, "val_tokens": count, "peak_memory_bytes": peak}
    prompt, generator = tokenizer.prompt("") or [0], torch.Generator(device).manual_seed(0)
    following = f"python eval_ppl.py {path} --split test\npython sample.py {path}"
    if isinstance(data, Text):
        record["bits_per_byte"] = bits_per_byte(loss, data.tokens, tokenizer)
        protocol = f"blocks | {count:,} tokens, context {model.config.block_size}, float32"
        print(f"val perplexity {perplexity(loss):.4f} | {protocol} | bits per byte {record['bits_per_byte']:.4f}")
    else:
        what = f"{count:,} tokens of the answers of {len(data.spans):,} examples"
        print(f"val loss {loss:.4f} nats a token | {what}, float32")
        prompt = data.parts(0)[0].tolist()
        following = f"python eval_text.py {path}"
    minutes = position["seconds"] / 60
    print(f"{position['tokens']:,} tokens in {minutes:.1f} min of training | peak memory {peak / 2**30:.2f} GiB")
    settings = {"temperature": 0.8, "top_p": 0.95, "stop": tokenizer.stop, "generator": generator}
    begins = "a sample:" if isinstance(data, Text) else f"an example of the val split:\n{tokenizer.decode(prompt)}"
    print(f"--- {begins}")
    model.eval()
    with torch.compiler.set_stance("force_eager"):
        print("".join(readable(prompt, (row[0] for row in model.stream([prompt], 160, **settings)), tokenizer)))
    print(f"--- next:\n{following}")
    return record


def main() -> None:
    flags = parse(__doc__, ModelConfig, LoRAConfig, TrainConfig)
    c, lora, config, checkpoint = settle(flags)
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    folder, meta, tokenizer = training_data(config, flags, checkpoint)
    if not checkpoint and "vocab_size" not in flags:
        c = replace(c, vocab_size=tokenizer.vocab_size)
    check_sizes(c, folder, meta, tokenizer)
    data, val_data = open_data(folder, meta, "train", c.block_size), open_data(folder, meta, "val", c.block_size)

    torch.manual_seed(config.seed)
    model = starting_model(c, lora, checkpoint, device)
    teacher = open_teacher(config, c, tokenizer, device)
    model.checkpoint_activations = config.checkpoint_activations
    tokens = config.max_steps * config.batch_size * config.grad_accum * c.block_size * isinstance(data, Text)
    config.compile = compiling_pays(config, c, tokens, model.num_params(), device)  # a resumed run keeps to it
    if config.compile:
        for layer in model.layers:  # those of the same head groups share what the first compiles
            layer.compile()
    optimizers = make_optimizers(model, config)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    position = restore(checkpoint, optimizers, scaler) if config.resume else dict.fromkeys(POSITION, 0)
    origin = {"grouped": checkpoint["grouped"]} if checkpoint and "grouped" in checkpoint else {}
    del checkpoint  # and with it the mapped file
    path, last, kept = Path(config.out_dir) / "ckpt.pt", config.max_steps, position["step"]

    def save_checkpoint() -> None:
        state = {"model": model.state_dict(), "config": asdict(c), "train": asdict(config), **position}
        state |= origin | ({"lora": asdict(lora)} if lora.lora_r else {})
        state |= {"tokenizer": tokenizer.data, "data": meta, "scaler": scaler.state_dict()}
        save(path, {**state, "optimizers": [optimizer.state_dict() for optimizer in optimizers]})

    def save_if_healthy() -> int:
        """What the last update did shows only in the loss after it."""
        with torch.no_grad(), autocast(device, dtype), torch.compiler.set_stance("force_eager"):
            loss = sum(model(x.to(device), y.to(device)).item() for x, y in batches) / targets(batches)
        check_health(loss, None, model, f"after step {position['step']}", f"{path} keeps step {kept}")
        save_checkpoint()
        return position["step"]

    def evaluate() -> None:
        (val_loss, count), at = validate(model, val_data, dtype, most=config.eval_tokens), position["step"]
        record = {"val_loss": val_loss, "val_tokens": count}
        log.write({"step": at, **record, "peak_memory_bytes": peak_memory_bytes(device)})
        tqdm.write(f"step {at}/{last} | val loss {val_loss:.4f} | val ppl {perplexity(val_loss):.2f}")

    if not config.resume:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_checkpoint()  # a run that is killed early can be resumed too
    log = Log(path.with_name("log.jsonl"), kept if config.resume else None)
    log.write({"step": kept, **describe(model, config, lora, data)})
    since = f", continued from step {kept}" if config.resume else ""
    how = str(dtype).removeprefix("torch.") + (", compiled" if config.compile else "")
    print(f"on {device}, {how} -> {path.parent}{since}", flush=True)
    if 0 < kept < last and kept % config.eval_every == 0 and kept not in log.evaluated:
        evaluate()  # the run was killed after it saved and before it evaluated

    slow = "compiling" if config.compile else None
    with signals_caught() as caught, tqdm(total=last, initial=kept, disable=None, desc=slow) as bar:
        while position["step"] < last and not caught:
            began, step = time.perf_counter(), position["step"]
            torch.manual_seed(config.seed + 1_000_003 * (step + 1))  # dropout, too, is a function of (seed, step)
            batches = data.step_batches(config.batch_size, config.grad_accum, config.seed, step)
            lr, count = learning_rate(config, step), tokens_read(batches)
            loss = forward_backward(model, batches, dtype, scaler, teacher, config.distil_weight).item()
            norm = update(model, optimizers, scaler, config, lr)
            known = None if scaler.is_enabled() else norm  # to the scaler, infinity only means: a smaller scale next
            check_health(loss, known, model, f"in step {step + 1}", f"{path} keeps step {kept}")

            step, seconds = step + 1, time.perf_counter() - began
            position = {"step": step, "tokens": position["tokens"] + count, "seconds": position["seconds"] + seconds}
            speed = {"ms": 1000 * seconds, "tok_s": count / seconds}
            log.write({"loss": loss, "lr": lr, "norm": norm, **speed, **position})
            bar.set_description(refresh=False)
            bar.update()
            if step % 10 == 0 or step == 1:
                head = f"step {step}/{last} | loss {loss:.4f} | lr {lr:.1e} | norm {norm:.2f}"
                tqdm.write(f"{head} | {speed['ms']:.0f} ms | {speed['tok_s']:,.0f} tok/s")
            if step % config.eval_every == 0 and step < last and not caught:
                kept = save_if_healthy()  # before the evaluation, which may fail
                evaluate()
        if position["step"] > kept:
            kept = save_if_healthy()
    if caught:
        name = signal.Signals(caught[0]).name
        print(f"{name}: saved step {kept}; continue with: python train.py --resume --out_dir {path.parent}", flush=True)
        sys.exit(128 + caught[0])
    log.write({"step": kept, **report(model, tokenizer, val_data, position, path)})


if __name__ == "__main__":
    exit_cleanly(main)
