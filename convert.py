"""Other programs' Llama checkpoints, read: `python checkpoint.py import`.

A Hugging Face folder is read by `hugging_face.py`, a tokenizer by `tokenizer_files.py`; here are Meta's own folder
(consolidated.00.pth, params.json) and llama2.c's legacy float32 .bin. A reader gives the fields of ModelConfig, and the
weights under our names, mapped from the file and not read: memory holds a page once it is used, so that the largest use
of it is the checkpoint's size and one tensor. What our model cannot be exactly is refused by its name.
"""

import math
import struct
from dataclasses import asdict
from pathlib import Path

import torch

from checkpoint import empty_model, model_config
from config import UserError
from hugging_face import Settings, Weights, open_weights, read_hugging_face
from model import ROPE_SCALING, ModelConfig, rope_angles
from tokenizer import Tokenizer
from tokenizer_files import find_tokenizer, left_out, read_json


def read(source: Path, tokenizer: str | None = None, block_size: int | None = None) -> tuple[dict, list[str]]:
    """A checkpoint made of `source`, its weights mapped from there, and notes for the user.

    Raises UserError when the source is missing, damaged, contradicts itself, or is a model that ours cannot be.
    """
    if source.is_dir():
        meta = (source / "params.json").exists() and not (source / "config.json").exists()
        settings, weights = (read_meta_folder if meta else read_hugging_face)(source)
    elif source.is_file() and source.suffix == ".bin" and source.name != "pytorch_model.bin":
        settings, weights = read_llama2c(source)
    elif source.suffix == ".pt" and source.exists():
        raise UserError(f"{source} is no foreign format: python checkpoint.py show {source}")
    elif source.exists():
        raise UserError(f"{source} is one file: name its folder, {source.parent}, or a .bin of llama2.c")
    else:
        raise UserError(f"{source}: no such file or folder; to get one of the hub: hf download NAME --local-dir FOLDER")
    if block_size is not None:
        settings["block_size"] = block_size
    found = find_tokenizer(source if source.is_dir() else None, Path(tokenizer) if tokenizer else None)
    checkpoint = {"model": weights, "config": settings, "tokenizer": found and found.data, "source": str(source)}
    check_weights(checkpoint, source)
    notes = check_tokenizer(found, settings["vocab_size"], llama2c=(tokenizer or "").endswith(".bin"))
    if found and not tokenizer and (lost := left_out(source, found)):
        which = (
            f"{len(lost)} tokens of tokenizer.json are not in tokenizer.model, which was read ({', '.join(lost[:3])})"
        )
        notes.append(f"{which}: import with --tokenizer {source}/tokenizer.json to have them")
    return checkpoint, notes


def check_weights(checkpoint: dict, source: Path) -> None:
    """Raise UserError unless the weights are finite, and tied where the settings say so."""
    c, weights = model_config(checkpoint), checkpoint["model"]
    if c.tie_embeddings and not torch.equal(weights["output.weight"], weights["tok_embeddings.weight"]):
        raise UserError(f"{source} ties its embeddings, and holds an output matrix that is another: it is damaged")
    for name, x in weights.items():
        if not all(bound.isfinite() for bound in x.aminmax()):  # which needs no memory, and passes nan on
            raise UserError(f"{source} is damaged: {name} holds numbers that are not finite")


def check_tokenizer(tokenizer: Tokenizer | None, vocab_size: int, llama2c: bool) -> list[str]:
    """Notes on what the tokenizer allows. Raises UserError when it has tokens that the model has not, or, in llama2.c's
    format, not as many: its file does not say how many there are, and may have been cut."""
    if tokenizer is None:
        return ["no tokenizer there; to evaluate or sample, import again with --tokenizer FILE"]
    if tokenizer.text_size > vocab_size or (llama2c and tokenizer.text_size < vocab_size):
        few = f"the tokenizer has {tokenizer.text_size} tokens, the model {vocab_size}"
        raise UserError(f"{few}: give the model's own, --tokenizer FILE")
    if tokenizer.vocab_size > vocab_size:
        beyond = f"bos_token_id or eos_token_id is {max(tokenizer.stop)}, the vocabulary has {vocab_size} tokens"
        raise UserError(f"{beyond}: mend config.json or generation_config.json")
    notes = []
    if tokenizer.kind == "tokenizer.json":
        kept = "its tokenizer.json cannot be made a SentencePiece model and is kept as it is"
        notes.append(f"{kept}: evaluating, sampling and training work, and need `pip install tokenizers`")
    if tokenizer.eos < 0:
        notes.append("no token that ends a text is known: samples go on to the end of the context")
    return notes


# ---- Meta and llama2.c, whose names and rotary pairs are ours ----


# what params.json may say and this reader understands; multiple_of and ffn_dim_multiplier show in the weights
KNOWN = {"dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps"}
KNOWN |= {"rope_theta", "use_scaled_rope", "rope_scaling_factor", "rope_high_freq_factor", "max_seq_len"}
KNOWN |= {"max_batch_size"}


