"""Scores of a model's answers to the instructions of a split (pip install sacrebleu rouge-score).

    python -m study score out/RUN/ckpt.pt                             # the test split of the run's own data
    python -m study score out/RUN/ckpt.pt --base base.pt --limit 100  # beside another model
    python -m study score any.pt --dataset alpaca --split val

    loss         nats a token of the references, given the prompts; compares between models of one tokenizer
    BLEU         sacreBLEU's corpus BLEU with its default tokenizer, 0 to 100 (arXiv 1804.08771)
    ROUGE-1/2/L  mean F1, 0 to 100 (rouge-score, no stemmer; it keeps only a-z and 0-9)
    exact match  % of answers equal to the reference, surrounding spaces aside; ended: % that the model ended
    latency      seconds until the whole batch of an answer is there: mean and percentiles

Answers are greedy unless --temperature is given. A .jsonl keeps the settings, the references and the answers.
"""

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU
from tqdm import tqdm

from checkpoint import build, load
from common import UserError, bounded, note, parse, pick_device, replacing
from data.instruct import FIELDS, encode_answer, encode_prompt, records_of
from data.loader import check_unchanged, padded, read_meta
from data.tokenizer import Record, Tokenizer
from model import Llama
from train import mean_loss

Pair = tuple[list[int], list[int]]  # the tokens of a prompt, and of its answer
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
    temperature: float = bounded(0.0, 0, 1e9)  # 0 is greedy, 1 the model's own distribution
    top_p: float = bounded(1.0, 1e-9, 1)  # draw from the likeliest tokens that together have this probability
    seed: int = bounded(0, 0, 2**63 - 1)  # of the drawing
    batch_size: int = bounded(16, 1)  # answers written at a time
    out: str | None = None  # the .jsonl to write (default: beside the checkpoint)
    device: str = "auto"  # cuda, mps, cpu or auto
    json: bool = False  # print one JSON object and nothing else


def write_answers(model: Llama, tokenizer: Tokenizer, pairs: list[Pair], config: ScoreConfig) -> list[tuple]:
    """For each prompt the answer, whether the model ended it itself, and the seconds of its batch."""
    generator = torch.Generator(model.tok_embeddings.weight.device).manual_seed(config.seed)
    how = {"temperature": config.temperature, "top_p": config.top_p, "generator": generator}
    model.generate([pairs[0][0]], 2)  # the first call sets things up
    written: list[tuple] = [()] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]))  # so that there is little padding
    for start in tqdm(range(0, len(order), config.batch_size), desc="answering", disable=None, leave=False):
        rows, began = order[start : start + config.batch_size], time.perf_counter()
        prompts = [pairs[i][0] for i in rows]
        texts = model.generate(prompts, config.max_new_tokens, stop=tokenizer.stop, **how)
        seconds = time.perf_counter() - began
        for i, prompt, ids in zip(rows, prompts, texts):
            ended = len(ids) < min(config.max_new_tokens, model.config.block_size - len(prompt))
            written[i] = tokenizer.decode(ids).strip(), ended, seconds
    return written


def text_scores(answers: list[str], references: list[str]) -> dict:
    """BLEU, ROUGE and exact match, in percent."""
    scorer = RougeScorer(ROUGE, use_stemmer=False)
    rouge = [scorer.score(reference, answer) for answer, reference in zip(answers, references)]
    exact = [answer.strip() == reference.strip() for answer, reference in zip(answers, references)]
    return {
        "bleu": BLEU().corpus_score(answers, [references]).score,
        **{kind: 100 * float(np.mean([row[kind].fmeasure for row in rouge])) for kind in ROUGE},
        "exact_match": 100 * float(np.mean(exact)),
    }


def score(model: Llama, tokenizer: Tokenizer, records: list[Record], config: ScoreConfig) -> dict:
    """All scores of one model, and its answers."""
    pairs = [(encode_prompt(record, tokenizer), encode_answer(record, tokenizer)) for record in records]
    by_length = sorted(pairs, key=lambda pair: len(pair[0]) + len(pair[1]))
    batches = [padded(by_length[i : i + config.batch_size]) for i in range(0, len(pairs), config.batch_size)]
    loss, count = mean_loss(model, batches, torch.float32)
    if not math.isfinite(loss):
        raise UserError(f"the loss is {loss}: this model has diverged, and its answers are noise")
    answers, ended, seconds = map(list, zip(*write_answers(model, tokenizer, pairs, config)))
    found = {"loss": loss, **text_scores(answers, [record["output"] for record in records])}
    found |= {"ended": 100 * float(np.mean(ended)), "latency_mean": float(np.mean(seconds))}
    found |= {f"latency_p{p}": float(np.percentile(seconds, p)) for p in (5, 50, 95)}
    return {**found, "answer_tokens": count, "answers": answers}


def records_to_score(config: ScoreConfig, checkpoint: dict) -> tuple[str, list[Record]]:
    """The data set's name and its records."""
    own = checkpoint.get("train", {}).get("dataset")
    name = config.dataset or own
    if not isinstance(name, str):
        raise UserError("this checkpoint names no data set: give --dataset NAME")
    folder, meta = read_meta(name)
    if meta.get("kind") != "instructions":
        raise UserError(f"{folder} is text: name instruction data with --dataset NAME, or use eval_ppl.py")
    path, record = folder / f"{config.split}.jsonl", meta["splits"][config.split]
    check_unchanged(path, record.get("jsonl_sha256"))
    trained = checkpoint.get("data", {}).get("splits", {}).get(config.split, record)
    if name == own and trained["sha256"] != record["sha256"]:
        note(f"{folder} was prepared anew since training, which may have seen these records")
    return Path(name).name, records_of(path, ",".join(FIELDS), "")


def fits(record: Record, model: Llama, tokenizer: Tokenizer) -> bool:
    tokens = len(encode_prompt(record, tokenizer)) + len(encode_answer(record, tokenizer))
    return tokens <= model.config.block_size + 1  # the last token is no input


def main() -> None:
    config = ScoreConfig(**parse(__doc__, ScoreConfig))
    device, checkpoint = pick_device(config.device), load(config.ckpt)
    name, records = records_to_score(config, checkpoint)
    kind = f"{name}-{config.split}" + f"-first{config.limit}" * bool(config.limit)
    out = Path(config.out or f"{config.ckpt.removesuffix('.pt')}-answers-{kind}.jsonl")
    if config.out and out.exists():
        raise UserError(f"--out {out} exists: name a new file")
    models = {"base": build(load(config.base), device)} if config.base else {}
    models["ckpt"] = build(checkpoint, device)
    fitting = [record for record in records if all(fits(record, *model) for model in models.values())]
    if not fitting:
        raise UserError(f"none of the {len(records)} examples fits the context: take a model of a longer one")
    kept, left_out = fitting[: config.limit], len(records) - len(fitting)
    results = {key: score(*model, kept, config) for key, model in models.items()}
    answers = [result.pop("answers") for result in results.values()]
    summary = json.dumps({"settings": asdict(config), "examples": len(kept), "left_out": left_out, **results})
    with replacing(out, "w") as file:
        file.write(summary + "\n")
        for record, *each in zip(kept, *answers):
            line = {**record, "answers": dict(zip(results, each))}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    if config.json:
        print(summary)
        return
    print(f"{name} {config.split}: {len(kept)} examples, {left_out} left out, longer than the context")
    print(" " * 18 + "".join(f"{key:>12}" for key in results))
    for name in results["ckpt"]:
        print(f"{name:18}" + "".join(f"{result[name]:12.6g}" for result in results.values()))
    print(f"all answers: {out}")
