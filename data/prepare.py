"""Turn text into data/NAME/: tokenizer.model, train.bin, val.bin, test.bin and meta.json.

    python data/prepare.py                                  # stdlib: Python's own source, from this machine
    python data/prepare.py shakespeare                      # or wikitext2, tinystories: downloaded, verified
    python data/prepare.py shakespeare --from input.txt     # the same from a local copy
    python data/prepare.py mine --text 'notes/**/*.md'      # your own UTF-8 text
    python data/prepare.py docstrings --tokenizer ckpt.pt   # instruction data (see instruct.py) for a model
    python data/prepare.py tasks --from mine.jsonl --fields dialogue,summary --tokenizer ckpt.pt
    python data/prepare.py en_de --parallel train.en train.de --tokenizer ckpt.pt

A document becomes BOS, its tokens, EOS; a .bin holds the documents end to end, as uint16 (uint32 above 65,536
tokens). Some corpora have splits of their own. Otherwise whole files go to val, test or train by a hash of
their names (huge ones to train); fewer than 20 files are each cut at line ends into 90%, 5% and 5%. Repeated
documents are dropped. The tokenizer learns from train only.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import islice
from pathlib import Path
from shutil import rmtree

import numpy as np
import torch
from tqdm import tqdm

# run as a script, Python looks for modules beside this file only
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import POSITIONAL, UserError, bounded, exit_cleanly, held, note, parse, sha256_of
from data import corpora
from data.instruct import encode_answer, read_files
from data.loader import BUILT_IN, DATA, SPLITS
from data.tokenizer import SETTINGS, Record, Tokenizer, prompt_text, read_tokenizer

TOKENIZER_BYTES = 50_000_000  # of text that the tokenizer learns from; more changes little and costs memory


@dataclass
class PrepareConfig:
    """data"""

    name: str = field(default="stdlib", metadata=POSITIONAL)  # stdlib, docstrings, shakespeare, alpaca, ...
    text: list[str] | None = None  # your own UTF-8 text: files, folders or globs
    from_: list[str] | None = None  # a copy of the download; or .json or .jsonl records: train [val] [test]
    parallel: list[str] | None = None  # records from parallel texts, SOURCE TARGET: train [val] [test]
    fields: list[str] | None = None  # the names of instruction,input,output or input,output, once or per file
    instruction: str = ""  # the instruction of every record, if they have none
    tokenizer: str | None = None  # a tokenizer.model or .json, or a ckpt.pt that has one (default: learn one)
    vocab_size: int | None = bounded(None, 1, 1 << 20)  # pieces of the learned tokenizer (default: 4096)
    out: str | None = None  # folder to write (default: data/NAME beside this script)
    overwrite: bool = False  # replace a folder that is already prepared


def read_source(config: PrepareConfig) -> dict[str, list]:
    """The splits that the flags name: lists of pieces of text, or of records."""
    name, files = config.name, [Path(path) for path in config.from_ or config.parallel or []]
    if bool(config.text) + bool(config.from_) + bool(config.parallel) > 1:
        raise UserError("--text, --from and --parallel are three sources: give one of them")
    if name == "alpaca" and not (files or config.text):
        files = corpora.downloaded(name)
    kinds = {file.name.removesuffix(".gz").rsplit(".", 1)[-1] for file in files}
    records = bool(files) and (bool(config.parallel) or kinds <= {"json", "jsonl"})
    if name in BUILT_IN and (config.text or (records and name != "alpaca")):
        raise UserError(f"{name} is a built-in data set: give yours another name")
    if records:
        return read_files(files, bool(config.parallel), config.fields or [], config.instruction)
    if config.fields or config.instruction:
        raise UserError("--fields and --instruction are for records: give --from FILE.json or --parallel")
    if config.text:
        return corpora.split(corpora.own_text(config.text))
    if name in corpora.DOWNLOADS and name != "alpaca" and len(files) < 2:
        return corpora.public_corpus(name, *files or [None])
    if name not in ("stdlib", "docstrings") or files:
        known, what = ", ".join(BUILT_IN), " from ".join([repr(name), *map(str, files)])
        raise UserError(f"unknown data set {what}: take {known}, or give --text FILE or --from X.json")
    return corpora.docstrings() if name == "docstrings" else corpora.split(corpora.standard_library())


def given_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.model, a tokenizer.json or a checkpoint."""
    try:
        if path.suffix == ".pt":
            data = torch.load(path, map_location="cpu", mmap=True, weights_only=True)["tokenizer"]
        else:
            data = path.read_bytes()
        tokenizer = read_tokenizer(data)
    except Exception as error:
        kind = "checkpoint" if path.suffix == ".pt" else "tokenizer"
        raise UserError(f"--tokenizer {path} is damaged or no {kind}: {str(error)[:200]}") from None
    if not tokenizer.is_exact():
        note(f"{path} does not return every text as it was, so bits per byte will not be exact")
    return tokenizer


