"""Hundreds of damaged model files: one clear line and exit code 2 each, or, where the damage touches nothing that is
read, the same weights. No hang, no memory beyond the file's size, no code run."""

import io
import json
import random
import re
import shutil
import signal
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import quick, refused, sharp_model
from foreign import checkpoint_of, save_folder, their_model, write_llama2c, write_llama2c_tokenizer
from safetensors.torch import load_file, save_file

from checkpoint import load, save
from tokenizer import Tokenizer

SLACK = 24 * 2**20  # bytes that Python and torch may take for themselves while a small file is refused
KINDS = ("safetensors", "safetensors shards", "bin", "llama2c", "meta", "ckpt")


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_data):
    """{kind: folder of an undamaged model}, each with the file that `import` or `show` is given."""
    root, tokenizer = tmp_path_factory.mktemp("whole"), (tiny_data / "tokenizer.model").read_bytes()
    for kind in KINDS:
        folder = root / kind
        if kind in KINDS[:3]:
            save_folder(their_model(vocab_size=400), folder, kind)
            (folder / "tokenizer.model").write_bytes(tokenizer)
            continue
        folder.mkdir()
        ours = sharp_model(vocab_size=400, tie_embeddings=kind == "llama2c")
        if kind == "llama2c":
            write_llama2c(folder / "model.bin", ours)
            write_llama2c_tokenizer(folder / "tok.bin", Tokenizer(tokenizer).sp)
        elif kind == "meta":
            torch.save(ours.state_dict(), folder / "consolidated.00.pth")
            params = {"dim": 32, "n_layers": 2, "n_heads": 4, "norm_eps": 1e-5, "rope_theta": 1e4}
            (folder / "params.json").write_text(json.dumps(params))
            (folder / "tokenizer.model").write_bytes(tokenizer)
        else:
            save(folder / "ckpt.pt", checkpoint_of(ours, tokenizer))
    return root


