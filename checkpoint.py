"""One-file checkpoints: saved whole or not at all, loaded without running code; a command to look at them.

    python checkpoint.py show out/RUN/ckpt.pt
    python checkpoint.py merge out/RUN/ckpt.pt --out merged.pt         # LoRA added, 4 bits dequantized

A checkpoint is a dict that `torch.load(path, weights_only=True)` reads, and that needs no other file:

    model       the state dict; where an adapter stands, ...wq.lora_A, ...wq.lora_B and ...wq.linear.weight
                (in 4 bits ...wq.linear.codes, absmax, scales) instead of ...wq.weight
    config      the fields of ModelConfig; lora, train, grouped: those of LoRAConfig, TrainConfig, GroupConfig
    tokenizer   the bytes of a SentencePiece model or of another kind that data/tokenizer.py reads, or None
    data        meta.json of the training data, with its checksums; source: what it was imported from
    step, tokens, seconds, log_size, optimizers, scaler    where training is, and what it needs to go on

It needs no random state: batches and dropout are functions of seed, step and rank.
"""

import string
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

import torch

from common import UserError, checked, exit_cleanly, parse, replacing, require, writable
from data.tokenizer import Tokenizer, read_tokenizer
from lora import LoRAConfig, LoRALinear, adapt, adapters, plain
from model import Llama, ModelConfig
from nf4 import BUFFERS, NF4Linear

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def save(path: Path, checkpoint: dict) -> None:
    """Write `path`, whole or not at all. Raises UserError when the disk is full or read-only."""
    with replacing(path, "wb") as file:
        torch.save(checkpoint, file)


def map_file(path: Path) -> object:
    """What torch.save wrote, its tensors mapped from the file: a page takes memory when it is read, and
    writing to a tensor changes only the memory. Raises whatever damaged bytes make the readers raise."""
    with zipfile.ZipFile(path) as archive:
        entries, size = archive.infolist(), path.stat().st_size
        # a compressed pickle could fill the memory
        honest = sum(e.file_size for e in entries) <= size and not any(e.compress_type for e in entries)
        require(honest, "an archive of compressed or overlapping entries")
        damaged = archive.testzip()  # torch.load would not look
        require(damaged is None, f"wrong checksum of {damaged}")
    return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


def check_tensors(weights: dict[str, torch.Tensor], size: int) -> None:
    """Raise UserError for all but plain tensors of floats, and for views claiming more than the file has."""
    storages = {}
    for name, x in weights.items():
        kinds = (torch.uint8,) if name.endswith(BUFFERS) else FLOATS
        sound = x.dtype in kinds and x.layout == torch.strided and x.device.type == "cpu"
        require(sound and x.is_contiguous(), f"{name} is no contiguous tensor of {kinds}")
        storages[x.data_ptr(), x.shape] = x.nbytes  # tied matrices are one
    require(sum(storages.values()) <= size, f"{size:,} bytes cannot hold its tensors")


def load(path: str | Path) -> dict:
    """Map a checkpoint, on the CPU, running no code in it. Raises UserError for a missing or damaged one."""
    path, foreign = Path(path), f"python -m formats import {path} OUT.pt"
    remedy = foreign if (path / "config.json").exists() else "name a ckpt.pt that train.py has written"
    require(path.is_file(), f"{path}: no such checkpoint; {remedy}")
    try:
        checkpoint = map_file(path)
        require({"model", "config", "tokenizer"} <= set(checkpoint), "it lacks model, config or tokenizer")
        for key in {"model", "config", "lora", "train", "data"} & set(checkpoint):
            require(isinstance(checkpoint[key], dict), f"{key} is {type(checkpoint[key])}")
        require(isinstance(checkpoint["tokenizer"], bytes | None), "its tokenizer is no bytes")
        check_tensors(checkpoint["model"], path.stat().st_size)
    except Exception as error:  # the readers raise whatever the bytes make them stumble over
        reason = (str(error).strip() or type(error).__name__).split("\n")[0][:160]
        raise UserError(f"{path} is damaged or no checkpoint ({reason}); a foreign one: {foreign}") from None
    return checkpoint


def split_checksum(checkpoint: dict, split: str) -> str | None:
    """The checksum of a split of its training data; None if it has none."""
    try:
        return checkpoint["data"]["splits"][split]["sha256"]
    except (KeyError, TypeError):
        return None


def model_config(checkpoint: dict, **changes) -> ModelConfig:
    """The checkpoint's ModelConfig, with some fields replaced. Raises UserError if it is damaged."""
    return checked(ModelConfig, {**checkpoint["config"], **changes})


def lora_config(checkpoint: dict) -> LoRAConfig:
    """The checkpoint's LoRAConfig, of rank 0 if it has no adapter. Raises UserError if it is damaged."""
    return checked(LoRAConfig, checkpoint.get("lora", {}))


def empty_model(c: ModelConfig, lora: LoRAConfig | None = None) -> Llama:
    """A model whose weights have no memory yet: `load_weights` brings it."""
    with torch.device("meta"):
        return adapt(Llama(c), lora or LoRAConfig())


def load_weights(model: Llama, weights: dict[str, torch.Tensor], where: str = "the checkpoint") -> None:
    """Give the model these tensors, not copied. Raises UserError unless it has these names and shapes."""
    try:
        model.load_state_dict(weights, assign=True)
    except Exception as error:
        reason = str(error).split("\n\t")[-1].strip()[:200]
        raise UserError(f"{where} is damaged or of another version: {reason}") from None
    if model.config.tie_embeddings:  # assigning has made two parameters of the one
        output = model.output.linear if isinstance(model.output, LoRALinear) else model.output
        output.weight = model.tok_embeddings.weight


