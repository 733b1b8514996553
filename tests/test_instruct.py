"""Instruction data and its scoring: loss on answers alone, no example that sees another, nothing cut in silence."""

import gzip
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, quick, refused, sharp_model

from checkpoint import build, load, save
from cross_entropy import IGNORE
from data.prepare import PrepareConfig, prepare
from dataset import Examples, open_split, read_meta
from eval_text import AnswerConfig, answer_nll, text_scores, write_answers
from instruct import encode_answer, encode_prompt, prompt_text, read_splits
from tokenizer import read_tokenizer

WORDS = "red green blue black white brown one two three four five six cat dog bird fish".split()  # noqa: SIM905


def records(count=60):
    """Tasks of very different lengths, some without an input."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, 1 + i % 13)) for i in range(count)]
    return [
        {"instruction": f"Repeat: {text}", "input": "", "output": text} if i % 3 else
        {"instruction": "Turn around.", "input": text, "output": " ".join(reversed(text.split()))}
        for i, text in enumerate(texts)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "tasks.json"
    path.write_text(json.dumps(records()))
    return path


@pytest.fixture(scope="module")
def data(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared") / "tasks"
    return prepare(PrepareConfig("tasks", from_=[str(source)], vocab_size=330, out=str(out)))


@pytest.fixture(scope="module")
def tuned(data, tmp_path_factory):
    """The ckpt.pt of a short run on the tasks, from nothing, and what the run printed."""
    out = tmp_path_factory.mktemp("tuned")
    shape = ["--n_layer", 2, "--n_head", 4, "--dim", 32, "--block_size", 120]
    run = ["--batch_size", 8, "--max_steps", 60, "--lr", 0.02, "--warmup_steps", 5, "--eval_every", 30]
    done = quick("train.py", "--dataset", data, "--out_dir", out, *shape, *run)
    assert done.returncode == 0, done.stderr
    return out / "ckpt.pt", done.stdout


def test_the_prompt_is_the_template_and_leaves_out_what_is_empty():
    record = {"instruction": "Translate.", "input": "a cat", "output": "eine Katze"}
    assert prompt_text(record) == "### Instruction:\nTranslate.\n\n### Input:\na cat\n\n### Response:\n"
    assert prompt_text({**record, "input": ""}) == "### Instruction:\nTranslate.\n\n### Response:\n"


def test_an_example_is_prompt_answer_and_end_and_the_mask_is_the_answer(data):
    folder, meta = read_meta(str(data))
    tokenizer = read_tokenizer((folder / "tokenizer.model").read_bytes())
    seen = 0
    for split in ("train", "val", "test"):
        tokens, mask = open_split(folder, meta, split), np.fromfile(folder / f"{split}.mask", np.uint8)
        kept = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
        seen, start = seen + len(kept), 0
        for record in kept:
            prompt, answer = encode_prompt(record, tokenizer), encode_answer(record, tokenizer)
            stop = start + len(prompt) + len(answer)
            assert tokens[start:stop].tolist() == prompt + answer and prompt[0] == tokenizer.bos
            assert tokenizer.decode(tokens[start:stop][mask[start:stop] == 1].tolist()) == record["output"]
            assert mask[start : start + len(prompt)].sum() == 0 and tokens[stop - 1] == tokenizer.eos
            start = stop
        assert start == len(tokens) and meta["splits"][split]["documents"] == len(kept)
        assert meta["splits"][split]["answer_tokens"] == mask.sum()
    unique = {json.dumps(record) for record in records()}
    assert seen == len(unique)


def test_a_prompt_is_in_one_split_only():
    same = [{"instruction": f"task {i % 40}", "input": "", "output": f"answer {i}"} for i in range(400)]
    parts = read_splits([same])
    prompts = [{record["instruction"] for record in parts[name]} for name in ("train", "val", "test")]
    assert sum(map(len, prompts)) == len(set.union(*prompts)) == 40 and len(prompts[1]) == 2 and len(prompts[2]) == 4
    assert sum(map(len, parts.values())) == 400
    assert parts == read_splits([same])


def test_what_stands_in_two_given_splits_is_left_to_the_test(tmp_path):
    both = {"instruction": "", "input": "the same", "output": "twice"}
    paths = [tmp_path / f"{name}.json" for name in ("train", "test")]
    paths[0].write_text(json.dumps([*records(), both, {**both, "output": "another answer"}]))
    paths[1].write_text(json.dumps([both, records()[4]]))
    config = PrepareConfig("x", from_=[str(path) for path in paths], vocab_size=330, out=str(tmp_path / "out"))
    kept = {name: (prepare(config) / f"{name}.jsonl").read_text() for name in ("test",)}
    kept |= {name: (tmp_path / "out" / f"{name}.jsonl").read_text() for name in ("train", "val")}
    assert "the same" in kept["test"] and "the same" not in kept["train"] + kept["val"]
    assert len(kept["test"].splitlines()) == 2


def test_own_splits_are_kept(tmp_path):
    few = [[{"instruction": "", "input": f"{name} {i}", "output": "x"} for i in range(20)] for name in "abc"]
    assert [part[0]["input"][0] for part in read_splits(few).values()] == ["a", "b", "c"]
    two = read_splits(few[:2])
    assert len(two["train"]) == 19 and len(two["val"]) == 1 and two["test"] == few[1]


@pytest.mark.parametrize("packed", [False, True])
def test_records_come_from_other_fields_jsonl_parallel_texts_and_gzip(tmp_path, packed):
    rows = [{"dialogue": f"a{i}\u2028b", "summary": f" s{i} ", "more": 1} for i in range(30)]

    def write(name, text):
        path = tmp_path / (name + ".gz" * packed)
        path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
        return str(path)

    lines = write("x.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n")
    texts = [write(f"x.{name}", "".join(f"{name} {i}\n" for i in range(30))) for name in ("en", "de")]
    how = {"vocab_size": 300, "instruction": "Do."}
    for config, expected in (
        (PrepareConfig("x", from_=[lines], fields=["dialogue,summary"], out=str(tmp_path / "f"), **how), "s3"),
        (PrepareConfig("x", parallel=texts, out=str(tmp_path / "p"), **how), "de 3"),
    ):
        folder = prepare(config)
        kept = "".join((folder / f"{split}.jsonl").read_text() for split in ("train", "val", "test")).split("\n")
        found = {row["output"]: row for row in map(json.loads, filter(None, kept))}
        assert len(found) == 30 and found[expected]["instruction"] == "Do."
    assert found[expected]["input"] in ("a3\u2028b", "en 3")


def test_an_epoch_has_every_example_once_in_batches_of_like_length(data):
    folder, meta = read_meta(str(data))
    split = Examples(folder, meta, "train", 120)
    count = -(-len(split.spans) // 4)
    for epoch in range(2):
        rows = [row for batch in split.epoch(4, 0, epoch) for row in batch.tolist()]
        assert sorted(rows) == list(range(len(split.spans))) and len(split.epoch(4, 0, epoch)) == count
    steps = [split.step_batches(4, 2, 0, step) for step in range(count)]
    again = split.step_batches(4, 2, 0, 5)
    assert all(torch.equal(a, b) for pair in zip(steps[5], again) for a, b in zip(*pair))
    batches = [batch for step in steps for batch in step]
    real = sum((split.spans[row, 1] - split.spans[row, 0] - 1) for row in range(len(split.spans)))
    assert 2 * real <= sum(x.numel() for x, _ in batches) < 1.25 * 2 * real, "much padding"
    assert len({x.shape[1] for x, _ in batches}) > 3
    orders = [np.concatenate(split.epoch(4, *key)).tolist() for key in ((0, 0), (0, 1), (1, 0))]
    assert orders[0] != orders[1] and orders[0] != orders[2]
    lengths = [x.shape[1] for x, _ in batches[:count]]
    assert lengths != sorted(lengths), "short examples always come first"


def test_no_example_sees_another_and_padding_carries_no_loss(data):
    """Float64: an example alone, without padding, has the loss that it has in a batch."""
    folder, meta = read_meta(str(data))
    split = Examples(folder, meta, "train", 120)
    model = sharp_model(vocab_size=330, block_size=120).double()
    x, y = split.batch(range(12))
    assert (y == IGNORE).any(1).all() and len({(row != 0).sum().item() for row in x}) > 3
    together = model(x, y).item()
    alone = sum(model(*split.batch([row])).item() for row in range(12))
    assert abs(together - alone) < 1e-9 * alone
    prompt, answer = split.parts(3)
    log_probs = model(torch.tensor([[*prompt, *answer]]).long())[0].log_softmax(-1)
    expected = -sum(log_probs[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer))
    assert abs(model(*split.batch([3])).item() - expected) < 1e-9 * expected


def test_too_long_examples_are_counted_and_not_cut(data, tmp_path, tuned):
    folder, meta = read_meta(str(data))
    longest = Examples(folder, meta, "train", 10**6)
    lengths = longest.spans[:, 1] - longest.spans[:, 0]
    assert not longest.note and lengths.max() == meta["splits"]["train"]["longest"]
    block = int(lengths.max()) - 6
    split, out = Examples(folder, meta, "train", block), (lengths - 1 > block).sum()
    assert out > 0 and len(split.spans) + out == len(lengths)
    assert len(Examples(folder, meta, "train", int(lengths.max()) - 1).spans) == len(lengths)
    assert all(split.parts(row)[1][-1] == 2 for row in range(len(split.spans)))
    run = ["--n_layer", 1, "--n_head", 2, "--dim", 16, "--block_size", block, "--max_steps", 1, "--batch_size", 4]
    done = quick("train.py", "--dataset", data, "--out_dir", tmp_path / "run", *run)
    assert f"{out} of {len(lengths)} train examples are left out" in done.stdout, done.stderr
    refused(quick("train.py", "--dataset", data, "--out_dir", tmp_path / "no", "--block_size", 8), "--block_size", 8)


def test_the_loss_of_training_is_that_of_scoring(tuned):
    path, printed = tuned
    done = quick("eval_text.py", path, "--split", "val", "--json", "--max_new_tokens", 2)
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout)
    loss, tokens = scores["ckpt"]["loss"], scores["ckpt"]["answer_tokens"]
    assert f"val loss {loss:.4f} nats a token | {tokens} tokens of the answers" in printed
    model, _ = build(load(path))
    folder, meta = read_meta(load(path)["train"]["dataset"])
    split = Examples(folder, meta, "val", 120)
    alone = [answer_nll(model, split, torch.float32)]
    total = sum(model(*split.batch([row])).item() for row in range(len(split.spans)))
    count = sum(len(split.parts(row)[1]) for row in range(len(split.spans)))
    assert scores["ckpt"]["loss"] == pytest.approx(total / count, rel=1e-5) == pytest.approx(alone[0][0], rel=1e-5)
    assert scores["ckpt"]["answer_tokens"] == count == alone[0][1]


# ---- answers ----


def test_answers_of_a_batch_are_those_alone_even_where_the_context_ends(data):
    """Prompts of 20 to 70 tokens in a context of 80: some answers are cut by it, each at its own length."""
    tokenizer = read_tokenizer((data / "tokenizer.model").read_bytes())
    model, tasks = sharp_model(vocab_size=330, block_size=80), records(20)
    config = AnswerConfig("x", batch_size=6, max_new_tokens=30)
    written = write_answers(model, tokenizer, tasks, config)
    for i, task in enumerate(tasks):
        ids = encode_prompt(task, tokenizer)
        alone = model.generate([ids], 30, stop=tokenizer.stop)[0]
        assert written["answer"][i] == tokenizer.decode(alone).strip() and written["tokens"][i] == len(alone)
        assert written["ended"][i] == (len(alone) < min(30, 80 - len(ids)))
    assert len({80 - len(encode_prompt(task, tokenizer)) < 30 for task in tasks}) == 2


def test_scores_are_those_of_the_published_formulas():
    references = ["the cat sat on the mat today", "a red bird"]
    answers = ["the cat sat on a mat today", "a red bird"]
    scores = text_scores(answers, references)
    # BLEU: n-gram precisions of both sentences together ("a red bird" has no 4-gram), none too short
    precisions = (9 / 10) * (6 / 8) * (3 / 6) * (1 / 4)
    assert scores["bleu"] == pytest.approx(100 * precisions**0.25)
    shorter = text_scores(["the cat sat on the mat", "a red bird"], references)  # all of it right: brevity alone
    assert shorter["bleu"] == pytest.approx(100 * np.exp(1 - 10 / 9))
    assert scores["rouge1"] == pytest.approx(100 * (6 / 7 + 1) / 2)  # 6 words of 7 in common
    assert scores["rouge2"] == pytest.approx(100 * (4 / 6 + 1) / 2)
    assert scores["rougeL"] == pytest.approx(100 * (6 / 7 + 1) / 2)
    assert scores["exact_match"] == 50 and "tok:13a" in scores["bleu_signature"]


def test_scoring_compares_two_models_and_keeps_what_they_wrote(tuned, tmp_path):
    import sacrebleu

    path, _ = tuned
    fresh = quick("train.py", "--init_from", path, "--out_dir", tmp_path / "other", "--lora_r", 2, "--max_steps", 3)
    assert fresh.returncode == 0, fresh.stderr
    done = quick("eval_text.py", tmp_path / "other/ckpt.pt", "--base", path, "--limit", 5, "--max_new_tokens", 20)
    assert done.returncode == 0, done.stderr
    first, *lines = (tmp_path / "other/ckpt-answers-tasks-test-first5.jsonl").read_text().splitlines()
    settings, kept = json.loads(first), [json.loads(line) for line in lines]
    assert settings["examples"] == 5 == len(kept) and settings["settings"]["max_new_tokens"] == 20
    for name in ("base", "ckpt"):
        answers = [row["answers"][name] for row in kept]
        assert not any("###" in answer for answer in answers), "the prompt is part of the answer"
        bleu = sacrebleu.corpus_bleu(answers, [[row["output"] for row in kept]]).score
        assert settings[name]["bleu"] == bleu and f"{bleu:12.2f}" in done.stdout
    assert settings["ckpt"]["bleu_signature"] in done.stdout and done.stdout.count("reference: ") == 5
    latency = settings["base"]["latency_s"]
    assert 0 < latency["p5"] <= latency["median"] <= latency["p95"]
    again = quick("eval_text.py", path, "--limit", 5, "--max_new_tokens", 20, "--batch_size", 2, "--json")
    scores = json.loads(again.stdout)["ckpt"]
    assert scores.pop("loss") == pytest.approx(settings["base"].pop("loss"), rel=1e-5)  # other batches round otherwise
    assert scores | {"latency_s": None} == settings["base"] | {"latency_s": None}


def test_examples_that_do_not_fit_are_counted_and_answers_can_be_drawn(tuned, data, tmp_path):
    path, _ = tuned
    checkpoint = load(path)
    checkpoint["config"]["block_size"] = 70
    save(tmp_path / "short.pt", checkpoint)
    lines = (data / "test.jsonl").read_text().splitlines() + (data / "val.jsonl").read_text().splitlines()
    found = []
    for split in ("test", "val"):
        done = quick("eval_text.py", tmp_path / "short.pt", "--split", split, "--max_new_tokens", 5, "--json")
        found.append(json.loads(done.stdout))
    tokenizer = read_tokenizer(checkpoint["tokenizer"])
    fits = [len(encode_prompt(r, tokenizer)) + len(encode_answer(r, tokenizer)) <= 71 for r in map(json.loads, lines)]
    assert sum(r["examples"] for r in found) == sum(fits) < len(fits)
    assert sum(r["left_out"] for r in found) == len(fits) - sum(fits)
    drawn = []
    for seed in (0, 0, 1):
        flags = ["--temperature", 1.5, "--seed", seed, "--max_new_tokens", 20]
        assert quick("eval_text.py", path, *flags, "--out", tmp_path / f"{len(drawn)}.jsonl").returncode == 0
        drawn.append((tmp_path / f"{len(drawn)}.jsonl").read_text().split("\n", 1)[1])
    assert drawn[0] == drawn[1] != drawn[2]
    refused(quick("eval_text.py", path, "--out", tmp_path / "0.jsonl"), "exists", "--out")


def test_a_task_is_answered_from_the_command_line(tuned):
    path, _ = tuned
    done = quick("sample.py", path, "--instruction", "Repeat: red", "--temperature", 0, "--max_new_tokens", 10)
    assert done.returncode == 0 and "###" not in done.stdout
    model, tokenizer = build(load(path))
    ids = encode_prompt({"instruction": "Repeat: red", "input": ""}, tokenizer)
    assert done.stdout.strip() == tokenizer.decode(model.generate([ids], 10, stop=tokenizer.stop)[0]).strip()
    refused(quick("sample.py", path, "--instruction", "x", "--prompt", "y"), "--prompt", "--instruction")


# ---- bad input ----


@pytest.mark.parametrize("text, words", [
    ("[]", "holds no records"), ("", "is no JSON"), ('{"a": 1}', "no list of records"), ("[1]", "record 1"),
    ('[{"instruction": "x", "input": ""}]', "no text in the field 'output'"),
    ('[{"instruction": "x", "output": "a"}, {"instruction": "x", "output": 3}]', "record 2"),
    ('[{"instruction": "x", "input": 3, "output": "a"}]', "'input'"),
    ('[{"instruction": "x", "output": "a"}]', "split"), ('[{"instruction": "x", "output": ""}]', "split"),
    ("\xff", "is no JSON"), ("[" * 100_000, "is no JSON"), ('[{"instruction": "\\ud83d", "output": "a"}]', "record 1"),
])  # fmt: skip
def test_records_that_are_none_are_refused_by_name(tmp_path, text, words):
    (tmp_path / "x.json").write_text(text)
    done = quick("data/prepare.py", "x", "--from", tmp_path / "x.json", "--out", tmp_path / "out")
    refused(done, words)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_mistakes_about_instructions_get_one_line(tmp_path, source, data, tuned, tiny_run, tiny_data):
    def prepared(*flags):
        return quick("data/prepare.py", "x", "--out", tmp_path / "out", *flags)

    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.txt").write_text("eins\n")
    (tmp_path / "c.jsonl").write_text('{"a": "x", "b": "y"}\n{"a": \n')
    refused(prepared("--parallel", tmp_path / "a.txt", tmp_path / "b.txt"), "2 lines", "1: they are not parallel")
    refused(prepared("--parallel", tmp_path / "a.txt"), "pairs")
    refused(prepared("--from", tmp_path / "c.jsonl", "--fields", "a,b"), "line 2")
    refused(prepared("--from", source, "--fields", "a"), "--fields a")
    refused(prepared("--from", source, "--fields", "question,answer"), "'question'", "--fields question,answer")
    refused(prepared("--from", source, "--fields", "instruction,inptu,output"), "'inptu'")
    refused(prepared("--from", source, "--fields", "instruction", "output"), "2 lists", "commas")
    refused(prepared("--from", source, source, source, source), "4 files")
    refused(prepared("--from", tmp_path / "none.json"), "none.json: no such file")
    refused(prepared("--text", tmp_path / "a.txt", "--instruction", "x"), "--instruction")
    refused(prepared("--from", source, "--text", tmp_path / "a.txt"), "one of them")
    alpaca = ["data/prepare.py", "alpaca", "--out", tmp_path / "out"]
    refused(quick(*alpaca, "--text", tmp_path / "a.txt"), "alpaca is not your text")
    refused(quick("data/prepare.py", "stdlib", "--from", source, "--out", tmp_path / "out"), "stdlib is made")
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b"x" * 1000)[:-20] + b"0" * 20)
    refused(prepared("--from", tmp_path / "d.jsonl.gz"), "is not UTF-8 text")
    refused(quick("eval_text.py", tiny_run), "is text", "eval_ppl.py")
    refused(quick("eval_text.py", tuned[0], "--limit", 0), "--limit")
    refused(quick("eval_ppl.py", tuned[0]), "eval_text.py")
    refused(quick("train.py", "--init_from", tiny_run, "--dataset", data, "--out_dir", tmp_path / "run"), "--from FILE")
    assert not (tmp_path / "out").exists() and not (tmp_path / "run").exists()


def test_missing_scorers_name_the_command_that_installs_them(monkeypatch, tuned):
    monkeypatch.setitem(__import__("sys").modules, "sacrebleu.metrics", None)
    refused(quick("eval_text.py", tuned[0]), "pip install sacrebleu rouge-score")


def test_the_template_stands_in_one_place():
    assert [path.name for path in ROOT.glob("*.py") if "### Response" in path.read_text()] == ["instruct.py"]


@pytest.mark.parametrize("name, change", [
    ("test.jsonl", lambda b: b[:-10]), ("test.jsonl", lambda b: b""), ("test.jsonl", lambda b: b'{"a": 1}\n' + b),
    ("train.mask", lambda b: bytes(len(b))), ("train.mask", lambda b: b"\1" * len(b)), ("train.mask", lambda b: b[1:]),
])  # fmt: skip
def test_damaged_files_of_a_data_set_are_noticed(tuned, data, tmp_path, name, change):
    shutil.copytree(data, tmp_path / "tasks")
    path = tmp_path / "tasks" / name
    path.write_bytes(change(path.read_bytes()))
    if name == "test.jsonl":
        refused(quick("eval_text.py", tuned[0], "--dataset", tmp_path / "tasks"), name)
    else:
        run = ["--dataset", tmp_path / "tasks", "--init_from", tuned[0], "--out_dir", tmp_path / "run"]
        refused(quick("train.py", *run), name, "--overwrite")
