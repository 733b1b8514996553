"""Models, tokenizers and adapters in and out, against transformers, sentencepiece, llama2.c and peft."""

import ctypes
import itertools
import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import foreign
import pytest
import torch
from conftest import adapted, assert_close, quick, refused, sharp_model, to_hugging_face
from corpus import Writer
from foreign import change_json, export_of, formats, imported, logits, save_folder, their_model, write_llama2c
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaForCausalLM

from checkpoint import build_model, load, save
from common import UserError, peak_memory_bytes
from data.prepare import learned
from data.tokenizer import read_tokenizer
from formats.gguf import PRE_TOKENIZERS, settings_of
from formats.tokenizers import sentencepiece_of_llama2c, with_special
from lora import TARGETS, LoRAConfig, adapters
from model import ROPE_SCALING
from study.bench import reset_peak_memory

TOLERANCE = 1e-5  # of the largest logit: some hundred float32 roundings of 6e-8, in another order
TEXTS = ["", "Once upon a time", " two  spaces\nand a line", "def f(x):\n    return x ** 2", "café 中😀 \t."]
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, **dict(zip(ROPE_SCALING, (8.0, 1.0, 4.0, 32)))}
WRITER = Writer(0)
CORPUS = "".join(WRITER.paragraph() + WRITER.function() for _ in range(60)).replace("\u2581", "").splitlines()


@pytest.mark.parametrize("settings, how", [
    ({}, "safetensors"), ({"num_key_value_heads": 2}, "safetensors shards"),
    ({"num_key_value_heads": 1, "head_dim": 12}, "bin"),
    ({"num_key_value_heads": 2, "tie_word_embeddings": True}, "bin shards"),
    ({"num_key_value_heads": 2, "rope_parameters": LLAMA3}, "safetensors"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}, "safetensors"),
    ({"dtype": torch.bfloat16}, "safetensors"), ({"dtype": torch.bfloat16}, "bin"),
])  # fmt: skip
def test_hugging_face_folder_comes_back_bit_equal(tmp_path, settings, how):
    plain = save_folder(their_model(**settings), tmp_path / "plain")
    theirs = LlamaForCausalLM.from_pretrained(plain, dtype="auto").eval()  # whose RoPE stays in float32
    folder = save_folder(theirs, tmp_path / "in", how)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    ours, _ = imported(folder, tmp_path / "ours.pt")
    # permuted in place, but not in the mapped files
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert {p.dtype for p in ours.parameters()} == {theirs.dtype}
    formats("export", tmp_path / "ours.pt", tmp_path / "out")
    how = {"dtype": "auto", "output_loading_info": True}
    back, report = LlamaForCausalLM.from_pretrained(tmp_path / "out", **how)
    assert not any(report.values()), report
    assert back.config.bos_token_id is None and back.config.eos_token_id is None
    assert torch.equal(logits(back.eval()), logits(theirs))
    assert all(torch.equal(p, back.state_dict()[name]) for name, p in theirs.state_dict().items())
    assert_close(logits(ours.float()), logits(theirs.float()), TOLERANCE, "logits")
    for shard in [*folder.glob("*model-00001-of-*")]:  # as if left there by another download
        shutil.copy(shard, folder / shard.name.replace("of-", "of-9"))
        refused(quick("-m formats", "import", folder, tmp_path / "no.pt"), "shards")


