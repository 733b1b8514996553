"""Text in, tokens out: exact round trips, splits that do not leak, downloads that are whole or absent."""

import ast
import hashlib
import http.server
import json
import math
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import OWN_TEXT, ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

import data.prepare as module
from config import UserError
from data.corpora import Piece, docstrings, functions, split, whole_file
from data.prepare import PrepareConfig, prepare
from dataset import open_split, read_meta
from download import download
from eval_ppl import bits_per_byte
from sample import readable
from tokenizer import SETTINGS, Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_data):
    return Tokenizer((tiny_data / "tokenizer.model").read_bytes())


@settings(max_examples=300, deadline=None, derandomize=True)
@given(text=st.text(st.characters(exclude_categories=["Cs"])) | st.text(" \u2581\t\n\r\x00é<s>0x41\ufeff", max_size=30))
def test_any_text_round_trips(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


def other_tokenizer(monkeypatch, **settings):
    """A tokenizer of other people's settings."""
    monkeypatch.setattr("tokenizer.SETTINGS", {**SETTINGS, **settings})
    return Tokenizer.train(
        iter(["some words, and some more words"] * 20), 290 if settings.get("byte_fallback", 1) else 22
    )


def test_a_space_before_every_text_counts_for_no_byte(monkeypatch):
    tokenizer, text = other_tokenizer(monkeypatch, add_dummy_prefix=True), "some words\nand more"
    assert tokenizer.dummy_prefix and tokenizer.decode(tokenizer.encode(text)) == text
    ids = np.array(tokenizer.prompt(text))
    assert tokenizer.token_bytes()[ids].sum() == len(text)
    assert bits_per_byte(math.log(2), ids, tokenizer) == (len(ids) - 1) / len(text)


def test_tokenizers_that_lose_text_are_told_apart(monkeypatch, tokenizer):
    assert tokenizer.is_exact()
    assert not other_tokenizer(monkeypatch, normalization_rule_name="nmt_nfkc").is_exact()
    assert not other_tokenizer(monkeypatch, byte_fallback=False).is_exact()


def test_a_tokenizer_without_bos_begins_with_the_text(monkeypatch):
    tokenizer = other_tokenizer(monkeypatch, bos_id=-1, eos_id=-1)
    assert tokenizer.bos == -1 and tokenizer.prompt("some") == tokenizer.encode("some")


def test_streamed_text_holds_back_unfinished_characters(tokenizer):
    text = "naïve 😀 words"
    ids = tokenizer.encode(text)
    parts = list(readable([tokenizer.bos], iter(ids), tokenizer))
    assert "".join(parts) == text and not any("\ufffd" in part for part in parts)
    cut = ids[: ids.index(tokenizer.encode("😀")[0]) + 2]  # two of the four bytes of the last character
    assert "".join(readable([tokenizer.bos], iter(cut), tokenizer)).startswith("naïve ")


def test_token_files_are_the_documents_end_to_end(tiny_data, tokenizer):
    folder, meta = read_meta(str(tiny_data))
    bos, eos, texts = tokenizer.bos, tokenizer.eos, {}
    for name, record in meta["splits"].items():
        tokens = open_split(folder, meta, name)
        assert len(tokens) == record["tokens"] == record["documents"] * 2 + sum(tokens > 2)
        assert tokens[0] == bos and tokens[-1] == eos and (tokens == bos).sum() == record["documents"]
        ends = np.flatnonzero(tokens == eos)
        starts = [0, *(ends[:-1] + 1)]
        texts[name] = [tokenizer.decode(tokens[a:b].tolist()) for a, b in zip(starts, ends)]
        assert sum(len(text.encode()) for text in texts[name]) == record["bytes"]
    for i, path in enumerate(OWN_TEXT):
        assert texts["train"][i] + texts["val"][i] + texts["test"][i] == Path(path).read_text()


def test_documents_are_split_whole_by_their_names_and_repeated_ones_dropped(tmp_path):
    for i in range(60):
        (tmp_path / f"{i}.txt").write_text(f"document number {i % 50} " * 20)  # ten of them repeat others
    pieces = [whole_file(path) for path in sorted(tmp_path.iterdir())]
    parts = split(pieces)
    names = [piece.name for part in parts.values() for piece in part]
    assert sorted(names) == sorted(piece.name for piece in pieces) and min(map(len, parts.values())) >= 3
    assert split(pieces[::-1]) == parts, "the order in which files are found must not matter"
    folder = prepare(PrepareConfig("x", text=[str(tmp_path)], vocab_size=300, out=str(tmp_path / "out")))
    meta = read_meta(str(folder))[1]
    assert sum(record["documents"] for record in meta["splits"].values()) == 50
    assert sum(record["repeated"] for record in meta["splits"].values()) == 10
    tokenizer = Tokenizer((folder / "tokenizer.model").read_bytes())
    seen = {}
    for name in meta["splits"]:
        for text in tokenizer.decode(open_split(folder, meta, name).tolist()).split("document number "):
            seen.setdefault(text.strip(), set()).add(name)
    assert all(len(places) == 1 for text, places in seen.items() if text)


def test_preparing_twice_gives_the_same_bytes(tmp_path, tiny_data):
    again = prepare(PrepareConfig("own", text=OWN_TEXT, vocab_size=400, out=str(tmp_path / "again")))
    for name in ("tokenizer.model", "train.bin", "val.bin", "test.bin"):
        assert (again / name).read_bytes() == (tiny_data / name).read_bytes(), name


def test_standard_library_is_real_code_without_tests():
    pieces = module.standard_library()
    names = {piece.name for piece in pieces}
    assert {"argparse.py", "json/decoder.py"} <= names and len(pieces) > 300
    assert not [name for name in names if "/test" in name or "site-packages" in name or "encodings/" in name]


def test_functions_come_without_what_their_docstrings_say(tmp_path):
    source = '''
class A:
    @property
    def size(self):
        """The size,
        in bytes.

        And more.
        """
        return 3

    async def wait(self): "Wait."; return 4

    def empty(self):
        """Nothing to do."""

def plain(x):
    return x

def outer():
    """Outer one."""
    def inner(y):
        """Inner one."""
        return y
    return inner
'''
    (tmp_path / "a.py").write_text(source)
    (tmp_path / "b.py").write_text("a template, not a program")
    found = {record["output"]: record["input"] for record in functions(whole_file(tmp_path / "a.py"))}
    assert set(found) == {"The size, in bytes.", "Outer one.", "Inner one."}
    assert found["The size, in bytes."] == "def size(self):\n    return 3"
    assert found["Inner one."] == "def inner(y):\n    return y"
    for said, code in found.items():
        assert ast.parse(code).body[0].name in ("size", "outer", "inner") and f'"{said}' not in code
    assert not list(functions(whole_file(tmp_path / "b.py")))


def test_no_function_of_val_or_test_stands_in_train():
    """Also where several files hold the same."""
    records = docstrings()
    train = {record["input"] for record in records["train"]}
    assert len(train) > 1000 and len(records["test"]) > 50
    assert not any(record["input"] in train for name in ("val", "test") for record in records[name])


def test_large_vocabularies_get_uint32(tmp_path, tiny_data):
    class Large(Tokenizer):
        def __init__(self, model):
            super().__init__(model)
            self.vocab_size = 70000

    (tmp_path / "a.txt").write_text("some words\n" * 50)
    large = Large((tiny_data / "tokenizer.model").read_bytes())
    dtype = module.token_dtype(large)
    record = module.write_split([whole_file(tmp_path / "a.txt")], large, tmp_path / "x.bin", set(), dtype)
    assert (tmp_path / "x.bin").stat().st_size == 4 * record["tokens"]


def test_separated_documents_are_found_across_chunks(tmp_path, monkeypatch):
    stories = [f"story {i} " + "é" * (i % 7) for i in range(50)]
    (tmp_path / "s.txt").write_text("\n<|endoftext|>\n".join(stories))
    monkeypatch.setattr("data.corpora.CHUNK", 13)
    piece = whole_file(tmp_path / "s.txt", separator=b"<|endoftext|>")
    assert list(piece.documents()) == [story.strip() for story in stories]


@pytest.mark.parametrize("source", ["zip", "folder"])
def test_wikitext_keeps_its_own_splits(tmp_path, source):
    parts = {name: f" = {name} = \n some words of {name} \n" * 30 for name in ("train", "valid", "test")}
    folder = tmp_path / "wikitext-2-raw"
    folder.mkdir()
    for name, text in parts.items():
        (folder / f"wiki.{name}.raw").write_text(text)
    if source == "zip":
        with zipfile.ZipFile(tmp_path / "w.zip", "w") as archive:
            for name, text in parts.items():
                archive.writestr(f"wikitext-2-raw/wiki.{name}.raw", text)
    given_path = tmp_path / "w.zip" if source == "zip" else folder
    out = prepare(PrepareConfig("wikitext2", from_=[str(given_path)], vocab_size=300, out=str(tmp_path / "out")))
    meta = read_meta(str(out))[1]
    tokenizer = Tokenizer((out / "tokenizer.model").read_bytes())
    for ours, theirs in (("train", "train"), ("val", "valid"), ("test", "test")):
        assert tokenizer.decode(open_split(out, meta, ours).tolist()) == parts[theirs]


def test_tinystories_validation_becomes_val_and_test(tmp_path):
    def stories(first, number):
        return "\n<|endoftext|>\n".join(f"Once there was a cat called {i}." for i in range(first, first + number))

    (tmp_path / "TinyStoriesV2-GPT4-train.txt").write_text(stories(0, 200))
    (tmp_path / "TinyStoriesV2-GPT4-valid.txt").write_text(stories(1000, 40))
    out = prepare(PrepareConfig("tinystories", from_=[str(tmp_path)], vocab_size=300, out=str(tmp_path / "out")))
    records = read_meta(str(out))[1]["splits"]
    assert records["train"]["documents"] == 200 and records["val"]["documents"] + records["test"]["documents"] == 40
    assert abs(records["val"]["documents"] - 20) <= 1


class Server(http.server.BaseHTTPRequestHandler):
    """Serves BODY, breaks off after BREAK_AFTER bytes of each answer, and honours ranges when RANGES."""

    body, break_after, ranges, requests = b"", 0, True, []

    def do_GET(self):
        start = int(self.headers["Range"].split("=")[1].rstrip("-")) if self.ranges else 0
        self.requests.append(start)
        self.send_response(206 if self.ranges else 200)
        self.send_header("Content-Length", str(len(self.body) - start))
        self.end_headers()
        self.wfile.write(self.body[start : start + self.break_after] if self.break_after else self.body[start:])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr("download.time.sleep", lambda seconds: None)
    monkeypatch.setattr(Server, "requests", [])
    monkeypatch.setattr(Server, "body", bytes(range(256)) * 1000)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/corpus.txt"
        running.shutdown()


def test_a_broken_download_continues_where_it_stopped(server, tmp_path, monkeypatch):
    monkeypatch.setattr(Server, "break_after", 100_000)
    path = download(server, hashlib.sha256(Server.body).hexdigest(), tmp_path)
    assert path.read_bytes() == Server.body and Server.requests == [0, 100_000, 200_000]
    assert [p.name for p in tmp_path.iterdir()] == ["corpus.txt"]


def test_a_server_without_ranges_begins_again(server, tmp_path, monkeypatch):
    monkeypatch.setattr(Server, "ranges", False)
    (tmp_path / "corpus.txt.part").write_bytes(b"old beginning")
    assert download(server, hashlib.sha256(Server.body).hexdigest(), tmp_path).read_bytes() == Server.body


def test_a_download_with_another_checksum_is_not_kept(server, tmp_path):
    with pytest.raises(UserError, match="sha256"):
        download(server, "0" * 64, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_download_that_never_comes_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("download.time.sleep", lambda seconds: None)
    with pytest.raises(UserError, match="--from"):
        download("http://127.0.0.1:9/corpus.txt", "0" * 64, tmp_path)


@pytest.mark.parametrize(
    "content, word",
    [
        (b"", "no text"),
        (b"hello\n", "does not fit"),
        ("Bj\u00f6rk\n".encode("latin1") * 99, "not UTF-8"),
        (None, "no such"),
    ],
)
def test_unusable_text_is_refused_and_leaves_nothing(tmp_path, content, word):
    path = tmp_path / "a.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=word):
        prepare(PrepareConfig("x", text=[str(path)], out=str(tmp_path / "out")))
    assert {p.name for p in tmp_path.iterdir()} <= {"a.txt"}


def test_a_folder_gives_its_text_files_and_one_bad_file_its_own_error(tmp_path):
    folder = tmp_path / "texts"
    (folder / "__pycache__").mkdir(parents=True)
    for name in ("a.md", "b.txt", ".hidden", "__pycache__/c.pyc"):
        (folder / name).write_text(f"{name}: some words\n" * 30)
    (folder / "image.png").write_bytes(b"\x89PNG\0\xff" * 100)
    assert [piece.name for piece in module.own_text([str(folder)])] == ["a.md", "b.txt"]
    (folder / "latin.txt").write_bytes("Bj\u00f6rk\n".encode("latin1") * 99)
    with pytest.raises(UserError, match=r"latin\.txt is not UTF-8"):
        prepare(PrepareConfig("x", text=[str(folder)], out=str(tmp_path / "out")))


def test_prepared_data_is_not_replaced_unless_asked(tiny_data, tmp_path):
    config = {"text": [str(ROOT / "model.py")], "vocab_size": 350}
    with pytest.raises(UserError, match="--overwrite"):
        prepare(PrepareConfig("own", out=str(tiny_data), **config))
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(UserError, match="something else"):
        prepare(PrepareConfig("own", out=str(tmp_path), **config))
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_long_lines_are_learned_from_too(tmp_path):
    (tmp_path / "a.txt").write_text("".join("albatross zeppelin " * 600 + f"{i}\n" for i in range(40)))
    out = prepare(PrepareConfig("x", text=[str(tmp_path / "a.txt")], vocab_size=300, out=str(tmp_path / "out")))
    tokenizer = Tokenizer((out / "tokenizer.model").read_bytes())
    assert len(tokenizer.encode("albatross zeppelin")) < 6


def test_an_existing_tokenizer_is_used_as_it_is(tmp_path, tiny_data, tiny_run):
    for given_path in (tiny_data / "tokenizer.model", tiny_run):
        out = tmp_path / given_path.name
        prepare(PrepareConfig("x", text=[str(ROOT / "*.py")], tokenizer=str(given_path), out=str(out)))
        assert (out / "tokenizer.model").read_bytes() == (tiny_data / "tokenizer.model").read_bytes()


def test_meta_records_what_was_made(tiny_data):
    meta = json.loads((tiny_data / "meta.json").read_text())
    assert {"source", "splits", "vocab_size", "dtype", "tokenizer", "tokenizer_sha256", "python"} <= set(meta)
    for name, record in meta["splits"].items():
        assert record["sha256"] == hashlib.sha256((tiny_data / f"{name}.bin").read_bytes()).hexdigest()


def test_a_piece_reads_its_bytes_alone(tmp_path):
    (tmp_path / "a").write_text("0123456789")
    assert list(Piece("a", Path(tmp_path / "a"), 2, 5).documents()) == ["234"]
