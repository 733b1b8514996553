"""Train a Llama: from nothing, on from where a run stopped (`--resume`), or from another's weights (`--init_from`).

    python train.py --n_layer 6 --novel                    # the default data, Python's own source, is prepared at once
    python train.py --n_layer 6 --novel --resume           # continue exactly, after a crash, Ctrl-C or more --max_steps
    python train.py --dataset shakespeare --dim 384 --n_kv_head 2 --max_steps 2000

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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from checkpoint import load, load_weights, model_config, replacing, save
from config import UserError, exit_cleanly, parse, pick
from dataset import Batch, open_split, prepared, step_batches
from device import autocast, peak_memory_bytes, pick_device, pick_dtype
from eval_ppl import bits_per_byte, mean_nll, perplexity, window_nll
from model import IGNORE, Llama, ModelConfig
from sample import readable
from tokenizer import Tokenizer


@dataclass
class TrainConfig:
    """training"""

    dataset: str = "stdlib"  # a name that data/prepare.py knows or has prepared, or a prepared folder
    out_dir: str | None = None  # where ckpt.pt and log.jsonl go (default: out/, then data set, layers x width, variant)
    resume: bool = False  # continue the run in out_dir; settings are the run's, but for the flags given
    overwrite: bool = False  # start anew in a directory that holds a run
    init_from: str | None = None  # a ckpt.pt whose weights and shape to start from
    batch_size: int = 16  # sequences of one micro-batch on one process
    grad_accum: int = 1  # micro-batches of one step
    max_steps: int = 500  # optimizer steps
    lr: float | None = None  # highest learning rate (default: 0.01 with muon, 0.002 with adamw)
    min_lr: float | None = None  # learning rate at the end of the cosine (default: lr / 10)
    warmup_steps: int = 50  # steps over which the learning rate rises from 0
    weight_decay: float = 0.1  # on matrices only
    grad_clip: float = 1.0  # longest gradient; 0 does not clip
    optimizer: Literal["adamw", "muon"] = "muon"  # muon takes the matrices of the blocks, AdamW the rest
    eval_every: int = 100  # steps between checkpoints, each followed by an evaluation
    eval_tokens: int = 32768  # tokens of the val split, evenly spread, that an evaluation reads; the last reads all
    seed: int = 0  # of weights, batches and dropout
    device: str = "auto"  # cuda, mps, cpu or auto
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of matrix products; weights stay in float32
    checkpoint_activations: bool = False  # keep only the blocks' inputs, recompute the rest: less memory, more time
    compile: bool = False  # torch.compile each block: a slow first step, faster ones after it

    def __post_init__(self):
        for name in ("batch_size", "grad_accum", "max_steps", "eval_every", "eval_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: give --{name} 1 or more")
        for name in ("lr", "min_lr", "warmup_steps", "weight_decay", "grad_clip"):
            if not 0 <= (getattr(self, name) or 0) < 1e9:  # false for nan, too
                raise UserError(f"{name} is {getattr(self, name)}: give --{name} 0 or more, below 1e9")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed is {self.seed}: give --seed 0 to {2**32 - 1}")
        if self.lr is None:
            self.lr = {"adamw": 0.002, "muon": 0.01}[self.optimizer]


# ---- one step ----


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up to lr, then half a cosine down to min_lr at the last step."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    lowest = config.lr / 10 if config.min_lr is None else config.min_lr
    done = (step - config.warmup_steps) / max(1, config.max_steps - 1 - config.warmup_steps)
    return lowest + (config.lr - lowest) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def make_optimizers(model: Llama, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW for all, or Muon for the blocks' matrices and AdamW for embeddings, output, norms and biases."""
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and name.startswith("layers.")]
    matrices = matrices if config.optimizer == "muon" else []
    taken = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in taken]
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


def forward_backward(
    model: Llama, batches: list[Batch], dtype: torch.dtype, scaler: torch.amp.GradScaler
) -> torch.Tensor:
    """Add the gradients of the mean loss over all target tokens of all micro-batches; return that mean, nats a token.

    Each micro-batch's summed loss is divided by the token count of the whole step: dividing by its own count would
    weigh tokens of short or masked micro-batches more, and accumulation would not equal the big batch.
    """
    device = model.tok_embeddings.weight.device
    count = sum((y != IGNORE).sum().item() for _, y in batches)
    total = torch.zeros((), device=device)
    for x, y in batches:
        with autocast(device, dtype):
            loss = model(x.to(device), y.to(device)) / max(1, count)
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


