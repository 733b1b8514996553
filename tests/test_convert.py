"""Other programs' checkpoints in and out, against transformers, safetensors, sentencepiece and tokenizers."""

import io
import json
import re
import struct
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import sentencepiece as spm
import torch
from conftest import ONE_THREAD, ROOT, assert_close, quick, refused, sharp_model
from safetensors.torch import load_file

from checkpoint import build, build_model, load, save
from hugging_face import uniform_heads
from model import ROPE_SCALING, Llama, ModelConfig
from tokenizer import read_tokenizer

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
TOLERANCE = 1e-5  # of the largest logit: some hundred float32 roundings of 6e-8, in another order


def their_model(dtype=torch.float32, seed=0, **settings):
    """A random LlamaForCausalLM, whose weights are large enough that its logits differ clearly."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        **{"vocab_size": 64, "max_position_embeddings": 128, "rms_norm_eps": 3e-6, **shape, **settings}
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2) if p.dim() == 2 else p.add_(0.1 * torch.randn_like(p))
    model.tie_weights()
    return model.to(dtype).eval()


def save_folder(model, folder, how):
    """As transformers saves it, whole or sharded; or as older releases did, in torch.save's format."""
    model.save_pretrained(folder, max_shard_size="15KB" if "shards" in how else "1GB")
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2 if "shards" in how else len(files) == 1
    if "bin" in how:
        for file in files:
            torch.save(
                load_file(file), folder / file.name.replace("model", "pytorch_model").replace("safetensors", "bin")
            )
            file.unlink()
        for index in folder.glob("*.index.json"):
            text = index.read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
            (folder / "pytorch_model.bin.index.json").write_text(text)
            index.unlink()
    return folder


def logits(model, length=100):
    tokens = torch.randint(64, (2, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out = model(tokens)
    return out if isinstance(model, Llama) else out.logits


def run(*args):
    done = quick("checkpoint.py", *args)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "settings, how",
    [
        ({}, "safetensors"),
        ({"num_key_value_heads": 2}, "safetensors shards"),
        ({"num_key_value_heads": 1, "head_dim": 12}, "bin"),
        ({"num_key_value_heads": 2, "tie_word_embeddings": True}, "bin shards"),
        ({"tie_word_embeddings": True}, "safetensors"),
        ({"num_key_value_heads": 2, "rope_parameters": LLAMA3}, "safetensors"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}, "safetensors"),
    ],
)
def test_hugging_face_folder_comes_back_bit_equal(tmp_path, settings, how):
    from transformers import LlamaForCausalLM

    theirs = their_model(**settings)
    folder = save_folder(theirs, tmp_path / "in", how)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    run("import", folder, tmp_path / "ours.pt")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before  # permuted in place, but not there
    assert_close(logits(build_model(load(tmp_path / "ours.pt"))), logits(theirs), TOLERANCE, "logits")
    run("export", tmp_path / "ours.pt", tmp_path / "out")
    back, report = LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(logits(back.eval()), logits(theirs))
    for name, p in theirs.state_dict().items():
        assert torch.equal(p, back.state_dict()[name]), name


def test_bfloat16_stays_bfloat16(tmp_path):
    theirs = their_model(torch.bfloat16, num_key_value_heads=2)
    run("import", save_folder(theirs, tmp_path / "in", "safetensors"), tmp_path / "ours.pt")
    checkpoint = load(tmp_path / "ours.pt")
    ours = build_model(checkpoint)
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    exact = logits(their_model(num_key_value_heads=2).to(torch.bfloat16).double())
    # each is as far from the exact result as bfloat16 rounds: 2^-9 an operation, some tens of them one after another
    assert_close(logits(ours).double(), exact, 0.03, "ours, to float64 on the same weights")
    assert_close(logits(theirs).double(), exact, 0.03, "theirs")
    run("export", tmp_path / "ours.pt", tmp_path / "out")
    back = load_file(tmp_path / "out" / "model.safetensors")
    assert {k: v.dtype for k, v in back.items()} == dict.fromkeys(theirs.state_dict(), torch.bfloat16)
    assert all(torch.equal(back[k], v) for k, v in theirs.state_dict().items())


# ---- uneven groups ----


def checkpoint_of(model, tokenizer=None):
    return {"model": model.state_dict(), "config": asdict(model.config), "tokenizer": tokenizer}


def export_of(model, folder, tokenizer=None):
    save(folder / "ours.pt", checkpoint_of(model, tokenizer))
    return run("export", folder / "ours.pt", folder / "out")


@pytest.mark.parametrize(
    "heads, k_groups, v_groups",
    [
        (1, [[0, 0, 0, 0], [0, 0, 0, 0]], [[0, 0, 0, 0], [0, 0, 0, 0]]),
        (2, [[0, 1, 0, 1], [0, 0, 1, 1]], [[0, 0, 0, 0], [1, 1, 0, 0]]),  # heads change places
        (4, [[0, 1, 1, 1], [0, 0, 1, 1]], [[0, 1, 1, 1], [0, 0, 1, 1]]),
        (4, [[0, 0, 1, 1], [0, 0, 1, 1]], [[0, 0, 1, 1], [0, 1, 1, 0]]),  # no two heads of layer 1 share both
    ],
)
def test_uneven_groups_are_exported_as_the_fewest_equal_ones(tmp_path, heads, k_groups, v_groups):
    from transformers import LlamaForCausalLM

    ours = sharp_model(k_groups=k_groups, v_groups=v_groups)
    said = export_of(ours, tmp_path)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert theirs.config.num_key_value_heads == heads
    assert_close(logits(theirs, 60), logits(ours, 60), TOLERANCE, "logits")
    cache, here = 2 * 2 * heads * 8 * 4, ours.config.kv_numbers_per_token * 4
    assert ("expanded" not in said) if cache == here else f"{cache:,} bytes a token there and {here:,} here" in said
    run("import", tmp_path / "out", tmp_path / "back.pt")
    assert_close(logits(build_model(load(tmp_path / "back.pt")), 60), logits(ours, 60), TOLERANCE, "imported again")


def test_six_heads_in_classes_of_two_and_four_need_three_groups():
    config = ModelConfig(n_layer=1, n_head=6, dim=48, k_groups=[[0, 1, 1, 0, 1, 1]], v_groups=[[0, 1, 1, 0, 1, 1]])
    assert uniform_heads(config) == (3, [[0, 3, 1, 2, 4, 5]])


# ---- llama2.c and Meta ----


def write_llama2c(path, model):
    """As llama2.c's legacy export does, whose layout its run.c reads."""
    c, layers = model.config, model.layers
    angles = torch.outer(torch.arange(c.block_size), 10000.0 ** -(torch.arange(0, c.head_dim, 2) / c.head_dim))
    tensors = [model.tok_embeddings.weight, *(layer.attention_norm.weight for layer in layers)]
    for name in ("wq", "wk", "wv", "wo"):
        tensors += [getattr(layer.attention, name).weight for layer in layers]
    tensors += [layer.ffn_norm.weight for layer in layers]
    for name in ("w1", "w2", "w3"):
        tensors += [getattr(layer.feed_forward, name).weight for layer in layers]
    tensors += [model.norm.weight, angles.cos(), angles.sin(), *([] if c.tie_embeddings else [model.output.weight])]
    vocabulary = c.vocab_size if c.tie_embeddings else -c.vocab_size
    sizes = (c.dim, c.hidden_dim, c.n_layer, c.n_head, c.n_kv_head, vocabulary, c.block_size)
    with open(path, "wb") as file:
        file.write(struct.pack("<7i", *sizes))
        for x in tensors:
            file.write(x.detach().numpy().astype("<f4").tobytes())


def write_llama2c_tokenizer(path, sp):
    """As llama2.c's tokenizer.py does."""
    marks = {sp.bos_id(): "\n<s>\n", sp.eos_id(): "\n</s>\n"}
    pieces = [marks.get(i, sp.id_to_piece(i)).replace("\u2581", " ").encode() for i in range(sp.vocab_size())]
    with open(path, "wb") as file:
        file.write(struct.pack("<I", max(map(len, pieces))))
        for i, piece in enumerate(pieces):
            file.write(struct.pack("<fI", sp.get_score(i), len(piece)) + piece)


@pytest.fixture(scope="module")
def prefixed():
    """A SentencePiece model that puts a space before every text, as Llama 2's and llama2.c's do."""
    model = io.BytesIO()
    text = (ROOT / "train.py").read_text().splitlines()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=model, vocab_size=500, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True, minloglevel=2,
    )  # fmt: skip
    return spm.SentencePieceProcessor(model_proto=model.getvalue())


TEXTS = ["", "Once upon a time", " two  spaces\nand a line", "def f(x):\n    return x ** 2", "café 中😀 \t."]


@pytest.mark.parametrize("settings", [{"n_kv_head": 2}, {"tie_embeddings": False}])
def test_llama2c_file_gives_the_same_model_and_tokens(tmp_path, prefixed, settings):
    ours = sharp_model(vocab_size=500, **settings)
    write_llama2c(tmp_path / "model.bin", ours)
    write_llama2c_tokenizer(tmp_path / "tok.bin", prefixed)
    run("import", tmp_path / "model.bin", tmp_path / "got.pt", "--tokenizer", tmp_path / "tok.bin")
    model, tokenizer = build(load(tmp_path / "got.pt"))
    assert model.config == ours.config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), ours.parameters(), strict=True))
    for text in TEXTS:
        assert tokenizer.encode(text) == prefixed.encode(text), text
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.stop == [2, 1]


@pytest.mark.parametrize("scaled", [False, True])
def test_meta_folder_gives_the_same_model(tmp_path, scaled):
    extra = dict(zip(ROPE_SCALING, (8, 1, 4, 8192))) if scaled else None
    ours = sharp_model(n_kv_head=2, tie_embeddings=False, rope_theta=5e5, rope_scaling=extra).bfloat16()
    folder = tmp_path / "meta"
    folder.mkdir()
    torch.save({**ours.state_dict(), "rope.freqs": torch.ones(4)}, folder / "consolidated.00.pth")
    params = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5, "vocab_size": -1}
    params |= {"multiple_of": 16, "rope_theta": 5e5, "use_scaled_rope": scaled, "rope_scaling_factor": 8}
    (folder / "params.json").write_text(json.dumps(params))
    run("import", folder, tmp_path / "got.pt", "--block_size", 64)
    model = build_model(load(tmp_path / "got.pt"))
    assert model.config == ours.config and torch.equal(logits(model, 60), logits(ours, 60))
    del params["rope_scaling_factor"]
    (folder / "params.json").write_text(json.dumps(params))
    if scaled:
        refused(quick("checkpoint.py", "import", folder, tmp_path / "no.pt"), "rope_scaling_factor", "32")


# ---- tokenizers ----


