from __future__ import annotations

import gzip
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slope.data import prepare
from slope.evaluation.heldout import (
    HeldOut,
    counting,
    labels,
    measurements,
    read_held_out,
    score,
    windows,
)


@given(st.integers(2, 80), st.integers(2, 20), st.data())
def test_windows_predict_each_token_once_from_enough_context(tokens, window, data):
    stride = data.draw(st.integers(1, window))
    predicted = []
    for number, (start, end, first) in enumerate(windows(tokens, window, stride)):
        assert start < first < end <= start + window
        assert number == 0 or first - start >= max(1, window - stride)
        predicted += range(first, end)
    unseen = set(range(tokens)) - set(predicted)
    assert len(predicted) == len(set(predicted))
    # Without overlap the first token of each window has no context.
    assert unseen == (set(range(0, tokens, stride)) if stride == window else {0})


class Counting(torch.nn.Module):
    """Predicts from how much context it sees: the loss shows which window a token was in."""

    config = SimpleNamespace(max_position_embeddings=8)
    device = torch.device("cpu")

    def get_input_embeddings(self):
        return torch.nn.Embedding(2, 1)

    def forward(self, input_ids):
        position = torch.arange(1.0, input_ids.shape[1] + 1).expand(input_ids.shape)
        logits = torch.stack([torch.zeros_like(position), position], -1)
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_score_is_the_mean_over_the_predicted_tokens(batch_size):
    ids = torch.zeros(13, dtype=torch.long)
    found = score(Counting(), ids, window=6, stride=2, batch_size=batch_size)
    # Token 0 would cost log(1 + e^context).
    contexts = [1, 2, 3, 4, 5] + [4, 5] * 3 + [4]
    losses = [math.log1p(math.exp(c)) for c in contexts]
    assert found.predicted == 12
    assert found.loss == pytest.approx(np.mean(losses), rel=1e-6)
    per_window = [losses[:5], losses[5:7], losses[7:9], losses[9:11], losses[11:]]
    residuals = [sum(w) - found.loss * len(w) for w in per_window]
    assert found.stderr == pytest.approx(
        math.sqrt(5 / 4 * sum(r * r for r in residuals)) / 12, rel=1e-5
    )


def test_score_equals_the_loss_of_transformers(model):
    ids = torch.randint(0, 288, (20,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(input_ids=ids[None], labels=ids[None]).loss.item()
    found = score(model, ids)
    assert found.loss == pytest.approx(expected, rel=1e-6)
    assert (found.window, found.stride, found.stderr) == (32, 32, None)


@pytest.mark.parametrize(
    ("tokens", "window", "stride"),
    [
        (5, 8, 8),  # shorter than a window
        (8, 8, 8), (8, 8, 3),  # exactly one
        (9, 8, 8), (9, 8, 7), (9, 8, 1),  # one token more: alone, it is not predicted
        (21, 8, 8), (21, 8, 5), (21, 8, 1), (2, 2, 1), (11, 2, 2),
    ],
)  # fmt: skip
def test_score_equals_a_loop_over_the_tokens(model, tokens, window, stride):
    """Token t is predicted in the first window that holds it, from what this holds before it."""
    ids = torch.randint(0, 288, (tokens,), generator=torch.Generator().manual_seed(tokens))
    losses = {}
    for token in range(1, tokens):
        start = max(0, math.ceil((token + 1 - window) / stride)) * stride
        if start < token:
            with torch.no_grad():
                logits = model(input_ids=ids[None, start:token]).logits[0, -1]
            losses.setdefault(start, []).append(-logits.log_softmax(-1)[ids[token]].item())
    count = sum(map(len, losses.values()))
    loss = sum(map(sum, losses.values())) / count
    spread = sum((sum(own) - loss * len(own)) ** 2 for own in losses.values())
    for batch_size in (1, 4):
        found = score(model, ids, window, stride, batch_size)
        assert (found.predicted, found.window, found.stride) == (count, window, stride)
        assert found.loss == pytest.approx(loss, rel=1e-5)
        if len(losses) == 1:
            assert found.stderr is None
        else:
            variance = len(losses) / (len(losses) - 1) * spread / count**2
            assert found.stderr == pytest.approx(math.sqrt(variance), rel=1e-3)


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_processes_share_out_the_batches_and_do_equally_many_forwards(monkeypatch, world_size):
    ids = torch.zeros(23, dtype=torch.long)
    whole = score(Counting(), ids, window=6, stride=2, batch_size=2)  # five batches
    parts, forwards = [], []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda sums: parts.append(sums.clone()))
    for rank in range(world_size):
        model = Counting()
        model.register_forward_hook(lambda *_, rank=rank: forwards.append(rank))
        score(model, ids, 6, 2, 2, rank=rank, world_size=world_size)
    assert len({forwards.count(rank) for rank in range(world_size)}) == 1
    assert (torch.stack(parts) != 0).sum(0).tolist() == [1] * 10  # each window, by one process
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda sums: sums.copy_(sum(parts)))
    assert score(Counting(), ids, 6, 2, 2, rank=1, world_size=world_size) == whole


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_said_and_has_no_error(value):
    class Broken(Counting):
        def forward(self, input_ids):
            found = super().forward(input_ids)
            found.logits[0, 0, 1] = value
            return found

    found = score(Broken(), torch.zeros(13, dtype=torch.long), window=6, stride=3)
    assert math.isnan(found.loss) and found.stderr is None and found.predicted == 12
    measured = measurements("model", "text", HeldOut(torch.zeros(13), 1, 20), found)
    assert [one.metric for one in measured] == ["perplexity", "loss", "bits_per_byte"]
    assert all(math.isnan(one.value) and one.stderr is None for one in measured)