@pytest.mark.parametrize("change", [
    {"rms_norm_eps": None, "max_position_embeddings": None, "rope_theta": None},  # what a missing one means
    {"rope_theta": 300.0, "rope_scaling": {k: x for k, x in LLAMA3.items() if k != "rope_theta"}},
    {"rope_scaling": {k: x for k, x in list(LLAMA3.items())[:5] if k != "rope_theta"}},
    {"tie_word_embeddings": True, "num_key_value_heads": None, "hidden_act": "swish"},
])  # fmt: skip
def test_folder_of_transformers_4(tmp_path, change):
    tied = "tie_word_embeddings" in change
    folder = save_folder(their_model(tie_word_embeddings=tied), tmp_path / "in")
    old = {"rope_parameters": None, "dtype": None, "torch_dtype": "float32", "transformers_version": "4.31.0"}
    change_json(folder / "config.json", **{**old, "pretraining_tp": 1, "rope_theta": 5000.0, **change})
    theirs = LlamaForCausalLM.from_pretrained(folder).eval()
    first, second = (layer.self_attn for layer in theirs.model.layers)
    second.q_proj.weight = first.q_proj.weight  # one tensor in the file, whose rows must move once
    state = theirs.state_dict()
    state |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    if tied:  # either name will do
        del state["model.embed_tokens.weight"]
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    ours, _ = imported(folder, tmp_path / "ours.pt")
    assert ours.config.block_size == theirs.config.max_position_embeddings
    assert_close(logits(ours), logits(theirs), TOLERANCE, "logits")
    formats("export", tmp_path / "ours.pt", tmp_path / "out")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert_close(logits(again), logits(theirs), TOLERANCE, "exported")


@pytest.mark.parametrize("heads, k_groups, v_groups", [
    (1, [[0, 0, 0, 0], [0, 0, 0, 0]], [[0, 0, 0, 0], [0, 0, 0, 0]]),
    (2, [[0, 1, 0, 1], [0, 0, 1, 1]], [[0, 0, 0, 0], [1, 1, 0, 0]]),  # heads change places
    (4, [[0, 1, 1, 1], [0, 0, 1, 1]], [[0, 1, 1, 1], [0, 0, 1, 1]]),
    (4, [[0, 0, 1, 1], [0, 0, 1, 1]], [[0, 0, 1, 1], [0, 1, 1, 0]]),  # no two heads of layer 1 share both
])  # fmt: skip
def test_uneven_groups_are_exported_as_the_fewest_equal_ones(tmp_path, heads, k_groups, v_groups):
    ours = sharp_model(k_groups=k_groups, v_groups=v_groups)
    said = export_of(ours, tmp_path)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert theirs.config.num_key_value_heads == heads
    assert_close(logits(theirs, 60), logits(ours, 60), TOLERANCE, "logits")
    cache, here = 2 * 2 * heads * 8 * 4, ours.config.kv_bytes_per_token(1) * 4
    assert (f"{cache:,} bytes a token there and {here:,} here" in said) == (cache != here)
    rounded = sharp_model(k_groups=k_groups, v_groups=v_groups, kv_bits=8)
    here = rounded.config.kv_bytes_per_token(4)
    assert f"there and {here:,} here" in export_of(rounded, tmp_path, out="rounded")
    back, _ = imported(tmp_path / "out", tmp_path / "back.pt")
    assert_close(logits(back, 60), logits(ours, 60), TOLERANCE, "imported again")


@pytest.mark.parametrize("settings", [{"n_kv_head": 2}, {"tie_embeddings": False}])
def test_llama2c_file_gives_the_same_model_and_tokens(tmp_path, prefixed, settings):
    ours = sharp_model(vocab_size=500, **settings)
    write_llama2c(tmp_path, ours, prefixed)
    files = tmp_path / "model.bin", tmp_path / "got.pt", "--tokenizer", tmp_path / "tok.bin"
    model, tokenizer = imported(*files)
    assert model.config == ours.config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), ours.parameters(), strict=True))
    for text in TEXTS:
        assert tokenizer.encode(text) == prefixed.encode(text), text
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.stop == [2, 1]


