"""Train a Llama: from nothing, on from where a run stopped, or from other weights.

    python train.py --n_layer 6 --novel             # the default data, Python's own source, is prepared first
    python train.py --n_layer 6 --novel --resume    # go on after a crash, after Ctrl-C, to more --max_steps
    python train.py --init_from ckpt.pt --lora_r 8 --quantize nf4 --dataset alpaca    # QLoRA on instructions
    python train.py --init_from grouped.pt --teacher ckpt.pt --distil_weight 1    # heal after gqa.py
    torchrun --nproc_per_node 2 train.py --n_layer 6 --novel   # the same run, divided among two processes

A run writes out/RUN/ckpt.pt and log.jsonl. A step's batch depends only on (seed, step), its dropout only on
(seed, step, rank), so a resumed run repeats an uninterrupted one, on a CPU bit for bit (docs/distributed.md).
"""

import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from checkpoint import build_model, load, lora_config, model_config, save, split_checksum
from common import (
    IGNORE, UserError, autocast, bounded, checked, compiler_missing, exit_cleanly, held, is_a, note, parse,
    peak_memory_bytes, pick, pick_device, pick_dtype, require,
)  # fmt: skip
from data.loader import Batch, Examples, Text, padded, prepared
from data.tokenizer import Tokenizer
from lora import LoRAConfig, adapt
from model import Llama, ModelConfig, widen
from muon import Muon
from parallel import (
    divided, first_alone, own_rows, processes, rank, send_gradients, shard, sum_over_ranks, whole, world,
)  # fmt: skip

