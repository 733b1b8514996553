"""Instruction data: records from .json lists, .jsonl files or parallel texts, and their tokens.

A record is an instruction, an input and an output, its answer. An example is BOS, the prompt (`prompt_text`),
the answer, EOS. A .bin holds the tokens of all examples, a .mask a byte per token: 1 in the answer and its
EOS, which carry the loss. The .jsonl keeps the records as text, for scoring.
"""

import gzip
import hashlib
import json
from pathlib import Path

from common import UserError
from data.loader import SPLITS
from data.tokenizer import Record, Tokenizer, prompt_text

FIELDS = ("instruction", "input", "output")
Splits = dict[str, list[Record]]


def encode_prompt(record: Record, tokenizer: Tokenizer) -> list[int]:
    return tokenizer.prompt(prompt_text(record))


def encode_answer(record: Record, tokenizer: Tokenizer) -> list[int]:
    """The answer's tokens and the one that ends it, encoded apart from the prompt, as a model writes them."""
    if not tokenizer.stop:
        raise UserError("this tokenizer has no token that ends an answer: take a model that has one")
    return [*tokenizer.encode(record["output"]), tokenizer.stop[0]]


def read_text(path: Path) -> str:
    """A UTF-8 file, gzipped or not."""
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")


def records_of(path: Path, fields: str, instruction: str) -> list[Record]:
    """The records of a .json list or a .jsonl. Raises UserError for a damaged file or a record without them.

    `fields` names instruction,input,output, or input,output; then all records have the same instruction.
    """
    names, records = [name.strip() for name in fields.split(",")], []
    if len(names) not in (2, 3):
        raise UserError(f"--fields {fields}: name input,output or instruction,input,output, with commas")
    source = names[-2]
    try:
        if ".jsonl" in path.suffixes:
            rows = (json.loads(line) for line in read_text(path).split("\n") if line.strip())
        else:
            rows = json.loads(read_text(path))
        found = source == "input"
        for row in rows:
            found |= source in row
            if len(names) == 3 and row.get(source) is None:
                row = {**row, source: ""}  # many instructions have no input
            texts = [instruction, *(row[name].strip() for name in names)]
            "".join(texts).encode()  # fails for lone surrogates
            records.append(dict(zip(FIELDS, texts[-3:])))
        if not found:
            raise KeyError(source)
    except Exception as error:
        where, reason = f"{path}, record {len(records) + 1},", f"{type(error).__name__} {str(error)[:80]}"
        raise UserError(f"{where} is damaged or has no text in --fields {fields} ({reason})") from None
    return records


def parallel_records(source: Path, target: Path, instruction: str) -> list[Record]:
    """A record for each line of two texts that are translations, or the like, of each other."""
    try:
        lines = (read_text(path).removesuffix("\n").split("\n") for path in (source, target))
        return [dict(zip(FIELDS, (instruction, a.strip(), b.strip()))) for a, b in zip(*lines, strict=True)]
    except Exception as error:
        raise UserError(f"{source} or {target} is damaged, or they are not parallel: {error}") from None


def read_files(files: list[Path], parallel: bool, fields: list[str], instruction: str) -> Splits:
    """The splits of records in one to three files, or in as many pairs of parallel texts."""
    if parallel:
        if len(files) not in (2, 4, 6) or fields:
            raise UserError("--parallel: give pairs, SOURCE TARGET, of train, val and test, and no --fields")
        parts = [parallel_records(*pair, instruction) for pair in zip(files[0::2], files[1::2])]
    else:
        if len(files) > 3 or len(fields) not in (0, 1, len(files)):
            raise UserError("--from: give train, val and test, and --fields, with commas, once or per file")
        fields = (fields or [",".join(FIELDS)]) * len(files)
        parts = [records_of(path, names, instruction) for path, names in zip(files, fields)]
    splits = read_splits(parts)
    if not all(splits.values()):
        counts = ", ".join(f"{name} {len(splits[name])}" for name in SPLITS)
        raise UserError(f"a split has no records ({counts}): give more of them")
    return splits


def read_splits(parts: list[list[Record]]) -> Splits:
    """Three files are train, val and test. One is cut into 85%, 5% and 10%; of two, the second is test.

    A cut follows the order of the prompts' hashes, so no prompt is in two splits, whatever its answers.
    """
    if len(parts) == 3:
        return dict(zip(SPLITS, parts))
    places = [hashlib.sha256(prompt_text(record).encode()).digest() for record in parts[0]]
    prompts = sorted(set(places))
    val, test = (max(1, round(share * len(prompts))) for share in (0.05, 0.10))
    names = ["val"] * val + ["test"] * test * (len(parts) == 1) + ["train"] * len(prompts)
    split_of = dict(zip(prompts, names))
    splits = {name: [r for r, place in zip(parts[0], places) if split_of[place] == name] for name in SPLITS}
    return splits if len(parts) == 1 else {**splits, "test": parts[1]}
