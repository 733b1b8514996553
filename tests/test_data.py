"""Exact round trips, splits that do not leak, whole downloads; instructions with loss on answers only."""

import gzip
import http.server
import json
import shutil
import threading
import time
from hashlib import sha256
from itertools import chain
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import quick, refused, sharp_model
from corpus import write_corpus
from foreign import checkpoint_of
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint import save
from common import IGNORE, UserError, held
from data import corpora
from data.corpora import download, split
from data.instruct import encoded, read_files
from data.loader import SPLITS, Examples, open_split, padded, prepared, read_meta
from data.prepare import PrepareConfig, given_tokenizer, learned, prepare
from data.tokenizer import Tokenizer, prompt_text, read_tokenizer
from eval_ppl import bits_per_byte
from formats.tokenizers import with_special
from model import pack


def made(out: Path, *args, **how) -> tuple[dict, Tokenizer, dict[str, np.ndarray]]:
    """What meta.json says of the splits, the tokenizer and the tokens of a data set prepared in `out`."""
    folder, meta, tokenizer = prepared(str(prepare(PrepareConfig(*args, out=str(out), **how))))
    return meta["splits"], tokenizer, {name: open_split(folder, meta, name) for name in SPLITS}


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(st.characters(exclude_categories=["Cs"])) | st.text(" \u2581\t\n\r\0é<s>0x41\ufeff"))
def test_any_text_round_trips(tiny_data, text):
    tokenizer = prepared(str(tiny_data))[2]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and tokenizer.token_bytes()[ids].sum() == len(text.encode())


def test_a_space_before_every_text_is_no_byte_and_tokenizers_that_lose_text_are_detected(tiny_data, prefixed):
    prefix, text = read_tokenizer(prefixed.serialized_model_proto()), "some words\nand more"
    ids = np.array(prefix.prompt(text))
    assert ids.tolist() == [1, *prefix.sp.encode(text)] and prefix.decode(ids.tolist()) == text
    assert prefix.token_bytes()[ids].sum() == len(text), "a space before every text is no byte"
    assert bits_per_byte(np.log(2), ids, prefix) == (len(ids) - 1) / len(text)
    behind = prefix.token_bytes()[ids[2:]].sum()  # without a BOS, the first token is not predicted
    assert bits_per_byte(np.log(2), ids[1:], prefix) == (len(ids) - 2) / behind
    unspaced = learned(["山川日月" * 9] * 9, 270)
    assert all(t.is_exact() for t in (prepared(str(tiny_data))[2], prefix, unspaced))
    for size, lossy in ((290, {"normalization_rule_name": "nmt_nfkc"}), (22, {"byte_fallback": False})):
        with mock.patch.dict("data.prepare.SETTINGS", lossy):
            assert not learned(["some words, and some more words"] * 20, size).is_exact()


def test_token_files_are_the_documents_end_to_end_and_the_same_each_time(tiny_data, tmp_path):
    paths, texts = write_corpus(tmp_path / "corpus"), []
    again, tokenizer, tokens = made(tmp_path / "again", "own", text=list(map(str, paths)), vocab_size=400)
    for name, record in again.items():
        ends = np.flatnonzero(tokens[name] == tokenizer.eos) + 1
        documents = [part.tolist() for part in np.split(tokens[name], ends)[:-1]]
        assert ends[-1] == len(tokens[name]) == record["tokens"] and len(documents) == record["documents"]
        assert all(ids[0] == 1 and ids.count(1) == 1 for ids in documents)
        assert max(map(len, documents)) == record["longest"]
        texts += [tokenizer.decode(ids) for ids in documents]
        assert tokens[name].tobytes() == (tiny_data / f"{name}.bin").read_bytes()
    assert sorted(texts) == sorted(path.read_text("utf-8") for path in paths), "a file is lost, or cut"


