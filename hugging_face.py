"""Hugging Face's folder of a LlamaForCausalLM, read and written.

    config.json    model.safetensors or pytorch_model.bin, whole or sharded    tokenizer.model or tokenizer.json

Two conventions differ from ours. Hugging Face turns the pairs (f, f + D/2) of a head where Meta's Llama and ours turn
(2f, 2f + 1), so the rows of wq and wk are permuted on the way. And it knows K/V groups of one size alone: uneven ones
are written as the smallest number of K/V heads that represents them. What cannot be represented exactly is refused.
"""

import json
import math
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from checkpoint import check_tensors, empty_model, load, map_file, model_config
from config import UserError
from model import ROPE_SCALING, ModelConfig
from tokenizer import Tokenizer, read_tokenizer
from tokenizer_files import read_json, write_tokenizer

Settings, Weights = dict[str, object], dict[str, torch.Tensor]

NAMES = {  # ours: Hugging Face's; within a layer, and outside
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head",
}  # fmt: skip
FIELDS = {  # ours: (config.json's, what a missing one means there)
    "n_layer": ("num_hidden_layers",), "n_head": ("num_attention_heads",), "n_kv_head": ("num_key_value_heads", None),
    "dim": ("hidden_size",), "head_dim": ("head_dim", None), "hidden_dim": ("intermediate_size",),
    "block_size": ("max_position_embeddings", 2048), "vocab_size": ("vocab_size",),
    "norm_eps": ("rms_norm_eps", 1e-6), "tie_embeddings": ("tie_word_embeddings", False),
}  # fmt: skip
ROTATED = ("attention.wq.weight", "attention.wk.weight")  # what RoPE turns, and hence the permuted


def their_name(ours: str) -> str:
    """layers.3.attention.wq.weight -> model.layers.3.self_attn.q_proj.weight"""
    layer, part = re.fullmatch(r"(layers\.\d+\.)?(.+)\.weight", ours).groups()
    return f"{'model.' + layer if layer else ''}{NAMES[part]}.weight"


def read_hugging_face(folder: Path) -> tuple[Settings, Weights]:
    """Settings and weights of the folder. Raises UserError as `convert.read` does."""
    path = folder / "config.json"
    settings = hugging_face_settings(read_json(path), path)
    try:
        c = model_config({"config": settings})
    except UserError as error:  # in their words, and without flags that only train.py has
        reason = re.split(r": (?:give|change) ", str(error))[0]
        for ours, (theirs, *_) in FIELDS.items():
            reason = re.sub(rf"\b{ours}\b", theirs, reason)
        raise UserError(f"{path}: {reason}") from None
    found = hugging_face_tensors(folder)
    found = {name: x for name, x in found.items() if ".rotary_emb." not in name}  # old releases saved these buffers
    if c.tie_embeddings and "model.embed_tokens.weight" in found:
        found.setdefault("lm_head.weight", found["model.embed_tokens.weight"])
    wanted = empty_model(c, found, str(folder), their_name).state_dict()
    weights = {name: found[their_name(name)] for name in wanted}
    for name, x in weights.items():
        if name.endswith(ROTATED):
            permute_rows(x, c.head_dim, to_pairs=True)
    return settings, weights


def hugging_face_settings(config: dict, path: Path) -> Settings:
    """The fields of ModelConfig. Raises UserError for what a Llama of ours cannot be."""
    named, kind = config.get("architectures"), config.get("model_type", "llama")
    if named not in (None, ["LlamaForCausalLM"], ["LLaMAForCausalLM"]) or kind != "llama":
        what = f"architectures {str(named)[:60]}, model_type {str(kind)[:20]}"
        raise UserError(f"{path}: {what} is not supported, LlamaForCausalLM alone is")
    rope, context = rope_settings(config, path), config.get("original_max_position_embeddings")  # of Llama 3's scaling
    supported = {
        "attention_bias": (config.get("attention_bias"), None, False),
        "mlp_bias": (config.get("mlp_bias"), None, False),
        "quantization_config": (config.get("quantization_config"), None),
        "hidden_act": (config.get("hidden_act"), None, "silu", "swish"),
        "RoPE type": (rope["rope_type"], "default", "llama3"),
        "partial_rotary_factor": (rope.get("partial_rotary_factor", config.get("partial_rotary_factor")), None, 1),
        "original_max_position_embeddings": (context, None, rope.get("original_max_position_embeddings", context)),
    }
    if wrong := [f"{name} {str(value)[:60]}" for name, (value, *fine) in supported.items() if value not in fine]:
        raise UserError(f"{path}: {', '.join(wrong)} is not supported")
    settings: Settings = {}
    for ours, (theirs, *default) in FIELDS.items():
        if theirs not in config and not default:
            raise UserError(f"{path} lacks {theirs}")
        settings[ours] = config.get(theirs, *default)
    settings["rope_theta"] = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    if rope["rope_type"] == "llama3":
        known = {"original_max_position_embeddings": context or settings["block_size"], **rope}
        settings["rope_scaling"] = {name: known.get(name) for name in ROPE_SCALING}
    return settings


