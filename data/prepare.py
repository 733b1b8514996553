"""Turn text into data/NAME/: tokenizer.model, train.bin, val.bin, test.bin and meta.json.

python data/prepare.py                                  # stdlib: Python's own source, from this machine
python data/prepare.py shakespeare                      # or wikitext2, tinystories: downloaded, verified
python data/prepare.py mine --text 'notes/**/*.md'      # your own UTF-8 text
python data/prepare.py docstrings --tokenizer ckpt.pt   # instruction data (see instruct.py) for a model
python data/prepare.py tasks --from mine.jsonl --fields dialogue,summary --tokenizer ckpt.pt
python data/prepare.py en_de --parallel train.en train.de --tokenizer ckpt.pt
"""

import io
import json
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import islice
from pathlib import Path
from shutil import rmtree

import numpy as np
import sentencepiece as spm
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds modules beside it only

from common import POSITIONAL, UserError, bounded, exit_cleanly, held, note, parse, require, sha256_of
from data import corpora
from data.instruct import encoded, read_files
from data.loader import BUILT_IN, DATA, SPLITS
from data.tokenizer import SPACE, Record, Tokenizer, prompt_text, read_tokenizer

FILES = {".bin": "sha256", ".mask": "mask_sha256", ".jsonl": "jsonl_sha256"}  # and their checksums' names
TOKENIZER_BYTES = 50_000_000  # of text that the tokenizer learns from; more changes little and costs memory
SETTINGS = {  # "identity" and the two False keep the text as it is
    "model_type": "bpe", "byte_fallback": True, "split_digits": True, "character_coverage": 0.9999,
    "normalization_rule_name": "identity", "add_dummy_prefix": False, "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,  # indentation is one token, not one per space
    "num_threads": 4,  # it becomes part of the model's bytes, so it must not depend on the machine
    "unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1,
}  # fmt: skip


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
    vocab_size: int | None = bounded(None, 260, 1 << 20)  # pieces of the learned tokenizer (default: 4096)
    out: str | None = None  # folder to write (default: data/NAME beside this script)
    overwrite: bool = False  # replace a folder that is already prepared


def read_source(config: PrepareConfig) -> dict[str, list]:
    """The splits that the flags name: lists of pieces of text, or of records."""
    name, given = config.name, [flag for flag in (config.text, config.from_, config.parallel) if flag]
    require(len(given) < 2, "--text, --from and --parallel are three sources: give one of them")
    files = [Path(path) for path in config.from_ or config.parallel or []]
    if name in corpora.DOWNLOADS and not given:
        files = [corpora.download(*file, DATA / "downloads") for file in corpora.DOWNLOADS[name].items()]
    records = bool(config.parallel) or any({".json", ".jsonl"} & {*file.suffixes} for file in files)
    if name in BUILT_IN and (config.text or config.parallel or (files and records != (name == "alpaca"))):
        raise UserError(f"{name} is a built-in data set, which this is not: give yours another name")
    if records:
        return read_files(files, bool(config.parallel), config.fields or [], config.instruction)
    require(not (config.fields or config.instruction), "--fields, --instruction need records: --from X.json")
    return corpora.split(corpora.own_text(config.text)) if config.text else corpora.built_in(name, files)


def given_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.model, a tokenizer.json or a checkpoint. Raises UserError for others."""
    try:
        if not zipfile.is_zipfile(path):
            return read_tokenizer(path.read_bytes())
        return read_tokenizer(torch.load(path, map_location="cpu", mmap=True, weights_only=True)["tokenizer"])
    except ModuleNotFoundError:
        raise
    except Exception as error:
        raise UserError(f"--tokenizer {path} is damaged, or has none: {error!s:.200}") from None


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
    return learned([line[i : i + 1000] for line in lines for i in range(0, len(line), 1000)], vocab_size)


def learned(lines: list[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of so many pieces. Raises UserError if the text has too few."""
    model = io.BytesIO()
    how = {"model_writer": model, "vocab_size": vocab_size, "minloglevel": 2, **SETTINGS}
    rare = sum(line.count(" ") for line in lines) < 0.001 * sum(map(len, lines))
    how |= {"required_chars": SPACE} if rare else {}  # as bytes, spaces would come back as U+2581
    try:
        spm.SentencePieceTrainer.train(sentence_iterator=iter(lines), **how)
    except RuntimeError as error:  # [its source line] the reason, or flags of its own
        reason = str(error).split("] ")[-1].split(" or decrease")[0].strip() or "it is empty"
        raise UserError(f"--vocab_size {vocab_size} does not fit this text: {reason}") from None
    return Tokenizer(model.getvalue())


