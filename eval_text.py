"""Score what a model answers: it writes an answer to each instruction of a split, and the answers, without the prompts,
are compared with the references.

    python eval_text.py out/RUN/ckpt.pt                             # the test split of the data that it was tuned on
    python eval_text.py out/RUN/ckpt.pt --base base.pt --limit 100  # side by side with another model
    python eval_text.py any.pt --dataset alpaca --split val

    loss         nats a token of the references, given the prompts; compare it between models of one tokenizer
    BLEU         sacreBLEU's corpus BLEU, 0 to 100 (arXiv 1804.08771)
    ROUGE-1/2/L  F1 of words, of pairs of words, of the longest common subsequence: means over the answers, 0 to 100
                 (rouge-score, without stemmer; it knows a-z and 0-9 alone)
    exact match  % of answers that are the reference, spaces at the ends aside
    latency      seconds until an answer is there: those of its whole batch

Answers are greedy unless --temperature is given. All are kept, with references and settings, in a .jsonl.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from checkpoint import build, load, trained_on
from config import UserError, exit_cleanly, parse
from cross_entropy import IGNORE
from dataset import Batch, Examples, check_unchanged, padded, read_meta
from device import autocast, pick_device
from eval_ppl import MOST_LOGITS
from files import replacing
from instruct import FIELDS, Record, encode_answer, encode_prompt, records_of
from model import Llama
from parallel import in_turn, total
from tokenizer import Tokenizer


@dataclass
class AnswerConfig:
    """scoring of answers"""

    ckpt: str  # the checkpoint
    base: str | None = None  # another checkpoint, to be scored beside it
    dataset: str | None = None  # prepared instruction data (default: what the checkpoint was trained on)
    split: Literal["val", "test"] = "test"  # which part of it
    limit: int | None = None  # only the first so many examples
    max_new_tokens: int = 128  # tokens of an answer at most; the model's context may end it sooner
    temperature: float = 0.0  # 0 is greedy, 1 the model's own distribution
    top_p: float = 1.0  # draw from the likeliest tokens that have this much probability together
    seed: int = 0  # of the drawing
    batch_size: int = 16  # answers written at a time
    out: str | None = None  # the .jsonl to write, a new one (default: beside the checkpoint, replaced by the next)
    device: str = "auto"  # cuda, mps, cpu or auto
    json: bool = False  # print one JSON object and nothing else


# ---- loss ----


@torch.no_grad()
def batches_nll(
    model: Llama, parts: Sequence, batch: Callable[[Sequence], Batch], dtype: torch.dtype
) -> tuple[float, int]:
    """Mean negative log-likelihood of the targets, nats, and their number, over the batch of each part; computed by all
    processes. The model is in eval mode."""
    assert not model.training, "call model.eval() first"
    device, summed, count = model.tok_embeddings.weight.device, 0.0, 0
    for number, kept in in_turn(len(parts)):
        x, y = batch(parts[number])
        with autocast(device, dtype):
            summed += model(x.to(device), y.to(device)).item() * kept
        count += (y != IGNORE).sum().item() * kept
    summed, count = total(summed, count)
    return summed / max(1, count), int(count)


def answer_nll(
    model: Llama, data: Examples, dtype: torch.dtype, every: int = 1, batch_size: int = 16
) -> tuple[float, int]:
    """The same of the answers of one example in `every`."""
    rows, size = np.argsort(data.spans[:, 1] - data.spans[:, 0], kind="stable")[::every], affordable(model, batch_size)
    return batches_nll(model, cut(rows, size), data.batch, dtype)


def cut(rows: Sequence, size: int) -> list[Sequence]:
    """Parts of so many rows, the last maybe of fewer."""
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def affordable(model: Llama, batch_size: int) -> int:
    """No more rows than those whose logits fit memory."""
    return max(1, min(batch_size, MOST_LOGITS // (model.config.block_size * model.config.vocab_size)))


# ---- answers ----


def write_answers(model: Llama, tokenizer: Tokenizer, records: list[Record], config: AnswerConfig) -> dict:
    """The answer to each record, whether it ended by itself, the seconds it took, and the tokens of all answers."""
    prompts = [encode_prompt(record, tokenizer) for record in records]
    generator = torch.Generator(model.tok_embeddings.weight.device).manual_seed(config.seed)
    how = {"temperature": config.temperature, "top_p": config.top_p, "stop": tokenizer.stop, "generator": generator}
    model.generate(prompts[:1], 2, **{**how, "generator": None, "temperature": 0.0})  # the first call sets things up
    written: list[dict] = [{} for _ in records]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # so that batches have little padding
    with tqdm(total=len(records), desc="answering", disable=None, leave=False) as bar:
        for start in range(0, len(order), config.batch_size):
            rows = order[start : start + config.batch_size]
            began = time.perf_counter()
            new_tokens = model.generate([prompts[i] for i in rows], config.max_new_tokens, **how)
            seconds = time.perf_counter() - began
            for i, ids in zip(rows, new_tokens):
                ended = len(ids) < min(config.max_new_tokens, model.config.block_size - len(prompts[i]))
                answer = tokenizer.decode(ids).strip()
                written[i] = {"answer": answer, "ended": ended, "seconds": seconds, "tokens": len(ids)}
            bar.update(len(rows))
    return {key: [answer[key] for answer in written] for key in ("answer", "ended", "seconds", "tokens")}


# ---- scores ----


def text_scores(answers: list[str], references: list[str]) -> dict:
    """BLEU with its signature, ROUGE and exact match, in percent. Raises UserError if the libraries are missing."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from sacrebleu.metrics import BLEU
    except ImportError:
        raise UserError("BLEU and ROUGE need two libraries: pip install sacrebleu rouge-score") from None
    bleu, kinds = BLEU(), ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(kinds, use_stemmer=False)
    rouge = [scorer.score(reference, answer) for answer, reference in zip(answers, references)]
    exact = [answer.strip() == reference.strip() for answer, reference in zip(answers, references)]
    return {
        "bleu": bleu.corpus_score(answers, [references]).score,
        **{kind: 100 * float(np.mean([scores[kind].fmeasure for scores in rouge])) for kind in kinds},
        "exact_match": 100 * float(np.mean(exact)),
        "bleu_signature": str(bleu.get_signature()),
    }


