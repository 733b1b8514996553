"""Train a Llama: from nothing, on from where a run stopped (`--resume`), or from another's weights (`--init_from`).

    python train.py --n_layer 6 --novel                    # the default data, Python's own source, is prepared at once
    python train.py --n_layer 6 --novel --resume           # continue exactly, after a crash, Ctrl-C or more --max_steps
    python train.py --dataset shakespeare --dim 384 --n_kv_head 2 --max_steps 2000
    python train.py --init_from ckpt.pt --lora_r 8 --quantize nf4 --dataset alpaca        # QLoRA on instructions
    python train.py --init_from grouped.pt --teacher ckpt.pt --max_steps 40               # heal after gqa.py
    torchrun --nproc_per_node 2 train.py --n_layer 6 --novel          # the same run, divided among two processes

A run leaves out/RUN/ckpt.pt and out/RUN/log.jsonl. The batch of a step is a function of (seed, step) alone, and the
dropout of a process's part of it one of (seed, step, process), so a resumed run sees what an uninterrupted one would
have seen, and ends with the same bits on a CPU.
"""

import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from checkpoint import build_model, load, save
from config import UserError, exit_cleanly, parse
from cross_entropy import IGNORE, widen
from dataset import Batch, Examples, Text, open_data
from device import autocast, peak_memory_bytes, pick_device, pick_dtype
from eval_ppl import perplexity
from files import held
from lora import LoRAConfig, adapt
from model import Llama, ModelConfig
from parallel import (
    divided,
    first_alone,
    processes,
    rank,
    send_gradients,
    share,
    shared,
    total,
    wait_for_all,
    whole,
    world,
)
from progress import Log, describe, report, validate
from settings import POSITION, TrainConfig, check_sizes, compiling_pays, open_teacher, settle, training_data
from tokenizer import Tokenizer

