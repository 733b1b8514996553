"""Other programs' tokenizers in and out: the tokens, and which of them open and end a text."""

import json
import sys

import pytest
from conftest import ROOT, quick, refused, sharp_model
from foreign import TEXTS, export_of, run, save_folder, their_model, write_llama2c_tokenizer

from checkpoint import build, load
from tokenizer import read_tokenizer
from tokenizer_files import sentencepiece_of_llama2c


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
    "files, special",
    [
        ({}, (1, True, [2, 1])),
        ({"config.json": {"bos_token_id": 0, "eos_token_id": 2}}, (1, True, [2, 1])),  # llama-160m's BOS is wrong
        ({"config.json": {"eos_token_id": [2, 7]}}, (1, True, [2, 7, 1])),
        ({"generation_config.json": {"eos_token_id": [2, 300]}}, (1, True, [2, 300, 1])),  # Llama 3 Instruct
        ({"tokenizer_config.json": {"add_bos_token": False}}, (1, False, [2, 1])),  # Yi
        ({"tokenizer_config.json": {"eos_token": {"content": "</s>"}}}, (1, True, [2, 1])),
        ({"config.json": {"bos_token_id": None, "eos_token_id": -1}}, (1, True, [2, 1])),
        ({"config.json": {"eos_token_id": 501}}, (1, True, [2, 501, 1])),  # beyond the tokenizer: ChatML
    ],
)
@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_special_tokens_of_all_files(tmp_path, prepended, name, files, special):
    backend, sp = prepended
    theirs = their_model(vocab_size=510)
    folder = save_folder(theirs, tmp_path / "in", "safetensors")
    if name == "tokenizer.model":
        (folder / name).write_bytes(sp.serialized_model_proto())
    else:
        backend.save(str(folder / name))
        special = (
            special[0],
            special[1],
            [token for token in special[2] if token != 2 or "2" in str(files) or "</s>" in str(files)],
        )
    config = {**json.loads((folder / "config.json").read_text()), "bos_token_id": None, "eos_token_id": None}
    for file, content in {"config.json": {}, "generation_config.json": {}, **files}.items():
        (folder / file).write_text(json.dumps({**(config if file == "config.json" else {}), **content}))
    run("import", folder, tmp_path / "ours.pt")
    tokenizer = read_tokenizer(load(tmp_path / "ours.pt")["tokenizer"])
    assert (tokenizer.bos, tokenizer.add_bos, tokenizer.stop) == special
    assert tokenizer.prompt("a")[: 1 + special[1]] == ([1] if special[1] else []) + tokenizer.encode("a")[:1]
    assert tokenizer.prompt("") == [1]
    run("export", tmp_path / "ours.pt", tmp_path / "out")
    run("import", tmp_path / "out", tmp_path / "again.pt")
    again = read_tokenizer(load(tmp_path / "again.pt")["tokenizer"])
    assert (again.special, again.file) == (tokenizer.special, tokenizer.file)


def test_a_special_token_beyond_the_vocabulary_is_refused(tmp_path, prefixed):
    folder = save_folder(their_model(vocab_size=500, bos_token_id=1, eos_token_id=9999), tmp_path / "in", "safetensors")
    (folder / "tokenizer.model").write_bytes(prefixed.serialized_model_proto())
    refused(quick("checkpoint.py", "import", folder, tmp_path / "ours.pt"), "eos_token_id is 9999", "500 tokens")


def test_exported_tokenizer_gives_transformers_the_same_tokens(tmp_path, tiny_data, prefixed):
    from transformers import AutoTokenizer

    learned = (tiny_data / "tokenizer.model").read_bytes()
    code = (ROOT / "model.py").read_text()
    # in Llama 2's model, runs of spaces stand early and are joined last
    write_llama2c_tokenizer(tmp_path / "tok.bin", prefixed, spaces=-1e9)
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
