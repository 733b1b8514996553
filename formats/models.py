"""Models of other programs: Hugging Face's folder in and out, Meta's folder and llama2.c's legacy .bin in.

A reader returns the fields of ModelConfig, and the weights under our names, mapped from the file: a page
takes memory once it is used. What our model cannot be exactly is refused.

Meta's names and rotary pairs, (2f, 2f + 1), are ours. Hugging Face rotates (f, f + D/2), so rows of wq and wk
are permuted on the way. And its K/V groups are equal runs of heads: uneven ones are written as the smallest
number of K/V heads that represents them exactly.
"""

import math
import re
import struct
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch

from checkpoint import empty_model, load, load_weights, model_config
from common import UserError, checked, note, require
from data.tokenizer import Tokenizer, read_tokenizer
from formats.files import Settings, Weights, read_json, read_tensors, write_folder
from formats.tokenizers import tokenizer_files
from model import ROPE_SCALING, ModelConfig

NAMES = {  # ours: Hugging Face's; within a layer, and outside
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj", "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head",
}  # fmt: skip
FIELDS = {  # ours: (config.json's, what a missing one means there)
    "n_layer": ("num_hidden_layers",), "n_head": ("num_attention_heads",),
    "n_kv_head": ("num_key_value_heads", None), "dim": ("hidden_size",), "head_dim": ("head_dim", None),
    "hidden_dim": ("intermediate_size",), "block_size": ("max_position_embeddings", 2048),
    "vocab_size": ("vocab_size",), "norm_eps": ("rms_norm_eps", 1e-6),
    "tie_embeddings": ("tie_word_embeddings", False), "rope_theta": ("rope_theta", 10000.0),
}  # fmt: skip
ACCEPTED = {  # what config.json may give, if it gives it; all else makes another model
    "architectures": (["LlamaForCausalLM"], ["LLaMAForCausalLM"]), "model_type": ("llama",),
    "attention_bias": (False,), "mlp_bias": (False,), "quantization_config": (),
    "hidden_act": ("silu", "swish"), "rope_type": ("default", "llama3"), "partial_rotary_factor": (1,),
}  # fmt: skip
# what params.json may give; the weights show what multiple_of and ffn_dim_multiplier lead to
PARAMS = {"dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "norm_eps", "rope_theta", "max_seq_len"}
PARAMS |= {"use_scaled_rope", "rope_scaling_factor", "rope_high_freq_factor", "max_batch_size"}
PARAMS |= {"multiple_of", "ffn_dim_multiplier"}
LLAMA2C_SIZES = ("dim", "hidden_dim", "n_layer", "n_head", "n_kv_head", "vocab_size", "block_size")
LLAMA2C_ORDER = ("tok_embeddings", "attention_norm", "wq", "wk", "wv", "wo", "ffn_norm", "w1", "w2", "w3")
LLAMA2C_ORDER += ("norm", "cos", "sin", "output")


def their_name(ours: str) -> str:
    """layers.3.attention.wq.weight -> model.layers.3.self_attn.q_proj.weight; lora_A stays so."""
    layer, part, kind = re.fullmatch(r"(layers\.\d+\.)?(.+)\.(\w+)", ours).groups()
    return f"{'model.' + layer if layer else ''}{NAMES[part]}.{kind}"


def permute_rows(weights: Weights, head_dim: int, to_pairs: bool) -> None:
    """Put rows f, f + D/2 of each head of wq and wk (H*D, C) and their lora_B at 2f, 2f + 1, or back. In
    place: a mapped file's pages become private ones, and nothing is held twice."""
    split = (2, head_dim // 2) if to_pairs else (head_dim // 2, 2)
    ends = ("wq.weight", "wk.weight", "wq.lora_B", "wk.lora_B")
    once = {x.data_ptr(): x for name, x in weights.items() if name.endswith(ends)}  # layers may share tensors
    for x in once.values():
        x.copy_(x.unflatten(0, (-1, *split)).transpose(1, 2).flatten(0, 2))


def read_hugging_face(folder: Path) -> tuple[Settings, Weights]:
    """config.json, and model.safetensors or pytorch_model.bin, whole or sharded."""
    settings = settings_of(read_json(folder / "config.json"))
    c = checked(ModelConfig, settings)
    ours = {their_name(name): name for name in empty_model(c).state_dict()}
    weights = {ours.get(n, n): x for n, x in read_shards(folder).items() if ".rotary_emb." not in n}
    permute_rows(weights, c.head_dim, to_pairs=True)
    return settings, weights


def settings_of(config: dict) -> Settings:
    """config.json as fields of ModelConfig. Raises UserError for what our Llama cannot represent."""
    config = {name: value for name, value in config.items() if value is not None}
    for place in ("rope_parameters", "rope_scaling"):  # of transformers 5, and of older releases
        for name, value in config.get(place, {}).items():
            name = "rope_type" if name == "type" else name
            first = config.setdefault(name, value)
            require(first == value, f"{name} {first} and {value} contradict each other"[:160])
    for name, accepted in ACCEPTED.items():
        given = config.get(name)
        require(given in (None, *accepted), f"{name} {str(given)[:60]} is not supported")
    settings = {o: config.get(t, *default) if default else config[t] for o, (t, *default) in FIELDS.items()}
    if config.get("rope_type") == "llama3":
        *names, context = ROPE_SCALING
        settings["rope_scaling"] = {name: config[name] for name in names}
        settings["rope_scaling"][context] = config.get(context) or settings["block_size"]
    return settings


def read_shards(folder: Path) -> Weights:
    """All tensors of a Hugging Face folder; the index of shards is not needed."""
    for kind in ("model{}.safetensors", "pytorch_model{}.bin"):
        if paths := sorted(folder.glob(kind.format(""))) or sorted(folder.glob(kind.format("-*-of-*"))):
            shards = [read_tensors(path) for path in paths]
            weights = {name: x for shard in shards for name, x in shard.items()}
            once = len(weights) == sum(map(len, shards))
            require(once, f"{folder} has tensors in two files: keep the shards of one download")
            return weights
    raise UserError(f"{folder} has no model.safetensors and no pytorch_model.bin: is the download complete?")


def read_meta(folder: Path) -> tuple[Settings, Weights]:
    """params.json and consolidated.00.pth."""
    params = read_json(folder / "params.json")
    if (folder / "consolidated.01.pth").exists():
        raise UserError(f"{folder} is split for several GPUs: import the model's Hugging Face folder instead")
    weights = read_tensors(folder / "consolidated.00.pth")
    weights = {name: x for name, x in weights.items() if not name.endswith("rope.freqs")}
    if unknown := set(params) - PARAMS:
        raise UserError(f"params.json has {min(unknown)}, which this Llama does not have")
    settings: Settings = {
        "n_layer": params["n_layers"], "n_head": params["n_heads"], "n_kv_head": params.get("n_kv_heads"),
        "dim": params["dim"], "hidden_dim": len(weights["layers.0.feed_forward.w1.weight"]),
        "norm_eps": params["norm_eps"], "rope_theta": params.get("rope_theta", 10000.0),
        "vocab_size": len(weights["tok_embeddings.weight"]),  # theirs may be -1: the tokenizer's
        "block_size": params.get("max_seq_len", 2048), "tie_embeddings": "output.weight" not in weights,
    }  # fmt: skip
    if params.get("use_scaled_rope"):
        require("rope_scaling_factor" in params, "it lacks rope_scaling_factor: Llama 3.1's is 8, 3.2's 32")
        values = (params["rope_scaling_factor"], 1, params.get("rope_high_freq_factor", 4), 8192)
        settings["rope_scaling"] = dict(zip(ROPE_SCALING, values))
    return settings, weights


def read_llama2c(path: Path) -> tuple[Settings, Weights]:
    """Seven int32, then float32 weights, one kind of matrix after the other, each for all layers; a negative
    vocabulary size means an output matrix of its own."""
    with open(path, "rb") as file:
        header = file.read(28)
    later = header.startswith((b"24ka", b"PK"))  # of llama2.c's format, or torch's
    require(not later, "no legacy .bin of llama2.c: export it there with --version 0, or name its folder")
    settings: Settings = dict(zip(LLAMA2C_SIZES, struct.unpack("<7i", header)))
    tied = settings["vocab_size"] > 0
    settings |= {"vocab_size": abs(settings["vocab_size"]), "tie_embeddings": tied, "norm_eps": 1e-5}
    c = checked(ModelConfig, settings)
    shapes = {name.removesuffix(".weight"): x.shape for name, x in empty_model(c).state_dict().items()}
    shapes |= dict.fromkeys(("cos", "sin"), (c.block_size, c.head_dim // 2))
    order = [name for part in LLAMA2C_ORDER for name in shapes if name.split(".")[-1] == part]
    order = order[:-1] if tied else order
    counts, size = [math.prod(shapes[name]) for name in order], path.stat().st_size
    wanted = 28 + 4 * sum(counts)
    require(size == wanted, f"it has {size:,} bytes, and its header asks for {wanted:,}")
    flat = torch.from_file(str(path), shared=False, size=size // 4, dtype=torch.float32)
    parts = zip(order, flat[7:].split(counts))  # llama2.c itself no longer reads the rotary tables
    return settings, {f"{n}.weight": x.view(shapes[n]) for n, x in parts if n not in ("cos", "sin")}


def exported(path: Path, each: bool = False) -> tuple[ModelConfig, Weights, list[int], Tokenizer | None]:
    """A checkpoint as an ordinary Llama: its config, weights, number of K/V heads of each layer (one for all,
    unless `each` may have its own) and tokenizer. Raises UserError for what no ordinary Llama can be."""
    checkpoint = load(path)
    c, weights = model_config(checkpoint), dict(checkpoint["model"])
    require(not checkpoint.get("lora"), f"{path} has an adapter: checkpoint.py merge, or export --adapter")
    require(not (c.novel or c.gated), "a --novel or --gated model has layers that no other Llama has")
    require(not any(c.t_latent), "no other Llama computes keys from tokens: gqa.py without --cache_tokens")
    load_weights(empty_model(c), weights, str(path))
    tokenizer = read_tokenizer(checkpoint["tokenizer"]) if checkpoint["tokenizer"] else None
    size = max(x.itemsize for x in weights.values())
    ours, c = c.kv_bytes_per_token(size), expand_latents(weights, c)
    heads = expand_groups(weights, c, each)
    if c.tie_embeddings:
        del weights["output.weight"]
    theirs = 2 * sum(heads) * c.head_dim * size
    if theirs != ours:
        note(f"its cache, floats of equal heads, takes {theirs:,} bytes a token there and {ours:,} here")
    return c, weights, heads, tokenizer


def export(path: Path, folder: Path) -> None:
    """Write the Hugging Face folder of a checkpoint. Raises UserError for what it cannot hold."""
    c, weights, (heads, *_), tokenizer = exported(path)
    require(c.dim % c.n_head == 0, f"transformers needs n_head to divide dim: {c.n_head} and {c.dim}")
    permute_rows(weights, c.head_dim, to_pairs=False)
    dtype = max((x.dtype for x in weights.values()), key=lambda dtype: dtype.itemsize)
    weights = {their_name(name): x for name, x in weights.items()}
    files = {"model.safetensors": weights, "config.json": config_of(c, heads, tokenizer, dtype)}
    write_folder(folder, files | (tokenizer_files(tokenizer) if tokenizer else {}))
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"wrote {folder}, {size:,} bytes, {heads} K/V heads of {c.n_head}")


def config_of(c: ModelConfig, heads: int, tokenizer: Tokenizer | None, dtype: torch.dtype) -> dict:
    """config.json, in the words that transformers 4 and 5, vLLM and llama.cpp all read."""
    bos, eos = (tokenizer.bos, tokenizer.special["eos"]) if tokenizer else (-1, [])
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        **{theirs: getattr(c, ours) for ours, (theirs, *_) in FIELDS.items()}, "num_key_value_heads": heads,
        "rope_scaling": {"rope_type": "llama3", **c.rope_scaling} if c.rope_scaling else None,
        "attention_bias": False, "mlp_bias": False, "torch_dtype": str(dtype).removeprefix("torch."),
        # a missing BOS would mean 1, and a missing EOS 2
        "bos_token_id": bos if bos >= 0 else None, "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
    }  # fmt: skip


def expand_latents(weights: Weights, c: ModelConfig) -> ModelConfig:
    """Write latent keys and values, in the dict, as one of each for every query head; return that config."""
    k_groups, v_groups, own = list(c.k_groups), list(c.v_groups), list(range(c.n_head))
    for layer, (ranks, v_rank) in enumerate(zip(c.k_latent, c.v_latent)):
        name = f"layers.{layer}.attention."
        keys, values = weights[name + "wk.weight"], weights[name + "wv.weight"]
        if ranks:  # a head's pair is the sum, over its numbers in the latent, of them times conj(k_mix)
            mix = torch.view_as_complex(weights.pop(name + "k_mix").double())
            z = torch.view_as_complex(keys.double().unflatten(0, (-1, 2)).mT.contiguous())  # (R, C)
            parts = (mix.conj()[..., None] * z).split(ranks, dim=1)
            heads = torch.stack([part.sum(1) for part in parts], dim=1) * (c.head_dim / (2 * len(z))) ** 0.5
            weights[name + "wk.weight"] = torch.view_as_real(heads).mT.flatten(0, 2).to(keys.dtype)
            k_groups[layer] = own
        if v_rank:
            heads = weights.pop(name + "v_mix").mT @ torch.cat((values, keys[: 2 * sum(ranks)]))  # (H, D, C)
            weights[name + "wv.weight"], v_groups[layer] = heads.flatten(0, 1), own
    return replace(c, k_groups=k_groups, v_groups=v_groups, k_latent=None, v_latent=None)


def expand_groups(weights: Weights, c: ModelConfig, each: bool) -> list[int]:
    """Rewrite the attention weights, in the dict, for the smallest number of equal K/V groups that represents
    each layer, or if not `each`, all of them; return each layer's number.

    Heads may change places if the columns of wo go with them. Heads with the same K and the same V group form
    a class. All classes are cut into runs of one length: the greatest common divisor of the classes' sizes.
    """
    classes = [list(zip(k, v)) for k, v in zip(c.k_groups, c.v_groups)]
    runs = [math.gcd(*Counter(layer).values()) for layer in classes]
    runs = runs if each else [math.gcd(*runs)] * c.n_layer
    for layer, (class_of, run) in enumerate(zip(classes, runs)):
        order = sorted(range(c.n_head), key=lambda head: class_of.index(class_of[head]))
        k_heads, v_heads = ([class_of[head][kind] for head in order[::run]] for kind in (0, 1))
        for part, ids, dim in (("wq", order, 0), ("wo", order, 1), ("wk", k_heads, 0), ("wv", v_heads, 0)):
            name = f"layers.{layer}.attention.{part}.weight"
            x = weights[name].unflatten(dim, (-1, c.head_dim))
            if ids != list(range(x.shape[dim])):  # else nothing is copied
                weights[name] = x.index_select(dim, torch.tensor(ids)).flatten(dim, dim + 1)
    return [c.n_head // run for run in runs]
