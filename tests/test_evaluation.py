from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from slope.evaluation import bigram, bigram_loss, mean_loss, perplexity, sample


def sequences(count, length, vocab, seed):
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(rng.zipf(1.5, length) % vocab) for _ in range(count)]


def test_bigram_probabilities_sum_to_one_for_every_context():
    vocab = 37
    model = bigram.fit_bigram(sequences(20, 50, vocab, 0), vocab)
    keys = np.arange(vocab * vocab)
    p = np.exp(model.log_probability(keys)).reshape(vocab, vocab)
    np.testing.assert_allclose(p.sum(1), 1.0, rtol=1e-12)


def test_bigram_loss_equals_a_plain_loop_over_the_formula():
    vocab = 11
    train, val = sequences(9, 30, vocab, 1), sequences(3, 30, vocab, 2)
    counts = np.zeros((vocab, vocab))
    for row in train:
        for a, b in zip(row[:-1].tolist(), row[1:].tolist(), strict=True):
            counts[a, b] += 1
    once, twice = (counts == 1).sum(), (counts == 2).sum()
    discount = once / (once + 2 * twice)
    unigram = ((counts > 0).sum(0) + 1) / ((counts > 0).sum() + vocab)
    losses = []
    for row in val:
        for a, b in zip(row[:-1].tolist(), row[1:].tolist(), strict=True):
            total, followers = counts[a].sum(), (counts[a] > 0).sum()
            p = unigram[b]
            if total:
                p = max(counts[a, b] - discount, 0) / total + discount * followers / total * p
            losses.append(-math.log(p))
    assert bigram_loss(train, val, vocab) == pytest.approx(np.mean(losses), rel=1e-12)


def test_bigram_loss_is_the_same_in_small_chunks(monkeypatch):
    train, val = sequences(20, 40, 50, 3), sequences(5, 40, 50, 4)
    whole = bigram_loss(train, val, 50)
    monkeypatch.setattr(bigram, "_PAIRS_PER_CHUNK", 64)
    assert bigram_loss(train, val, 50) == pytest.approx(whole, rel=1e-12)


def test_bigram_loss_works_with_a_vocabulary_whose_square_would_not_fit():
    train = [torch.tensor([0, 1_999_999, 0, 1_999_999])]
    assert bigram_loss(train, train, 2_000_000) < 5


def test_bigram_learns_a_chain_that_a_unigram_cannot():
    chain = [torch.arange(1000) % 10]
    assert bigram_loss(chain, chain, 10) < 0.1


def test_a_token_outside_the_vocabulary_is_an_error_with_its_id():
    with pytest.raises(ValueError, match=r"token id 7 in sequence 0 .* vocabulary of 7"):
        bigram_loss([torch.tensor([1, 7])], [torch.tensor([1, 2])], 7)


def test_an_empty_data_set_is_an_error():
    with pytest.raises(ValueError, match="no token pair to count"):
        bigram_loss([], [torch.tensor([0, 1])], 2)
    with pytest.raises(ValueError, match=r"no token pair to score.*val_ratio"):
        bigram_loss([torch.tensor([0, 1])], [], 2)


def test_perplexity_is_the_exponential_and_never_overflows():
    assert perplexity(1.0) == pytest.approx(math.e)
    assert perplexity(1e6) == math.inf
    assert math.isnan(perplexity(math.nan))


class TinyModel(torch.nn.Module):
    """Prefers token + 1; the loss is the mean over the shifted tokens, as in transformers."""

    def __init__(self, vocab=16, limit=8):
        super().__init__()
        self.table = torch.nn.Parameter(3 * torch.eye(vocab).roll(1, 1))
        self.dropout = torch.nn.Dropout(0.5)
        self.config = SimpleNamespace(max_position_embeddings=limit)

    def forward(self, input_ids, labels=None):
        assert input_ids.shape[1] <= self.config.max_position_embeddings
        logits = self.dropout(self.table[input_ids])
        loss = None
        if labels is not None:
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            )
        return SimpleNamespace(logits=logits, loss=loss)


class Letters:
    """A tokenizer in the manner of transformers: a = 0, b = 1, … and p ends the text."""

    eos_token_id = 15

    def encode(self, text):
        return [ord(c) - 97 for c in text]

    def decode(self, ids):
        return "".join(chr(97 + i) for i in ids)


def test_mean_loss_weights_batches_by_tokens_and_restores_the_mode():
    model = TinyModel().train()
    ids = torch.randint(0, 16, (5, 8), generator=torch.Generator().manual_seed(0))
    whole = mean_loss(model, [ids])
    assert mean_loss(model, [{"input_ids": ids[:4]}, ids[4:]]) == pytest.approx(whole, rel=1e-6)
    assert model.training


def test_mean_loss_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="no token to predict"):
        mean_loss(TinyModel(), [])


def test_sample_follows_the_model_past_its_context_length_and_stops_at_the_end():
    model = TinyModel().train()
    assert sample(model, Letters(), "ab", 40, temperature=0) == "abcdefghijklmno"
    assert model.training


def test_sample_is_a_function_of_its_seed_and_leaves_the_global_state_alone():
    model = TinyModel(limit=64)
    state = torch.random.get_rng_state()
    first = sample(model, Letters(), "a", 30, seed=3, temperature=2.0)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.rand(5)
    assert sample(model, Letters(), "a", 30, seed=3, temperature=2.0) == first
    assert any(
        sample(model, Letters(), "a", 30, seed=s, temperature=2.0) != first for s in range(4, 8)
    )


def test_sample_with_one_candidate_is_greedy():
    model = TinyModel()
    assert sample(model, Letters(), "a", 5, top_k=1) == sample(
        model, Letters(), "a", 5, temperature=0
    )


def test_an_empty_prompt_starts_from_the_end_of_text_token():
    assert sample(TinyModel(), Letters(), "", 3, temperature=0) == "abc"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1.0}, r"temperature=-1\.0"),
        ({"top_k": -2}, "top_k=-2"),
    ],
)
def test_options_out_of_range_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        sample(TinyModel(), Letters(), "a", **options)


def test_an_empty_prompt_without_an_end_token_says_what_to_type():
    tokenizer = Letters()
    tokenizer.eos_token_id = None
    with pytest.raises(ValueError, match=r"generate\.prompt="):
        sample(TinyModel(), tokenizer, "")
