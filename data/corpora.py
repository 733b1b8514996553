"""Where texts come from: files, this Python's standard library, public corpora; and how documents become splits.

A corpus is {split: pieces}, a piece bytes of a file that are read when they are needed.
"""

import ast
import glob
import hashlib
import os
import sysconfig
import textwrap
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from config import UserError
from download import download
from files import CHUNK
from instruct import Record

DATA = Path(__file__).resolve().parent

SPLITS = {"train": 0.90, "val": 0.05, "test": 0.05}
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
BUILT_IN = ("stdlib", "docstrings", *DOWNLOADS)  # the names that need no --text


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


def docstrings() -> dict[str, list[Record]]:
    """Functions of the standard library, and what their docstrings say that they do; each in the split that its file
    has in `stdlib`, so that a model trained on that has not read what it will be asked. What stands in train, too, in
    whatever file, is left out of val and test."""
    files = split(standard_library())
    found = {name: [record for piece in pieces for record in functions(piece)] for name, pieces in files.items()}
    read = {record["input"] for record in found["train"]}
    return {
        name: [record for record in records if name == "train" or record["input"] not in read]
        for name, records in found.items()
    }


def functions(piece: Piece, longest: int = 500) -> Iterator[Record]:
    """Those of a file whose docstring begins with a short paragraph: the code without it and without decorators,
    at most `longest` characters, and that paragraph on one line."""
    text = "".join(piece.documents())
    try:
        tree = ast.parse(text)
    except SyntaxError:  # a template, not a program
        return
    lines = text.split("\n")
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (said := ast.get_docstring(node)):
            first, *rest = node.body
            code = lines[node.lineno - 1 : first.lineno - 1] + lines[first.end_lineno : node.end_lineno]
            code, summary = textwrap.dedent("\n".join(code)).strip(), " ".join(said.split("\n\n")[0].split())
            if rest and first.end_lineno < rest[0].lineno and len(code) <= longest and len(summary) <= 120:
                yield {"instruction": "Say what this function does.", "input": code, "output": summary}


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
    """Whole documents by a hash of their names; see the top of prepare.py."""
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
