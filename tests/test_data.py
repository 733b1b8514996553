"""Text in, tokens out: exact round trips, splits that do not leak, downloads that are whole or absent; and
instruction data: loss on answers only, no example that sees another, nothing cut in silence."""

import gzip
import http.server
import json
import math
import shutil
import threading
from hashlib import sha256
from itertools import chain
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import quick, refused, sharp_model
from corpus import write_corpus
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint import build, load, save
from common import IGNORE, UserError
from data import corpora
from data.corpora import download, functions, split, whole_file
from data.instruct import encode_answer, encode_prompt, read_splits
from data.loader import SPLITS, Examples, open_split, read_meta
from data.prepare import PrepareConfig, prepare
from data.tokenizer import Tokenizer, read_tokenizer
from eval_ppl import bits_per_byte
from formats.tokenizers import with_special


def tokenizer_of(folder: Path) -> Tokenizer:
    return read_tokenizer((folder / "tokenizer.model").read_bytes())


def made(out: Path, *args, **how) -> tuple[dict, Tokenizer, dict[str, np.ndarray]]:
    """What meta.json says of the splits, the tokenizer and the tokens of a data set prepared in `out`."""
    folder, meta = read_meta(str(prepare(PrepareConfig(*args, out=str(out), **how))))
    return meta["splits"], tokenizer_of(folder), {name: open_split(folder, meta, name) for name in SPLITS}


# ---- tokenizers ----

ANY = st.text(st.characters(exclude_categories=["Cs"]))
TRICKY = st.text(" \u2581\t\n\r\x00é<s>0x41\ufeff", max_size=30)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=ANY | TRICKY)
def test_any_text_round_trips(tiny_data, text):
    tokenizer = tokenizer_of(tiny_data)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and tokenizer.token_bytes()[ids].sum() == len(text.encode())


def other_tokenizer(**settings) -> Tokenizer:
    """A tokenizer of other people's settings."""
    size = 290 if settings.get("byte_fallback", 1) else 22
    with mock.patch.dict("data.tokenizer.SETTINGS", settings):
        return Tokenizer.train(["some words, and some more words"] * 20, size)


def test_other_peoples_tokenizers_keep_their_ways_and_those_that_lose_text_are_told_apart(tiny_data):
    prefix, text = other_tokenizer(add_dummy_prefix=True), "some words\nand more"
    ids = np.array(prefix.prompt(text))
    assert prefix.dummy_prefix and prefix.decode(ids.tolist()) == text
    assert prefix.token_bytes()[ids].sum() == len(text), "a space before every text is no byte"
    assert bits_per_byte(math.log(2), ids, prefix) == (len(ids) - 1) / len(text)
    bare = other_tokenizer(bos_id=-1, eos_id=-1)
    assert bare.bos == -1 and bare.prompt("some") == bare.encode("some")
    assert tokenizer_of(tiny_data).is_exact() and prefix.is_exact()
    assert not other_tokenizer(normalization_rule_name="nmt_nfkc").is_exact()
    assert not other_tokenizer(byte_fallback=False).is_exact()


# ---- text ----


def test_token_files_are_the_documents_end_to_end_and_the_same_each_time(tiny_data, tmp_path):
    paths = write_corpus(tmp_path / "corpus")
    again, tokenizer, tokens = made(tmp_path / "again", "own", text=list(map(str, paths)), vocab_size=400)
    texts = []
    for name, record in again.items():
        ends = np.flatnonzero(tokens[name] == tokenizer.eos) + 1
        documents = [tokens[name][a:b].tolist() for a, b in zip([0, *ends[:-1]], ends)]
        assert ends[-1] == len(tokens[name]) == record["tokens"] and len(documents) == record["documents"]
        assert all(ids[0] == tokenizer.bos and ids.count(tokenizer.bos) == 1 for ids in documents)
        assert max(map(len, documents)) == record["longest"]
        texts += [tokenizer.decode(ids) for ids in documents]
        same = (tiny_data / f"{name}.bin").read_bytes()
        assert record["sha256"] == sha256(same).hexdigest() and tokens[name].tobytes() == same
    assert sorted(texts) == sorted(path.read_text("utf-8") for path in paths), "a file is lost, or cut"