@pytest.mark.parametrize("scaled", [False, True])
def test_meta_folder_gives_the_same_model(tmp_path, scaled):
    settings = {"tie_embeddings": scaled, "norm_eps": 2e-3, "n_kv_head": 2}  # saved under both names
    settings["rope_theta"] = 5e5 if scaled else 1e4
    settings["rope_scaling"] = dict(zip(ROPE_SCALING, (8, 1, 4, 8192))) if scaled else None
    ours = sharp_model(**settings).bfloat16()
    tables = dict.fromkeys(("rope.freqs", "layers.0.attention.inner_attention.rope.freqs"), torch.ones(4))
    torch.save({**ours.state_dict(), **tables}, tmp_path / "consolidated.00.pth")
    params = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 2e-3, "vocab_size": -1}
    params |= {"multiple_of": 16, "use_scaled_rope": scaled, "rope_scaling_factor": 8}
    params |= {"rope_theta": 5e5} if scaled else {}  # as Llama 2's
    (tmp_path / "params.json").write_text(json.dumps(params))
    model, _ = imported(tmp_path, tmp_path / "got.pt", "--block_size", 64)
    assert model.config == ours.config and torch.equal(logits(model, 60), logits(ours, 60))
    for change, word in (({"sliding_window": 16}, "sliding_window"), ({"n_layers": 3}, "layers.2")):
        (tmp_path / "params.json").write_text(json.dumps(params | change))
        refused(quick("-m formats", "import", tmp_path, tmp_path / "no.pt"), word)


@pytest.mark.parametrize("change, word", [
    ({"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM"), ({"model_type": "gemma"}, "gemma"),
    ({"attention_bias": True}, "attention_bias"), ({"mlp_bias": True}, "mlp_bias"),
    ({"hidden_act": "gelu"}, "gelu"), ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
    ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 4.0}}, "linear"),
    ({"rope_parameters": None, "rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "low_freq_factor"),
    ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
    ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "contradict"),
    ({"rope_parameters": LLAMA3, "original_max_position_embeddings": 16}, "contradict"),
    ({"num_hidden_layers": 3}, "layers.2"), ({"num_key_value_heads": 2}, "size mismatch"),
    ({"num_key_value_heads": 3}, "does not divide"), ({"tie_word_embeddings": True}, "tied"),
    ({"hidden_size": None}, "hidden_size"), ({"vocab_size": 10**9}, "vocab_size"),
])  # fmt: skip
def test_unsupported_models_are_refused_by_name(tmp_path, change, word):
    folder = save_folder(their_model(), tmp_path / "in")
    change_json(folder / "config.json", **change)
    refused(quick("-m formats", "import", folder, tmp_path / "ours.pt"), folder, word)
    assert not (tmp_path / "ours.pt").exists()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_import_and_export_hold_the_checkpoint_once(tmp_path):
    """Copies of wq and wk, here 2/7 of the weights, would show."""
    sizes = {"hidden_size": 768, "intermediate_size": 768, "num_hidden_layers": 8, "num_attention_heads": 8}
    folder, ours = save_folder(their_model(**sizes), tmp_path / "in"), tmp_path / "ours.pt"
    size = (folder / "model.safetensors").stat().st_size
    ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD, which tensors of earlier tests made grow:
    for line in (["import", folder, ours], ["export", ours, tmp_path / "out"]):
        ctypes.CDLL(None).malloc_trim(0)  # malloc would keep what is freed
        before = reset_peak_memory(torch.device("cpu"))
        formats(*line)
        held = peak_memory_bytes(torch.device("cpu")) - before
        assert held < 1.15 * size, f"{line[0]}: {held:,} bytes for {size:,}"


@pytest.fixture
def byte_level():
    """A tokenizer.json like Llama 3's: byte-level BPE that puts <s> before a text."""
    tokenizer, level = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel
    tokenizer.pre_tokenizer, tokenizer.decoder = level(add_prefix_space=False), decoders.ByteLevel()
    settings = {"initial_alphabet": level.alphabet(), "show_progress": False, "vocab_size": 400}
    trainer = trainers.BpeTrainer(special_tokens=["<pad>", "<s>", "</s>", "<end>"], **settings)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def test_a_tokenizer_json_that_changes_text_is_noticed(byte_level):
    fields = json.loads(byte_level.to_str())
    spaced = {"pre_tokenizer": {**fields["pre_tokenizer"], "add_prefix_space": True}}
    for change in ({}, {"normalizer": {"type": "NFC"}}, {"normalizer": {"type": "NFKC"}}, spaced):
        assert read_tokenizer(json.dumps(fields | change).encode()).is_exact() == (change == {})
    panics = {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}
    with pytest.raises(UserError, match="damaged"):
        read_tokenizer(json.dumps(fields | panics).encode())