def peak(reset=False):
    """Most bytes resident in this process since the last reset; 0 where Linux does not tell."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    except OSError:
        return 0


def opened(kind, folder, out):
    """What the command said of the file, within its memory."""
    size = sum(path.stat().st_size for path in folder.iterdir())
    before = peak(reset=True)
    signal.alarm(120)
    if kind == "ckpt":
        done = quick("checkpoint.py", "show", folder / "ckpt.pt")
    elif kind == "llama2c":
        done = quick("checkpoint.py", "import", folder / "model.bin", out, "--tokenizer", folder / "tok.bin")
    else:
        done = quick("checkpoint.py", "import", folder, out)
    signal.alarm(0)
    assert peak() - before < 3 * size + SLACK, f"{peak() - before:,} bytes for a file of {size:,}"
    return done


def check(kind, folder, whole, out, *words):
    """Whether the damaged model was refused; if not, it must be the whole one."""
    done = opened(kind, folder, out)
    if done.returncode:
        refused(done, *words)
        assert not out.exists() and not out.with_name(out.name + ".tmp").exists()
        return True
    assert not words, f"accepted, and should have been refused: {sorted(path.name for path in folder.iterdir())}"
    if kind == "ckpt":
        same = load(folder / "ckpt.pt"), load(whole / kind / "ckpt.pt")
        assert same[0]["config"] == same[1]["config"] and same[0]["tokenizer"] == same[1]["tokenizer"]
        assert all(torch.equal(same[0]["model"][name], x) for name, x in same[1]["model"].items())
    else:
        got, reference = load(out), out.with_name(f"{kind}.pt")
        if not reference.exists():
            assert opened(kind, whole / kind, reference).returncode == 0
        right = load(reference)
        assert got["config"] == right["config"] and got["tokenizer"] == right["tokenizer"]
        assert all(torch.equal(got["model"][name], x) for name, x in right["model"].items())
        out.unlink()
    return False


@pytest.mark.parametrize("kind", KINDS)
def test_cut_files_and_flipped_bytes(kind, whole, tmp_path):
    """Weights themselves carry no checksum in safetensors and llama2.c's format, so only what describes them is hit."""
    rng, refusals, out = random.Random(kind), 0, tmp_path / "out.pt"
    names = sorted(path.name for path in (whole / kind).iterdir() if not path.name.startswith("generation"))
    for number in range(40):
        folder = tmp_path / str(number)
        shutil.copytree(whole / kind, folder)
        path = folder / names[number % len(names)]
        data = bytearray(path.read_bytes())
        described = {
            ".safetensors": 8 + struct.unpack("<Q", data[:8])[0],
            ".bin": 28 if path.name == "model.bin" else 8,
        }
        if number % 3 == 0:
            data = data[: rng.randrange(len(data))]
        elif path.name.startswith("tok") or path.suffix == ".json":
            start = rng.randrange(len(data) // 2)  # a byte more or less would only be another text
            data[start : start + len(data) // 3] = b""
        else:
            last = len(data) if kind in ("bin", "meta", "ckpt") else described[path.suffix]
            for _ in range(3):
                data[rng.randrange(last)] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        refusals += check(kind, folder, whole, out)
    assert refusals >= 32, f"{refusals} of 40 refused"


def config_cases():
    absurd = [0, -1, 10**9, 10**30, 1.5, "32", True, [], {}, None]
    names = ["num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size", "vocab_size"]
    for name in names:
        yield from ((name, value) for value in absurd)
    yield from (("max_position_embeddings", value) for value in absurd if value is not None)
    for name in ("num_key_value_heads", "head_dim"):
        yield from ((name, value) for value in absurd if value is not None)
    for name in ("rms_norm_eps", "rope_theta"):
        yield from ((name, value) for value in (0, -1, float("nan"), float("inf"), 10**400, "1", [], {}, True))
    yield from (("tie_word_embeddings", value) for value in ("yes", 1, None, []))
    yield from (("rope_parameters", value) for value in (3, "x", [1], {"rope_type": []}, {"rope_theta": "x"}))
    yield from (("architectures", value) for value in (3, "x", [1], {"a": 1}, [None]))


def test_absurd_config_values(whole, tmp_path):
    folder, cases = tmp_path / "in", list(config_cases())
    shutil.copytree(whole / "safetensors", folder)
    good = json.loads((folder / "config.json").read_text())
    good["rope_theta"] = good.pop("rope_parameters")["rope_theta"]
    for name, value in cases:
        (folder / "config.json").write_text(json.dumps({**good, name: value}))
        assert check("safetensors", folder, whole, tmp_path / "out.pt", ""), f"{name} = {value!r} was accepted"
    assert len(cases) > 90


def test_header_numbers_of_llama2c(whole, tmp_path):
    folder = tmp_path / "in"
    shutil.copytree(whole / "llama2c", folder)
    data = (folder / "model.bin").read_bytes()
    for place in range(7):
        for value in (0, -1, 1, 2**31 - 1, -(2**31), 3, 2**20):
            header = bytearray(data)
            header[4 * place : 4 * place + 4] = struct.pack("<i", value)
            (folder / "model.bin").write_bytes(header)
            assert check("llama2c", folder, whole, tmp_path / "out.pt", "model.bin"), (place, value)
    table = len(data) - 4 * 2 * 64 * 4  # cosines and sines of 64 positions and 4 pairs end the file
    assert struct.unpack("<4f", data[table : table + 16]) == (1, 1, 1, 1)
    (folder / "model.bin").write_bytes(data[:table] + struct.pack("<f", 0.5) * 512)
    assert check("llama2c", folder, whole, tmp_path / "out.pt", "another rope_theta")
    for version, magic in ((1, b"24ka"), (2, b"24ka")):
        (folder / "model.bin").write_bytes(magic + struct.pack("<i", version) + data)
        assert check("llama2c", folder, whole, tmp_path / "out.pt", "--version 0")


def test_safetensors_headers_that_lie(whole, tmp_path):
    folder = tmp_path / "in"
    shutil.copytree(whole / "safetensors", folder)
    path = folder / "model.safetensors"
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    for length in (0, 1, size - 1, size + 1, len(data), 2**27, 2**40, 2**63, 2**64 - 1):
        path.write_bytes(struct.pack("<Q", length) + data[8:])
        assert check("safetensors", folder, whole, tmp_path / "out.pt", "model.safetensors"), length
    name = "model.norm.weight"
    for change in (
        {"shape": [2**40]}, {"shape": [-1]}, {"shape": []}, {"dtype": "F64"}, {"dtype": "X"}, {"data_offsets": [0, 1]},
        {"data_offsets": [0, 2**60]}, {"data_offsets": [128, 0]}, {"data_offsets": None}, {"dtype": "I32"},
    ):  # fmt: skip
        text = json.dumps({**header, name: {**header[name], **change}}).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
        assert check("safetensors", folder, whole, tmp_path / "out.pt", str(folder)), change
    for text in (b"[" * 100000, b"{" * 100000, b"{}", b"null", b"[]", b"\xff" * 100):
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
        assert check("safetensors", folder, whole, tmp_path / "out.pt", str(folder)), text[:10]


def test_missing_extra_misshapen_and_infinite_tensors(whole, tmp_path):
    folder = tmp_path / "in"
    shutil.copytree(whole / "safetensors", folder)
    good = load_file(folder / "model.safetensors")
    cases = [({}, name, name) for name in good]
    cases += [({name: x[..., :-2].contiguous()}, None, name) for name, x in good.items()]
    cases += [({name + "_scale": torch.ones(3)}, None, "_scale") for name in list(good)[:3]]
    cases += [({name: torch.full_like(good[name], bad)}, None, "not finite")
              for name in list(good)[:4] for bad in (float("nan"), float("inf"))]  # fmt: skip
    cases += [({name: x.to(dtype)}, None, str(dtype)) for name, x in list(good.items())[:3]
              for dtype in (torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64)]  # fmt: skip
    for change, without, word in cases:
        tensors = {name: x for name, x in {**good, **change}.items() if name != without}
        save_file(tensors, folder / "model.safetensors")
        word = "contradicts itself" if without or "layers" in word else word
        assert check("safetensors", folder, whole, tmp_path / "out.pt", word), (change.keys(), without)


def test_shard_indexes_that_lie(whole, tmp_path):
    folder = tmp_path / "in"
    shutil.copytree(whole / "safetensors shards", folder)
    index = folder / "model.safetensors.index.json"
    good = json.loads(index.read_text())["weight_map"]
    first = sorted(good)[0]
    for value in ("../../etc/passwd", "/etc/passwd", "missing.safetensors", "config.json", "", ".", 5, None, [], {}):
        index.write_text(json.dumps({"weight_map": {**good, first: value}}))
        assert check("safetensors shards", folder, whole, tmp_path / "out.pt", str(folder)), value
    for value in ({}, [], None, "x", {"a": {}}):
        index.write_text(json.dumps({"weight_map": value}))
        assert check("safetensors shards", folder, whole, tmp_path / "out.pt", str(folder)), value
    index.write_text(json.dumps({"weight_map": good}))
    (folder / good[first]).unlink()
    assert check("safetensors shards", folder, whole, tmp_path / "out.pt", good[first], "complete the download")


@pytest.mark.parametrize(
    "kind, file", [("bin", "pytorch_model.bin"), ("meta", "consolidated.00.pth"), ("ckpt", "ckpt.pt")]
)
def test_pickles_neither_run_code_nor_fill_the_memory(kind, file, whole, tmp_path):
    folder, marker = tmp_path / "in", tmp_path / "code has run"
    shutil.copytree(whole / kind, folder)
    good = torch.load(folder / file, weights_only=True)
    state = good["model"] if kind == "ckpt" else good
    name = sorted(state)[0]

    def wrapped(**changes):
        return {**good, "model": {**state, **changes}} if kind == "ckpt" else {**state, **changes}

    huge, shared = torch.zeros(1).expand(2**20, 2**20), torch.zeros(max(x.numel() for x in state.values()))
    views = {name: shared[: x.numel()].view(x.shape) for name, x in state.items()}  # ten times what is stored
    for content in (
        wrapped(**{name: huge}), wrapped(**{name: Bomb(marker)}), Bomb(marker), [], None, 3, {}, {3: 4}, torch.ones(3),
        wrapped(**views), wrapped(**{name: "x"}), wrapped(**{name: state[name].to_sparse()}),
        wrapped(**{name: state[name].to("meta")}),
        wrapped(**{name: state[name].flip(0).T.contiguous().T}), wrapped(**{name: state[name].to(torch.int32)}),
        dict.fromkeys(state, huge), wrapped(extra=torch.ones(3)), {k: v for k, v in state.items() if k != name},
    ):  # fmt: skip
        torch.save(content, folder / file)
        assert check(kind, folder, whole, tmp_path / "out.pt", str(folder)), str(content)[:100]
    torch.save(Bomb(marker), folder / file, _use_new_zipfile_serialization=False)
    assert check(kind, folder, whole, tmp_path / "out.pt", str(folder))
    assert not marker.exists()
    buffer = io.BytesIO()
    torch.save(good, buffer)
    for target in ("data/0", "data.pkl"):  # they shrink to a thousandth
        with zipfile.ZipFile(buffer) as stored, zipfile.ZipFile(folder / file, "w", zipfile.ZIP_DEFLATED) as packed:
            for entry in stored.infolist():
                extra = b"\0" * 2**28 if entry.filename.endswith(target) else b""
                packed.writestr(entry.filename, stored.read(entry) + extra)
        assert check(kind, folder, whole, tmp_path / "out.pt", str(folder)), target
