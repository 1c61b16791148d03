"""The token cache: what is in it, when it is built again, what a killed builder leaves."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from data_helpers import config, documents, write_jsonl
from filelock import FileLock
from tokenizers import Tokenizer

from slope.data import DataConfig, cache, cache_format, hashes, prepare, tokenise
from slope.data import tokenizer as tokenizers_of_slope

BUILDER = """
import sys, json, logging, time
logging.basicConfig(level=logging.INFO, stream=sys.stderr)
from slope.data import prepare, tokenise
settings, slow = json.loads(sys.argv[1]), float(sys.argv[2])
write = tokenise._SplitFile.write
def slowly(self, tokens):
    write(self, tokens)
    if slow and self.documents == 3:
        print("writing", flush=True)
        time.sleep(slow)
tokenise._SplitFile.write = slowly
data = prepare(settings, progress=False)
print(data.fingerprint, len(data.train), flush=True)
"""


def builder(settings, slow=0.0):
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", BUILDER, json.dumps(settings), str(slow)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def split_documents(data, split):
    """The documents of a split, decoded."""
    tokens = np.asarray(getattr(data, split).tokens).astype(int)
    assert tokens[-1] == data.eos_token_id
    ends = np.flatnonzero(tokens == data.eos_token_id)
    starts = np.concatenate([[0], ends[:-1] + 1])
    return [data.tokenizer.decode(tokens[a:b]) for a, b in zip(starts, ends, strict=True)]


def builds(monkeypatch):
    """Count the builds from here on."""
    calls = []
    original = cache._build

    def counted(*args):
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(cache, "_build", counted)
    return calls


def test_every_document_is_in_one_split_and_reads_back(settings):
    data = prepare(settings, progress=False)
    train, val = split_documents(data, "train"), split_documents(data, "val")
    assert sorted(train + val) == sorted(documents())
    assert 4 <= len(val) <= 24  # 60 documents, val_ratio 0.2: 12 expected
    assert data.train[0].tolist() == np.asarray(data.train.tokens[:16]).tolist()
    assert data.vocab_size == len(data.tokenizer) <= 300
    assert data.train.dtype == np.uint16


def test_second_run_opens_the_cache(settings, monkeypatch):
    first = prepare(settings, progress=True)
    calls = builds(monkeypatch)
    monkeypatch.setattr(cache, "load_tokenizer", None)
    again = prepare(settings, verify=True)
    longer = prepare({**settings, "max_length": 32})  # the same tokens, cut otherwise
    assert not calls
    assert again.fingerprint == longer.fingerprint == first.fingerprint
    assert again.tokenizer("two of four").input_ids == first.tokenizer("two of four").input_ids
    assert [p for p in Path(settings["cache_dir"]).iterdir() if ".tmp-" in p.name] == []


@pytest.mark.parametrize(
    "change",
    [{"tokenizer": "bpe:280"}, {"val_ratio": 0.3}, {"val_split_seed": 1}, {"max_documents": 30}],
)
def test_other_options_are_another_cache(settings, change, caplog):
    first = prepare(settings, progress=False)
    with caplog.at_level(logging.INFO, "slope.data"):
        other = prepare({**settings, **change}, progress=False)
    assert other.fingerprint != first.fingerprint
    assert "made with tokenizer 'bpe:300' or other options" in caplog.text
    assert prepare(settings, progress=False).fingerprint == first.fingerprint


def test_changed_text_is_never_missed(settings, corpus, monkeypatch):
    """Same size, same modification time: the content counts."""
    monkeypatch.setattr(hashes, "_REST_NS", 0)  # remember the hash at once
    first = prepare(settings, progress=False)
    stat = corpus.stat()
    corpus.write_text(corpus.read_text().replace("doc 7:", "doc 8:"))
    os.utime(corpus, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert corpus.stat().st_size == stat.st_size
    assert prepare(settings, progress=False).fingerprint != first.fingerprint


def test_hashes_are_remembered_for_files_at_rest(settings, corpus, monkeypatch):
    prepare(settings, progress=False)
    assert not (Path(settings["cache_dir"]) / "file-hashes.json").exists()  # written just now
    monkeypatch.setattr(hashes, "_REST_NS", 0)
    first = prepare(settings, progress=False)
    monkeypatch.setattr(hashes, "hash_file", None)
    monkeypatch.setattr(cache_format, "hash_file", lambda path: cache_format.hashlib.sha256(
        path.read_bytes()).hexdigest())  # fmt: skip
    assert prepare(settings, progress=False).fingerprint == first.fingerprint
    (Path(settings["cache_dir"]) / "file-hashes.json").write_text("[")
    monkeypatch.undo()
    assert prepare(settings, progress=False).fingerprint == first.fingerprint


def test_moved_files_find_their_cache(settings, corpus, monkeypatch, tmp_path):
    first = prepare(settings, progress=False)
    moved = corpus.rename(tmp_path / "moved.jsonl")
    calls = builds(monkeypatch)
    again = prepare({**settings, "data_files": [str(moved)]})
    assert not calls and again.fingerprint == first.fingerprint


def truncate(path):
    path.write_bytes(path.read_bytes()[:-2])


def flip_first_byte(path):
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("train.bin", truncate, "train.bin has .* bytes instead of"),
        ("val.bin", flip_first_byte, "header of val.bin is wrong"),
        ("val.bin", Path.unlink, "val.bin cannot be read"),
        ("meta.json", truncate, "meta.json cannot be read"),
        ("meta.json", Path.unlink, "meta.json cannot be read"),
        ("tokenizer.json", Path.unlink, "tokenizer.json cannot be read"),
        ("tokenizer.json", flip_first_byte, "checksum of tokenizer.json is wrong"),
    ],
)
def test_damaged_cache_is_built_again_with_a_warning(settings, caplog, name, damage, said):
    first = prepare(settings, progress=False)
    expected = first.train.tokens.tobytes(), first.val.tokens.tobytes()
    damage(first.cache_dir / name)
    caplog.clear()  # what another test's logging level let through
    with caplog.at_level(logging.WARNING, "slope.data"):
        again = prepare(settings, progress=False)
    (record,) = caplog.records
    assert cache.__name__ == record.name
    assert "cannot be used" in record.message and "building it again" in record.message
    assert re.search(said, record.message)
    assert (again.train.tokens.tobytes(), again.val.tokens.tobytes()) == expected
    caplog.clear()
    prepare(settings, progress=False)
    assert not caplog.records


def test_edited_meta_and_flipped_tokens(settings, caplog):
    first = prepare(settings, progress=False)
    meta = first.cache_dir / "meta.json"
    meta.write_text(meta.read_text().replace('"eos_token_id": 0', '"eos_token_id": 1'))
    prepare(settings, progress=False)
    assert "checksum of meta.json is wrong" in caplog.text
    path = first.cache_dir / "train.bin"
    data = bytearray(path.read_bytes())
    data[200] ^= 1  # one token inside: only the full checksum sees it
    path.write_bytes(bytes(data))
    prepare(settings, progress=False, verify=True)
    assert "checksum of train.bin is wrong" in caplog.text


def test_cache_of_another_tokenizer_under_this_name(settings, caplog):
    first = prepare(settings, progress=False)
    other = prepare({**settings, "tokenizer": "bpe:280"}, progress=False)
    tokens = first.train.tokens.tobytes()
    first.cache_dir.rename(first.cache_dir.with_name("aside"))
    other.cache_dir.rename(first.cache_dir)
    again = prepare(settings, progress=False)
    assert "with tokenizer 'bpe:280' or other options; building it again" in caplog.text
    assert again.train.tokens.tobytes() == tokens


def test_killed_builder_leaves_nothing_that_counts(settings):
    process = builder(settings, slow=60)
    try:
        assert process.stdout.readline() == "writing\n"
        folder = Path(settings["cache_dir"])
        assert [p for p in folder.iterdir() if ".tmp-" in p.name]
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not [p for p in folder.iterdir() if p.is_dir() and ".tmp-" not in p.name]
    data = prepare(settings, progress=False, verify=True)
    assert sorted(split_documents(data, "train") + split_documents(data, "val")) == sorted(
        documents()
    )
    assert not [p for p in folder.iterdir() if ".tmp-" in p.name]


def test_several_processes_build_once(settings):
    first = builder(settings, slow=1.0)
    assert first.stdout.readline() == "writing\n"
    others = [builder(settings) for _ in range(2)]
    results = [process.communicate(timeout=600) for process in [first, *others]]
    assert [process.returncode for process in [first, *others]] == [0, 0, 0], results
    assert len({out.splitlines()[-1] for out, _ in results}) == 1
    assert sum("tokenised text" in log for _, log in results) == 1
    assert not [p for p in Path(settings["cache_dir"]).iterdir() if ".tmp-" in p.name]


def test_waiting_is_said(settings, caplog):
    data = prepare(settings, progress=False)
    (data.cache_dir / "meta.json").unlink()
    lock = FileLock(data.cache_dir.with_name(f"{data.cache_dir.name}.lock"))
    held = threading.Event()

    def hold():
        with lock:
            held.set()
            time.sleep(0.3)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    begun = time.monotonic()
    with caplog.at_level(logging.INFO, "slope.data"):
        prepare(settings, progress=False)
    thread.join()
    assert time.monotonic() - begun > 0.2
    assert "another process is building token cache" in caplog.text


def test_full_disk_names_folder_and_bytes_and_loses_nothing(settings, monkeypatch, tmp_path):
    first = prepare(settings, progress=False)
    write = tokenise._SplitFile.write

    def full(self, tokens):
        if self.documents == 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, tokens)

    monkeypatch.setattr(tokenise._SplitFile, "write", full)
    other = {**settings, "tokenizer": "bpe:280"}
    with pytest.raises(OSError, match=r"^no space left in '.*cache' after \d+ bytes") as caught:
        prepare(other, progress=False)
    assert caught.value.errno == errno.ENOSPC
    assert "needs about" in str(caught.value) and "datamodule.cache_dir=" in str(caught.value)
    monkeypatch.undo()
    folder = Path(settings["cache_dir"])
    assert [p for p in folder.iterdir() if p.is_dir()] == [first.cache_dir]
    assert prepare(settings, progress=False, verify=True).fingerprint == first.fingerprint
    prepare(other, progress=False)


def test_too_little_space_is_found_before_the_work(settings, tmp_path, monkeypatch):
    plain = tmp_path / "plain.txt"
    plain.write_text("\n".join(documents()))
    settings = {**settings, "data_files": str(plain)}
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    monkeypatch.setattr(cache, "write_splits", None)
    with pytest.raises(
        OSError, match=r"^the token cache needs at least \d+ bytes and '.*cache' has 1000 free"
    ):
        prepare(settings, progress=False)


def test_cache_folder_that_cannot_be_made(settings, tmp_path, monkeypatch):
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(OSError, match=r"cannot write a token cache in .* datamodule.cache_dir="):
        prepare({**settings, "cache_dir": str(blocker / "cache")}, progress=False)
    monkeypatch.setattr(hashes, "_REST_NS", -1)  # as if the corpus were older: hashes are kept
    with pytest.raises(
        OSError, match=r"^cannot write a .*/file' \(it is a file\); type "
    ) as caught:
        prepare({**settings, "cache_dir": str(blocker)}, progress=False)
    assert caught.value.errno == errno.EEXIST


def test_equal_documents_stay_on_one_side(tmp_path):
    texts = documents(30)
    file = write_jsonl(tmp_path / "twice.jsonl", texts + texts)
    data = prepare(config(tmp_path, [file]), progress=False)
    train, val = split_documents(data, "train"), split_documents(data, "val")
    assert not set(train) & set(val)
    assert len(train) + len(val) == 60


def test_small_corpus_keeps_one_document_for_validation(tmp_path, corpus):
    data = prepare(config(tmp_path, [corpus], val_ratio=1e-9), progress=False)
    assert len(split_documents(data, "val")) == 1
    assert sorted(split_documents(data, "train") + split_documents(data, "val")) == sorted(
        documents()
    )


def test_end_of_document_in_a_document_is_text(tmp_path):
    texts = [*documents(30), "before <|endoftext|> after"]
    file = write_jsonl(tmp_path / "marks.jsonl", texts)
    data = prepare(config(tmp_path, [file]), progress=False)
    found = split_documents(data, "train") + split_documents(data, "val")
    assert sorted(found) == sorted(texts)


def test_odd_documents(tmp_path):
    file = tmp_path / "odd.jsonl"
    write_jsonl(file, [*documents(20), "", "  \n", "naïve 你好 🙂"])
    with file.open("a") as out:
        out.write('\n{"text": null}\n{"text": "half \\ud83d pair"}\n')
    data = prepare(config(tmp_path, [file]), progress=False)
    found = split_documents(data, "train") + split_documents(data, "val")
    assert sorted(found) == sorted([*documents(20), "naïve 你好 🙂", "half ? pair"])


def test_trained_tokenizer_is_the_same_in_every_process(tmp_path):
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); from data_helpers import documents;"
        "from slope.data.tokenizer import train_bpe; import hashlib;"
        "print(hashlib.sha256(train_bpe(documents(300), 400).to_str().encode()).hexdigest())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program, str(Path(__file__).parent)],
            capture_output=True, text=True, check=True, env={**os.environ, **extra},
        ).stdout
        for extra in ({"PYTHONHASHSEED": "1"}, {"RAYON_NUM_THREADS": "1"})
    }  # fmt: skip
    assert len(outputs) == 1


def test_validation_text_does_not_train_the_tokenizer(settings, monkeypatch):
    seen = []
    original = tokenizers_of_slope.train_bpe
    monkeypatch.setattr(
        tokenizers_of_slope, "train_bpe",
        lambda texts, size: original(seen_by(texts, seen), size),
    )  # fmt: skip
    data = prepare(settings, progress=False)
    assert sorted(seen) == sorted(split_documents(data, "train"))


def seen_by(texts, seen):
    for text in texts:
        seen.append(text)
        yield text


def test_large_vocabulary_takes_four_bytes(tmp_path, corpus):
    vocabulary = {f"w{i}": i for i in range(70_000)} | {"[UNK]": 70_000, "</s>": 70_001}
    from tokenizers import models, pre_tokenizers

    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    path = tmp_path / "words.json"
    backend.save(str(path))
    data = prepare(config(tmp_path, [corpus], tokenizer=str(path)), progress=False)
    assert data.train.dtype == np.uint32
    assert data.vocab_size == 70_002 and data.eos_token_id == 70_001
    assert int(data.train.tokens.max()) == 70_001


def test_config_is_a_mapping_a_dictconfig_or_any_object(settings):
    from omegaconf import OmegaConf

    tree = OmegaConf.create(
        {"datamodule": {**settings, "batch_size": 4, "batch_size_eval": "${datamodule.batch_size}",
                        "hub": {"path": None, "name": None, "split": "train"}}}
    )  # fmt: skip
    OmegaConf.set_struct(tree, True)
    expected = DataConfig.from_config(settings)
    assert DataConfig.from_config(tree.datamodule) == expected
    assert DataConfig.from_config(SimpleNamespace(**settings)) == expected
    assert DataConfig.from_config(expected) is expected


def test_a_build_that_fails_leaves_no_thread_behind(settings, monkeypatch):
    def full(self, tokens):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tokenise._SplitFile, "write", full)
    with pytest.raises((OSError, RuntimeError), match="space") as caught:
        prepare(settings, progress=False)
    # The error holds the frames of the build, and with them whatever they have not closed.
    assert caught.tb is not None
    assert not [thread for thread in threading.enumerate() if "tokenise" in thread.name]


def test_a_flipped_bit_is_found_and_the_cache_built_again(settings, caplog):
    good = prepare(settings, progress=False)
    path = good.train.path
    intact = path.read_bytes()
    middle = len(intact) // 2
    path.write_bytes(intact[:middle] + bytes([intact[middle] ^ 64]) + intact[middle + 1 :])
    prepare(settings, progress=False)
    assert "the checksum of train.bin is wrong; building it again" in caplog.text
    assert path.read_bytes() == intact