def read_meta_folder(folder: Path) -> tuple[Settings, Weights]:
    """Settings and weights of consolidated.00.pth and params.json. Raises UserError as `read` does."""
    params, path = read_json(folder / "params.json"), folder / "consolidated.00.pth"
    if (folder / "consolidated.01.pth").exists():
        raise UserError(f"{folder} is split for several GPUs: import the model's Hugging Face folder instead")
    if not path.exists():
        raise UserError(f"{folder} has no consolidated.00.pth: complete the download")
    if unknown := set(params) - KNOWN:
        raise UserError(f"{folder}/params.json has {', '.join(sorted(unknown))}, which this Llama does not have")
    if missing := {"dim", "n_layers", "n_heads", "norm_eps"} - set(params):
        raise UserError(f"{folder}/params.json lacks {', '.join(sorted(missing))}")
    weights = {name: x for name, x in open_weights(path).items() if name != "rope.freqs"}
    for name in ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight"):
        if name not in weights or weights[name].dim() != 2:
            raise UserError(f"{path} has no matrix {name}: it is no Llama, or damaged")
    vocab_size, hidden_dim = (weights[name].shape[0] for name in ("tok_embeddings.weight", name))
    if params.get("vocab_size", -1) not in (-1, vocab_size):  # -1 leaves it to the tokenizer
        raise UserError(f"{folder} contradicts itself: vocab_size {params['vocab_size']}, and {vocab_size} embeddings")
    settings: Settings = {
        "n_layer": params["n_layers"], "n_head": params["n_heads"], "n_kv_head": params.get("n_kv_heads"),
        "dim": params["dim"], "norm_eps": params["norm_eps"], "rope_theta": params.get("rope_theta", 10000.0),
        "hidden_dim": hidden_dim, "vocab_size": vocab_size, "block_size": params.get("max_seq_len", 2048),
        "tie_embeddings": "output.weight" not in weights,
    }  # fmt: skip
    if params.get("use_scaled_rope"):
        if "rope_scaling_factor" not in params:
            remedy = 'add "rope_scaling_factor": 8 if it is Llama 3.1, 32 if it is Llama 3.2'
            raise UserError(f"{folder}/params.json says use_scaled_rope and not how far: {remedy}")
        values = (params["rope_scaling_factor"], 1, params.get("rope_high_freq_factor", 4), 8192)
        settings["rope_scaling"] = dict(zip(ROPE_SCALING, values))
    weights.setdefault("output.weight", weights["tok_embeddings.weight"])
    empty_model(model_config({"config": settings}), weights, str(folder))
    return settings, weights


def llama2c_config(path: Path) -> ModelConfig:
    """The header: dim, hidden_dim, layers, heads, K/V heads, vocabulary, context as int32. A negative vocabulary says
    that the output has a matrix of its own."""
    with open(path, "rb") as file:
        header = file.read(28)
    if header.startswith(b"24ka"):
        raise UserError(f"{path} is a later version of llama2.c's format: export it there with --version 0")
    sizes = struct.unpack("<7i", header.ljust(28, b"\0"))
    if not all(sizes):
        hint = "; is it a tokenizer? name it behind --tokenizer" if path.name.startswith("tok") else ""
        raise UserError(f"{path} is no model of llama2.c: the seven sizes at its beginning are {sizes}{hint}")
    names = ("dim", "hidden_dim", "n_layer", "n_head", "n_kv_head", "vocab_size", "block_size")
    settings = dict(zip(names, (*sizes[:5], abs(sizes[5]), sizes[6])))
    try:
        return ModelConfig(**settings, tie_embeddings=sizes[5] > 0, norm_eps=1e-5)
    except UserError as error:
        raise UserError(f"{path} is no model of llama2.c: {str(error).split(':')[0]}") from None


def read_llama2c(path: Path) -> tuple[Settings, Weights]:
    """llama2.c's legacy format: the header, then float32 weights, each kind for all layers at once."""
    c = llama2c_config(path)
    kv, table = c.n_kv_head * c.head_dim, c.block_size * c.head_dim // 2
    stacks = {
        "attention_norm": (c.dim,), "attention.wq": (c.dim, c.dim), "attention.wk": (kv, c.dim),
        "attention.wv": (kv, c.dim), "attention.wo": (c.dim, c.dim), "ffn_norm": (c.dim,),
        "feed_forward.w1": (c.hidden_dim, c.dim), "feed_forward.w2": (c.dim, c.hidden_dim),
        "feed_forward.w3": (c.hidden_dim, c.dim),
    }  # fmt: skip
    shapes = {"tok_embeddings.weight": (c.vocab_size, c.dim)}
    shapes |= {f"layers.{i}.{name}.weight": shape for name, shape in stacks.items() for i in range(c.n_layer)}
    shapes |= {"norm.weight": (c.dim,), "cos": (table,), "sin": (table,)}
    shapes |= {} if c.tie_embeddings else {"output.weight": (c.vocab_size, c.dim)}
    counts, size = [math.prod(shape) for shape in shapes.values()], path.stat().st_size
    if size != 28 + 4 * sum(counts):
        wanted = f"{28 + 4 * sum(counts):,}"
        raise UserError(f"{path} has {size:,} bytes, and its header asks for {wanted}: it is damaged, or no llama2.c")
    flat = torch.from_file(str(path), shared=False, size=size // 4, dtype=torch.float32)
    weights = {name: x.view(shape) for (name, shape), x in zip(shapes.items(), flat[7:].split(counts))}
    weights.setdefault("output.weight", weights["tok_embeddings.weight"])
    # rotary tables, which llama2.c itself no longer reads: they tell whether the base is the one that it assumes
    angles = rope_angles(torch.arange(c.block_size), c.head_dim, c.rope_theta)
    for stored, ours in zip((weights.pop("cos"), weights.pop("sin")), angles):
        if not torch.allclose(stored, ours.flatten(), atol=1e-3):
            raise UserError(f"{path} is damaged, or was trained with another rope_theta than {c.rope_theta:g}")
    return {name: value for name, value in asdict(c).items() if not name.endswith("_groups")}, weights