def write_split(split: list, tokenizer: Tokenizer, path: Path, seen: dict[bytes, str], dtype: str) -> dict:
    """Write the .bin of a split, of records also the .mask and .jsonl; return counts and checksums. Left out
    are a document that repeats another, a record whose prompt is in a split written before, and one whose
    prompt or answer is empty. `seen` is {digest of a document or prompt: its split}, over all splits."""
    counts = Counter(documents=0, repeated=0, empty=0, bytes=0, tokens=0, answer_tokens=0, longest=0)
    paths = [path.with_suffix(end) for end in FILES]
    with open(paths[0], "wb") as tokens, open(paths[1], "wb") as mask, open(paths[2], "wb") as kept:
        for text, record in documents(split, path.stem):
            line = json.dumps(record, ensure_ascii=False) if record else text
            prompt_key, key = sha256(text.encode()).digest(), sha256(line.encode()).digest()
            repeated = key in seen or seen.get(prompt_key, path.stem) != path.stem
            empty = record and not (record["output"] and (record["instruction"] or record["input"]))
            if empty or repeated:
                counts["empty" if empty else "repeated"] += 1
                continue
            seen[key] = seen[prompt_key] = path.stem
            if not record:
                ids, end = tokenizer.prompt(text), [tokenizer.eos] * (tokenizer.eos >= 0)
            else:
                ids, end = encoded(record, tokenizer)
                mask.write(bytes(len(ids)) + b"\1" * len(end))
                kept.write(line.encode() + b"\n")
                counts.update(answer_tokens=len(end), bytes=len(record["output"].encode()))
            np.array(ids + end, dtype).tofile(tokens)
            counts.update(documents=1, bytes=len(text.encode()), tokens=len(ids + end))
            counts["longest"] = max(counts["longest"], len(ids + end))
    require(counts["documents"] > 0, f"nothing is left for the {path.stem} split: give more lines or records")
    for file in paths:
        if file.stat().st_size:
            counts[FILES[file.suffix]] = sha256_of(file)
        else:  # text has neither mask nor records
            file.unlink()
    return counts


def write_folder(config: PrepareConfig, folder: Path) -> None:
    """Fill an empty folder with the data set that the flags name. Raises UserError if they name none."""
    require(not (config.tokenizer and config.vocab_size), "--tokenizer has a vocabulary: drop --vocab_size")
    tokenizer = given_tokenizer(Path(config.tokenizer)) if config.tokenizer else None
    splits = read_source(config)
    records = isinstance(splits["train"][0], dict)
    if tokenizer is None:
        print(f"learning a tokenizer of {config.vocab_size or 4096:,} pieces")
        tokenizer = learn_tokenizer(splits["train"], config.vocab_size or 4096)
    elif tokenizer.eos < 0 and not records:
        note(f"{config.tokenizer} has no token that ends a text: nothing will stand between documents")
    (folder / "tokenizer.model").write_bytes(tokenizer.data)
    seen, counts, dtype = {}, {}, "uint16" if tokenizer.vocab_size <= 65536 else "uint32"
    for name in SPLITS[::-1] if records else SPLITS:  # a prompt that several splits have is in test only
        counts[name] = write_split(splits[name], tokenizer, folder / f"{name}.bin", seen, dtype)
    source = config.text or config.parallel or config.from_ or corpora.DOWNLOADS.get(config.name)
    meta = {"kind": "instructions" if records else "text", "splits": counts, "dtype": dtype}
    meta["source"] = " ".join(source or ["the standard library of Python", sys.version.split()[0]])
    meta["tokenizer"] = config.tokenizer or SETTINGS
    meta["tokenizer_sha256"] = sha256(tokenizer.data).hexdigest()
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")


def prepare(config: PrepareConfig) -> Path:
    """Write the folder of a data set and return it. It appears whole or not at all."""
    folder = (Path(config.out) if config.out else DATA / config.name).resolve()  # a link stays one
    bad = not folder.name or folder.is_file() or folder.is_mount() or folder == Path.cwd()  # irreplaceable
    require(not bad, f"{folder} must be a folder for this data only: name a new one in it with --out")
    partial = folder.with_name(folder.name + ".partial")
    ours = {"meta.json", "tokenizer.model", ".old", *(f"{n}{end}" for n in SPLITS for end in FILES)}
    with held(partial):
        done, there = (folder / "meta.json").exists(), [*folder.glob("*")]
        require(config.overwrite or not done, f"{folder} is prepared: use it, or --overwrite")
        others = {path.name for path in [*there, *partial.glob("*")]} - ours
        clear = not others and (done or not there)  # files of these names may be the user's own records
        require(clear, f"{folder} or its .partial holds something else: give another name or --out")
        try:
            write_folder(config, partial)  # over what a preparation that was killed has left there
            if folder.exists():
                folder.rename(partial / ".old")  # and back again, as a part of the new one
            partial.rename(folder)
            rmtree(folder / ".old", ignore_errors=True)
        finally:
            rmtree(partial, ignore_errors=True)
    return folder


def main() -> None:
    config = PrepareConfig(**parse(__doc__, PrepareConfig))
    folder = prepare(config)
    for name, counts in json.loads((folder / "meta.json").read_text())["splits"].items():
        print(f"{name:5} " + " | ".join(f"{n:,} {key}" for key, n in counts.items() if type(n) is int and n))
    tune = f" --init_from {config.tokenizer}" if (config.tokenizer or "").endswith(".pt") else ""
    print(f"wrote {folder}\nnext: python train.py --dataset {config.out or config.name}{tune}")


if __name__ == "__main__":
    exit_cleanly(main)