# ---- settings: what the user typed, on top of what a checkpoint holds ----

SHAPE_FREE = {"attention", "dropout", "block_size", "rope_theta"}  # model settings that fit any weights
POSITION = ("step", "tokens", "seconds")  # where a run is: optimizer steps, tokens seen, seconds of training
RUN_FIXED = {"dataset", "init_from", "optimizer", "seed", "batch_size", "grad_accum"}  # they decide what a step sees


def settle(flags: dict) -> tuple[ModelConfig, TrainConfig, dict | None]:
    """The two configurations and the checkpoint to begin with. Raises UserError where they contradict each other."""
    config, shape, checkpoint = TrainConfig(**pick(TrainConfig, flags)), pick(ModelConfig, flags), None
    if config.resume and config.overwrite:
        raise UserError("--resume continues a run and --overwrite deletes it: give one of them")
    if config.init_from:
        source = load(config.init_from)
        refuse_changes(flags, source["config"], set(shape) - SHAPE_FREE)
        checkpoint = {key: source[key] for key in ("model", "config", "tokenizer")}
    c = model_config(checkpoint, **shape) if checkpoint else ModelConfig(**shape)
    out_dir = Path(config.out_dir) if config.out_dir else default_out_dir(c, config)
    path = out_dir / "ckpt.pt"
    if config.resume:
        if not path.exists():
            raise UserError(f"no run in {out_dir.resolve()} to resume: drop --resume, or give another --out_dir")
        checkpoint = load(path)
        if not set(POSITION) | {"train", "data", "optimizers", "scaler"} <= set(checkpoint):
            raise UserError(f"{path} has no training state to resume: start a new run with --init_from {path}")
        refuse_changes(flags, {**checkpoint["config"], **checkpoint["train"]}, set(shape) - {"attention"} | RUN_FIXED)
        c = model_config(checkpoint, **shape)
        config = TrainConfig(**{**pick(TrainConfig, checkpoint["train"]), **pick(TrainConfig, flags)})
        if config.max_steps < checkpoint["step"]:
            raise UserError(f"the run is at step {checkpoint['step']} already: give --max_steps that or more")
    elif path.exists() and not config.overwrite:
        remedy = "give --resume to continue it, --overwrite to start anew, or another --out_dir"
        raise UserError(f"{out_dir} already holds a run: {remedy}")
    config.out_dir = str(out_dir)
    return c, config, checkpoint


def refuse_changes(flags: dict, saved: dict, names: set[str]) -> None:
    """Raise UserError if one of the flags `names` says something else than the checkpoint."""
    for name in sorted(names & set(flags)):
        if flags[name] != saved.get(name):
            raise UserError(f"--{name} {flags[name]}, but the checkpoint has {saved.get(name)}: drop --{name}")


def default_out_dir(c: ModelConfig, config: TrainConfig) -> Path:
    """out/stdlib-6x256-novel: data set, layers x width, and what is unusual."""
    parts = [Path(config.dataset).name, f"{c.n_layer}x{c.dim}"] + [f"kv{c.n_kv_head}"] * (c.n_kv_head != c.n_head)
    return Path("out") / "-".join(parts + ["novel"] * c.novel + ["tuned"] * bool(config.init_from))


def training_data(config: TrainConfig, flags: dict, checkpoint: dict | None) -> tuple[Path, dict, Tokenizer]:
    """Folder, record and tokenizer of the data set, which is prepared if need be and fits the checkpoint."""
    source = f"{config.out_dir}/ckpt.pt" if config.resume else config.init_from
    source = source if checkpoint and checkpoint["tokenizer"] else None  # without one, the data set's serves
    how = ["--vocab_size", str(flags["vocab_size"])] if "vocab_size" in flags else []
    folder, meta, tokenizer = prepared(config.dataset, *(["--tokenizer", source] if source else how))
    if source and tokenizer.data != checkpoint["tokenizer"]:
        remedy = f"python data/prepare.py NAME --text FILE --tokenizer {source}, and give --dataset NAME"
        raise UserError(f"{folder} has another tokenizer than the checkpoint: {remedy}")
    if config.resume and checkpoint["data"]["splits"]["train"] != meta["splits"]["train"]:
        raise UserError(f"{folder}/train.bin is not the data of the run: restore it, or start anew with --overwrite")
    return folder, meta, tokenizer