def test_files_are_split_by_their_names_and_repeated_ones_dropped(tmp_path):
    (tmp_path / "texts/.git").mkdir(parents=True)
    for i in range(60):
        (tmp_path / f"texts/{i}.txt").write_text(f"document number {i % 50} " * 20)  # ten repeat others
    for name in (".hidden", ".git/config", "image.png"):
        (tmp_path / "texts" / name).write_text("not to be read" + "\0" * (name == "image.png"))
    how = {"text": [str(tmp_path / "texts")], "vocab_size": 300}
    pieces = corpora.own_text(how["text"])
    assert split(pieces) == split(pieces[::-1]), "the order in which files are found must not matter"
    records, tokenizer, tokens = made(tmp_path / "out", "x", **how)
    counts = [(record["documents"], record["repeated"]) for record in records.values()]
    assert np.sum(counts, 0).tolist() == [50, 10] and min(counts)[0] >= 2
    found = [set(tokenizer.decode(tokens[name].tolist()).split("document number ")) - {""} for name in SPLITS]
    assert sum(map(len, found)) == len(set.union(*found)) == 50, "a document is in two splits"


def test_few_files_are_cut_at_line_ends_and_a_large_tokenizer_takes_uint32(tmp_path, tiny_data):
    for name in "ab":
        (tmp_path / name).write_text("".join(f"{name} line {i:03}\n" for i in range(200)))
    large = with_special(prepared(str(tiny_data))[2], 1, True, [2, 70000])
    (tmp_path / "large.model").write_bytes(large.data)
    how = {"text": [str(tmp_path / "[ab]")], "tokenizer": str(tmp_path / "large.model")}
    _, found, tokens = made(tmp_path / "out", "x", **how)
    assert found.data == large.data and all(part.itemsize == 4 for part in tokens.values())
    lines = [found.decode(tokens[name].tolist()).splitlines() for name in SPLITS]
    assert len(set(chain(*lines))) == 400 == sum(map(len, lines))
    assert np.allclose(list(map(len, lines)), (360, 20, 20), atol=4)
    for i in range(19):  # beside which a is most of the text
        (tmp_path / f"note-{i}").write_text("x\n")
    pieces = split(corpora.own_text([f"{tmp_path}/[an]*"])).values()
    sizes = [sum(piece.stop - piece.start for piece in part) for part in pieces]
    assert np.allclose(np.divide(sizes, sum(sizes)), corpora.SHARES, atol=0.03)
    (tmp_path / "tokenizer.json").write_text("{}")
    with mock.patch.dict("sys.modules", tokenizers=None), pytest.raises(ModuleNotFoundError):
        given_tokenizer(tmp_path / "tokenizer.json")


def test_wikitext_keeps_its_splits_and_the_tokenizer_learns_from_train_only(tmp_path, capsys):
    marks = {"train": "xylophone", "valid": "quizzical", "test": "wyvernjaw"}
    parts = {name: f" = {name} = \n {mark} and {mark} \n" * 60 for name, mark in marks.items()}
    (tmp_path / "w/wikitext-2-raw").mkdir(parents=True)
    for name, text in parts.items():
        (tmp_path / f"w/wikitext-2-raw/wiki.{name}.raw").write_text(text)
    archive = shutil.make_archive(str(tmp_path / "w"), "zip", tmp_path / "w")
    with mock.patch("data.corpora.DATA", tmp_path):
        _, tokenizer, tokens = made(tmp_path / "out", "wikitext2", from_=[archive], vocab_size=290)
        with pytest.raises(UserError, match="no zip file"):
            corpora.built_in("wikitext2", [tmp_path / "w/wikitext-2-raw/wiki.train.raw"])
        assert (tmp_path / "downloads/wikitext-2-raw/wiki.train.raw").exists(), "what was there is lost"
    assert [tokenizer.decode(tokens[name].tolist()) for name in SPLITS] == list(parts.values())
    with mock.patch("data.loader.DATA", tmp_path):
        (tmp_path / "out").rename(tmp_path / "wikitext2")
        assert prepared("wikitext2")[2].data == tokenizer.data  # found by its name
        assert "tokenizer" not in capsys.readouterr().err
        meta = tmp_path / "wikitext2/meta.json"
        meta.write_text(json.dumps(json.loads(meta.read_text()) | {"tokenizer": "other.pt"}))
        assert prepared("wikitext2") and "has the tokenizer of other.pt" in capsys.readouterr().err
    lengths = [len(tokenizer.encode(mark)) for mark in marks.values()]
    assert lengths[0] <= 3 < 7 < min(lengths[1:]), lengths