@pytest.mark.parametrize("kind", ["learned", "prefixed", "late"])
def test_exported_tokenizer_gives_transformers_the_same_tokens(tmp_path, tiny_data, prefixed, kind):
    """In `late`, as in Llama 2's, runs of spaces are joined last."""
    model = sharp_model(vocab_size=500)
    write_llama2c(tmp_path, model, prefixed, spaces=-1e6)
    data = {"learned": (tiny_data / "tokenizer.model").read_bytes()}
    data["prefixed"] = prefixed.serialized_model_proto()
    data["late"] = sentencepiece_of_llama2c((tmp_path / "tok.bin").read_bytes(), 500)
    export_of(model, tmp_path, data[kind])
    ours, theirs = read_tokenizer(data[kind]), AutoTokenizer.from_pretrained(tmp_path / "out")
    fields = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    from_json = read_tokenizer(json.dumps(fields).encode())
    mark = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": False}
    as_metaspace = read_tokenizer(json.dumps({**fields, "normalizer": None, "pre_tokenizer": mark}).encode())
    for text in (*TEXTS, "a </s> is no end", "\n".join(CORPUS), *CORPUS[:200]):
        ids = ours.prompt(text)
        assert from_json.prompt(text) == ids
        assert from_json.token_bytes()[ids].sum() == len(text.encode()) or not text
        assert kind == "learned" or text.startswith(" ") or as_metaspace.prompt(text) == ids
        if "</s>" not in text:
            assert theirs.encode(text) == ids and theirs.decode(ids, skip_special_tokens=True) == text
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["add_prefix_space"] is (kind != "learned")  # for llama.cpp


BOTH = {"tokenizer_config.json": {"eos_token": {"content": "<end>"}}, "config.json": {"eos_token_id": [2, 3]}}


# a folder's files; what tokenizer.json puts around a text (None: a SentencePiece model); BOS, add_bos, EOS
@pytest.mark.parametrize("files, template, bos, add_bos, eos", [
    ({}, None, 1, True, [2]), ({"config.json": {"eos_token_id": 1}}, None, 1, True, [2]),
    ({"config.json": {"bos_token_id": 0, "eos_token_id": 2}}, None, 1, True, [2]),  # llama-160m: wrong BOS
    ({"generation_config.json": {"eos_token_id": [2, 300]}}, None, 1, True, [2, 300]),  # Llama 3 Instruct
    ({"tokenizer_config.json": {"add_bos_token": False}}, None, 1, False, [2]),  # Yi
    ({"config.json": {"eos_token_id": 501}}, None, 1, True, [2, 501]),  # beyond the tokenizer: ChatML
    ({}, "<s> $A", 1, True, []), (BOTH, "<s> $A", 1, True, [3, 2]), ({}, "$A </s>", -1, False, [2]),
    ({"tokenizer_config.json": {"eos_token": "</s>", "add_bos_token": False}}, "<s> $A", 1, True, [2]),
    ({"tokenizer_config.json": {"add_bos_token": True, "bos_token": "<s>"}}, "$A", 1, True, []),  # deepseek
    ({"config.json": {"bos_token_id": 0, "eos_token_id": 0}}, "$A", 0, False, [0]),  # SmolLM: one is both
    ({"config.json": {"eos_token_id": 2}}, "$A", -1, False, [2]),
    ({"tokenizer_config.json": {"bos_token": "<s>"}}, "$A </s>", 1, False, [2]),
])  # fmt: skip
def test_special_tokens(tmp_path, prefixed, byte_level, files, template, bos, add_bos, eos):
    folder = save_folder(their_model(vocab_size=510), tmp_path / "in")
    if template:
        special = [(piece, i) for i, piece in enumerate(("<pad>", "<s>", "</s>")) if piece in template]
        byte_level.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
        byte_level.save(str(folder / "tokenizer.json"))
    else:
        (folder / "tokenizer.model").write_bytes(prefixed.serialized_model_proto())
    change_json(folder / "config.json", bos_token_id=None, eos_token_id=None)
    change_json(folder / "config.json", **files.get("config.json", {}))
    for name in ("tokenizer_config.json", "generation_config.json"):
        (folder / name).write_text(json.dumps(files.get(name, {})))
    _, tokenizer = imported(folder, tmp_path / "ours.pt")
    formats("export", tmp_path / "ours.pt", tmp_path / "out")
    _, again = imported(tmp_path / "out", tmp_path / "again.pt")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.special == again.special == {"bos": bos, "add_bos": add_bos, "eos": eos}
    for text in TEXTS[1:]:
        ids = tokenizer.prompt(text)
        plain = byte_level.encode(text, add_special_tokens=False).ids if template else prefixed.encode(text)
        assert ids == again.prompt(text) == [bos] * add_bos + plain and tokenizer.decode(ids) == text
        assert theirs.encode(text) == ids + [2] * ("</s>" in (template or ""))
        assert tokenizer.token_bytes()[[*ids, *eos[:1]]].sum() == len(text.encode()), text
    (tmp_path / "given").write_bytes(tokenizer.data)
    (folder / "generation_config.json").write_text('{"eos_token_id": 7}')
    _, kept = imported(folder, tmp_path / "kept.pt", "--tokenizer", tmp_path / "given")
    assert (kept.special == tokenizer.special) == (tokenizer.data != tokenizer.file)  # else eos is 7