def rope_settings(config: dict, path: Path) -> dict:
    """What config.json says of RoPE: transformers 5 writes rope_parameters; before, there were rope_scaling and
    rope_theta. Raises UserError when the two contradict each other."""
    new, old = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    if not isinstance(new, dict) or not isinstance(old, dict):
        raise UserError(f"{path}: RoPE type {str(new or old)[:60]} is not supported")
    if any(new.get(key, value) != value for key, value in old.items()) or (new and set(old) - set(new)):
        raise UserError(f"{path}: rope_parameters and rope_scaling say different things: remove the one that is wrong")
    rope = new or old
    return {**rope, "rope_type": rope.get("rope_type", rope.get("type", "default"))}


def hugging_face_tensors(folder: Path) -> Weights:
    """All tensors of the folder's weight files, mapped. Raises UserError when files are missing or damaged."""
    for whole in (folder / "model.safetensors", folder / "pytorch_model.bin"):
        index = folder / (whole.name + ".index.json")
        if whole.exists():
            return open_weights(whole)
        if index.exists():
            weights: Weights = {}
            shards = read_json(index).get("weight_map")
            shards = sorted(set(map(str, shards.values()))) if isinstance(shards, dict) else []
            for shard in shards:
                if Path(shard).name != shard or not (folder / shard).is_file():
                    raise UserError(f"{index} names {shard}, which is not there: complete the download")
                more = open_weights(folder / shard)
                if twice := set(more) & set(weights):
                    raise UserError(f"{folder / shard}: {min(twice)} is in another file, too")
                weights |= more
            return weights
    raise UserError(f"{folder} has no model.safetensors and no pytorch_model.bin, whole or sharded: is this all of it?")


def open_weights(path: Path) -> Weights:
    """The tensors of a .safetensors or torch.save file, mapped. Raises UserError when it is damaged."""
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, framework="pt") as file:
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        else:
            weights = map_file(path)
            if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights):
                raise ValueError("it holds no state dict")
            weights = {k: x.detach() if isinstance(x, torch.Tensor) else x for k, x in weights.items()}
    except ImportError:
        raise UserError(f"{path} needs a library to read it: pip install safetensors") from None
    except Exception as error:  # the readers raise whatever the bytes make them stumble over
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise UserError(f"{path} is damaged, cut short in a download, or of another format: {reason}") from None
    check_tensors(weights, path, path.stat().st_size)
    return weights


@torch.no_grad()
def permute_rows(weight: torch.Tensor, head_dim: int, to_pairs: bool) -> None:
    """Rows f, f + D/2 of every head of wq or wk, (H*D, C), become 2f, 2f + 1, or back. In place, which a mapped file
    does not see: private pages replace those of the file, so that nothing is held twice."""
    split = (2, head_dim // 2) if to_pairs else (head_dim // 2, 2)
    weight.copy_(weight.unflatten(0, (-1, *split)).transpose(1, 2).flatten(0, 2))


# ---- out ----


def export(path: str, folder: Path) -> str:
    """Write the Hugging Face folder of a checkpoint, whole or not at all, and return what was written, in words.

    Raises UserError for what LlamaForCausalLM cannot be, and for a folder that holds something.
    """
    checkpoint = load(path)
    c, weights = model_config(checkpoint), dict(checkpoint["model"])
    if checkpoint.get("lora"):
        raise UserError(f"{path} has an adapter: merge it first, python lora.py merge {path} --out merged.pt")
    if c.novel or c.gated:
        raise UserError("a --novel or --gated model has a layer that no other Llama has: it cannot be exported")
    if c.dim % c.n_head:
        raise UserError(f"dim {c.dim} is no multiple of n_head {c.n_head}, which transformers asks for")
    empty_model(c, weights, path)
    tokenizer = read_tokenizer(checkpoint["tokenizer"]) if checkpoint["tokenizer"] else None
    heads = expand_groups(weights, c)
    for name in weights:
        if name.endswith(ROTATED):
            permute_rows(weights[name], c.head_dim, to_pairs=False)
    if c.tie_embeddings:
        del weights["output.weight"]
    config = hugging_face_config(c, heads, tokenizer, {x.dtype for x in weights.values()})
    with new_folder(folder) as partial:
        write_safetensors({their_name(name): x for name, x in weights.items()}, partial / "model.safetensors")
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if tokenizer:
            write_tokenizer(tokenizer, partial)
    return what_it_costs(c, heads, checkpoint["model"], weights, folder)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `folder` when the block ends; an error leaves nothing. Raises
    UserError for a folder that holds something, and for a full or read-only disk."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} exists and is no empty folder: give another name, or delete it first")
    folder = folder.resolve()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=folder.name + ".", dir=folder.parent) as temporary:
            partial = Path(temporary) / folder.name
            partial.mkdir()
            yield partial
            partial.rename(folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error}") from None


