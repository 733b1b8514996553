"""Other programs' tokenizers in and out: their files, and which tokens open and end a text.

Read are SentencePiece's tokenizer.model, Hugging Face's tokenizer.json, and llama2.c's tokenizer.bin, which becomes a
SentencePiece model. In a Hugging Face folder, tokenizer_config.json, config.json and generation_config.json know more
about the special tokens than the tokenizer itself. Written is what lies behind the checkpoint, and for a SentencePiece
model also the tokenizer.json that gives the same tokens.
"""

import json
import re
import struct
from pathlib import Path

from config import UserError
from tokenizer import SPACE, JsonTokenizer, Tokenizer, read_tokenizer, with_special

# numbers of the fields and kinds in sentencepiece_model.proto
NORMAL, UNKNOWN, CONTROL, BYTE, BPE = 1, 2, 3, 6, 2


def read_json(path: Path) -> dict:
    """A JSON object from a file. Raises UserError when it is none."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path.parent} has no {path.name}: is it a Hugging Face or Meta folder of a model?") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {str(error)[:120]}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object")
    return content


def find_tokenizer(folder: Path | None, given: Path | None) -> Tokenizer | None:
    """The tokenizer that was given, or else lies in the folder; None where there is none.

    The special tokens are those that the folder, or else the given file's, tells. Raises UserError when a file cannot
    be read.
    """
    names = ("tokenizer.model", "tokenizer.json")
    path = given or next((folder / name for name in names if folder and (folder / name).exists()), None)
    if path is None:
        return None
    if not path.is_file():
        raise UserError(f"--tokenizer {path}: {'a folder, name a file in it' if path.is_dir() else 'no such file'}")
    data = path.read_bytes()
    if is_tiktoken(data) and not given and (folder / names[1]).exists():
        path = folder / names[1]
        data = path.read_bytes()
    if is_tiktoken(data):
        raise UserError(f"{path} is in tiktoken's format: give --tokenizer tokenizer.json, of the Hugging Face folder")
    try:
        tokenizer = read_tokenizer(sentencepiece_of_llama2c(data) if path.suffix == ".bin" else data)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (ValueError, struct.error) as error:
        raise UserError(f"{path} is no tokenizer of llama2.c, or damaged: {str(error)[:120]}") from None
    if path.suffix == ".bin":
        return tokenizer
    beside = folder if folder and (folder / "config.json").exists() else path.parent
    return with_special(tokenizer, *special_tokens(tokenizer, beside))


def is_tiktoken(data: bytes) -> bool:
    """Whether it is Llama 3's tokenizer.model: lines of a piece in base64 and its rank."""
    return re.match(rb"[A-Za-z0-9+/=]+ \d+\n", data[:200]) is not None


def special_tokens(tokenizer: Tokenizer, folder: Path) -> tuple[int, bool, list[int]]:
    """BOS, whether it opens a text, and the tokens that end one, from the tokenizer and the folder's config files.

    The tokenizer's own word comes first: the `bos_token_id` of some config.json, such as llama-160m's, is another's.
    `add_bos_token` decides for a SentencePiece model; a tokenizer.json that adds BOS does so whatever is said there, as
    in transformers 5.
    """
    names = ("tokenizer_config.json", "config.json", "generation_config.json")
    settings, *configs = (read_json(folder / name) if (folder / name).exists() else {} for name in names)
    said = settings.get("add_bos_token")
    if tokenizer.kind == "SentencePiece":
        add_bos = said if isinstance(said, bool) else True
    else:
        add_bos = tokenizer.add_bos or said is True
    own = [token for token in (tokenizer.bos,) if token >= 0]
    bos = [*own, *named(settings, "bos_token", tokenizer), *numbered(configs, "bos_token_id"), -1][0]
    own = [token for token in (tokenizer.eos,) if token >= 0]
    eos = [*own, *named(settings, "eos_token", tokenizer), *numbered(configs, "eos_token_id")]
    eos = list(dict.fromkeys(eos))
    return bos, add_bos, [token for token in eos if token != bos] or eos  # one token may be both, as in SmolLM


