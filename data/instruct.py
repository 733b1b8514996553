"""Instruction data: records from .json lists, .jsonl files or parallel texts, and their tokens.

An example is BOS, the prompt (`prompt_text`), the answer, EOS. A .bin holds the tokens of all, a .mask a byte
per token: 1 in the answer and its EOS, which carry the loss. A .jsonl keeps the records, for scoring.
"""

import gzip
import hashlib
import json
from pathlib import Path

from common import UserError, require
from data.loader import SPLITS
from data.tokenizer import Record, Tokenizer, prompt_text

FIELDS = ("instruction", "input", "output")


def encoded(record: Record, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Prompt, and answer with the token that ends it: apart, as a model reads one and writes the other."""
    require(tokenizer.stop, "this tokenizer has no token that ends an answer: take one that has")
    return tokenizer.prompt(prompt_text(record)), tokenizer.encode(record["output"]) + tokenizer.stop[:1]


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file, gzipped or not."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return data.decode("utf-8-sig").removesuffix("\n").split("\n")


def records_of(path: Path, fields: str, instruction: str, target: Path | None = None) -> list[Record]:
    """The records of a .json list, a .jsonl, or with a `target`, of the lines of parallel texts. `fields` are
    [instruction,]input,output. Raises UserError for a damaged file or a record without them."""
    names, records = [name.strip() for name in fields.split(",")], []
    require(len(names) in (2, 3), f"--fields {fields}: name input,output or instruction,input,output")
    try:
        rows = read_lines(path)
        if target:
            rows = ({"input": a, "output": b} for a, b in zip(rows, read_lines(target), strict=True))
        elif ".jsonl" in path.suffixes:
            rows = (json.loads(line) for line in rows if line.strip())
        else:
            rows = json.loads("\n".join(rows))
        for row in rows:
            row = {"input": "", **row}  # many instructions have none
            texts = [instruction, *(("" if row[name] is None else row[name]).strip() for name in names)][-3:]
            "".join(texts).encode()  # fails for lone surrogates
            records.append(dict(zip(FIELDS, [texts[0] or instruction, *texts[1:]])))
    except Exception as error:
        where = f"{path}{f' or {target}' if target else ''}, record {len(records) + 1},"
        raise UserError(f"{where} is unreadable, or without --fields {fields} ({error!r:.90})") from None
    return records


def read_files(files: list[Path], parallel: bool, fields: list[str], instruction: str) -> dict[str, list]:
    """The splits of records in files, or in pairs of parallel texts. Three are train, val and test. One is
    cut into 85%, 5% and 10% by the hashes of its prompts, so that none is in two splits; of two, the second
    is test. Raises UserError for a damaged file, or too few records."""
    targets = files[1::2] if parallel else [None] * len(files)
    files, fields = files[:: 1 + parallel], fields or ["input,output" if parallel else ",".join(FIELDS)]
    fitting = len(files) == len(targets) <= 3 and len(fields) in (1, len(files))
    require(fitting, "give train [val] [test], with --parallel in pairs, and --fields once or per file")
    records, *given = map(records_of, files, fields * 3, [instruction] * 3, targets)
    places = [hashlib.sha256(prompt_text(record).encode()).digest() for record in records]
    prompts = sorted(set(places))
    val, test = (max(1, round(share * len(prompts))) for share in (0.05, 0.10))
    names = ["val"] * val * (len(given) < 2) + ["test"] * test * (not given) + ["train"] * len(prompts)
    split_of = dict(zip(prompts, names))
    splits = {name: [r for r, place in zip(records, places) if split_of[place] == name] for name in SPLITS}
    splits |= zip(SPLITS[3 - len(given) :], given)
    require(all(splits.values()), "a split has no records: give more of them")
    return splits