def documents(split: list, what: str) -> Iterator[tuple[str, Record | None]]:
    """(text, None) for the texts in pieces, (prompt, record) for records; with a progress bar."""
    for item in tqdm(split, desc=what, disable=None):
        if isinstance(item, dict):
            yield prompt_text(item), item
        else:
            yield from ((text, None) for text in item.documents())


def learn_tokenizer(train: list, vocab_size: int) -> Tokenizer:
    """SentencePiece BPE on the lines of the train split; of a large corpus, on evenly spread ones."""
    texts = (text + record["output"] if record else text for text, record in documents(train, "tokenizer"))
    size = sum(item.stop - item.start for item in train if isinstance(item, corpora.Piece))
    every = max(1, round(size / TOKENIZER_BYTES))
    lines = islice((line for text in texts for line in text.split("\n")), 0, None, every)
    # SentencePiece leaves out lines of more than 4,192 bytes, so long ones come in parts
    parts = (line[i : i + 1000] for line in lines for i in range(0, len(line), 1000))
    return Tokenizer.train(parts, vocab_size)


def write_split(split: list, tokenizer: Tokenizer, path: Path, seen: dict[bytes, str], dtype: str) -> dict:
    """Write the .bin of a split, of records also the .mask and .jsonl, and return its counts.

    Left out are a document that repeats another, a record whose prompt is in a split written before, and one
    whose prompt or answer is empty. `seen` is {digest of a document or prompt: its split}, over all splits.
    """
    counts = Counter(documents=0, repeated=0, empty=0, bytes=0, tokens=0, answer_tokens=0, longest=0)
    mask_path, kept_path = path.with_suffix(".mask"), path.with_suffix(".jsonl")
    with open(path, "wb") as tokens, open(mask_path, "wb") as mask, open(kept_path, "wb") as kept:
        for text, record in documents(split, path.stem):
            line = json.dumps(record, ensure_ascii=False) if record else text
            prompt_key, key = sha256(text.encode()).digest(), sha256(line.encode()).digest()
            repeated = key in seen or seen.get(prompt_key, path.stem) != path.stem
            seen.setdefault(prompt_key, path.stem)
            if record and not (record["output"] and (record["instruction"] or record["input"])):
                counts["empty"] += 1
                continue
            if repeated:
                counts["repeated"] += 1
                continue
            seen[key] = path.stem
            ids, end = tokenizer.prompt(text), [tokenizer.eos][: tokenizer.eos >= 0]
            if record:
                end = encode_answer(record, tokenizer)
                np.repeat(np.uint8([0, 1]), [len(ids), len(end)]).tofile(mask)
                kept.write(line.encode() + b"\n")
                counts.update(answer_tokens=len(end), bytes=len(record["output"].encode()))
            np.array(ids + end, dtype).tofile(tokens)
            counts.update(documents=1, bytes=len(text.encode()), tokens=len(ids + end))
            counts["longest"] = max(counts["longest"], len(ids + end))
    for extra in (mask_path, kept_path):
        if not extra.stat().st_size:  # text has neither
            extra.unlink()
    if not counts["documents"]:
        left = f"{counts['empty']} empty, {counts['repeated']} repeated ones"
        raise UserError(f"no text is left for the {path.stem} split ({left}): give more of it, in lines")
    return counts