# what each optimizer keeps of the past
MOMENTS = {torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"}, torch.optim.Muon: {"momentum_buffer"}}

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
    muon = {"lr": config.lr, "weight_decay": config.weight_decay, "momentum": config.momentum}
    return [torch.optim.Muon(matrices, **muon, adjust_lr_fn="match_rms_adamw"), adamw]


def targets(batches: list[Batch]) -> int:
    """Tokens that carry loss."""
    return max(1, sum((y != IGNORE).sum().item() for _, y in batches))


def tokens_read(batches: list[Batch]) -> int:
    """Input tokens, without the padding that follows the last target of a row."""
    return sum(((y != IGNORE).flip(1).cumsum(1) > 0).sum().item() for _, y in batches)


def distilled(model: nn.Module, teacher: Llama, x: torch.Tensor, y: torch.Tensor, weight: float) -> torch.Tensor:
    """(1 - weight) * cross-entropy + weight * KL(teacher || model), nats, both summed over the targets that are not
    IGNORE: knowledge distillation (arXiv 1503.02531) at temperature 1."""
    counts = (y != IGNORE).flatten()
    ours = widen(model(x)).flatten(0, 1)[counts].log_softmax(-1)
    with torch.no_grad():
        theirs = widen(teacher(x)).flatten(0, 1)[counts].log_softmax(-1)
    kl = F.kl_div(ours, theirs, log_target=True, reduction="sum")
    return (1 - weight) * F.nll_loss(ours, y.flatten()[counts], reduction="sum") + weight * kl


def forward_backward(
    model: nn.Module, batches: list[Batch], dtype: torch.dtype, scaler: torch.amp.GradScaler,
    teacher: Llama | None = None, distil_weight: float = 0.0,
) -> float:  # fmt: skip
    """Add the gradients of the mean loss over all target tokens of all micro-batches; return that mean, nats a token.

    Each micro-batch's summed loss is divided by the token count of the whole step: dividing by its own count would
    weigh tokens of short or masked micro-batches more, and accumulation would not equal the big batch. Several
    processes compute some rows of each; their gradients arrive as a mean, so each loss counts once for every process.
    """
    device = next(model.parameters()).device
    count, summed = targets(batches), torch.zeros((), device=device)
    for i, batch in enumerate(batches):
        send_gradients(model, now=i == len(batches) - 1)
        with autocast(device, dtype):
            x, y = (part.to(device) for part in share(batch))
            loss = (distilled(model, teacher, x, y, distil_weight) if teacher else model(x, y)) / count
        scaler.scale(loss * world()).backward()
        summed = summed + loss.detach()
    return total(summed.item())[0]


def update(model, optimizers, scaler, config: TrainConfig, lr: float) -> float:
    """Clip the gradients, step the optimizers, clear the gradients; return the length of the unclipped gradient.

    When it is not finite nothing is stepped: the scaler tries a smaller scale next time, without one it is an error
    that the caller reports.
    """
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
        for group in optimizer.param_groups:
            group["lr"] = lr
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
    norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
    if math.isfinite(norm):  # of all parameters: the scaler alone would skip one optimizer and step the other
        for optimizer in optimizers:
            scaler.step(optimizer)
    scaler.update()
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    return norm


# ---- the run ----


@contextmanager
def signals_caught() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM are put on a list, for the loop to save and leave; one more than a second later ends the
    process at once (a batch system may send the first twice)."""
    caught, first = [], 0.0

    def catch(number, frame):
        nonlocal first
        first = first or time.monotonic()
        if time.monotonic() > first + 1:
            os._exit(128 + number)
        caught.append(number)

    before = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def restore(checkpoint: dict, optimizers: list[torch.optim.Optimizer], scaler: torch.amp.GradScaler) -> dict:
    """Give the optimizers and the scaler their state back; return the position in the run. Learning rates and the like
    are those of the flags. Raises UserError for moments of other parameters."""
    saved, known = checkpoint["optimizers"], {key: checkpoint[key] for key in POSITION}
    sound = len(saved) == len(optimizers) and all(0 <= x < math.inf for x in known.values())
    for optimizer, state in zip(optimizers, saved) if sound else ():
        params = [p for group in optimizer.param_groups for p in group["params"]]
        moments = state.get("state") if isinstance(state, dict) else None
        if not (sound := is_moments(moments, params, MOMENTS[type(optimizer)])):
            break
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": shared(moments, params), "param_groups": groups})
    if scaler.is_enabled() and (scale := checkpoint["scaler"]):  # the run may have had another --dtype until now
        sound = sound and {k: type(x) for k, x in scale.items()} == {k: type(x) for k, x in scaler.state_dict().items()}
        scaler.load_state_dict(scale) if sound else None
    if not sound:
        raise UserError("the checkpoint's training state is damaged: start a new run from it with --init_from")
    return known


def is_moments(moments: object, params: list[nn.Parameter], names: set[str]) -> bool:
    """Whether it has none, or for each parameter those names, tensors of its shape, or a number."""
    if not isinstance(moments, dict) or len(moments) not in (0, len(params)):
        return False
    if not all(i in moments and isinstance(moments[i], dict) and set(moments[i]) == names for i in range(len(moments))):
        return False
    named = [(x, () if name == "step" else params[i].shape) for i in moments for name, x in moments[i].items()]
    return all(isinstance(x, torch.Tensor) and x.is_floating_point() and x.shape == shape for x, shape in named)


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


@dataclass
class Run:
    """What a run is made of."""

    config: TrainConfig
    lora: LoRAConfig
    model: Llama
    learner: nn.Module  # what to call for gradients: the model, or what adds them up over the processes
    teacher: Llama | None
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler
    device: torch.device
    dtype: torch.dtype
    tokenizer: Tokenizer
    meta: dict  # the record of the data
    data: Text | Examples
    val_data: Text | Examples
    origin: dict  # what the first checkpoint says of its weights, for those to come
    position: dict  # see POSITION
    kept: int  # the step that is on the disk

    @property
    def path(self) -> Path:
        return Path(self.config.out_dir) / "ckpt.pt"


def set_up(flags: dict) -> Run:
    """All that comes before the first step; nothing is written yet, but data that is prepared."""
    c, lora, config, checkpoint = settle(flags)
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    with first_alone():  # what it prepares the others find
        folder, meta, tokenizer = training_data(config, flags, checkpoint)
    if not checkpoint and "vocab_size" not in flags:
        c = replace(c, vocab_size=tokenizer.vocab_size)
    check_sizes(c, folder, meta, tokenizer)
    data, val_data = open_data(folder, meta, "train", c.block_size), open_data(folder, meta, "val", c.block_size)

    torch.manual_seed(config.seed)
    model = starting_model(c, lora, checkpoint, torch.device("cpu") if config.fsdp else device)
    teacher = open_teacher(config, c, tokenizer, device)
    model.checkpoint_activations = config.checkpoint_activations
    tokens = config.max_steps * config.batch_size * config.grad_accum * c.block_size * isinstance(data, Text)
    config.compile = compiling_pays(config, c, tokens // world(), model.num_params(), device)  # also when resumed
    if config.compile:
        for layer in model.layers:  # those of the same head groups share what the first compiles
            layer.compile()
    learner = divided(model, config.fsdp, dtype, device)
    optimizers = make_optimizers(model, config)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    position = restore(checkpoint, optimizers, scaler) if config.resume else dict.fromkeys(POSITION, 0)
    origin = {"grouped": checkpoint["grouped"]} if checkpoint and "grouped" in checkpoint else {}
    return Run(
        config, lora, model, learner, teacher, optimizers, scaler, device, dtype, tokenizer, meta, data, val_data,
        origin, position, kept=position["step"],
    )  # fmt: skip


def save_checkpoint(run: Run) -> None:
    """The same file, whatever the number of processes was."""
    state = {"model": run.model.state_dict(keep_vars=True), "optimizers": [o.state_dict() for o in run.optimizers]}
    state = {**whole(state), "config": asdict(run.model.config), "train": asdict(run.config), **run.position}
    state |= run.origin | ({"lora": asdict(run.lora)} if run.lora.lora_r else {})
    state |= {"tokenizer": run.tokenizer.data, "data": run.meta, "scaler": run.scaler.state_dict()}
    if rank() == 0:
        save(run.path, state)
    wait_for_all()  # one that left before would have torchrun end the first while it writes
    run.kept = run.position["step"]


def save_if_healthy(run: Run, batches: list[Batch]) -> None:
    """What the last update did shows only in the loss after it."""
    with torch.no_grad(), autocast(run.device, run.dtype), torch.compiler.set_stance("force_eager"):
        parts = (share(batch) for batch in batches)
        (loss,) = total(sum(run.model(x.to(run.device), y.to(run.device)).item() for x, y in parts) / targets(batches))
    check_health(loss, None, run, f"after step {run.position['step']}")
    save_checkpoint(run)


def check_health(loss: float, norm: float | None, run: Run, where: str) -> None:
    """Raise UserError when training has diverged: loss or gradient not finite, or a loss of ten blind guesses."""
    if not loss < 10 * math.log(run.model.config.vocab_size) or not math.isfinite(norm or 0):
        values = f"loss {loss:.4g}" + (f", gradient norm {norm:.4g}" if norm else "")
        remedy = "try --overwrite with a lower --lr or a longer --warmup_steps"
        raise UserError(f"training diverged: {values} {where}; {run.path} keeps step {run.kept}; {remedy}")


def evaluate(run: Run, log: Log) -> None:
    if not run.config.eval_tokens:
        return
    val_loss, count = validate(run.model, run.val_data, run.dtype, most=run.config.eval_tokens)
    record = {"val_loss": val_loss, "val_tokens": count, "peak_memory_bytes": peak_memory_bytes(run.device)}
    log.write({"step": run.position["step"], **record})
    at = f"step {run.position['step']}/{run.config.max_steps}"
    tqdm.write(f"{at} | val loss {val_loss:.4f} | val ppl {perplexity(val_loss):.2f}")


def train_step(run: Run, batches: list[Batch], step: int) -> dict:
    """One step; what the log says of it."""
    torch.manual_seed(run.config.seed + 1_000_003 * (step + 1) + 7919 * rank())  # of dropout
    lr = learning_rate(run.config, step)
    loss = forward_backward(run.learner, batches, run.dtype, run.scaler, run.teacher, run.config.distil_weight)
    norm = update(run.model, run.optimizers, run.scaler, run.config, lr)
    known = None if run.scaler.is_enabled() else norm  # to the scaler, infinity only means: a smaller scale next
    check_health(loss, known, run, f"in step {step + 1}")
    return {"loss": loss, "lr": lr, "norm": norm}


def start(run: Run) -> Log:
    """Write the first checkpoint of a new run, open the log, say what begins. Raises UserError if another run has been
    in the folder since this one looked."""
    config, kept = run.config, run.kept
    if rank() == 0 and not config.overwrite:
        there = load(run.path).get("step") if run.path.exists() else None
        if there != (kept if config.resume else None):
            raise UserError(f"another run has just written {run.path}: give --resume to continue it")
    if not config.resume:
        save_checkpoint(run)  # a run that is killed early can be resumed too
    log = Log(run.path.with_name("log.jsonl"), kept if config.resume else None)
    log.write({"step": kept, **describe(run.model, config, run.lora, run.data)})
    since = f", continued from step {kept}" if config.resume else ""
    how = str(run.dtype).removeprefix("torch.") + (", compiled" if config.compile else "")
    how += f", {world()} processes" + (" that share the weights" if config.fsdp else "") if world() > 1 else ""
    print(f"on {run.device}, {how} -> {run.path.parent}{since}", flush=True)
    missing = 0 < kept < config.max_steps and kept % config.eval_every == 0 and kept not in log.evaluated
    if any(total(missing and rank() == 0)):
        evaluate(run, log)  # the run was killed after it saved and before it evaluated
    return log


def train(run: Run, log: Log) -> int | None:
    """Step until the last step or until a signal, whose number is returned."""
    config, last, batches = run.config, run.config.max_steps, []
    slow, hidden = "compiling" if config.compile else None, rank() > 0 or None
    with signals_caught() as caught, tqdm(total=last, initial=run.kept, disable=hidden, desc=slow) as bar:
        stop = False
        while run.position["step"] < last and not stop:
            began, step = time.perf_counter(), run.position["step"]
            batches = run.data.step_batches(config.batch_size, config.grad_accum, config.seed, step)
            found, count = train_step(run, batches, step), tokens_read(batches)
            step, seconds = step + 1, time.perf_counter() - began
            past = run.position
            run.position = {"step": step, "tokens": past["tokens"] + count, "seconds": past["seconds"] + seconds}
            speed = {"ms": 1000 * seconds, "tok_s": count / seconds}
            log.write({**found, **speed, **run.position})
            bar.set_description(refresh=False)
            bar.update()
            if step % 10 == 0 or step == 1:
                head = (
                    f"step {step}/{last} | loss {found['loss']:.4f} | lr {found['lr']:.1e} | norm {found['norm']:.2f}"
                )
                tqdm.write(f"{head} | {speed['ms']:.0f} ms | {speed['tok_s']:,.0f} tok/s")
            stop = any(total(len(caught)))  # all at the same step
            if step % config.eval_every == 0 and step < last and not stop:
                save_if_healthy(run, batches)  # before the evaluation, which may fail
                evaluate(run, log)
        if run.position["step"] > run.kept:
            save_if_healthy(run, batches)
        stop = stop or any(total(len(caught)))  # while the last was saved
    return (caught or [signal.SIGTERM])[0] if stop else None


@processes()
def main() -> None:
    run = set_up(parse(__doc__, ModelConfig, LoRAConfig, TrainConfig))
    with nullcontext() if rank() else held(run.path.parent):
        log = start(run)
        if number := train(run, log):
            stopped = f"{signal.Signals(number).name}: saved step {run.kept}"
            how = "torchrun, as before," if dist.is_initialized() else "python"
            print(f"{stopped}; continue with: {how} train.py --resume --out_dir {run.path.parent}", flush=True)
            sys.exit(128 + number)
        dtype = run.dtype if run.config.fsdp else torch.float32  # a shared model's weights are collected in run.dtype
        last = run.model, run.tokenizer, run.val_data, dtype, run.position, run.path, run.config.eval_tokens > 0
        log.write({"step": run.kept, **report(*last)})


if __name__ == "__main__":
    exit_cleanly(main)
