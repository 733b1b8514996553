"""Text to token ids and back: SentencePiece BPE with byte fallback, exact on any UTF-8 text.

SentencePiece writes a space as U+2581 in its pieces, so a U+2581 in the text would come back as a space. Here
it goes through its three byte tokens instead.

A checkpoint carries its tokenizer as bytes: a SentencePiece model, a tokenizer.json of Hugging Face, or a
JSON object of one of them and other special tokens than its own, which a model's other files had named.
"""

import base64
import io
import json
import re
from collections.abc import Iterable

import numpy as np
import sentencepiece as spm

from common import UserError

Record = dict[str, str]  # an example of instruction data: instruction, input, output
SPACE = "\u2581"
SETTINGS = {  # "identity" and the two False keep the text as it is
    "model_type": "bpe", "byte_fallback": True, "split_digits": True, "character_coverage": 0.9999,
    "normalization_rule_name": "identity", "add_dummy_prefix": False, "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,  # indentation is one token, not one per space
    "num_threads": 4,  # it becomes part of the model's bytes, so it must not depend on the machine
    "unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1,
}  # fmt: skip


def prompt_text(record: Record) -> str:
    """The text before an answer, the same in training and in use."""
    parts = [("Instruction", record["instruction"]), ("Input", record["input"])]
    return "".join(f"### {name}:\n{text}\n\n" for name, text in parts if text) + "### Response:\n"


def read_tokenizer(data: bytes | None) -> "Tokenizer":
    """The tokenizer in a file's or a checkpoint's bytes. Raises UserError if it is missing or damaged."""
    if data is None:
        raise UserError("this checkpoint has no tokenizer: import it again, with --tokenizer FILE")
    try:
        if not data.startswith(b"{"):
            return Tokenizer(data)
        fields = json.loads(data)
        if "sentencepiece" in fields:
            tokenizer = Tokenizer(base64.b64decode(fields["sentencepiece"]))
        else:
            own = fields.get("tokenizer_json", fields)
            tokenizer = JsonTokenizer(json.dumps(own, ensure_ascii=False).encode())
        tokenizer.set_special(**fields.get("special", tokenizer.special))
    except ImportError:
        raise UserError("a tokenizer.json needs a library: pip install tokenizers") from None
    except Exception as error:  # both libraries raise plain Exceptions
        raise UserError(f"no tokenizer, or a damaged one: {error!r:.120}") from None
    tokenizer.data = data
    return tokenizer


def with_special(tokenizer: "Tokenizer", bos: int, add_bos: bool, eos: list[int]) -> "Tokenizer":
    """The tokenizer with these special tokens; its `data` holds them only if its own file has others."""
    special = {"bos": bos, "add_bos": add_bos, "eos": eos}
    if special == tokenizer.special:
        return tokenizer
    fields = {"special": special}
    if isinstance(tokenizer, JsonTokenizer):
        fields["tokenizer_json"] = json.loads(tokenizer.file)
    else:
        fields["sentencepiece"] = base64.b64encode(tokenizer.file).decode()
    return read_tokenizer(json.dumps(fields, ensure_ascii=False).encode())


