"""Turn text into a tokenizer and token files: data/NAME/{tokenizer.model, train.bin, val.bin, test.bin, meta.json}.

    python data/prepare.py                                  # stdlib: Python's own source, found on this machine
    python data/prepare.py shakespeare                      # or wikitext2, tinystories: downloaded, checksum verified
    python data/prepare.py shakespeare --from input.txt     # the same from a copy that you have
    python data/prepare.py mine --text 'notes/**/*.md'      # your own UTF-8 text
    python data/prepare.py alpaca --tokenizer ckpt.pt       # instruction data, for a model that has this tokenizer
    python data/prepare.py tasks --from mine.jsonl --fields dialogue,summary --tokenizer ckpt.pt
    python data/prepare.py en_de --parallel train.en train.de --tokenizer ckpt.pt

A document becomes BOS, its tokens, EOS; a token file is the documents end to end, uint16 (uint32 above 65,536 tokens).
Corpora with splits of their own keep them. Otherwise whole documents (files) go to val, test or train in the order of
a hash of their names, so that no file is on two sides (huge ones always to train); fewer than 20 files are cut at line
ends instead, each into its first 90%, next 5% and last 5%. A document that repeats another's text is dropped. The
tokenizer learns from train alone. Instruction data: see instruct.py.
"""

import glob
import hashlib
import json
import os
import shutil
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

DATA = Path(__file__).resolve().parent
sys.path.insert(0, str(DATA.parent))  # run as a script, Python looks for modules beside this file only

from config import POSITIONAL, UserError, exit_cleanly, parse
from download import download
from files import CHUNK, held, sha256_of
from instruct import Record, prompt_text, read_files, write_examples
from tokenizer import SETTINGS, Tokenizer, read_tokenizer
from tokenizer_files import find_tokenizer

SPLITS = {"train": 0.90, "val": 0.05, "test": 0.05}
TOKENIZER_BYTES = 50_000_000  # text that the tokenizer learns from; more changes the pieces little and costs memory
TINYSTORIES = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/f54c09fd23315a6f9c86f9dc80f725de7d8f9c64/"
DOWNLOADS = {  # name: [(address, sha256), ...]
    "shakespeare": [
        ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
         "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"),
    ],
    "wikitext2": [
        ("https://huggingface.co/datasets/ggml-org/ci/resolve/main/wikitext-2-raw-v1.zip",
         "ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11"),
    ],
    "tinystories": [
        (TINYSTORIES + "TinyStoriesV2-GPT4-train.txt",
         "6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443"),
        (TINYSTORIES + "TinyStoriesV2-GPT4-valid.txt",
         "6874bae9a4c1a4e7edcf0e53b86c17817e9cf881fc75ff2368da457b80c0585d"),
    ],
    "alpaca": [
        ("https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/761dc5bfbdeeffa89b8bff5d038781a4055f796a/alpaca_data.json",
         "2eddafc6b977608d778aaab8dfc7e50e547b3af9826dfb9e909d9fc362e4a419"),
    ],
}  # fmt: skip
BUILT_IN = ("stdlib", *DOWNLOADS)  # the names that need no --text


@dataclass
class PrepareConfig:
    """data"""

    name: str = field(default="stdlib", metadata=POSITIONAL)  # stdlib, shakespeare, wikitext2, tinystories, alpaca, ...
    text: list[str] | None = None  # your own UTF-8 text: files, folders or globs
    from_: list[str] | None = None  # a local copy of the download; or instructions, .json or .jsonl: train [val] [test]
    parallel: list[str] | None = None  # instructions from pairs of parallel texts: SOURCE TARGET, of train [val] [test]
    fields: list[str] | None = None  # names of instruction,input,output, or input,output: once, or for each --from file
    instruction: str = ""  # what every record asks for, where the records do not say it
    tokenizer: str | None = None  # an existing tokenizer.model or .json, or a ckpt.pt that has one (default: learn one)
    vocab_size: int | None = None  # pieces that the learned tokenizer has (default: 4096)
    out: str | None = None  # folder to write (default: data/NAME beside this script)
    overwrite: bool = False  # replace a folder that is already prepared


