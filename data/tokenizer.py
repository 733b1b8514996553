"""Text to token ids and back: SentencePiece BPE with byte fallback, exact on any UTF-8 text.

A checkpoint carries its tokenizer as bytes: a SentencePiece model, a tokenizer.json of Hugging Face, or a
JSON object of either and special tokens that replace its own (formats/tokenizers.py makes it).
"""

import base64
import json
import re

import numpy as np
import sentencepiece as spm

from common import UserError, require

Record = dict[str, str]  # an example of instruction data: instruction, input, output
SPACE = "\u2581"  # how SentencePiece writes a space in its pieces


def prompt_text(record: Record) -> str:
    """The text before an answer, the same in training and in use."""
    parts = [("Instruction", record["instruction"].strip()), ("Input", record["input"].strip())]
    return "".join(f"### {name}:\n{text}\n\n" for name, text in parts if text) + "### Response:\n"


def read_tokenizer(data: bytes | None) -> "Tokenizer":
    """The tokenizer in a file's or a checkpoint's bytes. Raises UserError if it is missing or damaged."""
    require(data is not None, "this checkpoint has no tokenizer: import it again, with --tokenizer FILE")
    try:
        fields = json.loads(data) if data.startswith(b"{") else {}
        file = json.dumps(fields["tokenizer_json"]).encode() if "tokenizer_json" in fields else data
        file = base64.b64decode(fields["sentencepiece"]) if "sentencepiece" in fields else file
        tokenizer = JsonTokenizer(file) if file.startswith(b"{") else Tokenizer(file)
        tokenizer.set_special(**fields.get("special", tokenizer.special))
    except (KeyboardInterrupt, SystemExit, ModuleNotFoundError):
        raise
    except BaseException as error:  # plain Exceptions of both libraries, and panics of Rust, which are none
        raise UserError(f"no tokenizer, or a damaged one: {error!r:.120}") from None
    tokenizer.data = data
    return tokenizer


class Tokenizer:
    """A SentencePiece model. A checkpoint carries `data`; `file` is the tokenizer's own file.
    pieces      {token: how it is written, such as </s>}; those in `silent` stand for no text
    bos, eos    open a text (without `add_bos`, only an empty one) and end a document; -1 if there is none
    stop        all tokens that end a text: EOS, others like it, and the BOS of the next text
    vocab_size  1 + the largest token in any text (`text_size`) or `stop`
    """

    kind = "SentencePiece"
    byte_level = frozenset()  # tokens written in GPT-2's alphabet, a letter per byte

    def __init__(self, file: bytes):
        self.data = self.file = file
        self.backend = self.sp = spm.SentencePieceProcessor(model_proto=file or b"none")  # b"" loads nothing
        self.text_size = self.sp.vocab_size()
        self.pieces = {token: self.sp.id_to_piece(token) for token in range(self.text_size)}
        self.silent = {token for token in self.pieces if self.sp.is_control(token)}
        self.set_special(self.sp.bos_id(), True, [self.sp.eos_id()] * (self.sp.eos_id() >= 0))
        # Llama 2's model puts a space before every text. It is no byte of the text, and decoding drops it.
        self.dummy_prefix = self.sp.encode("a", out_type=str)[0].startswith(SPACE)

    def set_special(self, bos: int, add_bos: bool, eos: list[int]) -> None:
        """Choose the tokens that open and end a text; the first of `eos` ends a document."""
        require(all(type(i) is int and -1 <= i < 2**20 for i in [bos, *eos]), f"BOS {bos}, EOS {eos}")
        self.special = {"bos": bos, "add_bos": add_bos, "eos": eos}
        self.bos, self.add_bos, self.eos = bos, add_bos, eos[0] if eos else -1
        self.stop = list(dict.fromkeys(token for token in [*eos, bos] if token >= 0))
        self.vocab_size = max(self.text_size, 1 + max(self.stop, default=0))

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without BOS and EOS; U+2581, which would decode to a space, becomes its bytes."""
        if self.dummy_prefix:
            return self.sp.encode(text)
        first, *rest = (self.sp.encode(part) for part in text.split(SPACE))
        mark = [self.sp.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        return first + [token for part in rest for token in mark + part]

    def prompt(self, text: str) -> list[int]:
        """A document's beginning: BOS, if it opens texts, and the ids. Raises UserError for surrogates."""
        require(not re.search("[\ud800-\udfff]", text), f"{text[:40]!r} is not valid UTF-8: retype it")
        ids = self.encode(text)
        return [self.bos, *ids] if self.bos >= 0 and (self.add_bos or not ids) else ids

    def decode(self, ids: list[int]) -> str:
        """Text of the ids: nothing for control tokens and ids that it lacks, U+FFFD for incomplete UTF-8."""
        return self.backend.decode([i for i in ids if i < self.text_size and i not in self.stop])

    def is_exact(self) -> bool:
        """Whether decoding restores the text: not without byte fallback, nor if the model normalizes."""
        return all(self.decode(self.encode(text)) == text for text in (" Tab\t  ﬁ\n中😀", "e\u0301"))

    def token_bytes(self) -> np.ndarray:
        """(vocab_size,) UTF-8 bytes per token; of an exact tokenizer, they add up to a document's length."""
        sizes = np.zeros(self.vocab_size, np.int64)
        for token in self.pieces.keys() - self.silent - set(self.stop):
            piece = self.pieces[token]
            text = re.sub(r"\A<0x[0-9A-F]{2}>\Z", "?", piece).replace(SPACE, " ")
            sizes[token] = len(piece) if token in self.byte_level else len(text.encode())
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
        fields = {**json.loads(file), "truncation": None, "padding": None}
        self.backend = Backend.from_str(json.dumps(fields))
        self.backend.encode_special_tokens = True  # "</s>" in a text is these four characters
        self.pieces = {token: piece for piece, token in self.backend.get_vocab().items()}
        added = self.backend.get_added_tokens_decoder()
        self.silent = {token for token in added if added[token].special}
        unk = self.backend.token_to_id(fields["model"].get("unk_token") or "")  # it may be special
        self.text_size = 1 + max(self.pieces.keys() - self.silent | {unk or 0})
        if '"ByteLevel"' in json.dumps([fields["pre_tokenizer"], fields["decoder"]]):
            self.byte_level = self.pieces.keys() - added.keys()
        plain, framed = self.backend.encode("a", add_special_tokens=False), self.backend.encode("a").ids
        self.dummy_prefix = plain.tokens[0].startswith((SPACE, "Ġ"))
        start = framed.index(plain.ids[0])
        before, behind = framed[:start], framed[start + len(plain.ids) :]
        self.set_special(before[0] if before else -1, bool(before), behind[:1])

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids
