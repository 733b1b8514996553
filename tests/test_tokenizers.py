"""Other programs' tokenizers in and out: the tokens, and which of them open and end a text."""

import io
import json
import sys

import pytest
import sentencepiece as spm
from conftest import ROOT, quick, refused, sharp_model
from foreign import TEXTS, export_of, run, save_folder, their_model, write_llama2c_tokenizer

from checkpoint import build, load
from tokenizer import SETTINGS, read_tokenizer
from tokenizer_files import sentencepiece_of_llama2c


@pytest.fixture
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
    assert (tokenizer.bos, tokenizer.eos, tokenizer.stop) == (1, 2, [2, 3, 1])
    (tmp_path / "text.txt").write_text("".join(TEXTS))
    done = quick("eval_ppl.py", tmp_path / "ours.pt", "--text", tmp_path / "text.txt", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["tokenizer"].startswith("tokenizer.json 400"), done.stderr
    assert quick("sample.py", tmp_path / "ours.pt", "--prompt", "def", "--max_new_tokens", 5).stdout.startswith("def")
    run("export", tmp_path / "ours.pt", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == [2, 3]
    back = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert all(back.encode(text) == byte_level.encode(text).ids for text in TEXTS)


@pytest.mark.parametrize("prepend", ["normalizer", "metaspace"])
def test_tokenizer_json_like_llama_2s(prepended, prepend):
    """Made of a SentencePiece model by transformers' own conventions; byte pieces, an added token, "<s>" as text."""
    from tokenizers import AddedToken, normalizers, pre_tokenizers

    backend, sp = prepended
    if prepend == "normalizer":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    else:
        backend.normalizer, backend.pre_tokenizer = None, pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backend.add_tokens([AddedToken("‹fïm›", normalized=False)])
    tokenizer = read_tokenizer(backend.to_str().encode())
    assert tokenizer.bos == 1 and tokenizer.dummy_prefix
    for text in TEXTS:
        if prepend == "normalizer" or not text.startswith(" "):  # Metaspace puts no space before a text with one
            assert tokenizer.encode(text) == sp.encode(text), text
    for text in (TEXTS[1], *TEXTS[3:], "a </s> is no end", "x‹fïm›"):
        ids = tokenizer.prompt(text)
        assert tokenizer.decode(ids) == text and tokenizer.token_bytes()[ids].sum() == len(text.encode()), text
        assert not {0, 2} & set(ids)


@pytest.fixture
def prepended(prefixed):
    """The SentencePiece model `prefixed` as a BPE of `tokenizers`, and itself."""
    from tokenizers import Tokenizer, decoders, models, processors

    normal = {prefixed.id_to_piece(i): i for i in range(259, 500)}
    merges = [(piece[:cut], piece[cut:]) for piece in normal for cut in range(1, len(piece))]
    merges = [pair for pair in merges if set(pair) <= set(normal)]
    vocabulary = {prefixed.id_to_piece(i): i for i in range(500)}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    strip = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(strip)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend, prefixed


@pytest.mark.parametrize(
    "files, bos, add_bos, eos",
    [
        ({}, 1, True, [2]),
        ({"config.json": {"bos_token_id": 0, "eos_token_id": 2}}, 1, True, [2]),  # llama-160m's BOS is wrong
        ({"config.json": {"eos_token_id": 1}}, 1, True, [2]),
        ({"config.json": {"eos_token_id": [2, 7]}}, 1, True, [2, 7]),
        ({"generation_config.json": {"eos_token_id": [2, 300]}}, 1, True, [2, 300]),  # Llama 3 Instruct
        ({"tokenizer_config.json": {"add_bos_token": False}}, 1, False, [2]),  # Yi
        ({"tokenizer_config.json": {"eos_token": {"content": "</s>"}}}, 1, True, [2]),
        ({"config.json": {"bos_token_id": None, "eos_token_id": -1}}, 1, True, [2]),
        ({"config.json": {"eos_token_id": 501}}, 1, True, [2, 501]),  # beyond the tokenizer: ChatML
    ],
)
def test_special_tokens_beside_a_sentencepiece_model(tmp_path, prefixed, files, bos, add_bos, eos):
    tokenizer, again = there_and_back(tmp_path, "tokenizer.model", prefixed.serialized_model_proto(), files)
    assert tokenizer.special == again.special == {"bos": bos, "add_bos": add_bos, "eos": eos}
    assert tokenizer.file == again.file == prefixed.serialized_model_proto()
    assert tokenizer.prompt("a") == ([1] if add_bos else []) + prefixed.encode("a") and tokenizer.prompt("") == [1]
    document = [*tokenizer.prompt("a b"), tokenizer.eos]
    assert tokenizer.token_bytes()[document].sum() == 3 and tokenizer.decode(document) == "a b"


@pytest.mark.parametrize(
    "files, template, bos, add_bos, eos",
    [
        ({}, "<s> $A", 1, True, []),
        ({"tokenizer_config.json": {"eos_token": "</s>"}}, "<s> $A", 1, True, [2]),
        (
            {"tokenizer_config.json": {"eos_token": "<end>"}, "config.json": {"eos_token_id": [2, 3]}},
            "<s> $A",
            1,
            True,
            [3, 2],
        ),
        ({"tokenizer_config.json": {"add_bos_token": False}}, "<s> $A", 1, True, []),  # the file decides
        ({"tokenizer_config.json": {"add_bos_token": True, "bos_token": "<s>"}}, "$A", 1, True, []),  # deepseek
        ({"config.json": {"bos_token_id": 0, "eos_token_id": 0}}, "$A", 0, False, [0]),  # SmolLM: one token is both
        ({"config.json": {"bos_token_id": None, "eos_token_id": 2}}, "$A", -1, False, [2]),
        ({}, "$A </s>", -1, False, [2]),
    ],
)
def test_special_tokens_beside_a_tokenizer_json(tmp_path, byte_level, files, template, bos, add_bos, eos):
    from tokenizers import processors
    from transformers import AutoTokenizer

    special = [(piece, i) for i, piece in enumerate(("<pad>", "<s>", "</s>", "<end>")) if piece in template]
    byte_level.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    tokenizer, again = there_and_back(tmp_path, "tokenizer.json", byte_level.to_str().encode(), files)
    assert tokenizer.special == again.special == {"bos": bos, "add_bos": add_bos, "eos": eos}
    assert tokenizer.prompt("def") == ([bos] if add_bos else []) + tokenizer.encode("def")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert [i for i in theirs.encode("def") if i not in eos] == tokenizer.prompt("def")
    assert (theirs.bos_token_id, theirs.eos_token_id) == (bos if bos >= 0 else None, eos[0] if eos else None)


def there_and_back(tmp_path, name, data, files):
    """The tokenizer of a folder after its import, and after its export and second import."""
    folder = save_folder(their_model(vocab_size=510), tmp_path / "in", "safetensors")
    (folder / name).write_bytes(data)
    config = {**json.loads((folder / "config.json").read_text()), "bos_token_id": None, "eos_token_id": None}
    for file, content in {"config.json": {}, "generation_config.json": {}, **files}.items():
        (folder / file).write_text(json.dumps({**(config if file == "config.json" else {}), **content}))
    run("import", folder, tmp_path / "ours.pt")
    run("export", tmp_path / "ours.pt", tmp_path / "out")
    run("import", tmp_path / "out", tmp_path / "again.pt")
    return tuple(read_tokenizer(load(tmp_path / name)["tokenizer"]) for name in ("ours.pt", "again.pt"))


def test_tokens_that_only_tokenizer_json_has_are_reported(tmp_path, prepended):
    backend, sp = prepended
    folder = save_folder(their_model(vocab_size=510), tmp_path / "in", "safetensors")
    (folder / "tokenizer.model").write_bytes(sp.serialized_model_proto())
    backend.save(str(folder / "tokenizer.json"))
    assert "note" not in run("import", folder, tmp_path / "ours.pt")
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    backend.save(str(folder / "tokenizer.json"))
    said = run("import", folder, tmp_path / "more.pt")
    assert "2 tokens of tokenizer.json are not in tokenizer.model" in said and "<|im_start|>" in said
    run("import", folder, tmp_path / "json.pt", "--tokenizer", folder / "tokenizer.json")
    assert read_tokenizer(load(tmp_path / "json.pt")["tokenizer"]).kind == "tokenizer.json"


def test_a_sentencepiece_model_that_is_no_plain_bpe_is_exported_alone(tmp_path):
    for name, settings in (
        ("unigram", {"model_type": "unigram", "byte_fallback": True}),
        ("normalizing", {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "nmt_nfkc"}),
        ("symbols", {**SETTINGS, "user_defined_symbols": ["<|im_end|>"]}),
    ):
        model = io.BytesIO()
        text = iter((ROOT / "train.py").read_text().splitlines())
        settings = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, **settings}
        spm.SentencePieceTrainer.train(
            sentence_iterator=text, model_writer=model, vocab_size=400, minloglevel=2, **settings
        )
        (tmp_path / name).mkdir()
        said = export_of(sharp_model(vocab_size=400), tmp_path / name, model.getvalue())
        assert "is no plain BPE" in said and not (tmp_path / name / "out" / "tokenizer.json").exists(), name


def test_an_export_tells_llama_cpp_whether_a_space_comes_first(tmp_path, tiny_data, prefixed):
    learned = (tiny_data / "tokenizer.model").read_bytes()
    for name, data, space in (("learned", learned, False), ("prefixed", prefixed.serialized_model_proto(), True)):
        (tmp_path / name).mkdir()
        export_of(sharp_model(vocab_size=500), tmp_path / name, data)
        settings = json.loads((tmp_path / name / "out" / "tokenizer_config.json").read_text())
        assert settings["add_prefix_space"] is space


def test_a_model_without_a_tokenizer_is_exported_without_special_tokens(tmp_path):
    from transformers import AutoConfig

    export_of(sharp_model(), tmp_path)
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.bos_token_id is None and config.eos_token_id is None


def test_a_special_token_beyond_the_vocabulary_is_refused(tmp_path, prefixed):
    folder = save_folder(their_model(vocab_size=500, bos_token_id=1, eos_token_id=9999), tmp_path / "in", "safetensors")
    (folder / "tokenizer.model").write_bytes(prefixed.serialized_model_proto())
    refused(quick("checkpoint.py", "import", folder, tmp_path / "ours.pt"), "eos_token_id is 9999", "500 tokens")


def test_exported_tokenizer_gives_transformers_the_same_tokens(tmp_path, tiny_data, prefixed):
    from transformers import AutoTokenizer

    learned = (tiny_data / "tokenizer.model").read_bytes()
    code = (ROOT / "model.py").read_text()
    # in Llama 2's model, runs of spaces stand early and are joined last
    write_llama2c_tokenizer(tmp_path / "tok.bin", prefixed, spaces=-1e6)
    late = sentencepiece_of_llama2c((tmp_path / "tok.bin").read_bytes())
    for name, data in (("learned", learned), ("prefixed", prefixed.serialized_model_proto()), ("late", late)):
        (tmp_path / name).mkdir()
        export_of(sharp_model(vocab_size=500), tmp_path / name, data)
        ours, theirs = read_tokenizer(data), AutoTokenizer.from_pretrained(tmp_path / name / "out")
        for text in (*TEXTS, code, *code.splitlines()):
            assert theirs.encode(text) == ours.prompt(text), (name, text)
            assert theirs.decode(theirs.encode(text), skip_special_tokens=True) == text


def test_llama_3s_own_tokenizer_file_is_told_from_sentencepiece(tmp_path, byte_level):
    folder = save_folder(their_model(vocab_size=400), tmp_path / "in", "safetensors")
    (folder / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    refused(quick("checkpoint.py", "import", folder, tmp_path / "ours.pt"), "tiktoken", "--tokenizer tokenizer.json")
    byte_level.save(str(folder / "tokenizer.json"))
    run("import", folder, tmp_path / "ours.pt")
    assert read_tokenizer(load(tmp_path / "ours.pt")["tokenizer"]).kind == "tokenizer.json"


@pytest.mark.parametrize("library", ["safetensors", "tokenizers"])
def test_a_missing_library_is_named_with_its_command(tmp_path, byte_level, monkeypatch, library):
    folder = save_folder(their_model(vocab_size=400), tmp_path / "in", "safetensors")
    byte_level.save(str(folder / "tokenizer.json"))
    monkeypatch.setitem(sys.modules, library, None)
    refused(quick("checkpoint.py", "import", folder, tmp_path / "ours.pt"), f"pip install {library}")