def test_files_are_split_by_their_names_and_repeated_ones_dropped(tmp_path):
    folder = tmp_path / "texts"
    (folder / "__pycache__").mkdir(parents=True)
    for i in range(60):
        (folder / f"{i}.txt").write_text(f"document number {i % 50} " * 20)  # ten of them repeat others
    for name in (".hidden", "__pycache__/c.pyc", "image.png"):
        (folder / name).write_bytes(b"\x89PNG\0\xff" * 100)
    pieces = corpora.own_text([str(folder)])
    assert sorted(piece.name for piece in pieces) == sorted(f"{i}.txt" for i in range(60))
    assert split(pieces) == split(pieces[::-1]), "the order in which files are found must not matter"
    records, tokenizer, tokens = made(tmp_path / "out", "x", text=[str(folder)], vocab_size=300)
    counts = [(record["documents"], record["repeated"]) for record in records.values()]
    assert np.sum(counts, 0).tolist() == [50, 10] and min(counts)[0] >= 2
    found = [set(tokenizer.decode(tokens[name].tolist()).split("document number ")) - {""} for name in SPLITS]
    assert sum(map(len, found)) == len(set.union(*found)) == 50, "a document is in two splits"


def test_few_files_are_cut_at_line_ends(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text("".join(f"{name} line {i:03}\n" for i in range(200)))
    _, tokenizer, tokens = made(tmp_path / "out", "x", text=[str(tmp_path / "[ab]")], vocab_size=280)
    parts = [tokenizer.decode(tokens[name].tolist()) for name in SPLITS]
    counts = [len(set(part.splitlines())) for part in parts]
    assert len(set("".join(parts).splitlines())) == 400 == sum(counts)
    assert np.allclose(counts, (360, 20, 20), atol=4)


def test_wikitext_keeps_its_splits_and_the_tokenizer_learns_from_train_alone(tmp_path):
    marks = {"train": "xylophone", "valid": "quizzical", "test": "wyvernjaw"}
    parts = {name: f" = {name} = \n {mark} and {mark} \n" * 60 for name, mark in marks.items()}
    folder = tmp_path / "wikitext-2-raw"
    folder.mkdir()
    for name, text in parts.items():
        (folder / f"wiki.{name}.raw").write_text(text)
    archive = shutil.make_archive(str(tmp_path / "w"), "zip", tmp_path, folder.name)
    shutil.rmtree(folder)
    with mock.patch("data.corpora.DATA", tmp_path):
        _, tokenizer, tokens = made(tmp_path / "out", "wikitext2", from_=[archive], vocab_size=290)
    assert [tokenizer.decode(tokens[name].tolist()) for name in SPLITS] == list(parts.values())
    lengths = [len(tokenizer.encode(mark)) for mark in marks.values()]
    assert lengths[0] <= 3 < 7 < min(lengths[1:]), lengths


def test_tinystories_validation_becomes_val_and_test(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "CHUNK", 1000)  # of which train has several
    for name, first, last in (("train", 0, 200), ("valid", 200, 240)):
        text = "\n<|endoftext|>\n".join(f"Once there was a cät called {i}." for i in range(first, last))
        (tmp_path / f"TinyStoriesV2-GPT4-{name}.txt").write_text(text)
    records, *_ = made(tmp_path / "out", "tinystories", from_=[str(tmp_path)], vocab_size=300)
    counts = [records[name]["documents"] for name in SPLITS]
    assert counts[0] == 200 and sum(counts[1:]) == 40 and abs(counts[1] - 20) <= 1


def test_the_standard_library_is_code_and_no_question_stands_in_train(tmp_path, monkeypatch):
    names = {piece.name for piece in corpora.standard_library()}
    assert {"argparse.py", "json/decoder.py"} <= names and len(names) > 300
    assert not [name for name in names if "/test" in name or "site-packages" in name or "encodings/" in name]
    for i in range(60):  # every third function stands in two files
        text = 'def f{0}(x):\n    """Add {0}."""\n    return x + {0}\n'
        (tmp_path / f"{i}.py").write_text("\n".join(text.format(j) for j in (i, i - i % 3)))
    monkeypatch.setattr(corpora, "standard_library", lambda: corpora.own_text([str(tmp_path)]))
    found = [{record["input"] for record in part} for part in corpora.docstrings().values()]
    assert len(set.union(*found)) == 60 and all(found) and not found[0] & (found[1] | found[2])


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
'''
    (tmp_path / "a.py").write_text(source)
    found = {record["output"]: record["input"] for record in functions(whole_file(tmp_path / "a.py"))}
    assert found == {"The size, in bytes.": "def size(self):\n    return 3"}


def test_a_given_tokenizer_is_kept_and_a_large_one_takes_uint32(tmp_path, tiny_data):
    (tmp_path / "a.txt").write_text("".join(f"some words {i}\n" for i in range(99)))
    own, tokens = tokenizer_of(tiny_data), {}
    for size, given_one in ((2, own), (4, with_special(own, 1, True, [2, 70000]))):
        (tmp_path / f"{size}.model").write_bytes(given_one.data)
        how = {"text": [str(tmp_path / "a.txt")], "tokenizer": str(tmp_path / f"{size}.model")}
        _, found, tokens[size] = made(tmp_path / f"{size}", "x", **how)
        assert found.data == given_one.data and tokens[size]["val"].itemsize == size
    assert tokens[2]["val"].tolist() == tokens[4]["val"].tolist()


def test_unusable_text_is_refused_and_leaves_nothing(tmp_path):
    for name, content in (("no text", ""), ("does not fit", "hello\n"), ("is not UTF-8", "Bj\xf6rk\n")):
        (tmp_path / name).write_text(content, "latin1")
    files = sorted(tmp_path.iterdir())
    for path in (*files, tmp_path / "No such file"):
        with pytest.raises(UserError, match=path.name):
            prepare(PrepareConfig("x", text=[str(path)], out=str(tmp_path / "out")))
    assert sorted(tmp_path.iterdir()) == files


def test_prepared_data_is_not_replaced_unless_asked(tiny_data, tmp_path):
    (tmp_path / "precious.txt").write_text("".join(f"mine {i}\n" for i in range(200)))
    text = [str(tmp_path / "precious.txt")]
    with pytest.raises(UserError, match="--overwrite"):
        prepare(PrepareConfig("x", text=text, out=str(tiny_data)))
    with pytest.raises(UserError, match="something else"):
        prepare(PrepareConfig("x", text=text, out=str(tmp_path), overwrite=True))
    for size in (274, 275):
        assert made(tmp_path / "out", "x", text=text, vocab_size=size, overwrite=True)[1].vocab_size == size


# ---- downloads ----


class Server(http.server.BaseHTTPRequestHandler):
    """Serves BODY, breaks off after BREAK_AFTER bytes of each answer, and honours ranges when RANGES."""

    body, break_after, ranges, requests = bytes(range(256)) * 1000, None, True, []

    def do_GET(self):
        start = int(self.headers["Range"].split("=")[1].rstrip("-")) if self.ranges else 0
        self.requests.append(start)
        self.send_response(206 if self.ranges else 200)
        self.send_header("Content-Length", str(len(self.body) - start))
        self.end_headers()
        self.wfile.write(self.body[start:][: self.break_after])

    def log_message(self, *args):
        pass


@pytest.fixture
def url(monkeypatch):
    monkeypatch.setattr("data.corpora.time.sleep", lambda seconds: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/corpus.txt"
        running.shutdown()


def test_a_broken_download_continues_where_it_stopped_or_begins_again(url, tmp_path, monkeypatch):
    checksum = sha256(Server.body).hexdigest()
    monkeypatch.setattr(Server, "break_after", 100_000)
    path = download(url, checksum, tmp_path)
    assert path.read_bytes() == Server.body and Server.requests[-3:] == [0, 100_000, 200_000]
    assert [p.name for p in tmp_path.iterdir()] == ["corpus.txt"]
    monkeypatch.setattr(Server, "break_after", None)
    monkeypatch.setattr(Server, "ranges", False)
    path.rename(tmp_path / "corpus.txt.part").write_bytes(b"an old beginning")
    assert download(url, checksum, tmp_path).read_bytes() == Server.body


def test_a_download_that_is_another_or_never_comes_is_refused(url, tmp_path):
    with pytest.raises(UserError, match="sha256"):
        download(url, "0" * 64, tmp_path)
    with pytest.raises(UserError, match="--from"):
        download("http://127.0.0.1:9/corpus.txt", "0" * 64, tmp_path / "new")
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


# ---- instructions ----


def tasks() -> list[dict]:
    """Of very different lengths, some without an input."""
    rng, found = np.random.default_rng(0), []
    for i in range(60):
        text = " ".join(rng.choice(["red", "green", "blue", "cat", "dog", "bird"], 1 + i % 13))
        told = {"instruction": f"Repeat {i}: {text}", "input": "", "output": text}
        found.append(told if i % 3 else {"instruction": f"Copy {i}.", "input": text, "output": text})
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[Path, dict]:
    source = tmp_path_factory.mktemp("tasks") / "tasks.json"
    source.write_text(json.dumps(tasks()))
    made(source.parent / "out", "tasks", from_=[str(source)], vocab_size=330)
    return read_meta(str(source.parent / "out"))


def test_an_example_is_prompt_answer_and_end_and_the_mask_is_the_answer(data):
    (folder, meta), seen, tokenizer = data, [], tokenizer_of(data[0])
    for name in SPLITS:
        tokens, mask = open_split(folder, meta, name), np.fromfile(folder / f"{name}.mask", np.uint8)
        kept, start = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()], 0
        seen += kept
        for record in kept:
            prompt, answer = encode_prompt(record, tokenizer), encode_answer(record, tokenizer)
            stop = start + len(prompt) + len(answer)
            assert tokens[start:stop].tolist() == prompt + answer and prompt[0] == tokenizer.bos
            assert mask[start:stop].tolist() == [0] * len(prompt) + [1] * len(answer)
            assert tokenizer.decode(answer) == record["output"] and tokens[stop - 1] == tokenizer.eos
            start = stop
        assert start == len(tokens) and meta["splits"][name]["documents"] == len(kept)
        assert meta["splits"][name]["answer_tokens"] == mask.sum()
    assert {json.dumps(record) for record in seen} == {json.dumps(record) for record in tasks()}


def test_a_prompt_is_in_one_split_only_and_given_splits_are_kept(tmp_path):
    same = [{"instruction": f"task {i % 40}", "input": "", "output": f"answer {i}"} for i in range(400)]
    parts = read_splits([same])
    prompts = [{record["instruction"] for record in parts[name]} for name in SPLITS]
    assert list(map(len, prompts)) == [34, 2, 4] and len(set.union(*prompts)) == 40
    assert sum(map(len, parts.values())) == 400
    assert list(read_splits([same[:9], same[9:12], same[12:]]).values()) == [same[:9], same[9:12], same[12:]]
    both = {"instruction": "", "input": "the same", "output": "twice"}
    paths = [tmp_path / "train.json", tmp_path / "test.json"]
    for path, part in zip(paths, ([*tasks(), both, {**both, "output": "other"}], [both, tasks()[4]])):
        path.write_text(json.dumps(part))
    made(tmp_path / "out", "x", from_=list(map(str, paths)), vocab_size=330)
    kept = {name: (tmp_path / "out" / f"{name}.jsonl").read_text() for name in SPLITS}
    assert kept["test"].count("\n") == 2 and "the same" not in kept["train"] + kept["val"]


@pytest.mark.parametrize("packed", [False, True])
def test_records_come_from_other_fields_jsonl_parallel_texts_and_gzip(tmp_path, packed):
    def write(name, text):
        path = tmp_path / (name + ".gz" * packed)
        path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
        return str(path)

    rows = [{"dialogue": f"a{i}\u2028b", "summary": f" s{i} ", "more": 1} for i in range(30)]
    lines = write("x.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n")
    texts = [write(f"x.{name}", "".join(f"{name} {i}\n" for i in range(30))) for name in ("en", "de")]
    ways = {"s3": {"from_": [lines], "fields": ["dialogue,summary"]}, "de 3": {"parallel": texts}}
    for expected, how in ways.items():
        made(tmp_path / expected, "x", vocab_size=300, instruction="Do.", **how)
        kept = "".join((tmp_path / expected / f"{name}.jsonl").read_text() for name in SPLITS).split("\n")
        found = {row["output"]: row for row in map(json.loads, filter(None, kept))}
        assert len(found) == 30 and found[expected]["input"] in ("a3\u2028b", "en 3")


def test_an_epoch_has_every_example_once_in_batches_of_like_length(data):
    examples = Examples(*data, "train", 120)
    rows, count = len(examples.spans), -(-len(examples.spans) // 4)
    epochs = [[batch.tolist() for batch in examples.epoch(4, *key)] for key in ((0, 0), (0, 1), (1, 0))]
    assert all(sorted(chain(*of)) == list(range(rows)) and len(of) == count for of in epochs)
    assert len(set(map(str, epochs))) == 3
    batches = [batch for step in range(count) for batch in examples.step_batches(4, 2, 0, step)]
    again, real = examples.step_batches(4, 2, 0, 5), (np.diff(examples.spans) - 1).sum()
    assert all(torch.equal(a, b) for a, b in zip(chain(*batches[10:12]), chain(*again)))
    assert 2 * real <= sum(x.numel() for x, _ in batches) < 1.3 * 2 * real, "much padding"
    lengths = [x.shape[1] for x, _ in batches[:count]]
    assert lengths != sorted(lengths) and len(set(lengths)) > 2, "short examples always come first"


def test_no_example_sees_another_and_padding_carries_no_loss(data):
    """Float64: an example by itself, without padding, has the loss that it has in a batch."""
    examples, total = Examples(*data, "train", 120), 0.0
    model = sharp_model(vocab_size=330, block_size=120).double()
    x, y = examples.batch(range(12))
    assert (y == IGNORE).any(1).all() and len({(row != 0).sum().item() for row in x}) > 3
    for prompt, answer in map(examples.parts, range(12)):
        ids = torch.tensor([[*prompt.tolist(), *answer.tolist()]])
        log_p = model(ids)[0].log_softmax(-1)[len(prompt) - 1 : -1]
        total -= log_p[range(len(answer)), answer.tolist()].sum().item()
    assert model(x, y).item() == pytest.approx(total, rel=1e-9)


def test_too_long_examples_are_counted_and_not_cut(data, tmp_path):
    lengths = np.diff(Examples(*data, "train", 10**6).spans)[:, 0]
    assert lengths.max() == data[1]["splits"]["train"]["longest"]
    block = int(lengths.max()) - 6
    examples, out = Examples(*data, "train", block), (lengths - 1 > block).sum()
    assert out > 0 and len(examples.spans) + out == len(lengths) and f"{out} of " in examples.note
    assert len(Examples(*data, "train", int(lengths.max()) - 1).spans) == len(lengths)
    assert all(examples.parts(row)[1][-1] == 2 for row in range(len(examples.spans)))
    flags = ["--dataset", data[0], "--out_dir", tmp_path, "--block_size", 8]
    refused(quick("train.py", *flags), "longer than block_size 8")


def test_a_task_is_answered_from_the_command_line(tiny_run, tmp_path):
    checkpoint, task = load(tiny_run), {"instruction": "Add", "input": "1"}
    save(tmp_path / "x.pt", {**checkpoint, "config": {**checkpoint["config"], "block_size": 64}})
    model, tokenizer = build(load(tmp_path / "x.pt"))
    answer = model.generate([encode_prompt(task, tokenizer)], 9, stop=tokenizer.stop)[0]
    flags = ["--instruction", "Add", "--input", 1, "--temperature", 0, "--max_new_tokens", 9]
    assert quick("sample.py", tmp_path / "x.pt", *flags).stdout.strip() == tokenizer.decode(answer).strip()
