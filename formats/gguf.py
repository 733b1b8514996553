"""GGUF, the files of llama.cpp, in and out (pip install gguf): weights, dequantized if they must, tokenizers.

llama.cpp's Llama rotates the pairs (2f, 2f + 1), as ours does, so no row changes its place. Its "deci" is a
Llama whose layers may differ in their number of K/V heads; uneven groups are written as the smallest number
in each layer that represents them exactly.
"""

import json
from pathlib import Path

import torch

from checkpoint import empty_model
from common import checked, replacing, require
from data.tokenizer import JsonTokenizer, Tokenizer, read_tokenizer
from formats.files import Settings, Weights, reading
from formats.models import exported
from formats.tokenizers import ADDED, Kind, merges_of, sentencepiece_model, with_special
from model import ModelConfig

LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
LLAMA3 = (  # the pattern of Llama 3's tokenizer.json
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
SPLIT = {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False}
PRE_TOKENIZERS = {  # by llama.cpp's names; and ignore_merges (a part that is a piece needs none)
    "gpt-2": ([LEVEL], False),
    "smollm": ([{"type": "Digits", "individual_digits": True}, LEVEL], False),
    "llama-bpe": ([SPLIT, {**LEVEL, "use_regex": False}], True),
}


def read_gguf(path: Path) -> tuple[Settings, Weights, dict]:
    """Settings, weights, and all fields of a file. Raises UserError if it is no Llama of ours."""
    from gguf import MODEL_ARCH, GGUFReader, dequantize, get_tensor_name_map

    file, weights = GGUFReader(path, "c"), {}  # mapped; what writes to a tensor changes only the memory
    fields = {name: field.contents() for name, field in file.fields.items()}
    settings = settings_of(fields, {tensor.name for tensor in file.tensors})
    c = checked(ModelConfig, settings)
    theirs = get_tensor_name_map(MODEL_ARCH.LLAMA, c.n_layer)  # it has Meta's names, too, which are ours
    ours = {theirs.get_name(name, [".weight"]): name for name in empty_model(c).state_dict()}
    for tensor in file.tensors:
        plain = tensor.data.dtype.kind == "f"  # float32 and float16
        x = tensor.data if plain else dequantize(tensor.data, tensor.tensor_type)
        weights[ours.get(tensor.name, tensor.name)] = torch.from_numpy(x)
    return settings, weights, fields


def one(value: int | list[int]) -> int:
    """The number of a field that may have one for each layer; if they differ, the shapes do not fit."""
    return value[0] if isinstance(value, list) else value


def settings_of(fields: dict, tensors: set[str]) -> Settings:
    """A file's fields as those of ModelConfig. Raises UserError for what a Llama of ours cannot be."""
    kind = fields["general.architecture"]
    require(kind in ("llama", "deci"), f"its architecture is {kind}: only llama and deci are supported")
    own = {name.removeprefix(f"{kind}."): value for name, value in fields.items()}
    factor = own.get("rope.scaling.factor", own.get("rope.scale_linear", 1))  # without a type, it is linear
    scaled = "rope_freqs.weight" in tensors or own.get("rope.scaling.type", factor) not in ("none", 0, 1)
    require(not scaled, "its RoPE is scaled: import the model's Hugging Face folder instead")
    require(not own.get("expert_count"), "it is a mixture of experts")
    require(own.get("split.count", 1) < 2, "it is a part of a model: join them, llama-gguf-split --merge")
    n_layer, n_head, dim = own["block_count"], one(own["attention.head_count"]), own["embedding_length"]
    heads = own.get("attention.head_count_kv", n_head)
    groups = {"n_kv_head": heads}
    if isinstance(heads, list):
        divide = all(n and n_head % n == 0 for n in heads)
        require(divide, f"its K/V heads {heads} do not divide {n_head}"[:160])
        maps = [[head * n // n_head for head in range(n_head)] for n in heads]
        groups = {"k_groups": maps, "v_groups": maps}
    head_dim = own.get("attention.key_length", dim // n_head)
    require(own.get("rope.dimension_count", head_dim) == head_dim, "it rotates a part of each head")
    return {
        "n_layer": n_layer, "n_head": n_head, **groups, "dim": dim, "head_dim": head_dim,
        "hidden_dim": one(own["feed_forward_length"]), "block_size": own["context_length"],
        "vocab_size": own.get("vocab_size") or len(fields["tokenizer.ggml.tokens"]),
        "norm_eps": own["attention.layer_norm_rms_epsilon"], "rope_theta": own.get("rope.freq_base", 10000.0),
        "tie_embeddings": "output.weight" not in tensors,
    }  # fmt: skip


def tokenizer_of(path: Path, fields: dict) -> Tokenizer:
    """The tokenizer in a file's fields. Raises UserError for an unknown kind."""
    own = {name.removeprefix("tokenizer.ggml."): value for name, value in fields.items()}
    with reading(path, "tokenizer"):
        kind, pre = own.get("model", "missing"), own.get("pre", "default")
        if kind == "llama":
            pieces = list(zip(own["scores"], own["tokens"], own["token_type"]))
            data = sentencepiece_model(pieces, own.get("add_space_prefix", True))
        else:
            known = kind == "gpt2" and pre in PRE_TOKENIZERS
            require(known, f"its tokenizer is {kind}, {pre}: import with --tokenizer FILE")
            data = byte_level_of(own, *PRE_TOKENIZERS[pre])
        tokenizer = read_tokenizer(data)
        bos, ends = own.get("bos_token_id", tokenizer.bos), ("eos_token_id", "eot_token_id", "eom_token_id")
        eos = list(dict.fromkeys(own[end] for end in ends if end in own)) or tokenizer.special["eos"]
        add_bos = own.get("add_bos_token", kind == "llama" or pre == "llama-bpe")
        return with_special(tokenizer, bos, add_bos, eos)


def byte_level_of(own: dict, pre_tokenizers: list[dict], ignore_merges: bool) -> bytes:
    """A tokenizer.json, whose added tokens are those that no merge makes."""
    added = []
    for i, (piece, kind) in enumerate(zip(own["tokens"], own["token_type"])):
        if kind in (Kind.CONTROL, Kind.USER_DEFINED):
            added.append({"id": i, "content": piece, **ADDED, "special": kind == Kind.CONTROL})
    model = {"type": "BPE", "ignore_merges": ignore_merges, "merges": own["merges"]}
    model["vocab"] = {token: i for i, token in enumerate(own["tokens"])}
    fields = {"version": "1.0", "added_tokens": added, "normalizer": None, "post_processor": None}
    fields |= {"pre_tokenizer": {"type": "Sequence", "pretokenizers": pre_tokenizers}, "decoder": LEVEL}
    return json.dumps({**fields, "model": model}, ensure_ascii=False).encode()


def write_gguf(path: Path, out: Path) -> None:
    """Write a checkpoint as one file. Raises UserError for what llama.cpp cannot run."""
    c, weights, heads, tokenizer = exported(path, each=True)
    require(not c.rope_scaling, "RoPE is scaled: export a folder, and use llama.cpp's convert_hf_to_gguf.py")
    require(tokenizer is not None, f"{path} has no tokenizer, which llama.cpp needs: import with --tokenizer")
    import gguf

    uneven = len(set(heads)) > 1
    with replacing(out, "wb") as file:
        writer = gguf.GGUFWriter(file.name, "deci" if uneven else "llama")
        writer.add_block_count(c.n_layer)
        writer.add_context_length(c.block_size)
        writer.add_embedding_length(c.dim)
        writer.add_feed_forward_length([c.hidden_dim] * c.n_layer if uneven else c.hidden_dim)
        writer.add_head_count([c.n_head] * c.n_layer if uneven else c.n_head)
        writer.add_head_count_kv(heads if uneven else heads[0])
        for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
            add(c.head_dim)
        writer.add_layer_norm_rms_eps(c.norm_eps)
        writer.add_rope_freq_base(c.rope_theta)
        writer.add_vocab_size(c.vocab_size)
        write_tokenizer(writer, tokenizer, c.vocab_size)
        theirs = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c.n_layer)
        for name, x in weights.items():
            x = x.float() if x.dim() == 1 or x.dtype == torch.float64 else x
            raw = gguf.GGMLQuantizationType.BF16 if x.dtype == torch.bfloat16 else None
            data = x.view(torch.uint8) if raw else x
            writer.add_tensor(theirs.get_name(name, [".weight"]), data.numpy(), raw_dtype=raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    print(f"wrote {out}, {out.stat().st_size:,} bytes, K/V heads of the layers: {' '.join(map(str, heads))}")


def write_tokenizer(writer, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Add a tokenizer's fields. Raises UserError for one that llama.cpp does not support."""
    kinds = dict.fromkeys(tokenizer.pieces, Kind.NORMAL) | dict.fromkeys(tokenizer.silent, Kind.CONTROL)
    remedy = "export a folder, and use llama.cpp's convert_hf_to_gguf.py"
    require(tokenizer.eos >= 0, f"no token ends a text, and llama.cpp would take any for it: {remedy}")
    if isinstance(tokenizer, JsonTokenizer):
        fields = json.loads(tokenizer.backend.to_str())
        model, parts = fields["model"], fields["pre_tokenizer"] or {}
        parts = parts.get("pretokenizers", [parts])
        own = parts, model.get("ignore_merges")
        names = [name for name in PRE_TOKENIZERS if PRE_TOKENIZERS[name] == own]
        plain = model["type"] == "BPE" and not fields["normalizer"]
        require(names != [] and plain, f"llama.cpp has no name for how this tokenizer parts a text: {remedy}")
        kinds |= {token["id"]: Kind.USER_DEFINED for token in fields["added_tokens"] if not token["special"]}
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(names[0])
        writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    else:
        sp, plain = tokenizer.sp, merges_of(tokenizer) is not None
        require(plain, f"tokenizer.model is no plain BPE, or changes text: {remedy}")
        special = {Kind.BYTE: sp.is_byte, Kind.UNKNOWN: sp.is_unknown, Kind.UNUSED: sp.is_unused}
        for kind, is_of in special.items():
            kinds |= {i: kind for i in range(sp.vocab_size()) if is_of(i)}
        scores = [sp.get_score(i) for i in range(sp.vocab_size())]
        writer.add_tokenizer_model("llama")
        writer.add_token_scores(scores + [0.0] * (vocab_size - len(scores)))
        writer.add_add_space_prefix(tokenizer.dummy_prefix)
        writer.add_unk_token_id(sp.unk_id())
    writer.add_token_list([tokenizer.pieces.get(i, f"[unused {i}]") for i in range(vocab_size)])
    writer.add_token_types([kinds.get(i, Kind.UNUSED) for i in range(vocab_size)])
    writer.add_add_bos_token(tokenizer.add_bos and tokenizer.bos >= 0)
    writer.add_eos_token_id(tokenizer.eos)
    if tokenizer.bos >= 0:
        writer.add_bos_token_id(tokenizer.bos)