SHAPE_FREE = {"attention", "dropout", "block_size", "rope_theta", "kv_bits"}  # may change with --init_from
# what a resumed run may not change, nor its shape or adapter
RUN_FIXED = {"dataset", "init_from", "seed", "batch_size", "grad_accum", "optimizer", "momentum"}
RUN_FIXED |= {"teacher", "distil_weight"}
STREAM = 0.5  # root mean square of what begin_embeddings makes
# factors of lr where Muon trains; all else 1 (see docs/recipe.md)
RATES = {"wq": 2.0, "wk": 2.0, "w1": 0.7, "w2": 0.7, "w3": 0.7}
# what an optimizer keeps of each parameter
STATE = {torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"}, Muon: {"momentum_buffer"}}


@dataclass
class TrainConfig:
    """training"""

    dataset: str = "stdlib"  # a name that data/prepare.py has, or a prepared folder (tuning: checkpoint's)
    out_dir: str | None = None  # where ckpt.pt and log.jsonl go (default: out/DATASET-LAYERSxWIDTH-VARIANT)
    resume: bool = False  # continue the run in out_dir; settings are the run's, except for the flags given
    overwrite: bool = False  # start anew in a directory that holds a run
    init_from: str | None = None  # a ckpt.pt whose weights and shape to start from
    batch_size: int = bounded(16, 1, 2**20)  # sequences of one micro-batch, divided among the processes
    grad_accum: int = bounded(1, 1, 2**20)  # micro-batches of one step
    max_steps: int = bounded(500, 1)  # optimizer steps
    epochs: float | None = bounded(None, 1e-9, 1e6)  # passes over the train split, in place of max_steps
    lr: float = bounded(0.01, 0, 1e9)  # peak; unless given, with adamw .002, tuning .001, LoRA .005
    min_lr: float = bounded(0.0, 0, 1e9)  # learning rate one step after the last
    warmup_steps: int = bounded(10, 0)  # steps over which the learning rate rises from 0
    weight_decay: float = bounded(0.1, 0, 1e9)  # on matrices only
    grad_clip: float = bounded(1.0, 0, 1e9)  # largest norm of the gradient; 0 does not clip
    teacher: str | None = None  # a ckpt.pt of the same tokenizer whose predictions to learn
    distil_weight: float = bounded(0.5, 0, 1)  # with --teacher: share of its KL divergence in the loss
    momentum: float = bounded(0.8, 0, 0.9999)  # of Muon; the usual 0.95 learns less in some hundred steps
    optimizer: Literal["adamw", "muon"] = "muon"  # muon: the blocks' matrices, AdamW the rest (LoRA: adamw)
    eval_every: int = bounded(100, 1)  # steps between saves of ckpt.pt; after each, an evaluation
    eval_tokens: int = bounded(32768, 0)  # of val, evenly spread; the last evaluation reads all; 0: none
    seed: int = bounded(0, 0, 2**32 - 1)  # of weights, batches and dropout
    device: str = "auto"  # cuda, mps, cpu or auto
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of products; weights stay in float32
    checkpoint_activations: bool = False  # keep the blocks' inputs only, recompute the rest in the backward
    fsdp: bool = False  # FSDP2: each process keeps a shard of every matrix, its gradient and optimizer state
    compile: bool | None = None  # torch.compile each block (default: if a new CPU run is long enough to gain)


# ---- settings ----


def settle(flags: dict, checkpoint: dict) -> tuple[ModelConfig, LoRAConfig, TrainConfig]:
    """The flags on top of the settings of a checkpoint to start from or to resume, {} if there is none.
    Raises UserError where they contradict each other."""
    shape, adapter, run = (pick(cls, flags) for cls in (ModelConfig, LoRAConfig, TrainConfig))
    resume, old = flags.get("resume"), checkpoint.get("train", {})
    require(not {"epochs", "max_steps"} <= set(run), "--epochs and --max_steps: give one of them")
    adapted = resume or "lora" in checkpoint  # its adapter goes on learning; for a new one, merge it first
    fixed = set(adapter) if adapted else set()  # the flags that must agree with the checkpoint
    if resume:
        fixed |= (set(shape) - {"attention"}) | (RUN_FIXED & set(run))
    elif checkpoint:
        fixed |= set(shape) - SHAPE_FREE
    kept = {"lora_r": 0, **checkpoint.get("config", {}), **checkpoint.get("lora", {}), **old}
    for name in sorted(fixed):
        typed, own = flags[name], kept.get(name)
        require(typed == own, f"--{name} {typed}: the checkpoint has {own}, drop --{name}")
    c = model_config(checkpoint, **shape) if checkpoint else ModelConfig(**shape)
    lora = lora_config(checkpoint) if adapted else LoRAConfig(**adapter)
    if resume:
        old = {**old, "epochs": None} if "max_steps" in run else old
        return c, lora, checked(TrainConfig, {**pick(TrainConfig, old), **run})
    if any(adapter.values()) and not lora.lora_r:
        name = min(name for name, value in adapter.items() if value)
        raise UserError(f"--{name} is of an adapter: give --lora_r 8, or drop it")
    require(not lora.lora_r or checkpoint, "--lora_r adapts a trained model: give --init_from ckpt.pt")
    defaults = {"dataset": old.get("dataset", "stdlib")}
    if lora.lora_r:
        defaults |= {"lr": 0.005, "optimizer": "adamw"}
    elif checkpoint:
        defaults |= {"lr": 0.001}
    elif run.get("optimizer") == "adamw":
        defaults |= {"lr": 0.002}
    config = checked(TrainConfig, {**defaults, **run})
    require(config.teacher or "distil_weight" not in run, "--distil_weight is a teacher's: give --teacher")
    require(config.optimizer == "muon" or "momentum" not in run, "--momentum is Muon's: leave it out")
    return c, lora, config


def default_out_dir(flags: dict, source: dict) -> str:
    """out/stdlib-6x256-novel: data set, layers x width, and what is unusual."""
    c, lora, config = settle({**flags, "resume": False}, source)
    marks = {  # {a word: whether it is unusual}
        f"kv{c.n_kv_head}": c.n_kv_head not in (None, c.n_head), "novel": c.novel, "gated": c.gated,
        f"lora{lora.lora_r}": lora.lora_r > 0, lora.quantize: lora.quantize != "none",
        "tuned": source != {} and not lora.lora_r, "healed": config.teacher is not None,
    }  # fmt: skip
    words = [word for word, unusual in marks.items() if unusual]
    return "out/" + "-".join([Path(config.dataset).name, f"{c.n_layer}x{c.dim}", *words])


def open_tokens(config: TrainConfig, flags: dict, c: ModelConfig, checkpoint: dict):
    """Folder, record and tokenizer of the data set, which is prepared if need be. Raises UserError if its
    tokenizer is not the checkpoint's, if it is not the data of a resumed run, or has too few tokens."""
    source = f"{config.out_dir}/ckpt.pt" if config.resume else config.init_from
    how = ["--tokenizer", source] if checkpoint.get("tokenizer") else []  # without one, the data set's serves
    folder, meta, tokenizer = prepared(config.dataset, *how)
    splits, train = meta["splits"], meta["splits"]["train"]
    own = [split_checksum(checkpoint, name) == splits[name].get("sha256") for name in ("train", "val")]
    rather = f"start from the run, --init_from {source} and a new --out_dir"
    require(all(own) or not config.resume, f"{folder} is not the data of the run: restore it, or {rather}")
    if checkpoint.get("tokenizer") not in (None, tokenizer.data):
        remedy = f"python data/prepare.py NAME --tokenizer {source} ..., and give --dataset NAME"
        raise UserError(f"{folder} has another tokenizer than the checkpoint: {remedy}")
    if meta["kind"] == "text" and train["tokens"] < 2 * c.block_size:
        few = f"{folder} has only {train['tokens']} train tokens, {2 * c.block_size} are needed"
        raise UserError(f"{few}: use more text, or a smaller --block_size")
    if (checkpoint or "vocab_size" in flags) and c.vocab_size < tokenizer.vocab_size:
        few = f"vocab_size {c.vocab_size} is below the {tokenizer.vocab_size} of {folder}"
        raise UserError(f"{few}: drop the flag, or prepare data with --vocab_size {c.vocab_size}")
    return folder, meta, tokenizer


def open_teacher(path: str, c: ModelConfig, tokenizer: Tokenizer, device: torch.device) -> Llama:
    """The model whose predictions are learnt from. Raises UserError if it cannot read the same tokens."""
    checkpoint = load(path)
    teacher = build_model(checkpoint, device).requires_grad_(False)
    most, V, data = teacher.config.block_size, teacher.config.vocab_size, checkpoint["tokenizer"]
    require(data in (None, tokenizer.data), f"--teacher {path} has another tokenizer: give one of the same")
    require(c.vocab_size == V, f"--teacher {path} has {V} tokens: give a new model --vocab_size {V}")
    require(most >= c.block_size, f"--teacher {path} reads {most} tokens: give --block_size {most} or less")
    return teacher


def compiling_pays(config: TrainConfig, flops: float, device: torch.device) -> bool:
    """Whether to compile the blocks. On CPUs compiled steps take about an eighth less time, and compiling
    takes ten seconds or so: by default, runs of some minutes are compiled."""
    missing = compiler_missing(device)
    require(not (config.compile and missing), f"--compile needs {missing}: install it, or give --no-compile")
    gains = flops > 5e13 and device.type == "cpu" and sys.platform == "linux" and not missing
    return gains if config.compile is None else config.compile


# ---- the model and one step ----


def starting_model(c: ModelConfig, lora: LoRAConfig, checkpoint: dict, device: torch.device) -> Llama:
    """The model to train: new, or a checkpoint's in float32, with the adapter that it has or gets."""
    if not checkpoint:
        return Llama(c).to(device).train()
    model = build_model(checkpoint, **asdict(c))
    if not checkpoint.get("lora"):
        # layer by layer, from the mapped file: what is quantized never stands here in full
        adapt(model, lora)
    model.float()
    for x in (*model.parameters(), *model.buffers()):  # until here they may be a view of the file
        x.data = x.data.to(device, copy=True)
    return model.train()


def with_kernels(model: nn.Module) -> nn.Module:
    """The model, in Triton's kernels if that is its --attention, and Triton, which is for Linux, is here."""
    if model.config.attention == "triton":
        try:
            from flash_attention import use_kernels

            use_kernels(model)
        except ImportError as error:
            note(f"no triton attention: {error}; sdpa takes its place")
    return model


@torch.no_grad()
def begin_embeddings(model: Llama, tokens: np.ndarray) -> None:
    """Begin each token's embedding where the text puts it: tokens in the same company get similar ones.

    A row of M (V, 2V) is a token's positive pointwise mutual information, max(0, log(p(a, b) / p(a) / p(b))),
    with the tokens that follow it at one or two places, and with those that precede it. M's first C singular
    directions keep most of it (https://aclanthology.org/Q15-1016). Rows get one length, far above that of
    init_weights, else AdamW's first steps would write over them; the final norm takes that factor back, so
    that the first logits are no larger. A token not in the text begins at 0.
    """
    V, C = model.tok_embeddings.weight.shape
    ids = torch.from_numpy(tokens[: 10**7].astype(np.int64))
    pairs = torch.cat([ids[:-distance] * V + ids[distance:] for distance in (1, 2)])
    pairs, counts = pairs.unique(return_counts=True)
    first, second, counts = pairs // V, pairs % V, counts.float()
    begins, ends = (torch.bincount(side, counts, minlength=V) for side in (first, second))
    information = (counts / begins[first] * (counts.sum() / ends[second])).log().clamp(min=0)
    places = torch.stack((torch.cat((first, second)), torch.cat((second, first + V))))
    M = torch.sparse_coo_tensor(places, information.repeat(2), (V, 2 * V), check_invariants=True)
    W = torch.randn(2 * V, C)
    for _ in range(4):  # subspace iteration; qr's Q is column-major, and M @ it would take far longer
        W = torch.linalg.qr(M.T @ (M @ W)).Q.contiguous()
    begin = STREAM * math.sqrt(C) * F.normalize(M @ W)
    for weight in (model.tok_embeddings.weight, model.output.weight):  # tied, they are one
        weight[:, : W.shape[1]] = begin  # at most 2 V directions
    model.norm.weight.fill_(0.02 / STREAM)  # 0.02: the deviation of init_weights


def make_optimizers(model: Llama, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW for all that learns; or Muon for the blocks' matrices, at lr times RATES, and AdamW for
    embeddings, output, norms and biases. Latents' mixes stay fixed: training undoes them."""
    matrices, decayed, vectors, decay = [], [], [], config.weight_decay
    for name, p in [(name, p) for name, p in model.named_parameters() if p.requires_grad]:
        if p.dim() != 2:
            vectors.append(p)
        elif config.optimizer == "muon" and name.startswith("layers."):
            matrices.append({"params": [p], "rate": RATES.get(name.split(".")[-2], 1.0)})
        else:
            decayed.append(p)
    groups = [{"params": decayed, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    betas = (0.8, 0.99) if matrices else (0.9, 0.95)
    adamw = torch.optim.AdamW(groups, lr=config.lr, betas=betas, fused=True)
    return [Muon(matrices, config.lr, config.momentum, decay), adamw] if matrices else [adamw]


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up to lr, then a line down, to min_lr one step after the last."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    left = (config.max_steps - step) / (config.max_steps - config.warmup_steps)
    return config.min_lr + (config.lr - config.min_lr) * left


def distilled(model: nn.Module, teacher: Llama, x, y: torch.Tensor, weight: float) -> torch.Tensor:
    """(1 - weight) * cross-entropy + weight * KL(teacher || model), nats, summed over the targets that are
    not IGNORE: knowledge distillation (arXiv 1503.02531) at temperature 1."""
    counted = (y != IGNORE).flatten()
    ours = widen(model(x)).flatten(0, 1)[counted].log_softmax(-1)
    with torch.no_grad():
        theirs = widen(teacher(x)).flatten(0, 1)[counted].log_softmax(-1)
    kl = F.kl_div(ours, theirs, log_target=True, reduction="sum")
    return (1 - weight) * F.nll_loss(ours, y.flatten()[counted], reduction="sum") + weight * kl


def target_tokens(batches: list[Batch]) -> int:
    return sum((y != IGNORE).sum().item() for _, y in batches)


def train_step(
    learner: nn.Module, batches: list[Batch], optimizers: list[torch.optim.Optimizer], lr: float,
    dtype: torch.dtype, scaler: torch.amp.GradScaler, grad_clip: float = 1.0,
    teacher: Llama | None = None, distil_weight: float = 0.0,
) -> tuple[float, float]:  # fmt: skip
    """One optimizer step over micro-batches; return the loss, nats a token, and the norm of the unclipped
    gradient.

    A micro-batch's summed loss is divided by the target tokens of the whole step: divided by its own count,
    tokens of short or masked micro-batches would weigh more, and accumulation would not equal the big batch.
    Each process computes its share of the rows. DDP and FSDP2 average the gradients over processes; the loss
    times world() makes that average the sum. When the norm is not finite nothing is stepped, and the scaler
    tries a smaller scale next time.
    """
    device, tokens = next(learner.parameters()).device, max(1, target_tokens(batches))
    step_loss = torch.zeros((), device=device)
    for i, batch in enumerate(batches):
        send_gradients(learner, now=i == len(batches) - 1)
        x, y = (part.to(device) for part in own_rows(*batch))
        with autocast(device, dtype):
            loss = distilled(learner, teacher, x, y, distil_weight) if teacher else learner(x, y)
            loss = loss / tokens
        scaler.scale(loss * world()).backward()
        step_loss = step_loss + loss.detach()
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("rate", 1.0)
    norm = nn.utils.clip_grad_norm_(learner.parameters(), grad_clip or math.inf)
    norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
    if math.isfinite(norm):  # of all parameters: the scaler alone would skip one optimizer and step the other
        for optimizer in optimizers:
            scaler.step(optimizer)
    scaler.update()
    learner.zero_grad()
    return sum_over_ranks(step_loss.item()), norm


# ---- around the steps ----


@torch.no_grad()
def mean_loss(model: Llama, batches: list[Batch], dtype: torch.dtype) -> tuple[float, int]:
    """Loss, nats a token, and the number of target tokens."""
    device, tokens = model.tok_embeddings.weight.device, target_tokens(batches)
    # compiling once more, for other shapes, would take longer than this
    with autocast(device, dtype), torch.compiler.set_stance("force_eager"):
        loss = sum(model(*(part.to(device) for part in own_rows(*batch))).item() for batch in batches)
    return sum_over_ranks(loss) / max(1, tokens), tokens


class Log:
    """log.jsonl, one JSON object a line. A resumed run cuts off what was written after its checkpoint, which
    includes the last evaluation of a run that goes on beyond its end."""

    def __init__(self, path: Path, size: int):
        self.file = open(os.devnull if rank() else path, "a", buffering=1)  # noqa: SIM115
        if rank() == 0:
            self.file.truncate(min(size, self.file.tell()))  # a shorter file would be filled up with zeros

    def write(self, **record) -> None:
        """Append; numbers that JSON cannot express (inf, nan) become null."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self.file.write(json.dumps(finite) + "\n")

    def size(self) -> int:
        """Bytes, on the disk by now: a checkpoint counts on them, also after a power failure."""
        os.fsync(self.file.fileno())
        return self.file.tell()


def validate(model: Llama, data: Text | Examples, config: TrainConfig, dtype, step: int, log: Log) -> None:
    """Log and print `mean_loss` on the val split: on some `eval_tokens`, after the last step on all."""
    most, rows = config.eval_tokens, min(16, config.batch_size)
    items = data.some(most if step < config.max_steps else len(data.tokens))
    model.eval()
    loss, count = mean_loss(model, [padded(items[i : i + rows]) for i in range(0, len(items), rows)], dtype)
    model.train()
    peak = peak_memory_bytes(model.tok_embeddings.weight.device)
    log.write(step=step, val_loss=loss, val_tokens=count, peak_memory_bytes=peak)
    ppl = f"val perplexity {math.exp(min(loss, 700)):.4f} | loss {loss:.4f} nats a token"
    unit = "blocks" if isinstance(data, Text) else "answers of examples"
    how = f"{unit}, context {model.config.block_size}, {str(dtype).removeprefix('torch.')} products"
    tqdm.write(f"step {step}/{config.max_steps} | {ppl} | {how} | {count:,} tokens")


def describe(model: Llama, config: TrainConfig, lora: LoRAConfig, data: Text | Examples) -> dict:
    """Print what is about to be trained, and how much; return it for the log."""
    c, params = model.config, model.num_params()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    heads = f"{c.n_head} heads of {c.head_dim}" + ", novel" * c.novel + ", gated" * c.gated
    print(f"model: {params:,} parameters | {c.n_layer} layers | width {c.dim} | {heads}")
    if lora.lora_r:
        on = f"LoRA of rank {lora.lora_r} on {' '.join(lora.lora_targets)}"
        on += f", base in {lora.quantize}" * (lora.quantize != "none")
        print(f"trainable: {trainable:,} of {params:,} parameters ({100 * trainable / params:.2f}%) | {on}")
    epochs = config.max_steps / data.steps_per_epoch(config.batch_size * config.grad_accum)
    batch = f"{config.grad_accum} x {config.batch_size} sequences of up to {c.block_size} tokens"
    print(f"batch: {batch}; {config.max_steps:,} steps = {epochs:.3f} epochs of {config.dataset}")
    settings = {"model": asdict(c), "lora": asdict(lora), "train": asdict(config)}
    return {**settings, "params": params, "trainable": trainable, "epochs": epochs}


def restore(checkpoint: dict, optimizers: list[torch.optim.Optimizer], scaler: torch.amp.GradScaler) -> None:
    """Give the optimizers and the scaler their state back; learning rates and the like are those of the
    flags. Raises UserError if it is damaged or of other parameters."""
    try:
        for optimizer, saved in zip(optimizers, checkpoint["optimizers"], strict=True):
            params = [p for group in optimizer.param_groups for p in group["params"]]
            for i, p in enumerate(params if saved["state"] else ()):
                moments = {name: x.to(p.device, torch.float32) for name, x in saved["state"][i].items()}
                shapes = {name: () if name == "step" else p.shape for name in STATE[type(optimizer)]}
                require({name: x.shape for name, x in moments.items()} == shapes, f"state of parameter {i}")
                optimizer.state[p] = {name: shard(x, p) for name, x in moments.items()}
        for key, kind in {"step": int, "tokens": int, "log_size": int, "seconds": float}.items():
            require(is_a(checkpoint[key], kind) and 0 <= checkpoint[key] < math.inf, key)
        if scaler.is_enabled() and (saved := checkpoint["scaler"]):  # {} if the run had another --dtype
            require(all(is_a(x, float) and 0 <= x < math.inf for x in saved.values()), "scaler")
            scaler.load_state_dict(saved)
    except Exception as error:
        raise UserError(f"no sound training state ({error!s:.120}): start from it with --init_from") from None


def catch_signals() -> list[int]:
    """A list on which Ctrl-C and SIGTERM are put, for the loop to save and leave. A batch system may send the
    first twice; a signal that comes more than a second after it ends the process at once."""
    caught, times = [], []

    def catch(number, frame):
        caught.append(number)
        times.append(time.monotonic())
        if times[-1] > times[0] + 1:
            os._exit(128 + number)

    signal.signal(signal.SIGINT, catch)
    signal.signal(signal.SIGTERM, catch)
    return caught


def check_health(loss: float, norm: float, c: ModelConfig, step: int, saved: int) -> None:
    """Raise UserError when training has diverged: not finite, or a loss ten times that of a blind guess."""
    if not loss < 10 * math.log(c.vocab_size) or not math.isfinite(norm):
        what = f"training diverged at step {step}: loss {loss:.4g}, gradient norm {norm:.4g}"
        raise UserError(f"{what}; step {saved} is saved; try a lower --lr or a longer --warmup_steps")


def report(model: Llama, tokenizer: Tokenizer, data, config: TrainConfig, dtype, path: Path, log: Log):
    """Evaluate on the whole val split, print a sample, and what to run next."""
    text, device = isinstance(data, Text), model.tok_embeddings.weight.device
    prompt = (tokenizer.prompt("") or [0]) if text else data.parts(0)[0].tolist()
    dtype = dtype if config.fsdp else torch.float32  # FSDP collects the weights in the run's
    if config.eval_tokens:
        validate(model, data, config, dtype, config.max_steps, log)
    generator = torch.Generator(device).manual_seed(0)
    how = {"temperature": 0.8, "top_p": 0.95, "stop": tokenizer.stop, "generator": generator}
    model.eval()
    with autocast(device, dtype), torch.compiler.set_stance("force_eager"):
        (new,) = model.generate([prompt], 160, **how)
    command = f"python eval_ppl.py {path} --split test" if text else f"python -m study score {path}"
    print(f"--- a sample:\n{tokenizer.decode(prompt + new)}\n--- next:\n{command}\npython sample.py {path}")


# ---- the run ----


@processes()
def main(change: Callable[[Llama], None] | None = None) -> None:
    """The command. `change` is what an experiment does to the model before its first step."""
    flags = parse(__doc__, ModelConfig, LoRAConfig, TrainConfig)
    resume, named = flags.get("resume", False), flags.get("out_dir")
    require(not (resume and flags.get("overwrite")), "--resume and --overwrite: give one of them")
    source = load(flags["init_from"]) if "init_from" in flags and not (resume and named) else {}
    flags["out_dir"] = named or default_out_dir(flags, source)
    path = Path(flags["out_dir"]) / "ckpt.pt"
    with nullcontext() if rank() else held(path.parent):  # one run at a time in a folder
        require(path.exists() or not resume, f"no run in {path.parent}: drop --resume, or name its --out_dir")
        if path.exists() and not resume:
            remedy = "give --resume to continue it, --overwrite to start anew, or another --out_dir"
            require(flags.get("overwrite", False), f"{path.parent} already holds a run: {remedy}")
            kept = Path(flags.get("teacher", "")).resolve() != path.resolve()
            require(kept, f"the run would overwrite its --teacher {path}: give another --out_dir")
        train(flags, path, load(path) if resume else source, change)


def train(flags: dict, path: Path, checkpoint: dict, change: Callable[[Llama], None] | None) -> None:
    """The run that is saved at `path`, from its settings to its last words. It starts from a checkpoint, its
    own if it is resumed, or from {}, nothing."""

    # ---- settings
    c, lora, config = settle(flags, checkpoint)
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    require(world() > 1 or not config.fsdp, "--fsdp needs torchrun --nproc_per_node 2 or more; or --no-fsdp")

    # ---- data
    with first_alone():  # what it prepares the others find
        folder, meta, tokenizer = open_tokens(config, flags, c, checkpoint)
    if not checkpoint and "vocab_size" not in flags:
        c = replace(c, vocab_size=tokenizer.vocab_size)
    kind = Examples if meta["kind"] == "instructions" else Text
    data, val_data = (kind(folder, meta, split, c.block_size) for split in ("train", "val"))
    if "epochs" in flags:
        steps = config.epochs * data.steps_per_epoch(config.batch_size * config.grad_accum)
        config.max_steps = max(1, math.ceil(round(steps, 6)))  # 9 / 7 * 21 > 27
    last = config.max_steps

    # ---- model
    torch.manual_seed(config.seed)
    model = starting_model(c, lora, checkpoint, torch.device("cpu") if config.fsdp else device)
    model.checkpoint_activations = config.checkpoint_activations
    teacher = open_teacher(config.teacher, c, tokenizer, device) if config.teacher else None
    if not checkpoint:
        begin_embeddings(model, data.tokens)
    if change and not config.resume:
        change(model)
    # examples come in many shapes, each of which would be compiled
    planned = last * config.batch_size * config.grad_accum * c.block_size if isinstance(data, Text) else 0
    config.compile = compiling_pays(config, 6 * model.num_params() * planned / world(), device)
    if config.compile:
        for layer in model.layers:  # those of the same head groups share what the first compiles
            layer.compile()
    learner = divided(model, config.fsdp, dtype, device)
    with_kernels(model)  # only now are an FSDP model's weights on the GPU

    # ---- optimizer and position
    optimizers = make_optimizers(model, config)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    step, tokens, seconds, saved = 0, 0, 0.0, -1  # saved: the step of the file on the disk
    if config.resume:
        restore(checkpoint, optimizers, scaler)
        step, tokens, seconds, saved = (checkpoint[key] for key in ("step", "tokens", "seconds", "step"))
        require(step <= last, f"the run is at step {step} already: give more --max_steps, or --epochs")
    constant = {"config": asdict(c), "train": asdict(config), "data": meta, "tokenizer": tokenizer.data}
    constant |= {"grouped": checkpoint["grouped"]} if "grouped" in checkpoint else {}
    constant |= {"lora": asdict(lora)} if lora.lora_r else {}
    log, header = None, describe(model, config, lora, data)
    how = str(dtype).removeprefix("torch.") + ", compiled" * config.compile
    how += f", {world()} processes" * (world() > 1) + " that share the weights" * config.fsdp
    since = f", continued from step {step}" * config.resume
    print(f"on {device}, {how} -> {path.parent}{since}", flush=True)

    # ---- the loop
    caught, batches = catch_signals(), []
    bar = tqdm(total=last, initial=step, disable=rank() > 0 or None)
    while True:  # save and evaluate what `step` steps have made, then take another
        stop = sum_over_ranks(len(caught)) > 0  # all ranks at the same step
        due = step % config.eval_every == 0 and step < last
        if step > saved and (due or stop or step == last):
            # before the file is replaced: the last update may have diverged
            check_health(mean_loss(model, batches, dtype)[0], 0.0, c, step, saved)
            state = {"model": model.state_dict(keep_vars=True)}
            state = whole(state | {"optimizers": [optimizer.state_dict() for optimizer in optimizers]})
            state |= {"step": step, "tokens": tokens, "seconds": seconds, "scaler": scaler.state_dict()}
            if rank() == 0:
                save(path, constant | state | {"log_size": log.size() if log else 0})
            saved = step
            # all wait: a rank that left before would have torchrun end rank 0 while it writes
            stop = sum_over_ranks(len(caught)) > 0
        if log is None:  # only now: if the first save fails, an overwritten run keeps its log
            log = Log(path.with_name("log.jsonl"), checkpoint["log_size"] if config.resume else 0)
            log.write(step=step, **header)
        if due and step and config.eval_tokens and not stop:  # after saving: it may fail
            validate(model, val_data, config, dtype, step, log)
        if stop or step == last:
            break

        began, lr = time.perf_counter(), learning_rate(config, step)
        batches = data.step_batches(config.batch_size, config.grad_accum, config.seed, step)
        torch.manual_seed(config.seed + 1_000_003 * (step + 1) + 7919 * rank())  # of dropout
        loss, norm = train_step(
            learner, batches, optimizers, lr, dtype, scaler, config.grad_clip, teacher, config.distil_weight
        )
        # float16: an infinite norm only lowers the scaler's scale
        scalable = scaler.is_enabled() and scaler.get_scale() >= 1
        check_health(loss, 0.0 if scalable else norm, c, step + 1, saved)
        # input tokens up to the last target of each row: what follows is padding
        places = [(y != IGNORE) * torch.arange(1, y.shape[1] + 1) for _, y in batches]
        count = sum(place.amax(1).sum().item() for place in places)
        dt = time.perf_counter() - began
        step, tokens, seconds = step + 1, tokens + count, seconds + dt
        record = {"step": step, "loss": loss, "lr": lr, "norm": norm, "ms": 1000 * dt, "tok_s": count / dt}
        log.write(**record, tokens=tokens, seconds=seconds)
        bar.update()
        if step % 10 == 0 or step == 1:
            line = f"step {step}/{last} | loss {loss:.4f} | lr {lr:.1e} | norm {norm:.2f}"
            tqdm.write(f"{line} | {1000 * dt:.0f} ms | {count / dt:,.0f} tok/s")
    bar.close()

    # ---- the end
    if stop:
        program = "torchrun, as before," if world() > 1 else "python"
        print(f"saved step {step}; continue with: {program} train.py --resume --out_dir {path.parent}")
        sys.exit(128 + (caught or [signal.SIGTERM])[0])  # if another process caught it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    report(model, tokenizer, val_data, config, dtype, path, log)
    peak = peak_memory_bytes(device) / 2**30
    print(f"{tokens:,} tokens in {seconds / 60:.1f} min of training | peak memory {peak:.2f} GiB")


if __name__ == "__main__":
    exit_cleanly(main)
