"""One-file checkpoints: saved whole or not at all, loaded without running code; and a command to look at them, and to
exchange them with other programs (`convert.py`, `hugging_face.py`).

    python checkpoint.py show out/RUN/ckpt.pt
    python checkpoint.py import TinyLlama-1.1B/ tiny.pt                       # a Hugging Face folder, or Meta's own
    python checkpoint.py import stories260K.bin stories.pt --tokenizer tok512.bin        # llama2.c's
    python checkpoint.py export out/RUN/ckpt.pt FOLDER                        # a Hugging Face folder
"""

import re
import string
import types
import typing
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Literal

import torch

from config import POSITIONAL, UserError, exit_cleanly, parse, pick
from files import replacing, writable
from lora import LoRAConfig, LoRALinear, adapt, adapters
from model import Llama, ModelConfig
from nf4 import BUFFERS, NF4Linear
from tokenizer import Tokenizer, read_tokenizer

# ---- the file ----
#
# A checkpoint is a dict that `torch.load(path, weights_only=True)` reads, and that needs no other file:
#
#     model       the plain state dict: float32 from train.py, an imported model's own dtype
#     config      the fields of ModelConfig
#     lora        the fields of LoRAConfig, if there is an adapter. Then `model` has, where layers.0.attention.wq.weight
#                 was, ...wq.lora_A, ...wq.lora_B and ...wq.linear.weight, or ...wq.linear.codes and so on in NF4
#     tokenizer   the bytes of a SentencePiece model, or as `tokenizer.py` says; None if there is no tokenizer
#     grouped     the fields of GroupConfig, if gqa.py merged heads
#     source      what it was imported from; else, from train.py:
#     data        the record of the training data: meta.json, with its checksums
#     train       the fields of TrainConfig
#     step, tokens, seconds    training position: optimizer steps, tokens seen, seconds spent
#     optimizers  their state dicts, and `scaler` that of the gradient scaler
#
# There is no random state in it, because none is needed: batches and dropout are functions of (seed, step).

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def save(path: Path, checkpoint: dict) -> None:
    """Write `path`, in a new folder if need be, whole or not at all. Raises UserError when the disk is full or
    read-only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, "wb") as file:
        torch.save(checkpoint, file)


def map_file(path: Path) -> object:
    """What torch.save wrote, its tensors mapped from the file: a page takes memory when it is read, writing to a tensor
    changes the memory alone. Raises whatever the bytes of a foreign file make the readers stumble over."""
    if not zipfile.is_zipfile(path):
        raise ValueError("no file of torch.save, or one from before PyTorch 1.6, to be loaded and saved anew")
    with zipfile.ZipFile(path) as archive:  # torch.save never compresses; a compressed pickle could fill the memory
        entries = archive.infolist()
        if any(e.compress_type for e in entries) or sum(e.file_size for e in entries) > path.stat().st_size:
            raise ValueError("a compressed archive")
        if damaged := archive.testzip():  # torch.load would not look
            raise ValueError(f"{damaged} has a wrong checksum")
    return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


def load(path: str | Path) -> dict:
    """Map a checkpoint, on the CPU, without running any code in it. Raises UserError if it is missing, damaged or
    foreign."""
    path = Path(path)
    if not path.is_file():
        remedy = "train one with train.py, or import one with checkpoint.py import"
        remedy = f"name {path / 'ckpt.pt'}" if (path / "ckpt.pt").exists() else remedy
        remedy = f"import it: python checkpoint.py import {path} OUT.pt" if (path / "config.json").exists() else remedy
        raise UserError(f"{path}: no such checkpoint; {remedy}")
    try:
        checkpoint = map_file(path)
    except Exception:
        what = f"{path} ({path.stat().st_size:,} bytes) is no checkpoint, or was cut short in a copy"
        hint = f"; a foreign one is imported first: python checkpoint.py import {path} OUT.pt"
        raise UserError(what + hint * (path.suffix in (".bin", ".safetensors", ".pth"))) from None
    keys = {"model": dict, "config": dict, "tokenizer": (bytes, type(None))}
    if isinstance(checkpoint, dict) and set(checkpoint) == {"lora", "adapter"}:
        raise UserError(f"{path} is an adapter alone: lay it beside its base, python lora.py import {path} BASE.pt")
    there = isinstance(checkpoint, dict)
    there = there and all(isinstance(checkpoint.get(name, {}), dict) for name in ("lora", "train", "data"))
    if not there or any(not isinstance(checkpoint.get(k, 0), t) for k, t in keys.items()):
        raise UserError(f"{path} is no checkpoint: it lacks {', '.join(keys)}")
    check_tensors(checkpoint["model"], path, path.stat().st_size)
    return checkpoint


def trained_on(checkpoint: dict, split: str) -> str | None:
    """The checksum of a split of the data that it was trained on, if it says so."""
    try:
        return checkpoint["data"]["splits"][split]["sha256"]
    except (KeyError, TypeError):
        return None


def check_tensors(weights: dict, path: Path, size: int) -> None:
    """Raise UserError for what is no plain tensor of floats, and for views that claim more than the file's bytes."""
    total, tied = 0, {"lm_head.weight": "model.embed_tokens.weight"}
    tied |= dict.fromkeys(("output.weight", "output.linear.weight"), "tok_embeddings.weight")
    for name, x in weights.items():
        dense = isinstance(x, torch.Tensor) and x.device.type == "cpu" and x.layout == torch.strided
        fine = (torch.uint8,) if str(name).endswith(BUFFERS) else FLOATS
        if not isinstance(name, str) or not dense or x.dtype not in fine or not x.is_contiguous():
            kind = f"{x.dtype}, {x.layout}, on {x.device}" if isinstance(x, torch.Tensor) else type(x).__name__
            kind += "" if not dense or x.is_contiguous() else ", not contiguous"
            raise UserError(f"{path}: {name} is {kind}; contiguous tensors are read, of {', '.join(map(str, fine))}")
        twin = weights.get(tied.get(name))
        total += 0 if isinstance(twin, torch.Tensor) and twin.data_ptr() == x.data_ptr() else x.nbytes
    if total > size:
        raise UserError(f"{path} is damaged: its {size:,} bytes cannot hold tensors of {total:,}")