def test_tinystories_validation_becomes_val_and_test(tmp_path):
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
    text = '@f\ndef f{0}(x):\n    """Add\n    {0}.\n\n    More."""\n    return x + {0}\n'
    for i in range(60):  # every third function stands in two files
        others = 'def g(): "On one line."; return 4\ndef empty():\n    """Nothing."""\n'
        (tmp_path / f"{i}.py").write_text(others + text.format(i) + text.format(i - i % 3))
    monkeypatch.setattr(corpora, "standard_library", lambda: corpora.own_text([str(tmp_path)]))
    found = [{record["input"]: record["output"] for record in part} for part in corpora.docstrings().values()]
    expected = {f"def f{i}(x):\n    return x + {i}": f"Add {i}." for i in range(60)}
    assert found[0] | found[1] | found[2] == expected
    assert all(found) and not found[0].keys() & (found[1] | found[2])


def test_prepared_data_is_not_replaced_unless_asked(tiny_data, tmp_path):
    (tmp_path / "precious.txt").write_text("".join(f"mine {i}\n" for i in range(200)))
    text = [str(tmp_path / "precious.txt")]
    (tmp_path / "out.partial").mkdir()
    shutil.copy(text[0], tmp_path / "out.partial")
    taken = (tmp_path, True, "something else"), (tmp_path / "out", False, "something else")
    for out, overwrite, word in ((tiny_data, False, "--overwrite"), *taken):
        with pytest.raises(UserError, match=word):
            prepare(PrepareConfig("x", text=text, out=str(out), overwrite=overwrite))
    shutil.rmtree(tmp_path / "out.partial")  # it was kept
    with held(tmp_path / "new.partial"):
        done = quick("data/prepare.py", "x", "--text", *text, "--out", tmp_path / "new")
    refused(done, "new.partial is in use")
    (tmp_path / "link").symlink_to("out")
    for size, out in ((274, "out"), (275, "out"), (276, "link")):
        assert made(tmp_path / out, "x", text=text, vocab_size=size, overwrite=True)[1].vocab_size == size
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".bin", ".json", ".model"}
    (tmp_path / "out/meta.json").unlink()  # then train.bin, or train.jsonl, may be the user's own
    with pytest.raises(UserError, match="something else"):
        prepare(PrepareConfig("x", text=text, out=str(tmp_path / "out"), overwrite=True))


class Server(http.server.BaseHTTPRequestHandler):
    body, sent = bytes(range(256)) * 1000, None  # sent: bytes, before it breaks off, or after 8 falls silent

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body[: self.sent])
        time.sleep(self.sent == 8)  # silent, but not gone


