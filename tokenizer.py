"""Text to token ids and back: SentencePiece BPE with byte fallback, exact on any UTF-8 text.

SentencePiece writes a space as U+2581 inside its pieces, so a U+2581 of the text itself would come back as a space;
here it goes through its three byte tokens instead.

A tokenizer is held as bytes, the way that a checkpoint carries it: a SentencePiece model; or the tokenizer.json of
Hugging Face's `tokenizers` (`JsonTokenizer`), which some models have alone and which cannot be turned into the former;
or either of them in a JSON object together with the special tokens, where a model's other files say more about these.
"""

import base64
import io
import json
import re
from collections.abc import Iterator

import numpy as np
import sentencepiece as spm

from config import UserError

SPACE = "\u2581"

# "identity" and the two False keep text as it is; whitespace-only pieces give indentation one token, not one a space;
# the number of threads becomes part of the model's bytes, so it must not be the machine's
SETTINGS = {
    "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "add_dummy_prefix": False,
    "remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True, "split_digits": True,
    "character_coverage": 0.9999, "num_threads": 4, "unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1,
}  # fmt: skip


def remedy(reason: str) -> str:
    """What to do about a complaint of SentencePiece's trainer."""
    if high := re.search(r"too high .* value <= (\d+)", reason):
        return f"it has pieces for {high[1]} at most; give --vocab_size {high[1]}, or more text"
    if low := re.search(r"required_chars. \d+ vs (\d+)", reason):
        return f"its characters and bytes alone need {low[1]}; give --vocab_size {low[1]} or more"
    return reason.strip()


def check_unicode(text: str, where: str = "the text") -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # a lone surrogate, which Python makes of a shell's broken bytes
        raise UserError(f"{where} is not valid UTF-8 at character {error.start}: retype it") from None


def read_tokenizer(data: bytes | None) -> "Tokenizer":
    """The tokenizer of a file's or a checkpoint's bytes. Raises UserError when they are none, or damaged."""
    if data is None:
        raise UserError("this checkpoint has no tokenizer: import it again, with --tokenizer FILE")
    if not data.startswith(b"{"):
        return Tokenizer(data)
    try:
        fields = json.loads(data)
        if "sentencepiece" in fields:
            tokenizer = Tokenizer(base64.b64decode(fields["sentencepiece"]))
        else:
            tokenizer = JsonTokenizer(json.dumps(fields.get("tokenizer_json", fields), ensure_ascii=False).encode())
        if "special" in fields:
            tokenizer.set_special(**fields["special"])
    except UserError:
        raise
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"no tokenizer, or damaged: {str(error)[:120]}") from None
    tokenizer.data = data
    return tokenizer


def with_special(tokenizer: "Tokenizer", bos: int, add_bos: bool, eos: list[int]) -> "Tokenizer":
    """The tokenizer with these special tokens; its `data` carries them only where its own file says something else."""
    special = {"bos": bos, "add_bos": add_bos, "eos": eos}
    if special == tokenizer.special:
        return tokenizer
    if isinstance(tokenizer, JsonTokenizer):
        own = {"tokenizer_json": json.loads(tokenizer.file)}
    else:
        own = {"sentencepiece": base64.b64encode(tokenizer.file).decode()}
    tokenizer.set_special(**special)
    tokenizer.data = json.dumps({"special": special, **own}, ensure_ascii=False).encode()
    return tokenizer