def evaluate(model: Llama, tokenizer: Tokenizer, records: list[Record], config: AnswerConfig) -> dict:
    """All scores of one model, and its answers."""
    encoded = [(encode_prompt(record, tokenizer), encode_answer(record, tokenizer)) for record in records]
    encoded.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
    parts = cut(encoded, affordable(model, config.batch_size))
    loss, count = batches_nll(model, parts, padded, torch.float32)
    if not math.isfinite(loss):
        raise UserError(f"the loss is {loss}: this model has diverged, and its answers are noise")
    written = write_answers(model, tokenizer, records, config)
    seconds = np.array(written["seconds"])
    p5, median, p95 = np.percentile(seconds, (5, 50, 95)).tolist()
    return {
        "loss": loss,
        "answer_tokens": count,
        **text_scores(written["answer"], [record["output"] for record in records]),
        "ended": 100 * float(np.mean(written["ended"])),
        "latency_s": {"mean": float(seconds.mean()), "median": median, "p5": p5, "p95": p95},
        "params": model.num_params(),
        "answers": written["answer"],
    }


# ---- the command ----


def records_to_score(config: AnswerConfig, checkpoint: dict) -> tuple[str, list[Record]]:
    """The data set's name and its records."""
    its_own = checkpoint.get("train", {}).get("dataset")
    name = config.dataset or its_own
    if not isinstance(name, str):
        raise UserError("this checkpoint names no data set: give --dataset NAME")
    folder, meta = read_meta(name)
    path = folder / f"{config.split}.jsonl"
    if meta.get("kind") != "instructions":
        remedy = "name instruction data with --dataset NAME, or use eval_ppl.py"
        raise UserError(f"{folder} is text, without questions and answers: {remedy}")
    check_unchanged(path, meta["splits"][config.split].get("jsonl_sha256"))
    records = records_of(path, ",".join(FIELDS), "")
    trained = trained_on(checkpoint, config.split) if name == its_own else None
    if trained and trained != meta["splits"][config.split]["sha256"]:
        print(f"note: {folder} was prepared anew since training, which may have seen these", file=sys.stderr)
    return Path(name).name, records


def answers_file(config: AnswerConfig, name: str) -> Path:
    """Where the answers go; found out before they are written, which takes long."""
    if config.out:
        if Path(config.out).exists():
            raise UserError(f"--out {config.out} exists: name a new file")
        return Path(config.out)
    first = f"-first{config.limit}" if config.limit else ""
    ckpt = Path(config.ckpt)
    return ckpt.with_name(f"{ckpt.stem}-answers-{name}-{config.split}{first}.jsonl")


