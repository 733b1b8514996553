"""Scores of a model's answers to the instructions of a split (pip install sacrebleu rouge-score rapidfuzz).

    python -m study score out/RUN/ckpt.pt                             # the test split of the run's own data
    python -m study score out/RUN/ckpt.pt --base base.pt --limit 100  # beside another model
    python -m study score any.pt --dataset alpaca --split val

    loss         nats a token of the references, given the prompts; compares between models of one tokenizer
    choice       % of examples whose reference has the least loss a token of up to four (chance: 25, of four)
    bleu, bleu1  sacreBLEU's corpus BLEU with its default tokenizer, and of single words (arXiv 1804.08771)
    chrf         sacreBLEU's chrF2, of characters: fairer to German, whose words have many forms
    rouge1/2/L   mean F1 (rouge-score, no stemmer; it keeps only a-z and 0-9)
    f1           mean F1 of the words, whatever their order and case (arXiv 1606.05250, but with articles)
    edit         mean of 1 - Levenshtein distance / length of the longer text
    exact_match  % of answers equal to the reference, surrounding spaces aside; ended: % that the model ended
    latency      seconds until the whole batch of an answer is there: mean and percentiles

All but loss and latency go from 0 to 100. Answers are greedy. CKPT-answers-DATASET-SPLIT[-firstN].jsonl keeps
the settings, the references and the answers of the last time.
"""

import json
import re
import time
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from rapidfuzz.distance import Levenshtein
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF
from tqdm import tqdm

from checkpoint import build, load, split_checksum
from common import bounded, note, parse, pick_device, replacing, require
from data.instruct import FIELDS, encoded, records_of
from data.loader import check_unchanged, padded, read_meta
from data.tokenizer import Record, Tokenizer, prompt_text
from model import Llama
from train import mean_loss

ROUGE = ("rouge1", "rouge2", "rougeL")


@dataclass
class ScoreConfig:
    """scoring of answers"""

    ckpt: str  # the checkpoint
    base: str | None = None  # another checkpoint, to be scored beside it
    dataset: str | None = None  # prepared instruction data (default: what the checkpoint was trained on)
    split: Literal["val", "test"] = "test"  # which part of it
    limit: int | None = bounded(None, 1)  # only the first so many examples
    max_new_tokens: int = bounded(128, 1)  # tokens of an answer; the model's context may end it sooner
    batch_size: int = bounded(16, 1)  # answers written at a time
    device: str = "auto"  # cuda, mps, cpu or auto
    json: bool = False  # print one JSON object and nothing else


def word_f1(answer: str, reference: str) -> float:
    """2 x words in common / all words; without words, whether the texts are equal."""
    ours, theirs = (Counter(re.findall(r"\w+", text.lower())) for text in (answer, reference))
    return 2 * (ours & theirs).total() / max(1, (ours + theirs).total()) or float(answer == reference)


def choice(model: Llama, tokenizer: Tokenizer, records: list[Record]) -> float:
    """% of examples whose own reference has the least loss per token among up to four different ones."""
    right = 0
    for i, record in enumerate(tqdm(records, desc="choosing", disable=None, leave=False)):
        others = [r for r in records[i + 1 :] + records[:i] if prompt_text(r) != prompt_text(record)]
        outputs = dict.fromkeys(r["output"] for r in [record, *others])  # another right answer is no choice
        pairs = (encoded({**record, "output": output}, tokenizer) for output in outputs)
        fitting = (pair for pair in pairs if sum(map(len, pair)) <= model.config.block_size + 1)
        losses = [mean_loss(model, [padded([pair])], torch.float32)[0] for pair in islice(fitting, 4)]
        right += losses[0] == min(losses)
    return 100 * right / len(records)


def texts_scores(answers: list[str], references: list[str]) -> dict:
    """The scores that compare texts, 0 to 100."""
    metrics = {"bleu": BLEU(), "bleu1": BLEU(max_ngram_order=1), "chrf": CHRF()}
    found = {name: metric.corpus_score(answers, [references]).score for name, metric in metrics.items()}
    scorer, pairs = RougeScorer(ROUGE), list(zip(answers, references))
    rouge = [scorer.score(reference, answer) for answer, reference in pairs]
    each = {kind: [row[kind].fmeasure for row in rouge] for kind in ROUGE}
    each["f1"] = [word_f1(*pair) for pair in pairs]
    each["edit"] = [Levenshtein.normalized_similarity(*pair) for pair in pairs]
    each["exact_match"] = [answer == reference for answer, reference in pairs]
    return found | {name: 100 * float(np.mean(values)) for name, values in each.items()}