def check_sizes(c: ModelConfig, folder: Path, meta: dict, tokenizer: Tokenizer) -> None:
    """Raise UserError if the model has too few tokens in its vocabulary, or the data too few for its context."""
    if c.vocab_size < tokenizer.vocab_size:
        remedy = f"drop --vocab_size, or python data/prepare.py NAME --vocab_size {c.vocab_size}"
        raise UserError(f"vocab_size {c.vocab_size} is below {folder}'s {tokenizer.vocab_size}: {remedy}")
    for split, least in (("train", 2 * c.block_size), ("val", 2)):
        if meta["splits"][split]["tokens"] < least:
            few = f"{meta['splits'][split]['tokens']} {split} tokens"
            raise UserError(f"{folder} has only {few}, {least} are needed: use more text, or a smaller --block_size")


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


def describe(model: Llama, config: TrainConfig, train_tokens: int) -> dict:
    """Print what is about to be trained, and how much; return it for the log."""
    c, params = model.config, model.num_params()
    per_step = config.batch_size * config.grad_accum * c.block_size
    batch = {"sequences": config.batch_size, "grad_accum": config.grad_accum, "tokens_per_step": per_step}
    batch["tokens"] = per_step * config.max_steps
    batch["epochs"] = round(batch["tokens"] / train_tokens, 3)
    heads = f"{c.n_head} heads of {c.head_dim}" + (", novel" if c.novel else "")
    print(f"model: {params:,} parameters | {c.n_layer} layers | width {c.dim} | {heads}")
    arithmetic = f"{config.batch_size} sequences x {c.block_size} tokens x {config.grad_accum} = {per_step:,} tokens"
    total = f"{config.max_steps:,} steps = {batch['tokens']:,} tokens = {batch['epochs']} epochs of {config.dataset}"
    print(f"batch: {arithmetic} a step; {total}")
    return {"model": asdict(c), "train": asdict(config), "batch": batch, "params": params}


