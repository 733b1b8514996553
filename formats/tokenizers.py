"""Other programs' tokenizers, in and out, and the tokens that open and end a text.

It reads SentencePiece's tokenizer.model, Hugging Face's tokenizer.json and llama2.c's tokenizer.bin, which
becomes a SentencePiece model. Export adds to such a model the tokenizer.json that gives the same tokens.
"""

import base64
import json
import re
import struct
from enum import IntEnum
from pathlib import Path

from common import note, require
from data.tokenizer import SPACE, JsonTokenizer, Tokenizer, read_tokenizer
from formats.files import read_json, reading

ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
# of a piece, in sentencepiece_model.proto and in GGUF, from 1 on
Kind = IntEnum("Kind", ["NORMAL", "UNKNOWN", "CONTROL", "USER_DEFINED", "UNUSED", "BYTE"])


def find_tokenizer(source: Path, given: str | None, vocab_size: int) -> Tokenizer | None:
    """The tokenizer in the file `given`, or else in the folder. Raises UserError for a damaged one."""
    paths = [source / name for name in ("tokenizer.model", "tokenizer.json") if (source / name).exists()]
    # Llama 3's tokenizer.model is not SentencePiece's: it has lines of a piece in base64 and its rank
    paths = [path for path in paths if not re.match(rb"[A-Za-z0-9+/=]+ \d+\n", path.read_bytes())]
    if not given and not paths:
        note(f"no tokenizer in {source} can be read; to evaluate or sample, import again, --tokenizer FILE")
        return None
    path = Path(given) if given else paths[0]
    llama2c = path.suffix == ".bin"
    with reading(path, "tokenizer"):
        data = path.read_bytes()
        tokenizer = read_tokenizer(sentencepiece_of_llama2c(data, vocab_size) if llama2c else data)
        if not llama2c and tokenizer.data == tokenizer.file:  # it does not hold special tokens of its own
            folder = source if (source / "config.json").exists() else path.parent
            tokenizer = with_special(tokenizer, *special_tokens(tokenizer, folder))
        others = [source / name for name in ("tokenizer.json", "added_tokens.json")]
        beside, more = (read_json(other) if other.exists() and not given else {} for other in others)
        added = {token["content"] for token in beside.get("added_tokens") or []}
        lost = (added | more.keys()) - {*tokenizer.pieces.values()}
    if lost:
        note(f"{path} lacks {len(lost)} added tokens: to have them, import with --tokenizer {others[0]}")
    if tokenizer.eos < 0:
        note("no token that ends a text is known: samples go on to the end of the context")
    return tokenizer


def with_special(tokenizer: Tokenizer, bos: int, add_bos: bool, eos: list[int]) -> Tokenizer:
    """The tokenizer with these special tokens; `data` holds them beside the file, unless the file does."""
    special = {"bos": bos, "add_bos": add_bos, "eos": eos}
    if special == tokenizer.special:
        return tokenizer
    own = {"sentencepiece": base64.b64encode(tokenizer.file).decode()}
    if isinstance(tokenizer, JsonTokenizer):
        own = {"tokenizer_json": json.loads(tokenizer.file)}
    return read_tokenizer(json.dumps({"special": special, **own}, ensure_ascii=False).encode())


def special_tokens(tokenizer: Tokenizer, folder: Path) -> tuple[int, bool, list[int]]:
    """BOS, whether it opens a text, and the tokens that end one, from the tokenizer and the folder's configs.

    The tokenizer's own come first: the `bos_token_id` of some config.json, such as llama-160m's, is wrong. A
    tokenizer.json that adds BOS does so whatever `add_bos_token` is, as in transformers 5.
    """
    names = ("tokenizer_config.json", "config.json", "generation_config.json")
    settings, *configs = (read_json(folder / name) if (folder / name).exists() else {} for name in names)

    def tokens(name: str, own: int) -> list[int]:
        """Those that tokenizer_config.json gives by text, and the others by number, one or several."""
        text = settings.get(name)
        text = text.get("content") if isinstance(text, dict) else text
        found = [own, *(token for token, piece in tokenizer.pieces.items() if piece == text)]
        for value in (config.get(name + "_id") for config in configs):
            found += value if isinstance(value, list) else [value]
        return list(dict.fromkeys(token for token in found if type(token) is int and token >= 0))

    sentencepiece, add_bos = tokenizer.kind == "SentencePiece", settings.get("add_bos_token")
    add_bos = add_bos is not False if sentencepiece else tokenizer.add_bos or add_bos is True
    bos = next(iter(tokens("bos_token", tokenizer.bos)), -1)
    eos = tokens("eos_token", tokenizer.eos)
    return bos, add_bos, [token for token in eos if token != bos] or eos  # one may be both, as in SmolLM


def sentencepiece_of_llama2c(data: bytes, count: int) -> bytes:
    """llama2.c's tokenizer.bin (an int32, then float32 score, int32 length and bytes of each piece) as a
    SentencePiece model, a protocol buffer: the same scores give the same tokens."""
    pieces, place = [], 4
    while place < len(data):
        score, length = struct.unpack_from("<fi", data, place)
        piece = data[place + 8 : place + 8 + length]
        require(0 < length == len(piece), f"piece {len(pieces)} at byte {place} has length {length}")
        pieces.append((score, piece.decode().replace(" ", SPACE)))
        place += 8 + length
    require(259 <= len(pieces) == count, f"it has {len(pieces)} pieces, the vocabulary {count}; least is 259")
    pieces[:3] = [(0.0, "<unk>"), (0.0, "<s>"), (0.0, "</s>")]
    kinds = [Kind.UNKNOWN, Kind.CONTROL, Kind.CONTROL] + [Kind.BYTE] * 256 + [Kind.NORMAL] * len(pieces)
    return sentencepiece_model([(*piece, kind) for piece, kind in zip(pieces, kinds)])