def score(model: Llama, tokenizer: Tokenizer, records: list[Record], config: ScoreConfig) -> dict:
    """All scores of one model, and its answers."""
    pairs = [encoded(record, tokenizer) for record in records]
    batches = [pairs[i : i + config.batch_size] for i in range(0, len(pairs), config.batch_size)]
    loss, count = mean_loss(model, [padded(batch) for batch in batches], torch.float32)
    answers, ended, seconds = [], [], []
    model.generate([prompt for prompt, _ in batches[0]], 2)  # the first call sets things up
    for batch in tqdm(batches, desc="answering", disable=None, leave=False):
        prompts, began = [prompt for prompt, _ in batch], time.perf_counter()
        texts = model.generate(prompts, config.max_new_tokens, stop=tokenizer.stop)
        seconds += [time.perf_counter() - began] * len(batch)
        for prompt, ids in zip(prompts, texts):
            answers.append(tokenizer.decode(ids).strip())
            ended.append(len(ids) < min(config.max_new_tokens, model.config.block_size - len(prompt)))
    found = {"loss": loss, "choice": choice(model, tokenizer, records)}
    found |= texts_scores(answers, [record["output"] for record in records])
    found |= {"ended": 100 * float(np.mean(ended))}
    found |= {f"latency_p{p}": float(np.percentile(seconds, p)) for p in (5, 50, 95)}
    return found | {"latency_mean": float(np.mean(seconds)), "reference_tokens": count, "answers": answers}


def main() -> None:
    config = ScoreConfig(**parse(__doc__, ScoreConfig))
    device, checkpoint = pick_device(config.device), load(config.ckpt)
    own = checkpoint.get("train", {}).get("dataset")
    require(isinstance(config.dataset or own, str), "the checkpoint names no data set: give --dataset NAME")
    folder, meta = read_meta(config.dataset or own)
    instructions = meta["kind"] == "instructions"
    require(instructions, f"{folder} is text: name instruction data with --dataset NAME, or use eval_ppl.py")
    path, split = folder / f"{config.split}.jsonl", meta["splits"][config.split]
    check_unchanged(path, split.get("jsonl_sha256"))
    if config.dataset in (None, own) and split_checksum(checkpoint, config.split) != split["sha256"]:
        note(f"{folder} was prepared anew since training, which may have seen these records")
    models = {"base": build(load(config.base), device)} if config.base else {}
    models["ckpt"] = build(checkpoint, device)
    fitting = records = records_of(path, ",".join(FIELDS), "")
    for model, tokenizer in models.values():
        most = model.config.block_size + 1  # the last token is no input
        fitting = [record for record in fitting if sum(map(len, encoded(record, tokenizer))) <= most]
    require(fitting, f"none of {len(records)} examples fits the context: take a model of a longer one")
    kept, left_out = fitting[: config.limit], len(records) - len(fitting)
    kept.sort(key=lambda record: len(record["instruction"] + record["input"]))  # for little padding
    results = {name: score(*model, kept, config) for name, model in models.items()}
    answers = [result.pop("answers") for result in results.values()]
    summary = json.dumps({"settings": asdict(config), "examples": len(kept), "left_out": left_out, **results})
    first = f"-first{config.limit}" if config.limit else ""
    out = Path(f"{config.ckpt.removesuffix('.pt')}-answers-{folder.name}-{config.split}{first}.jsonl")
    if config.json:
        print(summary)
    else:
        print(f"{folder.name} {config.split}: {len(kept)} examples, {left_out} left out as too long")
        print(" " * 18 + "".join(f"{name:>12}" for name in results))
        for key in results["ckpt"]:
            print(f"{key:18}" + "".join(f"{result[key]:12.6g}" for result in results.values()))
        print(f"all answers: {out}", flush=True)
    with replacing(out, "w") as file:  # it may fail
        print(summary, file=file)
        for record, *each in zip(kept, *answers):
            print(json.dumps({**record, "answers": dict(zip(results, each))}), file=file)