def test_a_perplexity_too_large_for_a_number_is_infinite():
    class Certain(Counting):
        def forward(self, input_ids):
            logits = torch.tensor([0.0, 1000.0]).expand(*input_ids.shape, 2)
            return SimpleNamespace(logits=logits)

    found = score(Certain(), torch.zeros(5, dtype=torch.long), window=2)
    measured = measurements("model", "ids", HeldOut(torch.zeros(5)), found)
    assert [(one.metric, one.value, one.stderr) for one in measured] == [
        ("perplexity", math.inf, None),
        ("loss", 1000.0, 0.0),
    ]


def test_score_restores_the_mode_where_a_forward_fails():
    class Failing(Counting):
        def forward(self, input_ids):
            raise RuntimeError("out of memory")

    model = Failing().train()
    with pytest.raises(RuntimeError, match="out of memory"):
        score(model, torch.zeros(5, dtype=torch.long))
    assert model.training


def test_labels_tell_files_of_one_name_apart(tmp_path):
    one, other, third = (tmp_path / name for name in ("a/val.txt", "b/val.txt", "b/book.txt"))
    assert labels([one, other, third]) == [str(one), str(other), "book.txt"]
    assert labels([one, third]) == ["val.txt", "book.txt"]
    with pytest.raises(ValueError, match="val.txt' is given 2 times; give it once"):
        labels([one, tmp_path / "b" / ".." / "a" / "val.txt"])


@pytest.mark.parametrize(
    ("held_out", "expected"),
    [
        (HeldOut(torch.zeros(13)), "13 tokens; windows of 6"),
        (HeldOut(torch.zeros(13), 1, 9), "13 tokens in 1 document; windows"),
        (HeldOut(torch.zeros(13), 2, 9), "in 2 documents joined by the end-of-text token; windows"),
        (HeldOut(torch.zeros(13), 2, 9, False), "in 2 documents with nothing between them, as the"),
    ],
)
def test_how_tokens_were_counted_in_words(held_out, expected):
    found = score(Counting(), torch.zeros(13, dtype=torch.long), window=6)
    text = counting(held_out, found)
    assert expected in text
    assert text.endswith("6 apart; 10 tokens predicted, each once, after the first window from at "
                         "least 1 tokens of context.")  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 9}, "window of 9 tokens must be at least 2 and at most 8, the model's context"),
        ({"window": 1}, "window of 1 tokens must be at least 2"),
        ({"window": 4, "stride": 5}, "stride of 5 tokens must be from 1 to the window's 4"),
    ],
)
def test_score_refuses_windows(options, message):
    with pytest.raises(ValueError, match=message):
        score(Counting(), torch.zeros(5, dtype=torch.long), **options)


def test_score_refuses_tokens_and_models(model):
    with pytest.raises(ValueError, match="1 token to evaluate on"):
        score(Counting(), torch.zeros(1, dtype=torch.long))
    with pytest.raises(ValueError, match="the tokens run from 0 to 2, but the model has 2"):
        score(Counting(), torch.tensor([0, 2]))
    masked = SimpleNamespace(can_generate=lambda: False)
    with pytest.raises(ValueError, match="SimpleNamespace is no causal language model"):
        score(masked, torch.tensor([0, 1]))


def test_documents_are_joined_by_the_end_of_text_token(tmp_path, tokenizer):
    texts = ["the king", "  ", "the war and é"]
    path = tmp_path / "lines.jsonl"
    path.write_text("\n".join(json.dumps({"body": text}) for text in texts))
    found = read_held_out(path, tokenizer, "body")
    first, _, last = (tokenizer(text)["input_ids"] for text in texts)
    assert found.ids.tolist() == [*first, tokenizer.eos_token_id, *last]
    assert (found.documents, found.text_bytes) == (2, len("the kingthe war and é".encode()))
    marked = tmp_path / "marked.txt.gz"
    marked.write_bytes(gzip.compress("the king<|endoftext|>the war and é".encode()))
    assert torch.equal(read_held_out(marked, tokenizer).ids, found.ids)