class Tokenizer:
    """A SentencePiece model. `data` are its bytes as a checkpoint carries them, `file` those of its own file alone.

    bos         opens a text if `add_bos`, else only an empty one; -1 if there is none
    eos         ends a document; -1 if there is none
    stop        all tokens that end a text: EOS, others like it, and the BOS of a next one
    text_size   1 + the largest token that a text can have
    vocab_size  1 + the largest token that a text, its beginning or its end can have
    """

    kind = "SentencePiece"

    def __init__(self, file: bytes):
        self.data = self.file = file
        try:
            self.sp = spm.SentencePieceProcessor(model_proto=file or b"none")  # b"" would mean: load nothing
        except RuntimeError:
            raise UserError(f"these {len(file):,} bytes are no SentencePiece model: name a tokenizer.model") from None
        self.text_size = self.sp.vocab_size()
        self.set_special(self.sp.bos_id(), True, [token for token in [self.sp.eos_id()] if token >= 0])
        # Llama 2's model puts a space before every text. It is no byte of the text, and decoding drops it.
        self.dummy_prefix = self.sp.encode("a", out_type=str)[0].startswith(SPACE)
        self.space_bytes = [self.sp.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]

    def set_special(self, bos: int, add_bos: bool, eos: list[int]) -> None:
        """Say which tokens open and end a text; the first of `eos` ends a document. Raises UserError for no tokens."""
        if not all(type(token) is int and -1 <= token < 2**20 for token in [bos, *eos]):
            raise UserError(f"no tokenizer, or damaged: its BOS is {bos}, its EOS {eos}")
        self.special = {"bos": bos, "add_bos": add_bos, "eos": eos}
        self.bos, self.add_bos, self.eos = bos, add_bos, eos[0] if eos else -1
        self.stop = [*eos, *([bos] if bos >= 0 and bos not in eos else [])]
        self.vocab_size = max(self.text_size, 1 + max(self.stop, default=0))

    @classmethod
    def train(cls, lines: Iterator[str], vocab_size: int) -> "Tokenizer":
        """Learn `vocab_size` pieces from lines of text. Raises UserError when the text has too few for that."""
        model, failures = io.BytesIO(), []

        def watched() -> Iterator[str]:
            try:
                yield from lines
            except UserError as error:  # SentencePiece would wrap it in one of its own
                failures.append(error)

        try:
            spm.SentencePieceTrainer.train(
                sentence_iterator=watched(), model_writer=model, vocab_size=vocab_size, minloglevel=2, **SETTINGS,
            )  # fmt: skip
        except RuntimeError as error:
            if failures:
                raise failures[0] from None
            raise UserError(f"--vocab_size {vocab_size} does not fit this text: {remedy(str(error))}") from None
        if failures:
            raise failures[0]
        return cls(model.getvalue())

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without BOS and EOS. Raises UserError for a string that is no valid Unicode."""
        check_unicode(text)
        if SPACE not in text or self.dummy_prefix:
            return self.sp.encode(text)
        first, *rest = (self.sp.encode(part) for part in text.split(SPACE))
        return first + [token for part in rest for token in self.space_bytes + part]

    def prompt(self, text: str) -> list[int]:
        """The beginning of a document: BOS, if the model was trained with one, and the ids of the text."""
        ids = self.encode(text)
        return [self.bos, *ids] if self.bos >= 0 and (self.add_bos or not ids) else ids

    def decode(self, ids: list[int]) -> str:
        """Text of the ids; control tokens are nothing, and an incomplete UTF-8 sequence is U+FFFD."""
        return self.sp.decode([i for i in self.spoken(ids) if i < self.text_size])  # a vocabulary may be padded

    def spoken(self, ids: list[int]) -> list[int]:
        """Without the tokens that open and end a text, whatever kind of piece they are."""
        return [i for i in ids if i not in self.stop]

    def piece(self, token: int) -> str | None:
        """How the token is written, such as </s>; None if this tokenizer does not know it."""
        return self.sp.id_to_piece(token) if token < self.text_size else None

    def token_of(self, piece: str) -> int | None:
        """The token that is written so; None if there is none."""
        token = self.sp.piece_to_id(piece)
        return token if self.piece(token) == piece else None

    def is_exact(self) -> bool:
        """Whether text comes back as it was; an older model without byte fallback, or one that normalizes, fails."""
        probe = " Tab\t  ﬁ\n中😀"
        return self.decode(self.encode(probe)) == probe

    def token_bytes(self) -> np.ndarray:
        """(vocab_size,) UTF-8 bytes that each token stands for: their sum over a document is the document's length, if
        the tokenizer is exact."""
        sizes = [len(self.sp.id_to_piece(i).replace(SPACE, " ").encode()) for i in range(self.text_size)]
        for i in range(self.text_size):
            if self.sp.is_byte(i):
                sizes[i] = 1
            elif self.sp.is_control(i):
                sizes[i] = 0
        return self.without_frame(np.array(sizes + [0] * (self.vocab_size - self.text_size)))

    def without_frame(self, sizes: np.ndarray) -> np.ndarray:
        """Nothing for the tokens that open and end a document, and less than nothing for the one that every document
        has, where a space was put before the text."""
        sizes[self.stop] = 0
        mark = self.bos if self.add_bos and self.bos >= 0 else self.eos
        if self.dummy_prefix and mark >= 0:
            sizes[mark] = -1
        return sizes


class JsonTokenizer(Tokenizer):
    """A tokenizer.json of Hugging Face. What it puts before and behind a text are its BOS and EOS."""

    kind = "tokenizer.json"

    def __init__(self, file: bytes):
        try:
            from tokenizers import Tokenizer as Backend
        except ImportError:
            raise UserError("a tokenizer.json needs a library to read it: pip install tokenizers") from None
        self.data = self.file = file
        try:
            self.backend, fields = Backend.from_str(file.decode()), json.loads(file)
            pipeline = json.dumps([fields["pre_tokenizer"], fields["decoder"]])
            plain = self.backend.encode("a", add_special_tokens=False)
            first, prefixed = plain.ids[0], plain.tokens[0].startswith((SPACE, "Ġ"))
        except Exception as error:  # the library raises plain Exceptions
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"these {len(file):,} bytes are no tokenizer.json: {reason}") from None
        self.dummy_prefix = prefixed
        self.byte_level = (
            '"ByteLevel"' in pipeline
        )  # GPT-2's alphabet: a character for each byte; else as SentencePiece
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = True  # "</s>" in a text is these four characters
        self.added = self.backend.get_added_tokens_decoder()
        self.pieces = self.backend.get_vocab(with_added_tokens=True)
        self.text_size = 1 + max(i for i in self.pieces.values() if i not in self.added or not self.added[i].special)
        framed = self.backend.encode("a").ids
        start = framed.index(first) if first in framed else 0
        before, behind = framed[:start], framed[start + len(plain.ids) :]
        self.set_special(before[0] if before else -1, bool(before), behind[:1])

    def encode(self, text: str) -> list[int]:
        check_unicode(text)
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.backend.decode(self.spoken(ids))

    def piece(self, token: int) -> str | None:
        return self.backend.id_to_token(token)

    def token_of(self, piece: str) -> int | None:
        return self.backend.token_to_id(piece)

    def token_bytes(self) -> np.ndarray:
        sizes = np.zeros(self.vocab_size, dtype=np.int64)
        for piece, i in self.pieces.items():
            if i in self.added:  # plain text in either kind; special ones do not stand for any
                size = 0 if self.added[i].special else len(piece.encode())
            elif self.byte_level:
                size = len(piece)
            else:
                size = 1 if re.fullmatch("<0x[0-9A-F]{2}>", piece) else len(piece.replace(SPACE, " ").encode())
            if i < self.vocab_size:
                sizes[i] = size
        return self.without_frame(sizes)
