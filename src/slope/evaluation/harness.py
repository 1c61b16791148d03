"""The model as lm-eval asks it, and what becomes of requests that are longer than its context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.models.huggingface import HFLM


class CountingLM(HFLM):
    """Counts the requests, and those that lm-eval cuts because they do not fit the context.

    Of a question with an answer lm-eval keeps the last tokens that fit, of a prompt to continue the
    last that leave room for the continuation: both lose their beginning. A text whose whole
    likelihood is asked for goes through in windows, and is neither counted nor cut.

    Attributes:
        asked: requests so far.
        cut: of these, the ones that were cut.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self.asked = self.cut = 0

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], *args: Any, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        # Windows of a longer text come without a key.
        pairs = [(question, answer) for key, question, answer in requests if key is not None]
        longest = max((len(answer) for _, answer in pairs), default=0)
        if longest > self.max_length:
            raise ValueError(
                f"an answer of {longest:,} tokens is longer than the model's context of "
                f"{self.max_length:,}, and only questions are cut; leave the task out."
            )
        self.asked += len(pairs)
        # The last token of an answer is predicted and never seen.
        self.cut += sum(len(q) + len(a) > self.max_length + 1 for q, a in pairs)
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Any, Any]:
        """Encode prompts to continue; as in lm-eval."""
        self.asked += len(strings)
        if left_truncate_len is not None:
            self.cut += sum(len(self.tok_encode(text)) > left_truncate_len for text in strings)
        return super().tok_batch_encode(strings, padding_side, left_truncate_len, truncation)
