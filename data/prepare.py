"""Turn text into a tokenizer and token files: data/NAME/{tokenizer.model, train.bin, val.bin, test.bin, meta.json}.

    python data/prepare.py                                  # stdlib: Python's own source, found on this machine
    python data/prepare.py shakespeare                      # or wikitext2, tinystories: downloaded, checksum verified
    python data/prepare.py shakespeare --from input.txt     # the same from a copy that you have
    python data/prepare.py mine --text 'notes/**/*.md'      # your own UTF-8 text
    python data/prepare.py docstrings --tokenizer ckpt.pt   # instruction data, for a model that has this tokenizer
    python data/prepare.py tasks --from mine.jsonl --fields dialogue,summary --tokenizer ckpt.pt
    python data/prepare.py en_de --parallel train.en train.de --tokenizer ckpt.pt

A document becomes BOS, its tokens, EOS; a token file is the documents end to end, uint16 (uint32 above 65,536 tokens).
Corpora with splits of their own keep them. Otherwise whole documents (files) go to val, test or train in the order of
a hash of their names, so that no file is on two sides (huge ones always to train); fewer than 20 files are cut at line
ends instead, each into its first 90%, next 5% and last 5%. A document that repeats another's text is dropped. The
tokenizer learns from train alone. Instruction data: see instruct.py.
"""

import hashlib
import json
import shutil
import sys
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

# run as a script, Python looks for modules beside this file only
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import POSITIONAL, UserError, exit_cleanly, parse
from data.corpora import (
    BUILT_IN,
    DATA,
    DOWNLOADS,
    SPLITS,
    Piece,
    docstrings,
    own_text,
    public_corpus,
    split,
    standard_library,
)
from download import download
from files import held, sha256_of
from instruct import Record, prompt_text, read_files, write_examples
from tokenizer import SETTINGS, Tokenizer, read_tokenizer
from tokenizer_files import find_tokenizer

TOKENIZER_BYTES = 50_000_000  # text that the tokenizer learns from; more changes the pieces little and costs memory


@dataclass
class PrepareConfig:
    """data"""

    name: str = field(default="stdlib", metadata=POSITIONAL)  # stdlib, docstrings, shakespeare, wikitext2, alpaca, ...
    text: list[str] | None = None  # your own UTF-8 text: files, folders or globs
    from_: list[str] | None = None  # a local copy of the download; or instructions, .json or .jsonl: train [val] [test]
    parallel: list[str] | None = None  # instructions from pairs of parallel texts: SOURCE TARGET, of train [val] [test]
    fields: list[str] | None = None  # names of instruction,input,output, or input,output: once, or for each --from file
    instruction: str = ""  # what every record asks for, where the records do not say it
    tokenizer: str | None = None  # an existing tokenizer.model or .json, or a ckpt.pt that has one (default: learn one)
    vocab_size: int | None = None  # pieces that the learned tokenizer has (default: 4096)
    out: str | None = None  # folder to write (default: data/NAME beside this script)
    overwrite: bool = False  # replace a folder that is already prepared


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
        return docstrings() if config.name == "docstrings" and not (files or config.text) else None
    if config.name in BUILT_IN and config.name != "alpaca":
        raise UserError(f"{config.name} is made of this Python's library or downloaded: name your records otherwise")
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
