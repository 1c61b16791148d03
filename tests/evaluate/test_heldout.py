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
from slope.evaluation.heldout import read_held_out, score, windows


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
    found = read_held_out(data.cache_dir / "val.bin", None)
    assert found.ids.tolist() == data.val.tokens.tolist()


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
    refused("a.txt", b"words", ValueError, "without a tokenizer; type --tokenizer", tokenizer=None)
