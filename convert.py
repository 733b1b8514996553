"""Other programs' Llama checkpoints, read: `python checkpoint.py import`.

A Hugging Face folder is read by `hugging_face.py`; here are Meta's own folder (consolidated.00.pth, params.json),
llama2.c's legacy float32 .bin, and the tokenizers of all. A reader gives the fields of ModelConfig, and the weights
under our names, mapped from the file and not read: memory holds a page once it is used, so that the largest use of it
is the checkpoint's size and one tensor. What our model cannot be exactly is refused by its name.
"""

import json
import math
import re
import struct
from dataclasses import asdict
from pathlib import Path

import torch

from checkpoint import empty_model, model_config
from config import UserError
from hugging_face import Settings, Weights, open_weights, read_hugging_face, read_json
from model import ROPE_SCALING, ModelConfig, rope_angles
from tokenizer import SPACE, read_tokenizer


def read(source: Path, tokenizer: str | None = None, block_size: int | None = None) -> tuple[dict, list[str]]:
    """A checkpoint made of `source`, its weights mapped from there, and notes for the user.

    Raises UserError when the source is missing, damaged, contradicts itself, or is a model that ours cannot be.
    """
    if source.is_dir():
        reader = read_meta_folder if (source / "params.json").exists() else read_hugging_face
        settings, weights, special = reader(source)
    elif source.is_file() and source.suffix == ".bin" and source.name != "pytorch_model.bin":
        settings, weights, special = *read_llama2c(source), {}
    elif source.exists():
        raise UserError(f"{source}: give the folder that holds it and its config.json, or a llama2.c .bin file")
    else:
        raise UserError(f"{source}: no such file or folder")
    if block_size is not None:
        settings["block_size"] = block_size
    notes, beside = [], source if source.is_dir() else None
    data = find_tokenizer(beside, Path(tokenizer) if tokenizer else None, special)
    if data is None:
        notes.append("no tokenizer there: eval_ppl.py and sample.py will want one; import again with --tokenizer FILE")
    elif read_tokenizer(data).kind == "tokenizer.json":
        notes.append(
            "a tokenizer.json cannot be made a SentencePiece model: evaluating, sampling and training on it work "
            "wherever `pip install tokenizers` was run"
        )
    checkpoint = {"model": weights, "config": settings, "tokenizer": data, "source": str(source)}
    check(checkpoint, source)
    return checkpoint, notes


def check(checkpoint: dict, source: Path) -> None:
    """Raise UserError unless the weights are those that the settings ask for, finite, and enough for the tokenizer."""
    c, weights = model_config(checkpoint), checkpoint["model"]
    if c.tie_embeddings and "output.weight" not in weights:
        weights["output.weight"] = weights.get("tok_embeddings.weight", torch.empty(0))
    empty_model(c, weights, str(source))
    if c.tie_embeddings and not torch.equal(weights["output.weight"], weights["tok_embeddings.weight"]):
        raise UserError(f"{source} ties its embeddings, and holds an output matrix that is another: it is damaged")
    for name, x in weights.items():
        if not all(bound.isfinite() for bound in x.aminmax()):  # which needs no memory, and passes nan on
            raise UserError(f"{source} is damaged: {name} holds numbers that are not finite")
    if checkpoint["tokenizer"] and (tokens := read_tokenizer(checkpoint["tokenizer"]).vocab_size) > c.vocab_size:
        few = f"the tokenizer has {tokens} tokens, the model {c.vocab_size}"
        raise UserError(f"{few}: give the model's own, --tokenizer FILE")


# ---- Meta and llama2.c, whose names and rotary pairs are ours ----


def read_meta_folder(folder: Path) -> tuple[Settings, Weights, dict]:
    params, path = read_json(folder / "params.json"), folder / "consolidated.00.pth"
    if (folder / "consolidated.01.pth").exists():
        raise UserError(f"{folder} is split for several GPUs: import the model's Hugging Face folder instead")
    if not path.exists():
        raise UserError(f"{folder} has no consolidated.00.pth: complete the download")
    weights = {name: x for name, x in open_weights(path).items() if name != "rope.freqs"}
    if missing := {"dim", "n_layers", "n_heads", "norm_eps"} - set(params):
        raise UserError(f"{folder}/params.json lacks {', '.join(sorted(missing))}")
    for name in ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight"):
        if name not in weights or weights[name].dim() != 2:
            raise UserError(f"{path} has no matrix {name}: it is no Llama, or damaged")
    settings: Settings = {
        "n_layer": params["n_layers"], "n_head": params["n_heads"], "n_kv_head": params.get("n_kv_heads"),
        "dim": params["dim"], "norm_eps": params["norm_eps"], "rope_theta": params.get("rope_theta", 10000.0),
        "hidden_dim": weights["layers.0.feed_forward.w1.weight"].shape[0], "block_size": 2048,
        "vocab_size": weights["tok_embeddings.weight"].shape[0], "tie_embeddings": "output.weight" not in weights,
    }  # fmt: skip
    if params.get("use_scaled_rope"):
        if "rope_scaling_factor" not in params:
            remedy = 'add "rope_scaling_factor": 8 if it is Llama 3.1, 32 if it is Llama 3.2'
            raise UserError(f"{folder}/params.json says use_scaled_rope and not how far: {remedy}")
        values = (params["rope_scaling_factor"], 1, params.get("rope_high_freq_factor", 4), 8192)
        settings["rope_scaling"] = dict(zip(ROPE_SCALING, values))
    return settings, weights, {}


def llama2c_config(path: Path) -> ModelConfig:
    """The header: dim, hidden_dim, layers, heads, K/V heads, vocabulary, context as int32. A negative vocabulary says
    that the output has a matrix of its own."""
    with open(path, "rb") as file:
        header = file.read(28)
    if header.startswith(b"24ka"):
        raise UserError(f"{path} is a later version of llama2.c's format: export it there with --version 0")
    sizes = struct.unpack("<7i", header.ljust(28, b"\0"))
    if not all(sizes):
        raise UserError(f"{path} is no model of llama2.c: the seven sizes at its beginning are {sizes}")
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
    # rotary tables, which llama2.c itself no longer reads: they tell whether the base is the one that it assumes
    angles = rope_angles(torch.arange(c.block_size), c.head_dim, c.rope_theta)
    for stored, ours in zip((weights.pop("cos"), weights.pop("sin")), angles):
        if not torch.allclose(stored, ours.flatten(), atol=1e-3):
            raise UserError(f"{path} is damaged, or was trained with another rope_theta than {c.rope_theta:g}")
    return {name: value for name, value in asdict(c).items() if not name.endswith("_groups")}, weights


# ---- tokenizers ----


def find_tokenizer(folder: Path | None, given: Path | None, config: dict) -> bytes | None:
    """The bytes of the tokenizer that was given, or else lies in the folder; None where there is none.

    Raises UserError when it cannot be read.
    """
    candidates = [folder / name for name in ("tokenizer.model", "tokenizer.json")] if folder else []
    path = given or next((path for path in candidates if path.exists()), None)
    if path is None:
        return None
    if not path.is_file():
        raise UserError(f"--tokenizer {path}: no such file")
    data = path.read_bytes()
    if not given and path.suffix == ".model" and is_tiktoken(data) and candidates[1].exists():
        path, data = candidates[1], candidates[1].read_bytes()
    if is_tiktoken(data):
        raise UserError(f"{path} is in tiktoken's format: give --tokenizer tokenizer.json, of the Hugging Face folder")
    try:
        if path.suffix == ".bin":
            data = sentencepiece_of_llama2c(data)
        elif path.suffix == ".json":
            if not config and (path.parent / "config.json").exists():
                config = read_json(path.parent / "config.json")
            data = json.dumps({**json.loads(data), **special_tokens(config)}, ensure_ascii=False).encode()
        read_tokenizer(data)
    except (UserError, ValueError, TypeError, RecursionError, struct.error) as error:
        raise UserError(f"{path} is no tokenizer, or damaged: {str(error)[:120]}") from None
    return data


def is_tiktoken(data: bytes) -> bool:
    """Whether it is Llama 3's tokenizer.model: lines of a piece in base64 and its rank."""
    return re.match(rb"[A-Za-z0-9+/=]+ \d+\n", data[:200]) is not None


def special_tokens(config: dict) -> dict:
    """BOS and EOS of config.json, as JsonTokenizer wants them beside the tokenizer's own keys."""
    bos, eos = config.get("bos_token_id"), config.get("eos_token_id")
    eos = [token for token in (eos if isinstance(eos, list) else [eos]) if type(token) is int]
    return {"eos_ids": eos} | ({"bos_id": bos} if type(bos) is int else {})


def sentencepiece_of_llama2c(data: bytes) -> bytes:
    """llama2.c's tokenizer.bin (the longest piece's bytes as int32, then float32 score, int32 length and bytes of each
    piece) as a SentencePiece model: the BPE pieces with the same scores give the same tokens.

    The model is a protocol buffer, written here by hand: sentencepiece_model.proto has the numbers of the fields.
    """
    pieces, place = [], 4
    while place < len(data):
        score, length = struct.unpack_from("<fi", data, place)
        piece = data[place + 8 : place + 8 + length]
        if not 0 < length == len(piece):
            raise UserError(f"piece {len(pieces)} at byte {place} has length {length}")
        pieces.append((score, piece.decode().replace(" ", SPACE)))
        place += 8 + length
    if len(pieces) < 259:
        raise UserError(f"it has {len(pieces)} pieces, below the 3 + 256 of control tokens and bytes")

    def entry(field: int, value: int | bytes) -> bytes:
        """A varint, or bytes with their length."""
        tag = varint(field << 3 | (2 if isinstance(value, bytes) else 0))
        return tag + (varint(len(value)) + value if isinstance(value, bytes) else varint(value))

    names = ("<unk>", "<s>", "</s>")
    unknown, control, normal, byte = 2, 3, 1, 6
    model = b""
    for i, (score, piece) in enumerate(pieces):
        kind = byte if 3 <= i < 259 else normal if i > 2 else control if i else unknown
        text = (names[i] if i < 3 else piece).encode()
        model += entry(1, entry(1, text) + b"\x15" + struct.pack("<f", score) + entry(3, kind))
    bpe, whole_spaces = 2, entry(3, 1) + entry(4, 0) + entry(5, 1)  # space before the text, runs of them stay, escaped
    trainer = entry(3, bpe) + entry(4, len(pieces)) + entry(35, 1) + entry(40, 0) + entry(41, 1) + entry(42, 2)
    return model + entry(2, trainer) + entry(3, entry(1, b"identity") + whole_spaces)


def varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first, the high bit on all but the last."""
    return bytes([value & 127 | 128]) + varint(value >> 7) if value > 127 else bytes([value])