def write_safetensors(weights: Weights, path: Path) -> None:
    """Write the tensors, for whoever may read the folder. Raises OSError for a full disk."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError:
        raise UserError("Hugging Face's format needs a library to write it: pip install safetensors") from None
    try:
        save_file(weights, path, {"format": "pt"})
    except SafetensorError as error:
        raise OSError(error) from None
    path.chmod(0o666 & path.parent.stat().st_mode)  # the library makes it the owner's alone


def uniform_heads(c: ModelConfig) -> tuple[int, list[list[int]]]:
    """The smallest number of equal K/V groups that represents the model, and the order of query heads in each layer.

    Heads may change places, if the columns of wo go with them. Heads of the same K and the same V group make a class;
    equal runs of `run` heads can be cut from classes of any sizes that `run` divides, in every layer, so the longest
    run is the greatest common divisor of all sizes.
    """
    classes = [list(zip(k, v)) for k, v in zip(c.k_groups, c.v_groups)]
    run = math.gcd(*(size for layer in classes for size in Counter(layer).values()))
    return c.n_head // run, [sorted(range(c.n_head), key=lambda h, of=of: of.index(of[h])) for of in classes]


def expand_groups(weights: Weights, c: ModelConfig) -> int:
    """Rewrite the attention weights, in the dict, for equal neighbouring groups; return their number."""
    heads, orders = uniform_heads(c)
    run = c.n_head // heads

    def take(name: str, ids: list[int], dim: int = 0) -> None:
        """Rows or columns of the heads `ids`; none are copied where all stay."""
        x = weights[name].unflatten(dim, (-1, c.head_dim))
        if ids != list(range(x.shape[dim])):
            index = torch.tensor(ids)
            weights[name] = x.index_select(dim, index).flatten(dim, dim + 1).contiguous()

    for layer, order in enumerate(orders):
        at = f"layers.{layer}.attention."
        take(at + "wq.weight", order)
        take(at + "wo.weight", order, dim=1)
        take(at + "wk.weight", [c.k_groups[layer][head] for head in order[::run]])
        take(at + "wv.weight", [c.v_groups[layer][head] for head in order[::run]])
    return heads


def hugging_face_config(c: ModelConfig, heads: int, tokenizer: Tokenizer | None, dtypes: set[torch.dtype]) -> dict:
    """config.json, in the words that transformers 4 and 5, vLLM and llama.cpp all read."""
    values = {ours: getattr(c, ours) for ours in FIELDS} | {"n_kv_head": heads}
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        **{FIELDS[ours][0]: value for ours, value in values.items()},
        "attention_bias": False, "mlp_bias": False, "rope_theta": c.rope_theta,
        "rope_scaling": {"rope_type": "llama3", **c.rope_scaling} if c.rope_scaling else None,
        "torch_dtype": str(max(dtypes, key=lambda dtype: dtype.itemsize)).removeprefix("torch."),
    }  # fmt: skip
    bos, eos = (tokenizer.bos, tokenizer.special["eos"]) if tokenizer else (-1, [])
    config["bos_token_id"] = bos if bos >= 0 else None  # a missing one would mean 1, and a missing EOS 2
    config["eos_token_id"] = eos[0] if len(eos) == 1 else eos or None
    return config


def what_it_costs(c: ModelConfig, heads: int, before: Weights, after: Weights, folder: Path) -> str:
    """What was written, and what an expansion of uneven groups costs."""
    size = sum(path.stat().st_size for path in folder.iterdir())
    text = f"wrote {folder}, {size:,} bytes, {heads} K/V heads of {c.n_head}"
    itemsize = after["tok_embeddings.weight"].itemsize
    ours, theirs = c.kv_numbers_per_token * itemsize, 2 * c.n_layer * heads * c.head_dim * itemsize
    if theirs != ours:
        grown = sum(after[name].nbytes - before[name].nbytes for name in after)
        text += f"\nuneven groups, expanded to {heads} equal ones: the KV cache takes {theirs:,} bytes a token there"
        text += f" and {ours:,} here, the weights {grown:,} bytes more"
    if (folder / "tokenizer.model").exists() and not (folder / "tokenizer.json").exists():
        text += "\nnote: its tokenizer.model is no plain BPE; transformers makes its own of it (pip install protobuf)"
    return text