@pytest.mark.parametrize("change", [
    {"model_type": "unigram"}, {"normalization_rule_name": "nmt_nfkc"}, {"user_defined_symbols": ["<end>"]},
    {"user_defined_symbols": ["on", "th"]},  # which pairs of letters would make, too
])  # fmt: skip
def test_a_sentencepiece_model_that_is_no_plain_bpe_is_exported_by_itself(tmp_path, change):
    with mock.patch.dict("data.prepare.SETTINGS", change):
        model = learned(CORPUS, 400).file
    said = export_of(sharp_model(vocab_size=400), tmp_path, model)
    assert "is no plain BPE" in said and not (tmp_path / "out" / "tokenizer.json").exists()
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == model


def test_an_unknown_letter_is_a_token_of_the_vocabulary_also_if_that_is_special():
    theirs = Tokenizer(models.BPE({"a": 0, "<unk>": 1}, [], unk_token="<unk>"))
    theirs.add_special_tokens(["<unk>"])
    ours = read_tokenizer(theirs.to_str().encode())
    assert ours.encode("ab") == [0, 1] and ours.vocab_size == len(ours.token_bytes()) == 2


def test_which_tokenizer_of_a_folder_is_read(tmp_path, prefixed, byte_level, monkeypatch):
    folder = save_folder(their_model(vocab_size=510), tmp_path / "in")
    (folder / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")  # Llama 3's own, in tiktoken's format
    assert "import again" in formats("import", folder, tmp_path / "ours.pt")
    byte_level.save(str(folder / "tokenizer.json"))
    assert imported(folder, tmp_path / "ours.pt", "--overwrite")[1].kind == "tokenizer.json"
    (folder / "tokenizer.model").write_bytes(prefixed.serialized_model_proto())
    said = formats("import", folder, tmp_path / "ours.pt", "--overwrite")
    assert "lacks 2 added" in said and f"--tokenizer {folder / 'tokenizer.json'}" in said  # which has them
    (folder / "added_tokens.json").write_text('{"<|im_start|>": 508, "</s>": 2}')
    assert "lacks 3 added" in formats("import", folder, tmp_path / "ours.pt", "--overwrite")
    assert imported(folder, tmp_path / "ours.pt", "--overwrite")[1].kind == "SentencePiece"
    change_json(folder / "config.json", eos_token_id=9999)
    refused(quick("-m formats", "import", folder, tmp_path / "no.pt"), "10000", "510", "eos_token_id")
    (folder / "tokenizer.model").unlink()
    for library in ("tokenizers", "safetensors"):
        monkeypatch.setitem(sys.modules, library, None)
        refused(quick("-m formats", "import", folder, tmp_path / "no.pt"), library, "pip install")


def save_tuned(folder, quantize="none", base=None, **settings):
    """A tuned model, saved as ours.pt; base.pt is its base, or another one."""
    lora = LoRAConfig(3, 5.5, 0.0, list(TARGETS), quantize)
    save(folder / "base.pt", {**foreign.checkpoint_of(base or sharp_model(**settings)), "grouped": {"a": 1}})
    tuned = adapted(sharp_model(**settings), **asdict(lora))
    save(folder / "ours.pt", {**foreign.checkpoint_of(tuned), "lora": asdict(lora)})
    return tuned


def export(folder, name):
    return formats("export", folder / "ours.pt", folder / name, "--adapter")


def attach(folder, name, command=formats):
    """Put an adapter on base.pt, as back.pt."""
    return command("import", folder / name, folder / "back.pt", "--base", folder / "base.pt", "--overwrite")


def refuse(folder, name, *words):
    refused(attach(folder, name, lambda *line: quick("-m formats", *line)), *words)
    assert not (folder / "back.pt").exists()


def test_adapters_cross_to_peft_and_back(tmp_path):
    from peft import PeftModel

    settings = {"n_kv_head": 2, "tie_embeddings": False}
    ours = save_tuned(tmp_path, **settings)
    assert "r 3 on wq wk wv wo w1 w2 w3 output" in export(tmp_path, "adapter")
    theirs = PeftModel.from_pretrained(to_hugging_face(sharp_model(**settings)), tmp_path / "adapter")
    # float32, and another order of the products
    assert_close(logits(ours), logits(theirs), 1e-5, "exported")
    for name, p in theirs.named_parameters():  # their training
        if "lora_" in name:
            p.data.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    theirs.save_pretrained(tmp_path / "theirs")
    attach(tmp_path, "theirs")
    back = build_model(load(tmp_path / "back.pt"))
    assert_close(logits(back), logits(theirs), 1e-5, "imported")
    assert load(tmp_path / "back.pt")["grouped"] == {"a": 1}
    assert (logits(back) - logits(ours)).abs().max() > 1e-2
    formats("export", tmp_path / "back.pt", tmp_path / "again", "--adapter")
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "again"))
    head = first.pop(name_of_head := "base_model.model.lm_head.base_layer.weight")  # a copy of the base's
    assert first.keys() == second.keys() and all(torch.equal(x, second[name]) for name, x in first.items())
    (tmp_path / "back.pt").unlink()
    damaged = next(name for name in first if "lora_A" in name)
    one = first[damaged].index_fill(0, torch.tensor(0), -torch.inf)
    save_file({**first, damaged: one}, tmp_path / "theirs/adapter_model.safetensors")
    refuse(tmp_path, "theirs", "finite")
    save_file({**first, name_of_head: -head}, tmp_path / "theirs/adapter_model.safetensors")
    refuse(tmp_path, "theirs", "lm_head")


