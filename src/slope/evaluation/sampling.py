"""Text from a trained model: temperature and top-k sampling with a seed of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


def sample(
    model: nn.Module,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int = 64,
    seed: int = 0,
    *,
    temperature: float = 0.8,
    top_k: int = 50,
) -> str:
    """Continue a prompt.

    Args:
        model: causal language model; `model(input_ids=(1, length)).logits` is (1, length, vocab).
        tokenizer: a `transformers` tokenizer or a `tokenizers.Tokenizer`.
        prompt: the text to continue; empty starts from the end-of-text token.
        max_new_tokens: how many tokens to add at most; stops at the end-of-text token.
        seed: seed of this call only: the global random state is neither read nor changed.
        temperature: 0 takes the most likely token each time.
        top_k: choose among this many most likely tokens; 0 means all.

    Returns:
        The prompt and its continuation.

    Raises:
        ValueError: for an option out of range, or a prompt that gives no token and a tokenizer
            without an end-of-text token.
    """
    import torch

    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be 1 or more.")
    if temperature < 0:
        raise ValueError(f"temperature={temperature} must be 0 (greedy) or more.")
    if top_k < 0:
        raise ValueError(f"top_k={top_k} must be 0 (all tokens) or more.")
    end = _end_of_text(tokenizer)
    ids = _encode(tokenizer, prompt)
    given = len(ids)
    if not ids:
        if end is None:
            raise ValueError(
                "the prompt gives no token and the tokenizer has no end-of-text token; "
                "type generate.prompt='Some words'."
            )
        ids, given = [end], 1
    device = next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(seed)
    context = _context_length(model)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for _ in range(max_new_tokens):
                window = torch.tensor([ids[-context:] if context else ids], device=device)
                logits = model(input_ids=window).logits[0, -1].float()
                token = _choose(logits, temperature, top_k, generator)
                if token == end:
                    break
                ids.append(token)
    finally:
        model.train(was_training)
    return prompt + tokenizer.decode(ids[given:]) if prompt else tokenizer.decode(ids[given:])


def _choose(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """One token id from logits (vocab,)."""
    import torch

    if temperature == 0:
        return int(logits.argmax())
    best, index = logits.topk(min(top_k or len(logits), len(logits)))
    probability = torch.softmax(best / temperature, dim=0)
    return int(index[torch.multinomial(probability, 1, generator=generator)])


def _encode(tokenizer: Any, text: str) -> list[int]:
    if not text:
        return []
    encoded = tokenizer.encode(text)
    return list(getattr(encoded, "ids", encoded))


def _end_of_text(tokenizer: Any) -> int | None:
    """The id of the end-of-text token, whichever library the tokenizer is from."""
    token = getattr(tokenizer, "eos_token_id", None)
    if token is None and hasattr(tokenizer, "token_to_id"):
        token = tokenizer.token_to_id("<|endoftext|>")
    return token


def _context_length(model: nn.Module) -> int | None:
    """The longest input of the model, None where it has no limit that we can see."""
    config = getattr(model, "config", None)
    for name in ("max_position_embeddings", "n_positions"):
        length = getattr(config, name, None)
        if isinstance(length, int):
            return length
    return None
