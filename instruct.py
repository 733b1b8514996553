"""Instruction data: what a record is, the prompt that it becomes, and which of its tokens are the answer.

    .json, .jsonl: instruction, input, output ---+
    .jsonl: other fields (--fields)           ---+--data/prepare.py--> data/NAME/{train,val,test}.{jsonl,bin,mask}
    two parallel texts (--parallel)           ---+

An example is BOS, the prompt, the answer, EOS. The .bin holds their tokens end to end, the .mask a byte for each: 1 in
the answer and its EOS, which alone carry loss. The .jsonl keeps the records as text, for scoring (eval_text.py).
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from config import UserError
from tokenizer import Tokenizer, check_unicode

Record = dict[str, str]  # instruction, input, output
FIELDS = ("instruction", "input", "output")
SPLITS = {"val": 0.05, "test": 0.10}  # of the records, if they come in one file; train is the rest


def prompt_text(record: Record) -> str:
    """What stands before the answer, in training and in use: the template, in this one place."""
    parts = [("Instruction", record["instruction"]), ("Input", record["input"])]
    return "".join(f"### {name}:\n{text}\n\n" for name, text in parts if text) + "### Response:\n"


def encode_prompt(record: Record, tokenizer: Tokenizer) -> list[int]:
    return tokenizer.prompt(prompt_text(record))


def encode_answer(record: Record, tokenizer: Tokenizer) -> list[int]:
    """The answer's tokens and the one that ends it. They are encoded apart from the prompt's, so that what the model
    writes behind a prompt is cut into tokens as what it learned from."""
    if not tokenizer.stop:
        raise UserError("this tokenizer has no token that ends an answer: take a model that has one")
    return [*tokenizer.encode(record["output"]), tokenizer.stop[0]]


# ---- records from files ----


def read_text(path: Path) -> str:
    """A UTF-8 file, gzipped or not. Raises UserError if it is missing or is none."""
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from None


def read_json(path: Path) -> list:
    """The objects of a .json that is one list, or of a .jsonl, one a line. Raises UserError for damaged ones."""

    def parsed(text: str, place: str) -> object:
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}{place} is no JSON: {str(error)[:80]}") from None

    if ".jsonl" in path.suffixes:
        lines = enumerate(read_text(path).split("\n"), 1)
        return [parsed(line, f", line {number},") for number, line in lines if line.strip()]
    rows = parsed(read_text(path), "")
    if not isinstance(rows, list):
        raise UserError(f"{path} holds no list of records: give [{{...}}, ...], or a .jsonl of one record a line")
    return rows


def records_of(path: Path, fields: str, instruction: str) -> list[Record]:
    """The records of a .json or .jsonl file. `fields` names, with commas between, what takes the place of
    instruction,input,output, or of input,output alone. Raises UserError for a record without them."""
    names = [name.strip() for name in fields.split(",")]
    if len(names) not in (2, 3):
        raise UserError(f"--fields {fields}: name two, input,output, or three, instruction,input,output, with commas")
    wanted, records, rows = dict(zip(FIELDS[-len(names) :], names)), [], read_json(path)
    if wanted["input"] != "input" and not any(isinstance(row, dict) and wanted["input"] in row for row in rows):
        raise UserError(f"{path}: no record has a field {wanted['input']!r}: mend --fields {fields}")
    for number, row in enumerate(rows, 1):
        record = {"instruction": instruction, "input": ""}
        for ours, theirs in wanted.items():
            value = row.get(theirs) if isinstance(row, dict) else None
            if value is None and ours == "input" and len(names) == 3:
                continue  # many instructions need none
            if not isinstance(value, str):
                has = {key: type(x).__name__ for key, x in row.items()} if isinstance(row, dict) else row
                what = f"no text in the field {theirs!r} (it has: {str(has)[:100]})"
                raise UserError(f"{path}, record {number}: {what}; name the fields with --fields INPUT,OUTPUT")
            check_unicode(value, f"{path}, record {number}")
            record[ours] = value.strip()
        records.append(record)
    return records


def parallel_records(source: Path, target: Path, instruction: str) -> list[Record]:
    """A record for each line of two texts that are translations, or the like, of each other."""
    lines = [read_text(path).split("\n") for path in (source, target)]
    lines = [text[:-1] if text[-1] == "" else text for text in lines]
    if len(lines[0]) != len(lines[1]):
        raise UserError(f"{source} has {len(lines[0]):,} lines, {target} {len(lines[1]):,}: they are not parallel")
    return [{"instruction": instruction, "input": a.strip(), "output": b.strip()} for a, b in zip(*lines)]


def read_files(
    files: list[Path], parallel: bool, fields: list[str] | None, instruction: str
) -> dict[str, list[Record]]:
    """The splits of records in one to three files, or in as many pairs of parallel texts."""
    if parallel:
        if len(files) not in (2, 4, 6) or fields:
            has = f"has {len(files)} files" + " and --fields" * bool(fields)
            raise UserError(f"--parallel {has}: give pairs, SOURCE TARGET, of train, val and test, and no --fields")
        parts = [parallel_records(*pair, instruction) for pair in zip(files[0::2], files[1::2])]
    else:
        fields = fields or [",".join(FIELDS)]
        if len(files) > 3 or len(fields) not in (1, len(files)):
            count = f"--from has {len(files)} files, --fields {len(fields)} lists"
            raise UserError(f"{count}: give the files of train, val, test, and names with commas, once or once a file")
        parts = [records_of(path, names, instruction) for path, names in zip(files, fields * len(files))]
    if empty := [path for path, part in zip(files[:: len(files) // len(parts)], parts) if not part]:
        raise UserError(f"{empty[0]} holds no records")
    splits = read_splits(parts)
    if few := [name for name, part in splits.items() if not part]:
        raise UserError(f"no record is left for the {few[0]} split: give more than {sum(map(len, parts))}")
    return splits


def read_splits(files: list[list[Record]]) -> dict[str, list[Record]]:
    """Records of one file, which is cut; of two, train (from which val is cut) and test; or of train, val and test."""
    if len(files) == 3:
        return dict(zip(("train", "val", "test"), files))
    shares = SPLITS if len(files) == 1 else {"val": SPLITS["val"]}
    cut = cut_records(files[0], shares)
    return cut if len(files) == 1 else {**cut, "test": files[1]}


def cut_records(records: list[Record], shares: dict[str, float]) -> dict[str, list[Record]]:
    """Some records for each share, the rest for train, in the order of a hash of their prompts: the same prompt, with
    whatever answers, is on one side only."""

    def place(record: Record) -> bytes:
        return hashlib.sha256(prompt_text(record).encode()).digest()

    prompts, parts, start = sorted({place(record) for record in records}), {}, 0
    for name, share in shares.items():
        count = max(1, round(share * len(prompts)))
        parts[name], start = set(prompts[start : start + count]), start + count
    parts["train"] = set(prompts[start:])
    return {name: [record for record in records if place(record) in part] for name, part in parts.items()}


# ---- token files ----


def write_examples(
    records: Iterable[Record], tokenizer: Tokenizer, path: Path, seen: dict[str, str], dtype: str
) -> dict:
    """Write the .bin, .mask and .jsonl of a split and return its record. Left out and counted: an example that repeats
    another, one whose prompt stands in a split written before, and one whose prompt or answer is empty.

    seen: {record or prompt: the split that has it}, of all splits so far
    """
    record = {"documents": 0, "repeated": 0, "empty": 0, "bytes": 0, "tokens": 0, "answer_tokens": 0, "longest": 0}
    files = [path.with_suffix(suffix) for suffix in (".bin", ".mask", ".jsonl")]
    with open(files[0], "wb") as tokens, open(files[1], "wb") as mask, open(files[2], "w", encoding="utf-8") as kept:
        for example in tqdm(records, desc=path.stem, disable=None):
            line = json.dumps(example, ensure_ascii=False)
            empty = not example["output"] or not (example["instruction"] or example["input"])
            elsewhere = seen.setdefault(prompt_text(example), path.stem) != path.stem
            if empty or elsewhere or line in seen:
                record["empty" if empty else "repeated"] += 1
                continue
            seen[line] = path.stem
            prompt, answer = encode_prompt(example, tokenizer), encode_answer(example, tokenizer)
            np.array(prompt + answer, dtype).tofile(tokens)
            np.array([0] * len(prompt) + [1] * len(answer), np.uint8).tofile(mask)
            kept.write(line + "\n")
            record["documents"] += 1
            record["bytes"] += len(prompt_text(example).encode()) + len(example["output"].encode())
            record["tokens"] += len(prompt) + len(answer)
            record["answer_tokens"] += len(answer)
            record["longest"] = max(record["longest"], len(prompt) + len(answer))
    if not record["documents"]:
        what = f"{record['empty']} have an empty prompt or answer, {record['repeated']} repeat others"
        raise UserError(f"no record is left for the {path.stem} split: {what}; give more of them")
    return record