@dataclass(frozen=True)
class Piece:
    """Bytes start..stop of a text file; one document, or several with `separator` between them."""

    name: str
    path: Path
    start: int
    stop: int
    separator: bytes = b""

    def documents(self) -> Iterator[str]:
        """The texts, without empty ones; a file with a separator is read in chunks, however large it is."""
        rest, place = b"", self.start
        with open(self.path, "rb") as file:
            file.seek(self.start)
            while place < self.stop:
                read = file.read(min(self.stop - place, CHUNK if self.separator else self.stop))
                if not read:
                    raise UserError(f"{self.path} became shorter while it was read: run again")
                place += len(read)
                *complete, rest = (rest + read).split(self.separator) if self.separator else (b"", read)
                yield from (self.text(document) for document in complete if document.strip())
        if rest.strip():
            yield self.text(rest)

    def text(self, document: bytes) -> str:
        document = document.strip() if self.separator else document
        try:
            return document.decode()
        except UnicodeDecodeError as error:
            bad = f"byte 0x{document[error.start]:02x} behind {document[: error.start][-20:]!r}"
            remedy = f"convert it, for instance with: iconv -f latin1 -t utf-8 {self.path}"
            raise UserError(f"{self.path} is not UTF-8 ({bad}): {remedy}") from None


def whole_file(path: Path, name: str = "", separator: bytes = b"") -> Piece:
    return Piece(name or path.name, path, 0, path.stat().st_size, separator)


def standard_library() -> list[Piece]:
    """Every .py file of this Python's standard library but tests, installed packages and the code-page tables.

    The tables in encodings/ are generated and nearly alike: some in train would tell those in val.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages", "__pycache__"}
    files = [f for f in root.rglob("*.py") if not skip & set(f.relative_to(root).parts[:-1]) and f.is_file()]
    if not files:
        raise UserError(f"no Python source in {root}: give your own text with --text FILE")
    return [whole_file(file, file.relative_to(root).as_posix()) for file in files]


def is_text(file: Path, folder: Path) -> bool:
    """Whether a file found in a folder is meant to be read: not hidden, not in a __pycache__, without a zero byte."""
    hidden = any(part.startswith(".") or part == "__pycache__" for part in file.relative_to(folder).parts)
    if hidden or not file.is_file():
        return False
    with open(file, "rb") as content:
        return b"\0" not in content.read(4096)


def own_text(patterns: list[str]) -> list[Piece]:
    """The files that paths and globs name, and in folders those that are text: not hidden, compiled or binary."""
    found: set[Path] = set()
    for pattern in patterns:
        matches = [Path(p) for p in glob.glob(pattern, recursive=True)] or [Path(pattern)]
        for path in matches:
            found |= {file for file in path.rglob("*") if is_text(file, path)} if path.is_dir() else {path}
    files = sorted(f for f in found if not f.is_dir())
    if missing := [f for f in files if not f.exists()]:
        raise UserError(f"--text {missing[0]}: no such file")
    if not any(f.stat().st_size for f in files):
        raise UserError(f"--text {' '.join(patterns)}: no text there; name UTF-8 files, folders or globs")
    root = Path(os.path.commonpath([f.resolve().parent for f in files]))
    return [whole_file(file, file.resolve().relative_to(root).as_posix()) for file in files]


def split(pieces: list[Piece]) -> dict[str, list[Piece]]:
    """Whole documents by a hash of their names; see the top of this file."""
    if len(pieces) < 20:
        cut = [cut_by_position(piece) for piece in pieces]
        return {name: [parts[name] for parts in cut] for name in SPLITS}
    pieces = sorted(pieces, key=lambda piece: hashlib.sha256(piece.name.encode()).digest())
    total, parts = sum(piece.stop for piece in pieces), {}
    for name in ("val", "test"):  # the first 5% of the bytes, the next 5%, and train is what remains
        wanted = SPLITS[name] * total
        # one huge file would be most of a small split, and the split would measure that file
        limit, size, parts[name] = max(wanted / 4, 2 * total / len(pieces)), 0, []
        for piece in [piece for piece in pieces if piece.stop <= limit]:
            if size < wanted:
                parts[name].append(piece)
                pieces.remove(piece)
                size += piece.stop
    return {"train": sorted(pieces, key=lambda piece: piece.name), **parts}


def cut_by_position(piece: Piece) -> dict[str, Piece]:
    """One file -> its first 90%, next 5%, last 5% of bytes, each cut moved on to the next line's beginning."""
    parts, start, share = {}, 0, 0.0
    with open(piece.path, "rb") as file:
        for name in SPLITS:
            share += SPLITS[name]
            file.seek(min(piece.stop, round(share * piece.stop)))
            file.readline()
            stop = piece.stop if name == "test" else file.tell()
            parts[name] = Piece(f"{piece.name}[{name}]", piece.path, start, stop)
            start = stop
    return parts