def test_a_text_file_is_one_document_to_the_last_character(tmp_path, tokenizer):
    path = tmp_path / "text.txt"
    text = "the king\n\nthe war " * 5000  # longer than the pieces of training
    path.write_text(text, encoding="utf-8")
    found = read_held_out(path, tokenizer)
    assert found.documents == 1
    assert tokenizer.decode(found.ids) == text


def test_token_files(tmp_path, tokenizer):
    np.save(tmp_path / "ids.npy", np.arange(5, dtype=np.uint16))
    assert read_held_out(tmp_path / "ids.npy", None).ids.tolist() == [0, 1, 2, 3, 4]
    np.save(tmp_path / "floats.npy", np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"float64 of shape \(2, 2\); token ids are whole numbers"):
        read_held_out(tmp_path / "floats.npy", None)
    (tmp_path / "broken.npy").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"broken\.npy' cannot be read"):
        read_held_out(tmp_path / "broken.npy", None)
    (tmp_path / "val.bin").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"is not the train\.bin or val\.bin of a token cache"):
        read_held_out(tmp_path / "val.bin", None)
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text(f"the king {number} and the war " * 9)
    data = prepare(
        {"dataset": "text", "data_files": [f"{tmp_path}/*.txt"], "tokenizer": "bpe:260",
         "max_length": 4, "val_ratio": 0.3, "cache_dir": str(tmp_path / "cache")},
        progress=False,
    )  # fmt: skip
    for own in (None, data.tokenizer):
        found = read_held_out(data.cache_dir / "val.bin", own)
        assert found.ids.tolist() == data.val.tokens.tolist()
        assert (found.documents, found.text_bytes) == (None, None)
    with pytest.raises(ValueError, match=r"val.bin' was made with tokenizer 'bpe:260' of .*text"):
        read_held_out(data.cache_dir / "val.bin", tokenizer)


def test_token_files_of_another_tokenizer(tmp_path, tokenizer):
    last = max(tokenizer.get_vocab().values())
    np.save(tmp_path / "ids.npy", np.array([0, last]))
    assert read_held_out(tmp_path / "ids.npy", tokenizer).ids.tolist() == [0, last]
    np.save(tmp_path / "ids.npy", np.array([0, last + 1], dtype=np.uint32))
    with pytest.raises(ValueError, match=rf"token {last + 1}, but the tokenizer's last .* {last};"):
        read_held_out(tmp_path / "ids.npy", tokenizer)
    np.savez(tmp_path / "archive.npz", np.arange(3))
    (tmp_path / "archive.npz").rename(tmp_path / "archive.npy")
    with pytest.raises(ValueError, match="is an archive of arrays; write one array with np.save"):
        read_held_out(tmp_path / "archive.npy", None)
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"objects.npy' cannot be read .*; write it with np.save"):
        read_held_out(tmp_path / "objects.npy", None)


def test_a_tokenizer_without_an_end_joins_documents_with_nothing(tmp_path, tokenizer):
    class Endless:
        eos_token_id = None

        def get_vocab(self):
            return {}

        def __call__(self, text, verbose):
            return tokenizer(text, verbose=verbose)

    (tmp_path / "lines.jsonl").write_text('{"text": "the king"}\n{"text": "a war"}\n')
    found = read_held_out(tmp_path / "lines.jsonl", Endless())
    joined = tokenizer("the king")["input_ids"] + tokenizer("a war")["input_ids"]
    assert found.ids.tolist() == joined
    assert not found.separated


def test_bad_text_files(tmp_path, tokenizer):
    def refused(name, content, error, message, tokenizer=tokenizer):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(error, match=message):
            read_held_out(tmp_path / name, tokenizer)

    refused("no.txt", None, FileNotFoundError, "no file '.*no.txt' to evaluate on")
    refused("blank.txt", b" \n \n", ValueError, "blank.txt' holds no text to evaluate on")
    refused("empty.txt", b"", ValueError, "empty.txt' is empty .* take it out of --data")
    refused("a.csv", b"a,b", ValueError, "unknown extension '.csv'")
    refused("zero.txt", b"a\0b", ValueError, "is binary, not text .* take it out of --data")
    refused("a.jsonl", b'{"body": "a"}\n', ValueError, "no field 'text'.*Type --text-field body")
    refused("none.jsonl", b'{"text": " "}\n{"text": ""}\n', ValueError, "none.jsonl' holds no te")
    refused("b.jsonl", b'{"text": "a"}\n{"body": "b"}\n', ValueError, "no field 'text'")
    refused("half.jsonl", b'{"text": "\\ud800"}', ValueError, "half of a surrogate pair")
    refused("a.txt", b"words", ValueError, "without a tokenizer; type --tokenizer", tokenizer=None)
