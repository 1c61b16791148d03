"""Text from a causal language model: transformers' ``generate`` with its static key/value cache."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch

_NEW_TOKENS = 128


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: at most so many; None: 128, or what the context leaves.
        temperature: 0 takes the most likely token each time.
        top_k: choose among this many most likely tokens; 0 means all.
        top_p: choose among the most likely tokens that hold this share of the probability.
        seed: of the draws; the global generator is left as it was.

    Raises:
        ValueError: for a value out of range.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be 1 or more.")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be 0 (greedy) or more.")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be 0 (all tokens) or more.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1 (all tokens).")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed={self.seed} must be from 0 to 2**64 - 1.")

    def of_batch(self, number: int) -> Sampling:
        """The same for one of several batches, each with draws of its own; the first is number 0.

        Example:
            >>> seeds = [Sampling(seed=7).of_batch(number).seed for number in range(3)]
            >>> seeds[0], len(set(seeds))
            (7, 3)
        """
        if not number:
            return self
        # Not seed + number, which is the seed of somebody's next command.
        digest = hashlib.sha256(f"{self.seed}:{number}".encode()).digest()
        return replace(self, seed=int.from_bytes(digest[:8], "big"))


@dataclass(frozen=True)
class Generated:
    """What came out.

    Attributes:
        texts: continuation of each prompt, without the prompt.
        tokens: number of new tokens of each.
        seconds: wall time, prompts included.
    """

    texts: list[str]
    tokens: list[int]
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all prompts per second."""
        return sum(self.tokens) / self.seconds


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    sampling: Sampling | None = None,
    on_text: Callable[[str], None] | None = None,
) -> Generated:
    """Continue prompts, all in one batch.

    Args:
        model: a causal language model of `transformers`, dense or sparse, in eval mode.
        tokenizer: of `transformers`.
        prompts: texts; an empty one starts from the end-of-text token.
        sampling: how tokens are chosen. Without ``max_new_tokens`` the longest prompt sets the
            limit of all; :func:`batches` keeps those together that have the same.
        on_text: called with the prompt, and then with each piece of text as soon as it is known;
            for one prompt alone.

    Raises:
        ValueError: if the model cannot generate, or a prompt and the new tokens exceed its context.
    """
    sampling = sampling or Sampling()
    ids, rooms = encode(model, tokenizer, prompts, sampling)
    end = tokenizer.eos_token_id
    longest = max(map(len, ids))
    padding = 0 if end is None else end
    batch = torch.tensor([[padding] * (longest - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])
    draws: dict[str, Any] = {"do_sample": sampling.temperature > 0}
    if draws["do_sample"]:
        names = ("temperature", "top_k", "top_p")
        draws |= {name: getattr(sampling, name) for name in names}
    device = model.device
    if on_text is not None:
        on_text(prompts[0])
    began = time.perf_counter()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(sampling.seed)
        output = model.generate(
            batch.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=min(rooms),
            eos_token_id=end,
            pad_token_id=padding,
            cache_implementation="static",
            disable_compile=True,  # the first minute of each process would go into compiling
            # Whatever the folder's generation_config.json says: Sampling is all there is.
            num_beams=1,
            num_return_sequences=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            min_length=0,
            min_new_tokens=None,
            streamer=None if on_text is None else _streamer(tokenizer, on_text),
            **draws,
        )
    rows = [_until(row, end) for row in output[:, longest:].tolist()]
    seconds = time.perf_counter() - began
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
    return Generated(texts, [len(row) for row in rows], seconds)


def encode(
    model: Any, tokenizer: Any, prompts: Sequence[str], sampling: Sampling
) -> tuple[list[list[int]], list[int]]:
    """Token ids of each prompt, and how many tokens to add to each at most.

    Raises:
        ValueError: as :func:`generate` does.
    """
    if not getattr(model, "can_generate", bool)():
        raise ValueError(
            f"{type(model).__name__} is no causal language model, so it cannot generate text."
        )
    context = getattr(model.config, "max_position_embeddings", None)
    ids = [_encode(tokenizer, prompt, tokenizer.eos_token_id) for prompt in prompts]
    rooms = []
    for number, (prompt, row) in enumerate(zip(prompts, ids, strict=True), start=1):
        name = f"prompt {number} ({prompt[:30]!r}…)"
        rooms.append(_room(context, name, len(row), sampling.max_new_tokens))
    return ids, rooms


def batches(prompts: Sequence[str], rooms: Sequence[int], size: int) -> Iterator[list[str]]:
    """Consecutive prompts, at most ``size``, that may get equally many tokens.

    So how long a text may become does not depend on the prompts beside it.

    Example:
        >>> list(batches(["a", "b", "c", "long", "d"], [128, 128, 128, 9, 128], 2))
        [['a', 'b'], ['c'], ['long'], ['d']]
    """
    pairs = zip(prompts, rooms, strict=True)
    for _, group in groupby(pairs, key=lambda pair: pair[1]):
        alike = [prompt for prompt, _ in group]
        for start in range(0, len(alike), size):
            yield alike[start : start + size]


def _encode(tokenizer: Any, prompt: str, end: int | None) -> list[int]:
    ids = list(tokenizer(prompt, verbose=False)["input_ids"]) if prompt else []
    if ids:
        return ids
    if end is None:
        raise ValueError(
            "the prompt gives no token and the tokenizer has no end-of-text token; give a prompt "
            "of some words."
        )
    return [end]


def _room(context: int | None, name: str, tokens: int, wanted: int | None) -> int:
    """How many tokens to add at most to a prompt of ``tokens``."""
    if context is None:
        return wanted or _NEW_TOKENS
    if tokens >= context:
        raise ValueError(
            f"{name} has {tokens} tokens, and the model's context holds {context}, new tokens "
            "included; shorten the prompt."
        )
    if wanted is not None and tokens + wanted > context:
        raise ValueError(
            f"{name} has {tokens} tokens; with {wanted} new ones they exceed the model's context "
            f"of {context}; type --max-new-tokens {context - tokens}, or shorten the prompt."
        )
    return wanted or min(_NEW_TOKENS, context - tokens)


def _streamer(tokenizer: Any, on_text: Callable[[str], None]) -> Any:
    from transformers import TextStreamer

    class Stream(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            on_text(text)

    return Stream(tokenizer, skip_prompt=True, skip_special_tokens=True)


def _until(ids: list[int], end: int | None) -> list[int]:
    """A row up to its end of text, that token included."""
    return ids[: ids.index(end) + 1] if end in ids else ids