def sentencepiece_model(pieces: list[tuple[float, str, int]], dummy_prefix: bool = True) -> bytes:
    """A SentencePiece BPE model, a protocol buffer, of (score, text, kind); 0, 1, 2 are <unk>, <s>, </s>."""
    model = []
    for score, piece, kind in pieces:
        fields = entry(1, piece.encode()) + b"\x15" + struct.pack("<f", score) + entry(3, kind)
        model.append(entry(1, fields))
    trainer = entry(3, 2) + entry(4, len(pieces)) + entry(35, 1)  # BPE, so many pieces, byte fallback
    trainer += entry(40, 0) + entry(41, 1) + entry(42, 2)  # <unk>, <s>, </s>
    spaces = entry(3, int(dummy_prefix)) + entry(4, 0) + entry(5, 1)  # before the text, all kept, escaped
    return b"".join(model) + entry(2, trainer) + entry(3, entry(1, b"identity") + spaces)


def entry(field: int, value: int | bytes) -> bytes:
    """One field of a protocol buffer: a varint, or bytes behind their length."""
    if isinstance(value, int):
        return varint(field << 3) + varint(value)
    return varint(field << 3 | 2) + varint(len(value)) + value


def varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first, the high bit on all but the last."""
    return bytes([value & 127 | 128]) + varint(value >> 7) if value > 127 else bytes([value])


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes | dict]:
    """tokenizer_config.json, tokenizer.json, and for llama.cpp the SentencePiece model. Given that one only,
    transformers 5 orders merges by token number: with Llama 2's, runs of spaces become other tokens."""
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings |= {"add_bos_token": tokenizer.add_bos, "add_eos_token": False}
    special = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos}
    settings |= {name: tokenizer.pieces[i] for name, i in special.items() if i in tokenizer.pieces}
    files = {"tokenizer_config.json": settings}
    if isinstance(tokenizer, JsonTokenizer):
        fields, own = json.loads(tokenizer.file), JsonTokenizer(tokenizer.file)
        if tokenizer.add_bos and (own.bos, own.add_bos) != (tokenizer.bos, True):
            fields["post_processor"] = bos_template(tokenizer)
    else:
        files["tokenizer.model"] = tokenizer.file
        settings["add_prefix_space"] = tokenizer.dummy_prefix
        fields = tokenizer_json(tokenizer)
    if fields:
        files["tokenizer.json"] = json.dumps(fields, ensure_ascii=False).encode()
    else:
        settings["tokenizer_class"] = "LlamaTokenizer"
        note("tokenizer.model is no plain BPE; transformers converts it (pip install protobuf)")
    return files


def merges_of(tokenizer: Tokenizer) -> list[str] | None:
    """The pairs of pieces that BPE joins, best first, written "l r"; None if the model is no plain BPE, or
    changes text. SentencePiece joins the two neighbours whose joint piece has the best score, `tokenizers`
    goes by a list of pairs. So it names for each piece, the best first, all pairs that join to it."""
    sp, merges = tokenizer.sp, []
    other = (sp.is_control, sp.is_unknown, sp.is_byte, sp.is_unused)
    scores = {p: sp.get_score(i) for i, p in tokenizer.pieces.items() if not any(kind(i) for kind in other)}
    several = [score for piece, score in scores.items() if len(piece) > 1]
    # two pieces of one score: user-defined ones, which no merge makes
    if len(set(several)) < len(several) or not tokenizer.is_exact():
        return None
    for piece in sorted(scores, key=lambda piece: -scores[piece]):
        cuts = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        pairs = [f"{left} {right}" for left, right in cuts if left in scores and right in scores]
        if scores[piece] != round(scores[piece]) or (cuts and not pairs):  # a unigram's are logarithms
            return None
        merges += pairs
    return merges


def tokenizer_json(tokenizer: Tokenizer) -> dict | None:
    """The tokenizer.json of a SentencePiece model; None if that is no plain BPE, or changes text."""
    sp, merges = tokenizer.sp, merges_of(tokenizer)
    if merges is None:
        return None
    special = sorted({*tokenizer.silent, sp.unk_id()})
    prefix = [{"type": "Prepend", "prepend": SPACE}] if tokenizer.dummy_prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if tokenizer.dummy_prefix else []
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    back = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"}]
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": tokenizer.pieces[i], **ADDED} for i in special],
        "normalizer": {"type": "Sequence", "normalizers": [*prefix, spaces]},
        "pre_tokenizer": None, "post_processor": bos_template(tokenizer),
        "decoder": {"type": "Sequence", "decoders": [*back, {"type": "Fuse"}, *strip]},
        "model": {"type": "BPE", "unk_token": tokenizer.pieces[sp.unk_id()], "fuse_unk": True,
                  "byte_fallback": True, "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "vocab": {piece: i for i, piece in tokenizer.pieces.items()}, "merges": merges},
    }  # fmt: skip


def bos_template(tokenizer: Tokenizer) -> dict | None:
    """The part of tokenizer.json that puts BOS before a text."""
    piece = tokenizer.pieces.get(tokenizer.bos) if tokenizer.add_bos else None
    if piece is None:
        return None
    bos, text = {"SpecialToken": {"id": piece, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    pair = [bos, text, {"Sequence": {"id": "B", "type_id": 1}}]
    special = {piece: {"id": piece, "ids": [tokenizer.bos], "tokens": [piece]}}
    return {"type": "TemplateProcessing", "single": [bos, text], "pair": pair, "special_tokens": special}