class Tokenizer:
    """A SentencePiece model. A checkpoint carries `data`; `file` is the tokenizer's own file.

    bos         opens a text if `add_bos`, else only an empty one; -1 if there is none
    eos         ends a document; -1 if there is none
    stop        all tokens that end a text: EOS, others like it, and the BOS of the next text
    text_size   1 + the largest token in any text
    vocab_size  1 + the largest token in any text or `stop`
    """

    kind = "SentencePiece"

    def __init__(self, file: bytes):
        self.data = self.file = file
        self.sp = spm.SentencePieceProcessor(model_proto=file or b"none")  # b"" would mean: load nothing
        self.text_size = self.sp.vocab_size()
        self.set_special(self.sp.bos_id(), True, [token for token in [self.sp.eos_id()] if token >= 0])
        # Llama 2's model puts a space before every text. It is no byte of the text, and decoding drops it.
        self.dummy_prefix = self.sp.encode("a", out_type=str)[0].startswith(SPACE)

    def set_special(self, bos: int, add_bos: bool, eos: list[int]) -> None:
        """Choose the tokens that open and end a text; the first of `eos` ends a document."""
        if not all(type(token) is int and -1 <= token < 2**20 for token in [bos, *eos]):
            raise UserError(f"the tokenizer's BOS {bos} or EOS {eos} is no token")
        self.special = {"bos": bos, "add_bos": add_bos, "eos": eos}
        self.bos, self.add_bos, self.eos = bos, add_bos, [*eos, -1][0]
        self.stop = [*eos, *(token for token in [bos] if token >= 0 and token not in eos)]
        self.vocab_size = max(self.text_size, 1 + max(self.stop, default=0))

    @classmethod
    def train(cls, lines: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learn `vocab_size` pieces from lines of text. Raises UserError if the text has too few."""
        model, lines = io.BytesIO(), list(lines)  # a list: the trainer would hide an error in reading them
        how = {"model_writer": model, "vocab_size": vocab_size, "minloglevel": 2, **SETTINGS}
        try:
            spm.SentencePieceTrainer.train(sentence_iterator=iter(lines), **how)
        except RuntimeError as error:
            reason = str(error).split("] ")[-1].strip()  # it begins with the trainer's source line
            raise UserError(f"--vocab_size {vocab_size} does not fit this text: {reason}") from None
        return cls(model.getvalue())

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without BOS and EOS."""
        if self.dummy_prefix:
            return self.sp.encode(text)
        first, *rest = (self.sp.encode(part) for part in text.split(SPACE))
        mark = [self.sp.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        return first + [token for part in rest for token in mark + part]

    def prompt(self, text: str) -> list[int]:
        """The beginning of a document: BOS, if the model was trained with one, and the ids of the text."""
        try:
            text.encode()
        except UnicodeEncodeError:  # a lone surrogate, which Python makes of a shell's broken bytes
            raise UserError(f"{text[:40]!r} is not valid UTF-8: retype it") from None
        ids = self.encode(text)
        return [self.bos, *ids] if self.bos >= 0 and (self.add_bos or not ids) else ids

    def decode(self, ids: list[int]) -> str:
        """Text of the ids: nothing for control tokens, U+FFFD for an incomplete UTF-8 sequence."""
        # a model's vocabulary may be larger than its tokenizer's
        return self.sp.decode([i for i in ids if i < self.text_size and i not in self.stop])

    def piece(self, token: int) -> str | None:
        """How a token is written, such as </s>; None if it is not in this tokenizer."""
        return self.sp.id_to_piece(token) if token < self.text_size else None

    def token_of(self, piece: str) -> int | None:
        """The token that is written so; None if there is none."""
        token = self.sp.piece_to_id(piece)
        return token if self.piece(token) == piece else None

    def is_exact(self) -> bool:
        """Whether decoding restores the text: not without byte fallback, nor if the model normalizes."""
        probe = " Tab\t  ﬁ\n中😀"
        return self.decode(self.encode(probe)) == probe

    def size_of(self, token: int) -> int:
        """UTF-8 bytes that a token stands for, at any place but a document's first."""
        if self.sp.is_control(token):
            return 0
        return 1 if self.sp.is_byte(token) else len(self.piece(token).replace(SPACE, " ").encode())

    def token_bytes(self) -> np.ndarray:
        """(vocab_size,) bytes per token; if the tokenizer is exact, they add up to a document's length."""
        sizes = np.zeros(self.vocab_size, np.int64)
        sizes[: self.text_size] = [self.size_of(token) for token in range(self.text_size)]
        sizes[self.stop] = 0
        mark = self.bos if self.add_bos and self.bos >= 0 else self.eos
        if self.dummy_prefix and mark >= 0:
            sizes[mark] = -1  # every document has one, and the space put before its text is none of its bytes
        return sizes


class JsonTokenizer(Tokenizer):
    """A tokenizer.json of Hugging Face. What it puts before and behind a text are its BOS and EOS."""

    kind = "tokenizer.json"

    def __init__(self, file: bytes):
        from tokenizers import Tokenizer as Backend  # only a model without tokenizer.model needs it

        self.data = self.file = file
        self.backend, fields = Backend.from_str(file.decode()), json.loads(file)
        self.piece, self.token_of = self.backend.id_to_token, self.backend.token_to_id
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = True  # "</s>" in a text is these four characters
        # GPT-2's alphabet has a character per byte; otherwise pieces are written as SentencePiece writes them
        self.byte_level = '"ByteLevel"' in json.dumps([fields["pre_tokenizer"], fields["decoder"]])
        self.added = self.backend.get_added_tokens_decoder()
        special = {token for token, added in self.added.items() if added.special}
        self.text_size = 1 + max(set(self.backend.get_vocab(with_added_tokens=True).values()) - special)
        plain, framed = self.backend.encode("a", add_special_tokens=False), self.backend.encode("a").ids
        self.dummy_prefix = plain.tokens[0].startswith((SPACE, "Ġ"))
        start = framed.index(plain.ids[0])
        before, behind = framed[:start], framed[start + len(plain.ids) :]
        self.set_special([*before, -1][0], bool(before), behind[:1])

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.backend.decode([i for i in ids if i not in self.stop])

    def size_of(self, token: int) -> int:
        piece = self.piece(token) or ""
        if token in self.added:
            return 0 if self.added[token].special else len(piece.encode())
        if self.byte_level:
            return len(piece)
        return 1 if re.fullmatch("<0x[0-9A-F]{2}>", piece) else len(piece.replace(SPACE, " ").encode())