def too_long(record: Record, models: Iterable[tuple[Llama, Tokenizer]]) -> bool:
    """Whether prompt and reference together are beyond the context of one of the models."""
    return any(
        len(encode_prompt(record, tokenizer)) + len(encode_answer(record, tokenizer)) - 1 > model.config.block_size
        for model, tokenizer in models
    )


def table(results: dict[str, dict]) -> Iterator[str]:
    """A line a score, a column a model."""
    rows = {
        "loss, nats a token": "loss", "BLEU": "bleu", "ROUGE-1": "rouge1", "ROUGE-2": "rouge2", "ROUGE-L": "rougeL",
        "exact match, %": "exact_match", "ended by itself, %": "ended",
    }  # fmt: skip
    yield " " * 20 + "".join(f"{name:>12}" for name in results)
    for label, key in rows.items():
        yield f"{label:20}" + "".join(f"{r[key]:12.{4 if key == 'loss' else 2}f}" for r in results.values())
    for key in ("mean", "median", "p5", "p95"):
        yield f"{'latency, s, ' + key:20}" + "".join(f"{r['latency_s'][key]:12.3f}" for r in results.values())


def examples(records: list[Record], results: dict[str, dict], count: int = 5, width: int = 200) -> Iterator[str]:
    """Some to read, evenly spread; long texts shortened, each on a line."""

    def short(text: str) -> str:
        text = " / ".join(line for line in text.split("\n") if line.strip())
        return text if len(text) <= width else text[:width] + " ..."

    for i in sorted({k * len(records) // count for k in range(count)}):
        yield "---"
        texts = [("instruction", records[i]["instruction"]), ("input", records[i]["input"])]
        texts += [("reference", records[i]["output"])]
        texts += [(f"answer of {name}", result["answers"][i]) for name, result in results.items()]
        yield from (f"{label}: {short(text)}" for label, text in texts if text or "answer" in label)


def main() -> None:
    config = AnswerConfig(**parse(__doc__, AnswerConfig))
    for name in ("limit", "max_new_tokens", "batch_size"):
        if getattr(config, name) is not None and getattr(config, name) < 1:
            raise UserError(f"{name} is {getattr(config, name)}: give --{name} 1 or more")
    if not 0 <= config.temperature < 1e9 or not 0 < config.top_p <= 1 or not 0 <= config.seed < 2**63:
        raise UserError("give --temperature 0 or more, --top_p above 0 up to 1, and --seed 0 to 2^63 - 1")
    paths = {"base": config.base, "ckpt": config.ckpt} if config.base else {"ckpt": config.ckpt}
    device = pick_device(config.device)
    name, records = records_to_score(config, load(config.ckpt))
    out = answers_file(config, name)
    text_scores(["none"], ["none"])  # a missing library is found out before the work
    models = {key: build(load(path), device) for key, path in paths.items()}
    fitting = [record for record in records if not too_long(record, models.values())]
    kept = fitting[: config.limit]
    if not kept:
        block = min(model.config.block_size for model, _ in models.values())
        raise UserError(f"none of the {len(records)} examples fits the context of {block} tokens")
    results = {key: evaluate(*model, kept, config) for key, model in models.items()}
    settings = {"settings": asdict(config), "examples": len(kept), "left_out": len(records) - len(fitting)}
    for key, result in results.items():
        settings[key] = {name: value for name, value in result.items() if name != "answers"}
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out, "w") as file:
        file.write(json.dumps(settings) + "\n")
        for i, record in enumerate(kept):
            answers = {key: result["answers"][i] for key, result in results.items()}
            file.write(json.dumps({**record, "answers": answers}, ensure_ascii=False) + "\n")
    if config.json:
        print(json.dumps(settings))
        return
    left = f", {settings['left_out']} left out, longer than the context" if settings["left_out"] else ""
    how = "greedy" if not config.temperature else f"temperature {config.temperature}, top_p {config.top_p}"
    print(f"{name} {config.split}: {len(kept)} examples{left} | {how}, batches of {config.batch_size}")
    print("\n".join(f"{key}: {path}, {results[key]['params']:,} parameters" for key, path in paths.items()))
    if len({tokenizer.data for _, tokenizer in models.values()}) > 1:
        print("note: the models have other tokenizers, so their losses are of other tokens and do not compare")
    print("\n".join(table(results)))
    print(f"sacreBLEU {results['ckpt']['bleu_signature']}\n" + "\n".join(examples(kept, results)))
    print(f"---\nall answers: {out}")


if __name__ == "__main__":
    exit_cleanly(main)