def named(settings: dict, key: str, tokenizer: Tokenizer) -> list[int]:
    """The token that tokenizer_config.json gives by its text."""
    value = settings.get(key)
    value = value.get("content") if isinstance(value, dict) else value
    token = tokenizer.token_of(value) if isinstance(value, str) else None
    return [] if token is None else [token]


def numbered(configs: list[dict], key: str) -> list[int]:
    """The tokens that config.json and generation_config.json give by number, one or several; -1 means none."""
    values = [config.get(key) for config in configs]
    values = [token for value in values for token in (value if isinstance(value, list) else [value])]
    return [token for token in values if type(token) is int and token >= 0]


def left_out(folder: Path, tokenizer: Tokenizer) -> list[str]:
    """Tokens that the folder's tokenizer.json adds to its tokenizer.model, which alone is read."""
    path = folder / "tokenizer.json"
    if tokenizer.kind != "SentencePiece" or not path.exists():
        return []
    added = read_json(path).get("added_tokens")
    added = [token for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    return [str(token.get("content")) for token in added if tokenizer.token_of(str(token.get("content"))) is None]


def sentencepiece_of_llama2c(data: bytes) -> bytes:
    """llama2.c's tokenizer.bin (the longest piece's bytes as int32, then float32 score, int32 length and bytes of each
    piece) as a SentencePiece model: the BPE pieces with the same scores give the same tokens.

    The model is a protocol buffer, written here by hand. Raises ValueError or struct.error when the data is damaged.
    """
    pieces, place = [], 4
    while place < len(data):
        score, length = struct.unpack_from("<fi", data, place)
        piece = data[place + 8 : place + 8 + length]
        if not 0 < length == len(piece):
            raise ValueError(f"piece {len(pieces)} at byte {place} has length {length}")
        pieces.append((score, piece.decode().replace(" ", SPACE)))
        place += 8 + length
    if len(pieces) < 259:
        raise ValueError(f"it has {len(pieces)} pieces, below the 3 + 256 of control tokens and bytes")
    pieces[:3] = [(0.0, "<unk>"), (0.0, "<s>"), (0.0, "</s>")]
    kinds = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * (len(pieces) - 259)
    model = b""
    for (score, piece), kind in zip(pieces, kinds):
        model += entry(1, entry(1, piece.encode()) + b"\x15" + struct.pack("<f", score) + entry(3, kind))
    byte_fallback, special = entry(35, 1), entry(40, 0) + entry(41, 1) + entry(42, 2)
    trainer = entry(3, BPE) + entry(4, len(pieces)) + byte_fallback + special
    space_before, keep_spaces, escape_spaces = entry(3, 1), entry(4, 0), entry(5, 1)
    normalizer = entry(1, b"identity") + space_before + keep_spaces + escape_spaces
    return model + entry(2, trainer) + entry(3, normalizer)


def entry(field: int, value: int | bytes) -> bytes:
    """One field of a protocol buffer: a varint, or bytes behind their length."""
    if isinstance(value, int):
        return varint(field << 3) + varint(value)
    return varint(field << 3 | 2) + varint(len(value)) + value


def varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first, the high bit on all but the last."""
    return bytes([value & 127 | 128]) + varint(value >> 7) if value > 127 else bytes([value])


# ---- out ----


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer.model, tokenizer.json and tokenizer_config.json, as far as the tokenizer can be written so.

    From a tokenizer.model alone transformers 5 would make the merges itself, but in the order of the vocabulary and not
    of the scores: with Llama 2's, runs of spaces come out as other tokens. llama.cpp reads tokenizer.model.
    """
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings |= {"add_bos_token": tokenizer.add_bos, "add_eos_token": False}
    for name, token in (("bos_token", tokenizer.bos), ("eos_token", tokenizer.eos)):
        if token >= 0 and tokenizer.piece(token) is not None:
            settings[name] = tokenizer.piece(token)
    if isinstance(tokenizer, JsonTokenizer):
        fields, own = json.loads(tokenizer.file), JsonTokenizer(tokenizer.file)
        if (own.bos, own.add_bos) != (tokenizer.bos, tokenizer.add_bos):
            fields["post_processor"] = beginning(tokenizer)
    else:
        (folder / "tokenizer.model").write_bytes(tokenizer.file)
        settings["add_prefix_space"] = tokenizer.dummy_prefix
        fields = tokenizer_json(tokenizer)
    if fields:
        (folder / "tokenizer.json").write_text(json.dumps(fields, ensure_ascii=False), encoding="utf-8")
    else:
        settings["tokenizer_class"] = "LlamaTokenizer"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def merges_of(tokenizer: Tokenizer) -> list[str] | None:
    """The pairs of pieces that BPE joins, best first, written "l r"; None if the SentencePiece model is no plain BPE.

    SentencePiece joins the two neighbours whose joint piece has the best score; `tokenizers` joins by a list of pairs.
    So the list is: the pieces by score, each with all its ways to be cut into two.
    """
    sp, size = tokenizer.sp, tokenizer.text_size
    other = [sp.is_control, sp.is_unknown, sp.is_byte, sp.is_unused]
    scores = {sp.id_to_piece(i): sp.get_score(i) for i in range(size) if not any(kind(i) for kind in other)}
    cuts = {
        piece: [f"{piece[:i]} {piece[i:]}" for i in range(1, len(piece)) if piece[:i] in scores and piece[i:] in scores]
        for piece in sorted(scores, key=lambda piece: -scores[piece])
    }
    ranks = all(score == round(score) for score in scores.values())  # unigram models have logarithms instead
    joined = all(cuts[piece] or len(piece) == 1 for piece in cuts)  # user-defined pieces are found in another way
    return [pair for pairs in cuts.values() for pair in pairs] if ranks and joined else None


def tokenizer_json(tokenizer: Tokenizer) -> dict | None:
    """The tokenizer.json that gives the tokens of a SentencePiece model; None if it is no plain BPE or changes text."""
    sp, size, merges = tokenizer.sp, tokenizer.text_size, merges_of(tokenizer)
    if merges is None or not tokenizer.is_exact():
        return None
    special = [i for i in range(size) if sp.is_control(i) or sp.is_unknown(i)]
    prefix = [{"type": "Prepend", "prepend": SPACE}] if tokenizer.dummy_prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if tokenizer.dummy_prefix else []
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    control = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": sp.id_to_piece(i), **control} for i in special],
        "normalizer": {"type": "Sequence", "normalizers": [*prefix, spaces]},
        "pre_tokenizer": None,
        "post_processor": beginning(tokenizer),
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": sp.id_to_piece(sp.unk_id()), "fuse_unk": True,
            "byte_fallback": True, "continuing_subword_prefix": None, "end_of_word_suffix": None,
            "ignore_merges": False,
            "vocab": {sp.id_to_piece(i): i for i in range(size)}, "merges": merges,
        },
    }  # fmt: skip


def beginning(tokenizer: Tokenizer) -> dict | None:
    """The part of tokenizer.json that puts BOS before a text."""
    piece = tokenizer.piece(tokenizer.bos) if tokenizer.bos >= 0 and tokenizer.add_bos else None
    if piece is None:
        return None
    first, second = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
    bos = {"SpecialToken": {"id": piece, "type_id": 0}}
    ids = {piece: {"id": piece, "ids": [tokenizer.bos], "tokens": [piece]}}
    return {"type": "TemplateProcessing", "single": [bos, first], "pair": [bos, first, second], "special_tokens": ids}