def write_folder(config: PrepareConfig, folder: Path) -> None:
    """Fill an empty folder with the data set that the flags name."""
    if config.tokenizer and config.vocab_size:
        raise UserError("--tokenizer has a vocabulary of its own: drop --vocab_size")
    tokenizer = given_tokenizer(Path(config.tokenizer)) if config.tokenizer else None
    splits = read_source(config)
    records = isinstance(splits["train"][0], dict)
    if tokenizer is None:
        hint = "; to tune a model, give its own: --tokenizer ckpt.pt" * records
        print(f"learning a tokenizer of {config.vocab_size or 4096:,} pieces{hint}")
        tokenizer = learn_tokenizer(splits["train"], config.vocab_size or 4096)
    (folder / "tokenizer.model").write_bytes(tokenizer.data)
    seen, counts, dtype = {}, {}, "uint16" if tokenizer.vocab_size <= 65536 else "uint32"
    for name in SPLITS[::-1] if records else SPLITS:  # a prompt that several splits have is in test only
        counts[name] = write_split(splits[name], tokenizer, folder / f"{name}.bin", seen, dtype)
        for end in ("bin", "mask", "jsonl") if records else ("bin",):
            key = f"{end}_sha256".removeprefix("bin_")
            counts[name][key] = sha256_of(folder / f"{name}.{end}")
    source = config.text or config.parallel or config.from_ or corpora.DOWNLOADS.get(config.name)
    meta = {
        "name": config.name, "kind": "instructions" if records else "text",
        "source": " ".join(source or ["the standard library of Python", sys.version.split()[0]]),
        "splits": counts, "vocab_size": tokenizer.vocab_size, "dtype": dtype,
        "tokenizer_sha256": sha256(tokenizer.data).hexdigest(),
        "tokenizer": config.tokenizer or SETTINGS, "python": sys.version.split()[0],
    }  # fmt: skip
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")


def prepare(config: PrepareConfig) -> Path:
    """Write the folder of a data set and return it. It appears whole or not at all."""
    folder = Path(config.out) if config.out else DATA / config.name
    partial = folder.with_name(folder.name + ".partial")
    ours = {f"{name}.{end}" for name in SPLITS for end in ("bin", "mask", "jsonl")}
    with held(partial):
        try:
            if (folder / "meta.json").exists() and not config.overwrite:
                raise UserError(f"{folder} is already prepared: use it, or give --overwrite")
            if folder.exists() and {p.name for p in folder.iterdir()} - ours - {
                "meta.json",
                "tokenizer.model",
            }:
                raise UserError(f"{folder} holds something else than a data set: give another name or --out")
            for left in partial.iterdir():  # by a preparation that was killed
                left.unlink()
            write_folder(config, partial)
            (folder / "meta.json").unlink(missing_ok=True)  # first: a folder without it is no data set
            rmtree(folder, ignore_errors=True)
            partial.rename(folder)
        except OSError as error:
            raise UserError(f"cannot prepare {folder}: {error}") from None
        finally:
            rmtree(partial, ignore_errors=True)
    return folder


def main() -> None:
    config = PrepareConfig(**parse(__doc__, PrepareConfig))
    folder = prepare(config)
    for name, counts in json.loads((folder / "meta.json").read_text())["splits"].items():
        counts = {what: count for what, count in counts.items() if type(count) is int and count}
        print(f"{name:5} " + " | ".join(f"{count:,} {what}" for what, count in counts.items()))
    tune = f" --init_from {config.tokenizer}" if (config.tokenizer or "").endswith(".pt") else ""
    print(f"wrote {folder}\nnext: python train.py --dataset {config.out or config.name}{tune}")


if __name__ == "__main__":
    exit_cleanly(main)