def test_rank_stabilized_adapters_keep_their_scale(tmp_path):
    from peft import LoraConfig, get_peft_model

    save_tuned(tmp_path, n_kv_head=2)
    settings = {"r": 4, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"], "use_rslora": True}
    theirs = to_hugging_face(sharp_model(n_kv_head=2))
    theirs = get_peft_model(theirs, LoraConfig(**settings, init_lora_weights=False)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    attach(tmp_path, "theirs")
    back = load(tmp_path / "back.pt")
    assert back["lora"] == asdict(LoRAConfig(4, 6.0, 0.0, ["wq", "w2"]))
    assert_close(logits(build_model(back)), logits(theirs), 1e-5)


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_an_adapter_in_a_pt_comes_back_bit_equal_and_goes_on_a_bfloat16_base(tmp_path, quantize):
    ours = save_tuned(tmp_path, quantize)
    assert ("a base in nf4" in export(tmp_path, "adapter.pt")) == (quantize == "nf4")
    size = sum(layer.lora_A.nbytes + layer.lora_B.nbytes for layer in adapters(ours))
    assert (tmp_path / "adapter.pt").stat().st_size < size + 20000  # without the base
    attach(tmp_path, "adapter.pt")
    assert torch.equal(logits(build_model(load(tmp_path / "back.pt"))), logits(ours))
    (tmp_path / "back.pt").rename(tmp_path / "base.pt")
    refuse(tmp_path, "adapter.pt", "merge it")
    save(tmp_path / "base.pt", foreign.checkpoint_of(base := sharp_model().bfloat16()))
    attach(tmp_path, "adapter.pt")
    assert {p.dtype for p in build_model(load(tmp_path / "back.pt")).parameters()} == {torch.float32}
    if quantize == "none":
        wo = load(tmp_path / "back.pt")["model"]["layers.1.attention.wo.linear.weight"]
        assert torch.equal(wo, base.layers[1].attention.wo.weight)


@pytest.mark.parametrize("other", [{"dim": 48}, {"n_layer": 3}, {"n_kv_head": 2}])
@pytest.mark.parametrize("kind", ["adapter.pt", "folder"])
def test_an_adapter_of_another_model_is_refused(tmp_path, other, kind):
    save_tuned(tmp_path, base=sharp_model(**other))
    export(tmp_path, kind)
    refuse(tmp_path, kind, "another model", "lora_")


@pytest.mark.parametrize("change, word", [
    ({"use_qalora": True}, "use_qalora"), ({"peft_type": "IA3"}, "IA3"), ({"kasa_config": {"a": 1}}, "kasa"),
    ({"alora_invocation_tokens": [1]}, "alora"), ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
    ({"r": 5}, "another model"), ({"r": "four"}, "lora_r"), ({"r": None}, "damaged"),
    ({"r": 2**62}, "lora_r"), ({"lora_alpha": -1}, "lora_alpha"), ({"init_lora_weights": "pissa"}, "pissa"),
])  # fmt: skip
def test_an_adapter_that_is_no_plain_lora_is_refused(tmp_path, change, word):
    save_tuned(tmp_path)
    export(tmp_path, "folder")
    change_json(tmp_path / "folder" / "adapter_config.json", **change)
    refuse(tmp_path, "folder", word)


@pytest.mark.parametrize("how", [
    {"rank_pattern": {"q_proj": 2}}, {"layers_to_transform": [0]}, {"modules_to_save": ["lm_head"]},
    {"lora_bias": True}, {"trainable_token_indices": [3]},
])  # fmt: skip
def test_variants_of_lora_are_refused_by_their_tensors(tmp_path, how):
    from peft import LoraConfig, get_peft_model

    save_tuned(tmp_path)
    config = LoraConfig(r=3, target_modules=["q_proj", "v_proj"], **how)
    get_peft_model(to_hugging_face(sharp_model()), config).save_pretrained(tmp_path / "folder")
    refuse(tmp_path, "folder", "another model")


@pytest.mark.parametrize("settings", [
    {"k_groups": [[0, 1, 1, 1]] * 2}, {"n_kv_head": 1, "k_latent": [[2] * 4] * 2}, {"novel": True},
    {"gated": True},
])  # fmt: skip
def test_uneven_groups_and_extra_layers_have_no_peft_format(tmp_path, settings):
    save_tuned(tmp_path)
    export(tmp_path, "plain")
    save_tuned(tmp_path, **settings)
    refused(quick("-m formats", "export", tmp_path / "ours.pt", tmp_path / "folder", "--adapter"), "PEFT")
    refuse(tmp_path, "plain", "PEFT")


APART = {"k_groups": [[0, 1, 2, 2], [0, 0, 1, 1]], "v_groups": [[0, 1, 1, 1], [0, 0, 0, 0]]}


@pytest.mark.parametrize("settings, dtype", [
    ({"rope_theta": 5e4}, torch.float32), ({"n_kv_head": 2, "tie_embeddings": False}, torch.float16),
    ({"n_kv_head": 1, "norm_eps": 2e-3}, torch.bfloat16), (APART, torch.float32),
    ({"k_groups": [[0, 1, 0, 1]] * 2, "v_groups": [[0] * 4] * 2}, torch.float32),
])  # fmt: skip
def test_a_gguf_file_comes_back_and_is_the_same_model_to_transformers(tmp_path, tiny_data, settings, dtype):
    data = (tiny_data / "tokenizer.model").read_bytes()
    ours, own = sharp_model(vocab_size=400, **settings).to(dtype), read_tokenizer(data)
    export_of(ours, tmp_path, data, "a.gguf")
    back, tokenizer = imported(tmp_path / "a.gguf", tmp_path / "back.pt")
    assert_close(logits(back), logits(ours.float()), TOLERANCE, "logits")
    if "k_groups" not in settings:
        assert all(torch.equal(x, ours.state_dict()[name]) for name, x in back.state_dict().items())
    assert all(tokenizer.prompt(text) == own.prompt(text) for text in (*TEXTS, *CORPUS))
    if settings == APART:  # of an architecture that transformers does not read
        assert back.config.k_groups == [[0, 1, 2, 3], [0, 0, 1, 1]]
    else:
        theirs = LlamaForCausalLM.from_pretrained(tmp_path, gguf_file="a.gguf", dtype=torch.float32).eval()
        assert_close(logits(theirs), logits(ours.float()), TOLERANCE, "transformers' logits")


@pytest.mark.parametrize("name, value, why", [
    ("rope.scaling.factor", 4.0, "scaled"), ("rope.scale_linear", 4.0, "scaled"),  # to llama.cpp both linear
    ("attention.head_count_kv", [4, 3], "do not divide 4"), ("split.count", 2, "--merge"),
])  # fmt: skip
def test_what_gguf_has_and_our_models_do_not_is_refused(name, value, why):
    sizes = {"llama.block_count": 2, "llama.attention.head_count": 4, "llama.embedding_length": 8}
    with pytest.raises(UserError, match=why):
        settings_of({"general.architecture": "llama", **sizes, f"llama.{name}": value, name: value}, set())


@pytest.mark.parametrize("part", PRE_TOKENIZERS)
def test_a_byte_level_tokenizer_crosses_gguf(tmp_path, byte_level, part):
    byte_level.add_tokens(["    "])  # one that is no special token
    fields = json.loads(byte_level.to_str())
    fields["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[part][0]}
    fields["model"]["ignore_merges"] = part == "llama-bpe"
    ours = with_special(read_tokenizer(json.dumps(fields).encode()), 1, part == "llama-bpe", [2])
    export_of(sharp_model(vocab_size=404), tmp_path, ours.data, "a.gguf")
    _, back = imported(tmp_path / "a.gguf", tmp_path / "back.pt")
    assert back.special == ours.special
    assert all(back.prompt(text) == ours.prompt(text) for text in (*TEXTS, "12345", "a    b", *CORPUS))


def test_llama_cpp_writes_the_same_greedy_text(tmp_path, tiny_data):
    llama_cpp = pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python, which compiles it")
    data, ours = (tiny_data / "tokenizer.model").read_bytes(), sharp_model(vocab_size=400, **APART)
    export_of(ours, tmp_path, data, "a.gguf")
    theirs = llama_cpp.Llama(str(tmp_path / "a.gguf"), n_ctx=64, n_threads=1, verbose=False)
    for text in TEXTS[1:]:
        prompt = read_tokenizer(data).prompt(text)
        assert theirs.tokenize(text.encode()) == prompt
        written = itertools.islice(theirs.generate(prompt, temp=0.0, repeat_penalty=1.0), 20)
        assert ours.generate([prompt], 20) == [list(written)]