def test_a_download_is_whole_or_refused(tmp_path, monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url, checksum = f"http://127.0.0.1:{server.server_port}/corpus.txt", sha256(Server.body).hexdigest()
    nowhere, wrong, hash_ = "http://127.0.0.1:9/corpus.txt", "0" * 64, "invalid hash"
    cases = (None, url, wrong, hash_), (9, url, checksum, hash_), (8, url, checksum, "timed out")
    for sent, address, sha, reason in (*cases, (None, nowhere, checksum, "refused")):
        monkeypatch.setattr(Server, "sent", sent)
        monkeypatch.setattr(corpora, "PATIENCE", 0.2 if sent == 8 else 9)
        with pytest.raises(UserError, match=f"{address}: .*{reason}.*--from"):
            download(address, sha, tmp_path)
        assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    assert download(url, checksum, tmp_path).read_bytes() == Server.body
    server.shutdown()
    server.server_close()
    assert download(url, checksum, tmp_path).read_bytes() == Server.body  # is not fetched again


def tasks() -> list[dict]:
    """Of very different lengths, some without an input."""
    rng, words = np.random.default_rng(0), ["red", "green", "blue", "cat", "dog", "bird"]
    texts = [" ".join(rng.choice(words, 1 + i % 13)) for i in range(60)]
    told = [(f"Repeat {i}: {text}", "") if i % 3 else (f"Copy {i}.", text) for i, text in enumerate(texts)]
    return [{"instruction": a, "input": b, "output": text} for (a, b), text in zip(told, texts)]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[Path, dict]:
    source = tmp_path_factory.mktemp("tasks") / "tasks.json"
    source.write_text(json.dumps(tasks()))
    made(source.parent / "out", "tasks", from_=[str(source)], vocab_size=330)
    return read_meta(str(source.parent / "out"))


def test_an_example_is_prompt_answer_and_end_and_the_mask_is_the_answer(data):
    (folder, meta), seen, tokenizer = data, [], prepared(str(data[0]))[2]
    for name in SPLITS:
        kept = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        pairs = [encoded(record, tokenizer) for record in kept]
        parts = map(Examples(folder, meta, name, 10**6).parts, range(len(kept)))
        assert [(prompt.tolist(), answer.tolist()) for prompt, answer in parts] == pairs
        mask = [bit for prompt, answer in pairs for bit in [0] * len(prompt) + [1] * len(answer)]
        assert np.fromfile(folder / f"{name}.mask", np.uint8).tolist() == mask
        assert all(prompt[0] == tokenizer.bos and answer[-1] == tokenizer.eos for prompt, answer in pairs)
        assert [tokenizer.decode(answer) for _, answer in pairs] == [record["output"] for record in kept]
        seen += kept
    assert sorted(map(str, seen)) == sorted(map(str, tasks()))


def test_a_prompt_is_in_one_split_only_and_given_splits_are_kept(tmp_path):
    same = [{"instruction": f"task {i % 40}", "input": "", "output": f"answer {i}"} for i in range(400)]

    def splits_of(*parts: list[dict], instruction: str = "") -> list[list[dict]]:
        paths = [tmp_path / f"{i}.json" for i in range(len(parts))]
        for path, part in zip(paths, parts):
            path.write_text(json.dumps(part))
        return list(read_files(paths, False, [], instruction).values())

    prompts = [[record["instruction"] for record in part] for part in splits_of(same)]
    assert [len(set(part)) for part in prompts] == [34, 2, 4] and len(set(chain(*prompts))) == 40
    assert len([*chain(*prompts)]) == 400
    assert splits_of(same[:9], same[9:12], same[12:]) == [same[:9], same[9:12], same[12:]]
    both = {"instruction": "", "input": "the same", "output": "twice"}
    assert splits_of([*tasks(), {**both, "output": "other"}], [both])[2] == [both]
    how = {"from_": [str(tmp_path / f"{i}.json") for i in (0, 1)], "vocab_size": 330}
    made(tmp_path / "out", "x", **how)
    kept = [(tmp_path / "out" / f"{name}.jsonl").read_text().count("the same") for name in SPLITS]
    assert kept == [0, 0, 1]
    # a record that is left out for its empty answer takes its prompt from no other split
    splits_of([*tasks(), both], [{**both, "output": ""}, tasks()[0]])
    made(tmp_path / "out", "x", **how, overwrite=True)
    assert "the same" in "".join((tmp_path / f"out/{n}.jsonl").read_text() for n in ("train", "val"))
    with pytest.raises(UserError, match="record 1,"):
        splits_of([{**both, "output": 0}])  # is no text, as 1 is none
    (found, *_) = splits_of([{**row, "instruction": ""} for row in tasks()], instruction="Do.")
    assert {row["instruction"] for row in found} == {"Do."}
    said = prompt_text({"instruction": "Do. ", "input": " x\n"})  # as --instruction and --input may be
    assert said == "### Instruction:\nDo.\n\n### Input:\nx\n\n### Response:\n"


def test_records_come_from_other_fields_jsonl_parallel_texts_and_gzip(tmp_path):
    rows = [{"dialogue": f"a{i}\u2028b", "summary": f" s{i} ", "more": 1} for i in range(30)]
    texts = {name: "".join(f"{name} {i}\n" for i in range(30)) for name in ("en", "de")}
    texts["jsonl"] = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    for name, text in texts.items():
        (tmp_path / f"x.{name}.gz").write_bytes(gzip.compress(text.encode()))
    for files in (["jsonl.gz"], ["en.gz", "de.gz"]):
        paths, pairs = [tmp_path / f"x.{file}" for file in files], len(files) == 2
        found = chain(*read_files(paths, pairs, [] if pairs else ["dialogue,summary"], "Do.").values())
        found = {record["output"]: record["instruction"] + record["input"] for record in found}
        assert len(found) == 30 and found.items() & {("de 3", "Do.en 3"), ("s3", "Do.a3\u2028b")}


def test_an_epoch_has_every_example_once_in_batches_of_like_length(data):
    examples = Examples(*data, "train", 120)
    rows, count = len(examples.spans), -(-len(examples.spans) // 4)
    epochs = [[batch.tolist() for batch in examples.epoch(4, *key)] for key in ((0, 0), (0, 1), (1, 0))]
    assert all(sorted(chain(*of)) == list(range(rows)) and len(of) == count for of in epochs)
    assert len(set(map(str, epochs))) == 3
    steps, real = examples.steps_per_epoch(8), examples.lengths.sum()
    batches = [batch for step in range(2 * steps) for batch in examples.step_batches(4, 2, 0, step)]
    assert 2 * real <= sum(x.numel() for x, _ in batches) < 1.3 * 2 * real, "much padding"
    ((whole, _),), parts = examples.step_batches(8, 1, 0, 5), examples.step_batches(4, 2, 0, 5)
    parts = torch.cat([torch.nn.functional.pad(x, (0, whole.shape[1] - x.shape[1])) for x, _ in parts])
    assert torch.equal(parts, whole), "accumulation trains on other examples"
    lengths = [x.shape[1] for x, _ in batches[:count]]
    assert lengths != sorted(lengths) and len(set(lengths)) > 2, "short examples always come first"


def test_no_example_sees_another_and_padding_carries_no_loss(data):
    examples, total = Examples(*data, "train", 120), 0.0
    model = sharp_model(vocab_size=330, block_size=120).double()
    parts = [examples.parts(row) for row in range(12)]
    x, y = padded(parts)
    assert (y == IGNORE).any(1).all() and len({(row != 0).sum().item() for row in x}) > 3
    for prompt, answer in parts:
        ids = torch.tensor([[*prompt.tolist(), *answer.tolist()]])
        log_p = model(ids)[0].log_softmax(-1)[len(prompt) - 1 : -1]
        total -= log_p[range(len(answer)), answer.tolist()].sum().item()
    assert model(x, y).item() == pytest.approx(total, rel=1e-9)


def test_too_long_examples_are_counted_and_not_cut(data, tmp_path, capsys):
    examples = Examples(*data, "train", 10**6)
    lengths, parts = examples.lengths, [examples.parts(row) for row in range(len(examples.spans))]
    assert lengths.tolist() == [len(prompt) + len(answer) - 1 for prompt, answer in parts]
    assert len(Examples(*data, "train", int(lengths.max())).spans) == len(lengths)
    block = int(lengths.max()) - 5
    examples, out = Examples(*data, "train", block), (lengths > block).sum()
    assert out > 0 and len(examples.spans) + out == len(lengths)
    assert f"{out} of " in capsys.readouterr().err
    assert all(examples.parts(row)[1][-1] == 2 for row in range(len(examples.spans)))
    examples = Examples(*data, "train", int(np.median(lengths)))  # half of the tokens of those that fit
    half = sorted(map(str, examples.some(int(examples.lengths.sum()) // 2)))  # every second one
    assert half == sorted(str(examples.parts(row)) for row in range(0, len(examples.spans), 2))
    refused(quick("train.py", "--dataset", data[0], "--out_dir", tmp_path, "--block_size", 8), "longer than")


def test_a_task_is_answered_from_the_command_line(tiny_data, tmp_path):
    tokenizer, task = prepared(str(tiny_data))[2], {"instruction": "Add", "input": "1"}
    model = sharp_model(vocab_size=400)  # whose text depends on all of the prompt
    save(tmp_path / "x.pt", checkpoint_of(model, tokenizer.data))
    assert given_tokenizer(shutil.copy(tmp_path / "x.pt", tmp_path / "x")).data == tokenizer.data
    answer = model.generate([tokenizer.prompt(prompt_text(task))], 9, stop=tokenizer.stop)[0]
    flags = ["--instruction", "Add", "--input", 1, "--temperature", 0, "--max_new_tokens", 9]
    assert quick("sample.py", tmp_path / "x.pt", *flags).stdout.strip() == tokenizer.decode(answer).strip()
    with mock.patch("model.pack", wraps=pack) as packed:
        quick("sample.py", tmp_path / "x.pt", *flags, "--kv_bits", 4)
    assert {bits for _, bits in (call.args for call in packed.call_args_list)} == {4}