def build_model(checkpoint: dict, device: str | torch.device = "cpu", **changes) -> Llama:
    """The model of a loaded checkpoint, some fields of its config replaced, in eval mode. Its weights are the
    mapped file's unless another device is asked for; weights of several dtypes become float32."""
    model = empty_model(model_config(checkpoint, **changes), lora_config(checkpoint))
    load_weights(model, checkpoint["model"])
    if len({p.dtype for p in model.parameters()}) > 1:
        model.float()
    return model.to(device).eval()


def build(checkpoint: dict, device="cpu", kv_bits: int | None = None) -> tuple[Llama, Tokenizer]:
    """The model, in eval mode, and the tokenizer of a loaded checkpoint; `kv_bits` replaces its cache's."""
    changes = {"kv_bits": kv_bits} if kv_bits else {}
    return build_model(checkpoint, device, **changes), read_tokenizer(checkpoint["tokenizer"])


def with_model(checkpoint: dict, model: Llama) -> dict:
    """The checkpoint with other weights: an adapter and the optimizer's state do not fit them."""
    kept = {key: x for key, x in checkpoint.items() if key not in ("lora", "optimizers", "scaler")}
    return kept | {"model": model.state_dict(), "config": asdict(model.config)}


def merged(checkpoint: dict) -> dict:
    """The checkpoint as an ordinary one: adapter added, NF4 dequantized, in the dtype of its embeddings."""
    require(lora_config(checkpoint).lora_r > 0, "this checkpoint has no adapter: there is nothing to merge")
    model, weights = build_model(checkpoint), checkpoint["model"]
    return with_model(checkpoint, plain(model).to(weights["tok_embeddings.weight"].dtype))


# ---- the command ----


@dataclass
class CheckpointConfig:
    """checkpoints"""

    action: Literal["show", "merge"]  # what to do
    ckpt: str  # the checkpoint
    out: str = "merged.pt"  # merge: the checkpoint to write
    overwrite: bool = False  # merge: replace an existing checkpoint


def picture(c: ModelConfig) -> Iterator[str]:
    """A line for each run of equal layers: every head's K and V group, as letters, or a latent's size."""
    letters, width = string.ascii_uppercase + string.ascii_lowercase, max(c.n_head + 6, 28)

    def drawn(of_head: list[int], latent: int, told: int) -> str:
        if latent:
            return f"latent ({latent})" + " and tokens" * (told > 0)
        heads = "".join(letters[g] for g in of_head) if max(of_head) < 52 else " ".join(map(str, of_head))
        return f"{heads} ({max(of_head) + 1})"

    yield f"  {'layer':8} {'K group of each query head':{width}} V group"
    sources = zip(c.k_groups, c.v_groups, c.k_latent, c.v_latent, c.t_latent)
    rows = [(drawn(k, 2 * sum(ranks), t), drawn(v, v_rank, t)) for k, v, ranks, v_rank, t in sources]
    for row, run in groupby(range(c.n_layer), key=rows.__getitem__):
        layers = list(run)
        span = f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else f"{layers[0]}"
        yield f"  {span:8} {row[0]:{width}} {row[1]}"


def show(path: str | Path) -> None:
    """Print what a checkpoint is."""
    checkpoint = load(path)
    model, lora = build_model(checkpoint), lora_config(checkpoint)
    c, dtype = model.config, model.tok_embeddings.weight.dtype
    params, kind = model.num_params(), str(dtype).removeprefix("torch.")
    print(f"{path}: {params:,} parameters, {kind}, {Path(path).stat().st_size:,} bytes")
    for name, value in asdict(c).items():
        if not name.endswith(("_groups", "_latent", "kv_head")) and value is not None:
            print(f"  {name:14} {value}")
    print("head groups\n" + "\n".join(picture(c)))
    cache = c.kv_bytes_per_token(dtype.itemsize)
    share = 100 * cache / (2 * c.n_layer * c.n_head * c.head_dim * dtype.itemsize)
    print(f"KV cache: {cache:,} bytes a token ({share:.0f}% of multi-head attention)")
    if checkpoint["tokenizer"]:
        t = read_tokenizer(checkpoint["tokenizer"])
        print(f"tokenizer: {t.kind}, {t.vocab_size:,} tokens, BOS {t.bos}, EOS {t.eos}")
    if lora.lora_r:
        added = sum(layer.lora_A.numel() + layer.lora_B.numel() for layer in adapters(model))
        print(f"LoRA: {added:,} parameters, not merged")
    if stored := [layer for layer in model.modules() if isinstance(layer, NF4Linear)]:
        weights, size = sum(x.num_weights for x in stored), sum(b.nbytes for x in stored for b in x.buffers())
        print(f"NF4: {weights:,} weights in {size:,} bytes ({8 * size / weights:.3f} bits each)")
    for key in ("lora", "grouped", "train", "step", "tokens", "source"):
        values = checkpoint.get(key)
        if isinstance(values, dict):
            values = ", ".join(f"{k} {v}" for k, v in values.items() if v is not None)
        if values is not None:
            print(f"{key}: {values}")


def main() -> None:
    config = CheckpointConfig(**parse(__doc__, CheckpointConfig))
    if config.action == "merge":
        writable(Path(config.out), config.overwrite)
        save(Path(config.out), merged(load(config.ckpt)))
    show(config.ckpt if config.action == "show" else config.out)


if __name__ == "__main__":
    exit_cleanly(main)