def is_a(value: object, kind: object) -> bool:
    """Whether a value has a type such as int, float | None, Literal["a", "b"] or list[list[int]]."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return any(is_a(value, k) for k in args)
    if origin is Literal:
        return value in args
    if origin is list:
        return isinstance(value, list) and all(is_a(v, args[0]) for v in value)
    if origin is dict:
        return isinstance(value, dict) and all(is_a(v, args[1]) for v in value.values())
    return type(value) is kind or (kind is float and type(value) is int and abs(value) < 2**53)


def model_config(checkpoint: dict, **changes) -> ModelConfig:
    """The checkpoint's ModelConfig, with the fields in `changes` replaced. Raises UserError if it cannot be read."""
    return checked(ModelConfig, {**checkpoint["config"], **changes})


def lora_config(checkpoint: dict) -> LoRAConfig:
    """The checkpoint's LoRAConfig, of rank 0 if it has no adapter. Raises UserError if it cannot be read."""
    return checked(LoRAConfig, checkpoint.get("lora", {}))


def checked(cls: type, settings: dict):
    """cls(**settings), if these are its fields and have their types."""
    if unknown := set(settings) - set(pick(cls, settings)):
        names = ", ".join(sorted(map(str, unknown)))
        raise UserError(f"the checkpoint has settings that this version does not know: {names}")
    kinds = typing.get_type_hints(cls)
    if wrong := [name for name, value in settings.items() if not is_a(value, kinds[name])]:
        value = repr(settings[wrong[0]])[:80]
        raise UserError(f"the checkpoint's config has a value of a wrong type: {wrong[0]} is {value}")
    return cls(**settings)


def compare(wanted: dict[str, torch.Tensor], found: dict[str, torch.Tensor], where: str) -> None:
    """Raise UserError unless `where` has the tensors that its config asks for, in their shapes, and no others."""
    for name in sorted(wanted | found):
        ask, have = (str(list(state[name].shape)) if name in state else "none" for state in (wanted, found))
        if ask != have:
            shapes = f"its config asks for {name} {ask}, and it holds {have}"
            bias = name.endswith(".bias") and ask == "none"
            why = "this Llama has no such biases" if bias else "it is damaged or of another version"
            raise UserError(f"{where} contradicts itself: {shapes}; {why}")