def local_copy(source: Path, names: list[str]) -> list[Path]:
    """The files `names` from `--from`: the file itself, or those in the folder."""
    paths = [source / name for name in names] if source.is_dir() else [source]
    if missing := [path for path in paths if not path.exists()]:
        raise UserError(
            f"--from {source}: {missing[0]} does not exist; it should be {' and '.join(names)}, or their folder"
        )
    if len(paths) != len(names):
        raise UserError(f"--from {source}: give the folder that holds {' and '.join(names)}")
    return paths


def public_corpus(name: str, source: Path | None) -> dict[str, list[Piece]]:
    """The splits of a downloadable corpus, from its address or from a local copy."""
    if name == "wikitext2" and source and source.is_dir():
        wiki = {part: source / f"wiki.{part}.raw" for part in ("train", "valid", "test")}
        local_copy(source, [path.name for path in wiki.values()])
        return {
            "train": [whole_file(wiki["train"])],
            "val": [whole_file(wiki["valid"])],
            "test": [whole_file(wiki["test"])],
        }
    names = [url.split("/")[-1] for url, _ in DOWNLOADS[name]]
    paths = local_copy(source, names) if source else [download(*d, DATA / "downloads") for d in DOWNLOADS[name]]
    if name == "wikitext2":
        folder = DATA / "downloads" / "wikitext-2-raw"
        try:
            with zipfile.ZipFile(paths[0]) as archive:
                for part in ("train", "valid", "test"):
                    archive.extract(f"wikitext-2-raw/wiki.{part}.raw", folder.parent)
        except (zipfile.BadZipFile, KeyError) as error:
            raise UserError(f"{paths[0]} is not WikiText-2's zip file: {error}") from None
        return public_corpus(name, folder)
    if name == "tinystories":  # it has two splits: the validation stories become val and test, half each
        train, valid = (whole_file(path, separator=b"<|endoftext|>") for path in paths)
        middle = story_start(valid, valid.stop // 2)
        halves = {"val": (0, middle), "test": (middle, valid.stop)}
        cut = {part: [Piece(valid.name, valid.path, *ends, valid.separator)] for part, ends in halves.items()}
        return {"train": [train], **cut}
    return split([whole_file(paths[0])])


def story_start(piece: Piece, place: int) -> int:
    """The first byte behind the separator that follows `place`."""
    with open(piece.path, "rb") as file:
        file.seek(place)
        return min(piece.stop, place + file.read(CHUNK).find(piece.separator) + len(piece.separator))


def corpus(config: PrepareConfig) -> dict[str, list[Piece]]:
    """The splits of text that the flags name."""
    if config.text:
        if config.name in BUILT_IN:
            raise UserError(f"{config.name} is not your text: name it, python data/prepare.py NAME --text ...")
        return split(own_text(config.text))
    if config.from_ and (config.name not in DOWNLOADS or len(config.from_) > 1):
        copies = f"one copy of a download ({', '.join(DOWNLOADS)}), or .json and .jsonl records"
        raise UserError(f"--from {' '.join(config.from_)}: it takes {copies}; your own text is --text FILE")
    if config.name == "stdlib":
        return split(standard_library())
    if config.name in DOWNLOADS:
        return public_corpus(config.name, Path(config.from_[0]) if config.from_ else None)
    known = ", ".join(BUILT_IN)
    raise UserError(f"unknown data set {config.name!r}: take one of {known}, or give your own text with --text FILE")


def instructions(config: PrepareConfig) -> dict[str, list[Record]] | None:
    """The splits of records that the flags name; None if they name text."""
    if bool(config.text) + bool(config.from_) + bool(config.parallel) > 1:
        raise UserError("--text, --from and --parallel are three sources: give one of them")
    files = [Path(name) for name in config.parallel or config.from_ or []]
    if config.name == "alpaca" and not (files or config.text):
        files = [download(*DOWNLOADS["alpaca"][0], DATA / "downloads")]
    is_records = [path.name.removesuffix(".gz").endswith((".json", ".jsonl")) for path in files]
    if not config.parallel and not (files and all(is_records)):
        if config.fields or config.instruction:
            raise UserError("--fields and --instruction are of records: give --from FILE.json or --parallel")
        return None
    if config.name in BUILT_IN and config.name != "alpaca":
        raise UserError(f"{config.name} is text, and these are records: name them otherwise")
    return read_files(files, bool(config.parallel), config.fields, config.instruction)


def given_tokenizer(config: PrepareConfig) -> Tokenizer | None:
    """The one of `--tokenizer`: a file of another program, or what a checkpoint carries."""
    if not config.tokenizer:
        return None
    if config.vocab_size:
        raise UserError("--tokenizer has a vocabulary of its own: drop --vocab_size")
    path = Path(config.tokenizer)
    if path.suffix == ".pt":
        from checkpoint import load  # torch is needed for nothing else here

        return read_tokenizer(load(path)["tokenizer"])
    tokenizer = find_tokenizer(None, path)
    if not tokenizer.is_exact():
        print(f"note: {path} does not return every text as it was, so bits per byte will not be exact", file=sys.stderr)
    return tokenizer


def learn_tokenizer(train: list[Piece] | list[Record], vocab_size: int) -> Tokenizer:
    """SentencePiece BPE on the lines of the train documents; of a large corpus, on evenly spread ones."""
    every, note = 1, ""
    if isinstance(train[0], Piece):
        every = max(1, round(sum(piece.stop - piece.start for piece in train) / TOKENIZER_BYTES))
        lines = (line for piece in train for text in piece.documents() for line in text.split("\n"))
    else:
        note = "; to tune a model that there is, give its own: --tokenizer ckpt.pt"
        lines = (line for record in train for line in (prompt_text(record) + record["output"]).split("\n"))
    print(f"learning a tokenizer of {vocab_size:,} pieces{note}")
    # SentencePiece leaves out what is longer than 4,192 bytes, so long lines come in parts
    parts = (line[i : i + 1000] for line in islice(lines, 0, None, every) for i in range(0, len(line), 1000))
    return Tokenizer.train(parts, vocab_size)


def token_dtype(tokenizer: Tokenizer) -> str:
    return "uint16" if tokenizer.vocab_size <= 65536 else "uint32"


def write_split(pieces: list[Piece], tokenizer: Tokenizer, path: Path, seen: set[bytes], dtype: str) -> dict:
    """Write one token file and return its record. `seen` holds the digests of the documents written so far."""
    record = {"documents": 0, "repeated": 0, "bytes": 0, "tokens": 0}
    total = sum(piece.stop - piece.start for piece in pieces)
    with open(path, "wb") as file, tqdm(desc=path.stem, total=total, unit="B", unit_scale=True, disable=None) as bar:
        for piece in pieces:
            for text in piece.documents():
                size, digest = len(text.encode()), hashlib.sha256(text.encode()).digest()
                bar.update(size)
                if digest in seen:
                    record["repeated"] += 1
                    continue
                seen.add(digest)
                ends = [] if tokenizer.eos < 0 else [tokenizer.eos]
                tokens = np.array(tokenizer.prompt(text) + ends, dtype=dtype)
                tokens.tofile(file)
                record["documents"] += 1
                record["bytes"] += size
                record["tokens"] += len(tokens)
    if not record["documents"]:
        raise UserError(f"no text is left for the {path.stem} split: give more of it, in lines")
    return record


def refuse_prepared(folder: Path, config: PrepareConfig) -> None:
    if (folder / "meta.json").exists() and not config.overwrite:
        raise UserError(f"{folder} is already prepared: use it, or give --overwrite")


def prepare(config: PrepareConfig) -> Path:
    """Write the folder of a data set and return it. It appears whole or not at all."""
    folder = Path(config.out) if config.out else DATA / config.name
    refuse_prepared(folder, config)
    ours = {"meta.json", "tokenizer.model", *(f"{name}.{kind}" for name in SPLITS for kind in ("bin", "mask", "jsonl"))}
    if folder.exists() and not {path.name for path in folder.iterdir()} <= ours:
        raise UserError(f"{folder} holds something else than a prepared data set: choose another name or --out")
    tokenizer, records = given_tokenizer(config), instructions(config)
    splits = records or corpus(config)
    partial = folder.with_name(folder.name + ".partial")
    with held(partial):
        refuse_prepared(folder, config)  # by another, while this one was reading
        for left in partial.iterdir():  # by one that was killed
            left.unlink()
        write_folder(config, tokenizer, splits, bool(records), partial, folder)
    return folder


def write_folder(
    config: PrepareConfig, tokenizer: Tokenizer | None, splits: dict, records: bool, partial: Path, folder: Path
) -> None:
    """Fill the folder `partial`, then let it take the place of `folder`."""
    try:
        tokenizer = tokenizer or learn_tokenizer(splits["train"], config.vocab_size or 4096)
        (partial / "tokenizer.model").write_bytes(tokenizer.data)
        seen, dtype, counts = {} if records else set(), token_dtype(tokenizer), {}
        for name in ("test", "val", "train") if records else SPLITS:  # what stands in two, test keeps
            path = partial / f"{name}.bin"
            write = write_examples if records else write_split
            counts[name] = {**write(splits[name], tokenizer, path, seen, dtype), "sha256": sha256_of(path)}
            if records:
                of = {f"{kind}_sha256": sha256_of(path.with_suffix(f".{kind}")) for kind in ("mask", "jsonl")}
                counts[name] |= of
        meta = {
            "name": config.name,
            "kind": "instructions" if records else "text",
            "source": " ".join(config.text or config.parallel or config.from_ or [source_of(config.name)]),
            "splits": counts,
            "vocab_size": tokenizer.vocab_size,
            "dtype": dtype,
            "tokenizer_sha256": hashlib.sha256(tokenizer.data).hexdigest(),
            "tokenizer": config.tokenizer or SETTINGS,
            "python": sys.version.split()[0],
        }
        (partial / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
        (folder / "meta.json").unlink(missing_ok=True)  # first: what is left of a folder without it is not taken
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except BaseException as error:  # Ctrl-C, too
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"cannot write {folder}: {error}") from None
        raise


def source_of(name: str) -> str:
    """Where the text came from, for the record."""
    if name in DOWNLOADS:
        return " ".join(url for url, _ in DOWNLOADS[name])
    return f"the standard library of Python {sys.version.split()[0]}"


def main() -> None:
    config = PrepareConfig(**parse(__doc__, PrepareConfig))
    folder = prepare(config)
    meta = json.loads((folder / "meta.json").read_text())
    what = "examples" if meta["kind"] == "instructions" else "documents"
    for name in SPLITS:
        record = meta["splits"][name]
        line = f"{name:5} {record['tokens']:>13,} tokens | {record['bytes'] / record['tokens']:.2f} bytes a token"
        line += f" | {record['documents']:,} {what}"
        line += f", {record['repeated']} repeated ones dropped" if record["repeated"] else ""
        if what == "examples":
            line += f", {record['empty']} empty ones dropped" if record["empty"] else ""
            line += f" | {record['answer_tokens']:,} answer tokens | longest {record['longest']:,} tokens"
        print(line)
    start = f" --init_from {config.tokenizer}" if (config.tokenizer or "").endswith(".pt") else ""
    start += " --lora_r 8" if start and what == "examples" else ""
    print(f"wrote {folder}\nnext: python train.py --dataset {config.out or config.name}{start}")


if __name__ == "__main__":
    exit_cleanly(main)