def validate(model: Llama, tokens: np.ndarray, dtype: torch.dtype, most: int | None = None) -> float:
    """Mean loss over non-overlapping blocks of the tokens, or over some `most` tokens in evenly spread ones; nats."""
    context = model.config.block_size
    stride = max(context, context * len(tokens) // most) if most else context
    model.eval()
    with torch.compiler.set_stance("force_eager"):  # compiling once more would take longer than the evaluation
        loss = mean_nll(window_nll(model, tokens, context, stride, dtype, quiet=most is not None))
    model.train()
    return loss


def check_health(loss: float, norm: float | None, model: Llama, where: str, kept: str) -> None:
    """Raise UserError when training has diverged: loss or gradient not finite, or a loss of ten blind guesses."""
    if not loss < 10 * math.log(model.config.vocab_size) or not math.isfinite(norm or 0):
        values = f"loss {loss:.4g}" + (f", gradient norm {norm:.4g}" if norm else "")
        remedy = "try --overwrite with a lower --lr or a longer --warmup_steps"
        raise UserError(f"training diverged: {values} {where}; {kept}; {remedy}")


def report(model: Llama, tokenizer: Tokenizer, val_tokens: np.ndarray, position: dict, path: Path) -> dict:
    """Print the perplexity on the whole val split, as eval_ppl.py does, a sample, and what to run next."""
    device = model.tok_embeddings.weight.device
    loss, peak = validate(model, val_tokens, torch.float32), peak_memory_bytes(device)
    bits = bits_per_byte(loss, val_tokens, tokenizer)
    protocol = f"blocks | {len(val_tokens) - 1:,} tokens, context {model.config.block_size}, float32"
    print(f"val perplexity {perplexity(loss):.4f} | {protocol} | bits per byte {bits:.4f}")
    minutes = position["seconds"] / 60
    print(f"{position['tokens']:,} tokens in {minutes:.1f} min of training | peak memory {peak / 2**30:.2f} GiB")
    prompt, generator = tokenizer.prompt("") or [0], torch.Generator(device).manual_seed(0)
    settings = {"temperature": 0.8, "top_p": 0.95, "stop": tokenizer.stop, "generator": generator}
    print("--- a sample:")
    model.eval()
    with torch.compiler.set_stance("force_eager"):
        print("".join(readable(prompt, (row[0] for row in model.stream([prompt], 160, **settings)), tokenizer)))
    print(f"--- next:\npython eval_ppl.py {path} --split test\npython sample.py {path}")
    return {"val_loss": loss, "val_tokens": len(val_tokens) - 1, "bits_per_byte": bits, "peak_memory_bytes": peak}


def main() -> None:
    flags = parse(__doc__, ModelConfig, TrainConfig)
    c, config, checkpoint = settle(flags)
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    folder, meta, tokenizer = training_data(config, flags, checkpoint)
    if not checkpoint and "vocab_size" not in flags:
        c.vocab_size = tokenizer.vocab_size
    check_sizes(c, folder, meta, tokenizer)
    tokens, val_tokens = open_split(folder, meta, "train"), open_split(folder, meta, "val")

    torch.manual_seed(config.seed)
    model = Llama(c).to(device).train()
    if checkpoint:
        load_weights(model, checkpoint)
    model.checkpoint_activations = config.checkpoint_activations
    if config.compile:
        for layer in model.layers:
            layer.compile()
    optimizers = make_optimizers(model, config)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    position = restore(checkpoint, optimizers, scaler) if config.resume else dict.fromkeys(POSITION, 0)
    path, last, kept = Path(config.out_dir) / "ckpt.pt", config.max_steps, position["step"]

    def save_checkpoint() -> None:
        state = {"model": model.state_dict(), "config": asdict(c), "train": asdict(config), **position}
        state |= {"tokenizer": tokenizer.data, "data": meta, "scaler": scaler.state_dict()}
        save(path, {**state, "optimizers": [optimizer.state_dict() for optimizer in optimizers]})

    def save_if_healthy() -> int:
        """What the last update did shows only in the loss after it."""
        with torch.no_grad(), autocast(device, dtype):
            loss = sum(model(x.to(device), y.to(device)).item() for x, y in batches) / count
        check_health(loss, None, model, f"after step {position['step']}", f"{path} keeps step {kept}")
        save_checkpoint()
        return position["step"]

    def evaluate() -> None:
        val_loss, at = validate(model, val_tokens, dtype, most=config.eval_tokens), position["step"]
        record = {"val_loss": val_loss, "val_tokens": config.eval_tokens}
        log.write({"step": at, **record, "peak_memory_bytes": peak_memory_bytes(device)})
        tqdm.write(f"step {at}/{last} | val loss {val_loss:.4f} | val ppl {perplexity(val_loss):.2f}")

    if not config.resume:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_checkpoint()  # a run that is killed early can be resumed too
    log = Log(path.with_name("log.jsonl"), kept if config.resume else None)
    log.write({"step": kept, **describe(model, config, len(tokens))})
    since = f", continued from step {kept}" if config.resume else ""
    print(f"on {device}, {str(dtype).removeprefix('torch.')} -> {path.parent}{since}", flush=True)
    if 0 < kept < last and kept % config.eval_every == 0 and kept not in log.evaluated:
        evaluate()  # the run was killed after it saved and before it evaluated

    with signals_caught() as caught, tqdm(total=last, initial=kept, disable=None) as bar:
        while position["step"] < last and not caught:
            began, step = time.perf_counter(), position["step"]
            torch.manual_seed(config.seed + 1_000_003 * (step + 1))  # dropout, too, is a function of (seed, step)
            batches = step_batches(tokens, c.block_size, config.batch_size, config.grad_accum, config.seed, step)
            lr, count = learning_rate(config, step), sum(y.numel() for _, y in batches)
            loss = forward_backward(model, batches, dtype, scaler).item()
            norm = update(model, optimizers, scaler, config, lr)
            known = None if scaler.is_enabled() else norm  # to the scaler, infinity only means: a smaller scale next
            check_health(loss, known, model, f"in step {step + 1}", f"{path} keeps step {kept}")

            step, seconds = step + 1, time.perf_counter() - began
            position = {"step": step, "tokens": position["tokens"] + count, "seconds": position["seconds"] + seconds}
            speed = {"ms": 1000 * seconds, "tok_s": count / seconds}
            log.write({"loss": loss, "lr": lr, "norm": norm, **speed, **position})
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
    log.write({"step": kept, **report(model, tokenizer, val_tokens, position, path)})


if __name__ == "__main__":
    exit_cleanly(main)
