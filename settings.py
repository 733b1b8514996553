"""What a training run is to do: its flags, on top of what a checkpoint holds, checked against each other and data."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from checkpoint import build_model, checked, is_a, load, lora_config, model_config, trained_on
from config import UserError, pick
from dataset import prepared
from device import check_compiler, compiles_by_itself
from lora import LoRAConfig
from model import Llama, ModelConfig
from tokenizer import Tokenizer

# model settings that fit any weights
SHAPE_FREE = {"attention", "pretraining_tp", "dropout", "block_size", "rope_theta"}
POSITION = ("step", "tokens", "seconds")  # where a run is: optimizer steps, tokens seen, seconds of training
# they decide what a step sees, and what it learns from
RUN_FIXED = {"dataset", "init_from", "seed", "batch_size", "grad_accum", "teacher", "distil_weight"}
RUN_FIXED |= {"optimizer", "momentum"}


@dataclass
class TrainConfig:
    """training"""

    dataset: str = "stdlib"  # a name that data/prepare.py knows or has prepared, or a folder (--init_from: its own)
    out_dir: str | None = None  # where ckpt.pt and log.jsonl go (default: out/, then data set, layers x width, variant)
    resume: bool = False  # continue the run in out_dir; settings are the run's, but for the flags given
    overwrite: bool = False  # start anew in a directory that holds a run
    init_from: str | None = None  # a ckpt.pt whose weights and shape to start from
    batch_size: int = 16  # sequences of one micro-batch, divided among the processes
    grad_accum: int = 1  # micro-batches of one step
    max_steps: int = 500  # optimizer steps
    lr: float | None = None  # highest learning rate (default: muon 0.01, adamw 0.002; tuning 0.001, LoRA 0.005)
    min_lr: float | None = None  # learning rate at the end of the cosine (default: lr / 10)
    warmup_steps: int = 50  # steps over which the learning rate rises from 0
    weight_decay: float = 0.1  # on matrices only
    grad_clip: float = 1.0  # longest gradient; 0 does not clip
    teacher: str | None = None  # a ckpt.pt of the same tokenizer whose predictions to learn, such as before grouping
    distil_weight: float = 0.5  # with --teacher: the KL divergence from it counts this much, the data's tokens the rest
    momentum: float = 0.8  # share of its past that Muon's step keeps; the usual 0.95 learns less in some hundred steps
    optimizer: Literal["adamw", "muon"] = "muon"  # muon takes the matrices of the blocks, AdamW the rest; LoRA: adamw
    eval_every: int = 100  # steps between checkpoints, each followed by an evaluation
    eval_tokens: int = 32768  # of the val split, evenly spread, in an evaluation; the last reads all; 0: no evaluation
    seed: int = 0  # of weights, batches and dropout
    device: str = "auto"  # cuda, mps, cpu or auto
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of matrix products; weights stay in float32
    checkpoint_activations: bool = False  # keep only the blocks' inputs, recompute the rest: less memory, more time
    fsdp: bool = False  # FSDP2: each of several processes keeps a share of every matrix, its gradient and its moments
    compile: bool | None = None  # torch.compile each block (default: where a run on a CPU is long enough to gain by it)

    def __post_init__(self):
        for name in ("batch_size", "grad_accum", "max_steps", "eval_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: give --{name} 1 or more")
        for name in ("lr", "min_lr", "warmup_steps", "weight_decay", "grad_clip", "eval_tokens"):
            if not 0 <= (getattr(self, name) or 0) < 1e9:  # false for nan, too
                raise UserError(f"{name} is {getattr(self, name)}: give --{name} 0 or more, below 1e9")
        if not 0 <= self.distil_weight <= 1:
            raise UserError(f"distil_weight is {self.distil_weight}: give --distil_weight from 0 to 1")
        if not 0 <= self.momentum < 1:
            raise UserError(f"momentum is {self.momentum}: give --momentum from 0 up to, not including, 1")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed is {self.seed}: give --seed 0 to {2**32 - 1}")
        if self.lr is None:
            self.lr = {"adamw": 0.002, "muon": 0.01}[self.optimizer]


def settle(flags: dict) -> tuple[ModelConfig, LoRAConfig, TrainConfig, dict | None]:
    """The configurations and the checkpoint to begin with. Raises UserError where they contradict each other."""
    if flags.get("resume") and flags.get("overwrite"):
        raise UserError("--resume continues a run and --overwrite deletes it: give one of them")
    shape, adapter = pick(ModelConfig, flags), pick(LoRAConfig, flags)
    checkpoint = start_from(flags["init_from"], flags) if flags.get("init_from") else None
    c = model_config(checkpoint, **shape) if checkpoint else ModelConfig(**shape)
    lora = lora_config(checkpoint or {})
    if not lora.lora_r and not (flags.get("resume") and "lora_r" not in adapter):  # a run that is resumed has its own
        lora = LoRAConfig(**adapter)
    if "distil_weight" in flags and "teacher" not in flags and not flags.get("resume"):
        raise UserError("--distil_weight weighs a teacher's predictions: give --teacher ckpt.pt, or drop it")
    if adapter and not lora.lora_r and not flags.get("resume"):
        raise UserError(f"--{min(adapter)} is of an adapter: give --lora_r 8, or drop it")
    defaults = {"optimizer": "adamw", "lr": 0.005} if lora.lora_r else {"lr": 0.001} if checkpoint else {}
    if checkpoint and is_a(dataset := checkpoint["train"].get("dataset"), str):
        defaults["dataset"] = dataset
    config = TrainConfig(**{**defaults, **pick(TrainConfig, flags)})
    out_dir = Path(config.out_dir) if config.out_dir else default_out_dir(c, lora, config)
    path = out_dir / "ckpt.pt"
    if config.resume:
        if not path.exists():
            raise UserError(f"no run in {out_dir.resolve()} to resume: drop --resume, or give another --out_dir")
        checkpoint = load(path)
        kinds = {"step": int, "tokens": int, "seconds": float, "train": dict, "optimizers": list, "scaler": dict}
        if not all(is_a(checkpoint.get(name), kind) for name, kind in kinds.items()):
            raise UserError(f"{path} has no training state to resume: start a new run with --init_from {path}")
        checkpoint["train"].setdefault("momentum", 0.95)  # of runs from before it could be chosen
        lora = lora_config(checkpoint)
        saved = {**checkpoint["config"], **asdict(lora), **checkpoint["train"]}
        refuse_changes(flags, saved, set(shape) - {"attention", "pretraining_tp"} | set(adapter) | RUN_FIXED)
        c = model_config(checkpoint, **shape)
        config = checked(TrainConfig, {**pick(TrainConfig, checkpoint["train"]), **pick(TrainConfig, flags)})
        if config.max_steps < checkpoint["step"]:
            raise UserError(f"the run is at step {checkpoint['step']} already: give --max_steps that or more")
    elif path.exists() and not config.overwrite:
        remedy = "give --resume to continue it, --overwrite to start anew, or another --out_dir"
        raise UserError(f"{out_dir} already holds a run: {remedy}")
    elif lora.lora_r and not checkpoint:
        raise UserError(f"--lora_r {lora.lora_r} adapts a trained model: give --init_from ckpt.pt")
    if config.fsdp and not dist.is_initialized():
        raise UserError("--fsdp shares a model among processes: give --no-fsdp, or start some with torchrun")
    config.out_dir = str(out_dir)
    return c, lora, config, checkpoint


def start_from(path: str, flags: dict) -> dict:
    """What a new run takes over from a checkpoint. Raises UserError if a flag says something else."""
    source = load(path)
    refuse_changes(flags, source["config"], set(pick(ModelConfig, flags)) - SHAPE_FREE)
    if source.get("lora"):  # its adapter is trained further
        hint = f", or merge it for a new adapter: python lora.py merge {path}"
        refuse_changes(flags, asdict(lora_config(source)), set(pick(LoRAConfig, flags)), hint)
    train = source["train"] if isinstance(source.get("train"), dict) else {}
    kept = ("model", "config", "tokenizer", "lora", "grouped")
    return {key: source[key] for key in kept if key in source} | {"train": train}


def open_teacher(config: TrainConfig, c: ModelConfig, tokenizer: Tokenizer, device: torch.device) -> Llama | None:
    """The model whose predictions are learnt from. Raises UserError if it cannot read the same tokens."""
    if config.teacher is None:
        return None
    checkpoint = load(config.teacher)
    teacher = build_model(checkpoint, device).requires_grad_(False)
    if checkpoint["tokenizer"] not in (None, tokenizer.data) or teacher.config.vocab_size != c.vocab_size:
        sizes = teacher.config.vocab_size, c.vocab_size
        values = "the model's is another" if len(set(sizes)) == 1 else f"vocab_size {sizes[0]}, the model's {sizes[1]}"
        raise UserError(f"--teacher {config.teacher} has another tokenizer ({values}): give one of the same")
    if teacher.config.block_size < c.block_size:
        limit = f"reads {teacher.config.block_size} tokens"
        raise UserError(f"--teacher {config.teacher} {limit}: give --block_size {teacher.config.block_size} or less")
    return teacher


def compiling_pays(config: TrainConfig, c: ModelConfig, tokens: int, params: int, device: torch.device) -> bool:
    """Whether the steps of a run save more time than its first one spends on compiling a block, some ten seconds.

    Compiled steps take about an eighth less time (measured on CPUs alone), so a run of a hundred seconds breaks even;
    it must be twice as long, for each kind of block, since blocks of other head groups compile anew. The length is
    guessed from operations, at 125 billion a second and thread, so that it is no matter of the machine's mood.
    Raises UserError for --compile where there is no compiler.
    """
    if config.compile:
        check_compiler(device)
    if config.compile is not None:
        return config.compile
    kinds = len({str(groups) for groups in zip(c.k_groups, c.v_groups)})
    seconds = 6 * params * tokens / (1.25e11 * torch.get_num_threads())
    return seconds > 200 * kinds and compiles_by_itself(device)


def refuse_changes(flags: dict, saved: dict, names: set[str], hint: str = "") -> None:
    """Raise UserError if one of the flags `names` says something else than the checkpoint."""
    for name in sorted(names & set(flags)):
        if flags[name] != saved.get(name):
            raise UserError(f"--{name} {flags[name]}, but the checkpoint has {saved.get(name)}: drop --{name}{hint}")


def default_out_dir(c: ModelConfig, lora: LoRAConfig, config: TrainConfig) -> Path:
    """out/stdlib-6x256-novel: data set, layers x width, and what is unusual."""
    parts = [Path(config.dataset).name, f"{c.n_layer}x{c.dim}"] + [f"kv{c.n_kv_head}"] * (c.n_kv_head != c.n_head)
    tuned = [f"lora{lora.lora_r}"] * (lora.lora_r > 0) + [lora.quantize] * (lora.quantize != "none") or ["tuned"]
    tuned += ["healed"] * (config.teacher is not None)
    parts += ["novel"] * c.novel + ["gated"] * c.gated + (tuned if config.init_from else [])
    return Path("out") / "-".join(parts)


def training_data(config: TrainConfig, flags: dict, checkpoint: dict | None) -> tuple[Path, dict, Tokenizer]:
    """Folder, record and tokenizer of the data set, which is prepared if need be and fits the checkpoint."""
    source = f"{config.out_dir}/ckpt.pt" if config.resume else config.init_from
    source = source if checkpoint and checkpoint["tokenizer"] else None  # without one, the data set's serves
    how = ["--vocab_size", str(flags["vocab_size"])] if "vocab_size" in flags else []
    folder, meta, tokenizer = prepared(config.dataset, *(["--tokenizer", source] if source else how))
    if source and tokenizer.data != checkpoint["tokenizer"]:
        what = "NAME --from FILE" if meta.get("kind") == "instructions" else "NAME --text FILE"
        what = f"{config.dataset} --overwrite" if config.dataset == "docstrings" else what
        remedy = f"python data/prepare.py {what} --tokenizer {source}, and give --dataset with that name"
        raise UserError(f"{folder} has another tokenizer than the checkpoint: {remedy}")
    if config.resume and trained_on(checkpoint, "train") != meta["splits"]["train"].get("sha256"):
        raise UserError(f"{folder}/train.bin is not the data of the run: restore it, or start anew with --overwrite")
    return folder, meta, tokenizer


def check_sizes(c: ModelConfig, folder: Path, meta: dict, tokenizer: Tokenizer) -> None:
    """Raise UserError if the model has too few tokens in its vocabulary, or the data too few for its context."""
    if c.vocab_size < tokenizer.vocab_size:
        remedy = f"drop --vocab_size, or python data/prepare.py NAME --vocab_size {c.vocab_size}"
        raise UserError(f"vocab_size {c.vocab_size} is below {folder}'s {tokenizer.vocab_size}: {remedy}")
    text = meta.get("kind") != "instructions"  # examples may have any length
    for split, least in (("train", 2 * c.block_size), ("val", 2)) if text else ():
        if meta["splits"][split]["tokens"] < least:
            few = f"{meta['splits'][split]['tokens']} {split} tokens"
            raise UserError(f"{folder} has only {few}, {least} are needed: use more text, or a smaller --block_size")
