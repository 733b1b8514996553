"""Text to token ids and back: SentencePiece BPE with byte fallback, exact on any UTF-8 text.

SentencePiece writes a space as U+2581 inside its pieces, so a U+2581 of the text itself would come back as a space;
here it goes through its three byte tokens instead.

A tokenizer is held as bytes, the way that a checkpoint carries it: a SentencePiece model, or the JSON of Hugging Face's
`tokenizers` (`JsonTokenizer`), which some models have alone and which cannot be turned into the former.
"""

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


def check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # a lone surrogate, which Python makes of a shell's broken bytes
        raise UserError(f"the text is not valid UTF-8 at character {error.start}: retype it") from None


def read_tokenizer(model: bytes | None) -> "Tokenizer":
    """The tokenizer of a file's or a checkpoint's bytes. Raises UserError when they are none, or damaged."""
    if model is None:
        raise UserError("this checkpoint has no tokenizer: import it again, with --tokenizer FILE")
    return (JsonTokenizer if model[:1] == b"{" else Tokenizer)(model)


class Tokenizer:
    """A SentencePiece model; `stop` are the tokens that end a text: EOS, and the BOS of a next one."""

    kind = "SentencePiece"

    def __init__(self, model: bytes):
        self.model = model
        try:
            self.sp = spm.SentencePieceProcessor(model_proto=model or b"none")  # b"" would mean: load nothing
        except RuntimeError:
            raise UserError(f"these {len(model):,} bytes are no SentencePiece model: name a tokenizer.model") from None
        self.vocab_size, self.bos, self.eos = self.sp.vocab_size(), self.sp.bos_id(), self.sp.eos_id()
        self.stop = [token for token in (self.eos, self.bos) if token >= 0]
        # Llama 2's model puts a space before every text. It is no byte of the text, and decoding drops it.
        self.dummy_prefix = self.sp.encode("a", out_type=str)[0].startswith(SPACE)
        self.space_bytes = [self.sp.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]

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
        """The beginning of a document: BOS, if the model has one, and the ids of the text."""
        return [token for token in [self.bos, *self.encode(text)] if token >= 0]

    def decode(self, ids: list[int]) -> str:
        """Text of the ids; control tokens are nothing, and an incomplete UTF-8 sequence is U+FFFD."""
        return self.sp.decode([i for i in ids if i < self.vocab_size])  # a model's vocabulary may be padded

    def piece(self, token: int) -> str:
        """How the token is written, for control tokens such as </s>."""
        return self.sp.id_to_piece(token)

    def is_exact(self) -> bool:
        """Whether text comes back as it was; an older model without byte fallback, or one that normalizes, fails."""
        probe = " Tab\t  ﬁ\n中😀"
        return self.decode(self.encode(probe)) == probe

    def token_bytes(self) -> np.ndarray:
        """(V,) UTF-8 bytes that each token stands for, so that their sum over a document is the document's length."""
        sizes = [len(self.sp.id_to_piece(i).replace(SPACE, " ").encode()) for i in range(self.vocab_size)]
        for i in range(self.vocab_size):
            if self.sp.is_byte(i):
                sizes[i] = 1
            elif self.sp.is_control(i):
                sizes[i] = 0
        if self.dummy_prefix and self.bos >= 0:
            sizes[self.bos] = -1  # BOS opens a document, and the space put before it counts for nothing
        return np.array(sizes)


class JsonTokenizer(Tokenizer):
    """A tokenizer.json of Hugging Face, with `bos_id` and `eos_ids`, from their config.json, beside its own keys."""

    kind = "tokenizer.json"

    def __init__(self, model: bytes):
        try:
            from tokenizers import Tokenizer as Backend
        except ImportError:
            raise UserError("a tokenizer.json needs a library to read it: pip install tokenizers") from None
        self.model = model
        try:
            fields = json.loads(model)
            self.bos, eos = fields.pop("bos_id", None), fields.pop("eos_ids", [])
            self.backend = Backend.from_str(json.dumps(fields))
            self.backend.no_truncation()
            self.backend.no_padding()
            if self.bos is None:  # what the tokenizer puts before a text is it
                self.bos = (self.backend.encode("").ids or [-1])[0]
            self.vocab_size = 1 + max(self.backend.get_vocab(with_added_tokens=True).values())
            self.eos, self.stop = (eos or [-1])[0], sorted(token for token in {*eos, self.bos} if token >= 0)
            # GPT-2's alphabet has a character for each byte; the other kind writes pieces as SentencePiece does
            self.byte_level = '"ByteLevel"' in json.dumps([fields["pre_tokenizer"], fields["decoder"]])
            self.adds_bos = self.backend.encode("").ids[:1] == [self.bos]
            self.dummy_prefix = self.backend.encode("a", add_special_tokens=False).tokens[0].startswith((SPACE, "Ġ"))
        except Exception as error:  # the library raises plain Exceptions
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"these {len(model):,} bytes are no tokenizer.json: {reason}") from None

    def encode(self, text: str) -> list[int]:
        check_unicode(text)
        return self.backend.encode(text, add_special_tokens=False).ids

    def prompt(self, text: str) -> list[int]:
        """As the tokenizer itself begins a text: some models were trained without a BOS, which then opens only ""."""
        ids = self.encode(text)
        return [self.bos, *ids] if self.bos >= 0 and (self.adds_bos or not ids) else ids

    def decode(self, ids: list[int]) -> str:
        return self.backend.decode([i for i in ids if i < self.vocab_size])

    def piece(self, token: int) -> str:
        return self.backend.id_to_token(token)

    def original(self) -> bytes:
        """The file without the keys that we added."""
        fields = {k: v for k, v in json.loads(self.model).items() if k not in ("bos_id", "eos_ids")}
        return json.dumps(fields, ensure_ascii=False).encode()

    def token_bytes(self) -> np.ndarray:
        sizes = np.zeros(self.vocab_size, dtype=np.int64)
        special = {i for i, token in self.backend.get_added_tokens_decoder().items() if token.special}
        for piece, i in self.backend.get_vocab(with_added_tokens=True).items():
            is_byte = re.fullmatch("<0x[0-9A-F]{2}>", piece) and not self.byte_level
            text = piece if self.byte_level else piece.replace(SPACE, " ")
            sizes[i] = 0 if i in special else 1 if is_byte else len(text) if self.byte_level else len(text.encode())
        if self.dummy_prefix and self.adds_bos:
            sizes[self.bos] = -1
        return sizes