@pytest.fixture(scope="module")
def byte_level():
    """A tokenizer.json like Llama 3's: byte-level BPE that puts <s> before a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer, level = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel
    tokenizer.pre_tokenizer, tokenizer.decoder = level(add_prefix_space=False), decoders.ByteLevel()
    settings = {"initial_alphabet": level.alphabet(), "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<pad>", "<s>", "</s>", "<end>"], **settings)
    tokenizer.train_from_iterator((ROOT / "train.py").read_text().splitlines(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def test_folder_with_a_tokenizer_json_alone(tmp_path, byte_level):
    from transformers import AutoTokenizer

    theirs = their_model(vocab_size=400, bos_token_id=1, eos_token_id=[2, 3])
    folder = save_folder(theirs, tmp_path / "in", "safetensors")
    byte_level.save(str(folder / "tokenizer.json"))
    assert "pip install tokenizers" in run("import", folder, tmp_path / "ours.pt")
    _, tokenizer = build(load(tmp_path / "ours.pt"))
    for text in TEXTS:
        assert tokenizer.prompt(text) == byte_level.encode(text).ids, text
        assert tokenizer.decode(tokenizer.prompt(text)) == text
        assert tokenizer.token_bytes()[tokenizer.prompt(text)].sum() == len(text.encode()), text
    assert (tokenizer.bos, tokenizer.eos, tokenizer.stop) == (1, 2, [1, 2, 3])
    (tmp_path / "text.txt").write_text("".join(TEXTS))
    done = quick("eval_ppl.py", tmp_path / "ours.pt", "--text", tmp_path / "text.txt", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["tokenizer"].startswith("tokenizer.json 400"), done.stderr
    assert quick("sample.py", tmp_path / "ours.pt", "--prompt", "def", "--max_new_tokens", 5).stdout.startswith("def")
    run("export", tmp_path / "ours.pt", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == [2, 3]
    back = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert all(back.encode(text) == byte_level.encode(text).ids for text in TEXTS)


def test_exported_tokenizer_gives_transformers_the_same_tokens(tmp_path, tiny_data, prefixed):
    from transformers import AutoTokenizer

    learned = (tiny_data / "tokenizer.model").read_bytes()
    for name, data in (("learned", learned), ("prefixed", prefixed.serialized_model_proto())):
        (tmp_path / name).mkdir()
        export_of(sharp_model(vocab_size=500), tmp_path / name, data)
        ours, theirs = read_tokenizer(data), AutoTokenizer.from_pretrained(tmp_path / name / "out")
        for text in TEXTS:
            if name == "prefixed":  # transformers puts no space before a text that begins with one
                text = text.lstrip()
            assert theirs.encode(text) == ours.prompt(text), (name, text)
            assert theirs.decode(theirs.encode(text), skip_special_tokens=True) == text


# ---- what cannot be read, or written ----


@pytest.mark.parametrize(
    "change, words",
    [
        ({"architectures": ["MistralForCausalLM"]}, ["MistralForCausalLM", "LlamaForCausalLM"]),
        ({"architectures": None, "model_type": "gemma"}, ["gemma"]),
        ({"attention_bias": True}, ["attention_bias"]),
        ({"mlp_bias": True}, ["mlp_bias"]),
        ({"hidden_act": "gelu"}, ["hidden_act gelu"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantization_config", "gptq"]),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, ["RoPE type yarn"]),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 4.0}}, ["RoPE type linear"]),
        ({"rope_parameters": None, "rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, ["low_freq_factor"]),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, ["partial_rotary_factor 0.5"]),
        ({"num_hidden_layers": 3}, ["3 layers", "it holds 2"]),
        ({"num_key_value_heads": 2}, ["k_proj.weight [16, 32]", "it holds [32, 32]"]),
        ({"num_key_value_heads": 3}, ["n_kv_head 3"]),
        ({"tie_word_embeddings": True}, ["ties its embeddings"]),
    ],
)
def test_unsupported_models_are_refused_by_name(tmp_path, change, words):
    folder = save_folder(their_model(), tmp_path / "in", "safetensors")
    config = {**json.loads((folder / "config.json").read_text()), **change}
    (folder / "config.json").write_text(json.dumps(config))
    refused(quick("checkpoint.py", "import", folder, tmp_path / "ours.pt"), *words)
    assert not (tmp_path / "ours.pt").exists()


def test_biases_are_refused_by_name_even_if_the_config_hides_them(tmp_path):
    theirs = their_model(attention_bias=True)
    theirs.config.attention_bias = False
    folder = save_folder(theirs, tmp_path / "in", "safetensors")
    refused(quick("checkpoint.py", "import", folder, tmp_path / "ours.pt"), "k_proj.bias", "no such biases")


def test_what_cannot_be_exported_is_refused(tmp_path, tiny_run):
    save(tmp_path / "novel.pt", {**load(tiny_run), **checkpoint_of(sharp_model(novel=True))})
    refused(quick("checkpoint.py", "export", tmp_path / "novel.pt", tmp_path / "out"), "--novel")
    save(tmp_path / "odd.pt", checkpoint_of(sharp_model(n_head=5, head_dim=6)))
    refused(quick("checkpoint.py", "export", tmp_path / "odd.pt", tmp_path / "out"), "dim 32", "n_head 5")
    assert not (tmp_path / "out").exists()
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("all of it")
    refused(quick("checkpoint.py", "export", tiny_run, tmp_path / "precious"), "exists", "--overwrite")
    refused(quick("checkpoint.py", "export", tiny_run, tmp_path / "precious", "--overwrite"), "something else")
    assert (tmp_path / "precious" / "thesis.tex").read_text() == "all of it"


def test_a_trained_run_is_exported_and_shown(tmp_path, tiny_run):
    from transformers import AutoTokenizer, LlamaForCausalLM

    run("export", tiny_run, tmp_path / "out")
    assert "2 K/V" not in run("export", tiny_run, tmp_path / "out", "--overwrite")
    theirs, tokenizer = (
        LlamaForCausalLM.from_pretrained(tmp_path / "out"),
        AutoTokenizer.from_pretrained(tmp_path / "out"),
    )
    ours, own_tokenizer = build(load(tiny_run))
    prompt = tokenizer("def main(", return_tensors="pt")
    assert prompt["input_ids"][0].tolist() == own_tokenizer.prompt("def main(")
    text = theirs.generate(**prompt, max_new_tokens=15, do_sample=False)[0].tolist()
    assert text == own_tokenizer.prompt("def main(") + ours.generate([own_tokenizer.prompt("def main(")], 15)[0]
    shown = run("show", tiny_run)
    assert "training: step 30 of 30" in shown and "LoRA: none" in shown and "0-1      ABCD (4)" in shown


def test_show_draws_uneven_groups_and_counts_their_cache(tmp_path):
    groups = {"k_groups": [[0, 1, 1, 1], [0, 1, 0, 2]], "v_groups": [[0, 0, 0, 0], [2, 1, 0, 2]]}
    save(tmp_path / "uneven.pt", checkpoint_of(sharp_model(novel=True, **groups)))
    shown = run("show", tmp_path / "uneven.pt")
    for line in (
        r"0 +ABBB \(2\) +AAAA \(1\)",
        r"1 +ABAC \(3\) +CBAC \(3\)",
        r"attention.novel +144 ",
        "none recorded",
    ):
        assert re.search(line, shown), shown
    assert f"KV cache: {(2 + 1 + 3 + 3) * 8 * 4} bytes a token (56% of multi-head attention's 512)" in shown


def test_import_without_a_tokenizer_says_so_when_one_is_needed(tmp_path):
    folder = save_folder(their_model(), tmp_path / "in", "safetensors")
    assert "no tokenizer" in run("import", folder, tmp_path / "ours.pt")
    refused(quick("sample.py", tmp_path / "ours.pt"), "no tokenizer", "--tokenizer FILE")
    refused(quick("checkpoint.py", "import", folder, tmp_path / "ours.pt"), "exists", "--overwrite")
    refused(quick("checkpoint.py", "import", tmp_path / "none", tmp_path / "x.pt"), "no such file or folder")
    refused(quick("checkpoint.py", "import", tmp_path, tmp_path / "x.pt"), "no config.json")
    refused(quick("checkpoint.py", "import", folder / "model.safetensors", tmp_path / "x.pt"), "give the folder")
    refused(quick("checkpoint.py", "import", folder), "name it behind")
    refused(quick("checkpoint.py", "show", folder), "no such checkpoint")
    big = ["--tokenizer", folder / "config.json"]
    refused(quick("checkpoint.py", "import", folder, tmp_path / "x.pt", *big), "config.json is no tokenizer")


def test_training_goes_on_from_an_imported_bfloat16_model_in_float32(tmp_path, tiny_data):
    theirs = their_model(torch.bfloat16, vocab_size=400)
    folder = save_folder(theirs, tmp_path / "in", "safetensors")
    (folder / "tokenizer.model").write_bytes((tiny_data / "tokenizer.model").read_bytes())
    run("import", folder, tmp_path / "ours.pt", "--block_size", 32)
    flags = ["--init_from", tmp_path / "ours.pt", "--out_dir", tmp_path / "run", "--max_steps", 2, "--eval_tokens", 512]
    done = quick("train.py", "--dataset", tiny_data, "--batch_size", 4, *flags)
    assert done.returncode == 0, done.stderr
    trained = load(tmp_path / "run" / "ckpt.pt")["model"]
    assert {x.dtype for x in trained.values()} == {torch.float32} and len(trained) == len(
        load(tmp_path / "ours.pt")["model"]
    )


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_import_and_export_hold_the_checkpoint_once(tmp_path):
    """Copies of wq and wk, here 2/9 of the weights, would show."""
    theirs = their_model(hidden_size=768, intermediate_size=768, num_hidden_layers=8, num_attention_heads=8)
    folder = save_folder(theirs, tmp_path / "in", "safetensors")
    size = (folder / "model.safetensors").stat().st_size
    measure = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
import checkpoint, convert, hugging_face, model, safetensors.torch, torch
with torch.device("meta"):
    model.Llama(model.ModelConfig())  # what it imports when first used is not the checkpoint's
peak = lambda: int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
before = peak()
if {what!r} == "import":
    checkpoint.save(Path({to!r}), convert.read(Path({source!r}))[0])
else:
    hugging_face.export({source!r}, Path({to!r}))
print(peak() - before)
"""
    ends = {"import": (folder, tmp_path / "ours.pt"), "export": (tmp_path / "ours.pt", tmp_path / "out")}
    for what, (source, to) in ends.items():
        code = measure.format(root=str(ROOT), what=what, source=str(source), to=str(to))
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ONE_THREAD)
        assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1.15 * size, f"{what}: {int(done.stdout):,} bytes for {size:,}"