def empty_model(
    c: ModelConfig, weights: dict[str, torch.Tensor], where: str, spell: Callable = str, lora: LoRAConfig | None = None
) -> Llama:
    """A model without memory, for weights that are compared with it, under names that `spell` makes of ours."""
    layers = len({re.sub(r".*\blayers\.(\d+)\..*", r"\1", name) for name in weights if "layers." in name})
    if layers != c.n_layer:  # found out before so many are built
        raise UserError(f"{where} contradicts itself: its config asks for {c.n_layer} layers, and it holds {layers}")
    with torch.device("meta"):
        model = adapt(Llama(c), lora or LoRAConfig())
    compare({spell(name): x for name, x in model.state_dict().items()}, weights, where)
    return model


def build_model(checkpoint: dict, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Llama:
    """The model of a loaded checkpoint, in eval mode. Its weights are the mapped file's, in their own dtype, as long as
    they stay on the CPU and no other `dtype` is asked for; weights of several dtypes become float32."""
    weights, lora = checkpoint["model"], lora_config(checkpoint)
    model = empty_model(model_config(checkpoint), weights, "the checkpoint", lora=lora)
    model.load_state_dict(weights, assign=True)
    if model.config.tie_embeddings:  # assigning has made two parameters of the one
        output = model.output.linear if isinstance(model.output, LoRALinear) else model.output
        output.weight = model.tok_embeddings.weight
    if len({p.dtype for p in model.parameters()}) > 1:
        dtype = dtype or torch.float32
    return model.to(device, dtype).eval()


def build(checkpoint: dict, device: str | torch.device = "cpu") -> tuple[Llama, Tokenizer]:
    """The model, in eval mode, and the tokenizer of a loaded checkpoint."""
    tokenizer = read_tokenizer(checkpoint["tokenizer"])
    return build_model(checkpoint, device), tokenizer


# ---- the command ----


@dataclass
class CheckpointConfig:
    """checkpoints"""

    action: Literal["show", "import", "export"]  # what to do
    source: str  # the checkpoint; for import a Hugging Face or Meta folder, or a llama2.c .bin
    out: str | None = field(default=None, metadata=POSITIONAL)  # import: the checkpoint; export: the folder to write
    tokenizer: str | None = None  # import: tokenizer.model, tokenizer.json or llama2.c's .bin (default: the folder's)
    block_size: int | None = None  # import: longest context, tokens (default: what the source says)
    overwrite: bool = False  # import: replace an existing checkpoint


def picture(c: ModelConfig) -> Iterator[str]:
    """A line for each run of equal layers: the K and the V group that every query head reads, as letters."""
    letters = string.ascii_uppercase + string.ascii_lowercase

    width = max(c.n_head + 6, 28)

    def drawn(of_head: list[int]) -> str:
        heads = "".join(letters[g] for g in of_head) if max(of_head) < 52 else " ".join(map(str, of_head))
        return f"{heads} ({max(of_head) + 1})"

    yield f"  {'layer':8} {'K group of each query head':{width}} V group"
    for (k, v), run in groupby(range(c.n_layer), key=lambda layer: (c.k_groups[layer], c.v_groups[layer])):
        layers = list(run)
        span = f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else f"{layers[0]}"
        yield f"  {span:8} {drawn(k):{width}} {drawn(v)}"


def sizes_by_part(model: Llama) -> Counter:
    """Parameters of each kind of layer, tied ones counted once."""
    sizes = Counter()
    weights = [(name, p.numel()) for name, p in model.named_parameters()]
    weights += [(name, layer.num_weights) for name, layer in model.named_modules() if isinstance(layer, NF4Linear)]
    for name, size in weights:
        part = re.sub(r"^layers\.\d+\.|\.linear\b|\.weight$|\.bias$", "", name)
        part = "norms" if part.endswith("norm") else "LoRA" if ".lora_" in part else part
        sizes[part] += size
    return sizes


def adapter_lines(model: Llama, lora: LoRAConfig) -> Iterator[str]:
    """What an adapter is, and how its base is stored."""
    size = sum(layer.lora_A.numel() + layer.lora_B.numel() for layer in adapters(model))
    values = f"r {lora.lora_r}, alpha {lora.lora_alpha:g}, dropout {lora.lora_dropout:g}, not merged"
    yield f"LoRA: {size:,} parameters on {' '.join(lora.lora_targets)}, {values}" if lora.lora_r else "LoRA: none"
    if stored := [layer for layer in model.modules() if isinstance(layer, NF4Linear)]:
        weights, size = sum(layer.num_weights for layer in stored), sum(layer.nbytes for layer in stored)
        bits = f"{8 * size / weights:.3f} bits each"
        yield f"NF4: the {weights:,} weights of the blocks' matrices in {size:,} bytes ({bits}); all others are floats"


def training_position(checkpoint: dict) -> str:
    """How far the training is, or that there was none here."""
    kinds = {"step": int, "tokens": int, "seconds": float, "train": dict}
    if not all(is_a(checkpoint.get(key), kind) for key, kind in kinds.items()):
        return f"none; imported from {checkpoint['source']}" if "source" in checkpoint else "none recorded"
    train, minutes = checkpoint["train"], checkpoint["seconds"] / 60
    done = f"step {checkpoint['step']} of {train.get('max_steps')}, {checkpoint['tokens']:,} tokens, {minutes:.1f} min"
    taught = f", taught by {train['teacher']}" if train.get("teacher") else ""
    return f"{done}, with {train.get('optimizer')} on {train.get('dataset')}, seed {train.get('seed')}{taught}"


def show(path: str) -> None:
    """Print what a checkpoint is; of its weights only the checksums are looked at."""
    checkpoint = load(path)
    c, weights = model_config(checkpoint), checkpoint["model"]
    lora = lora_config(checkpoint)
    model = empty_model(c, weights, path, lora=lora)
    stored = sorted({str(x.dtype).removeprefix("torch.") for x in weights.values()})
    print(f"{path}: {model.num_params():,} parameters, {', '.join(stored)}, {Path(path).stat().st_size:,} bytes")
    settings = {k: v for k, v in asdict(c).items() if not k.endswith("_groups") and v is not None}
    if c.kv_numbers_per_token != 2 * c.n_layer * c.n_kv_head * c.head_dim:
        del settings["n_kv_head"]  # the groups are uneven, and the picture shows them
    print("config\n  " + "\n  ".join(f"{name:14} {value}" for name, value in settings.items()))
    print("parameters by part")
    for part, size in sizes_by_part(model).items():
        print(f"  {part:20} {size:>14,}  {100 * size / model.num_params():5.1f}%")
    print("head groups\n" + "\n".join(picture(c)))
    if isinstance(how := checkpoint.get("grouped"), dict):
        print(f"  of {how.get('ckpt')}, merged: {how.get('merge')}, refitted: {how.get('refit')}")
    itemsize = weights["tok_embeddings.weight"].itemsize
    cache, whole = c.kv_numbers_per_token * itemsize, 2 * c.n_layer * c.n_head * c.head_dim * itemsize
    full = f"{cache * c.block_size:,} for a context of {c.block_size:,}"
    print(f"KV cache: {cache:,} bytes a token, {full} ({100 * cache / whole:.0f}% of multi-head attention)")
    if checkpoint["tokenizer"]:
        tokenizer = read_tokenizer(checkpoint["tokenizer"])
        print(f"tokenizer: {tokenizer.kind}, {tokenizer.vocab_size:,} tokens, BOS {tokenizer.bos}, EOS {tokenizer.eos}")
    else:
        print("tokenizer: none")
    print("\n".join(adapter_lines(model, lora)))
    print(f"training: {training_position(checkpoint)}")


def main() -> None:
    flags = parse(__doc__, CheckpointConfig)
    config, action = CheckpointConfig(**flags), flags["action"]
    used = {"show": {"source"}, "export": {"source", "out"}, "import": set(flags)}[action] | {"action"}
    if surplus := sorted(set(flags) - used):
        raise UserError(f"{action} does not use {', '.join(f'{name} {flags[name]}' for name in surplus)}: leave it out")
    if action == "show":
        show(config.source)
        return
    from convert import read  # both need this module
    from hugging_face import export

    if not config.out:
        what = "FOLDER, the one to write" if action == "export" else "OUT.pt, the checkpoint to write"
        raise UserError(f"one name is missing: python checkpoint.py {action} {config.source} {what}")
    out = Path(config.out)
    if action == "export":
        print(export(config.source, out))
        return
    if Path(config.source).exists():
        writable(out, config.overwrite)
    checkpoint, notes = read(Path(config.source), config.tokenizer, config.block_size)
    save(out, checkpoint)
    show(config.out)
    print("".join(f"note: {note}\n" for note in notes), end="")
    if checkpoint["tokenizer"]:
        print(f"--- next:\npython eval_ppl.py {out} --text FILE\npython sample.py {out}")


if __name__ == "__main__":
    exit_cleanly(main)
