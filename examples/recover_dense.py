"""Make a dense checkpoint 2:4 and recover what that cost by a short sparse training.

python examples/recover_dense.py
"""

from __future__ import annotations

import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import slope
from slope.data import TokenData, prepare
from slope.evaluation import mean_loss, perplexity

TEXT = {
    "dataset": "demo", "max_documents": 300, "tokenizer": "bpe:512", "max_length": 64,
    "val_ratio": 0.05,
}  # fmt: skip
SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 64, "initializer_range": 0.1, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


def train(model: PreTrainedModel, data: TokenData, max_steps: int, lora_start: float) -> None:
    """The plain loop; on a dense model the schedule has nothing to do."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    schedule = slope.SlopeSchedule(max_steps, lora_start)
    loader = DataLoader(data.train, batch_size=8, shuffle=True)
    for step, ids in zip(range(max_steps), loader, strict=False):
        schedule.apply(model, step)
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def main(max_steps: int = 120) -> dict[str, float]:
    """Validation perplexity of the dense model, after pruning, and after recovery."""
    torch.manual_seed(0)
    data = prepare(TEXT, progress=False)
    val = DataLoader(data.val, batch_size=8)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=data.vocab_size))
    train(model, data, max_steps, lora_start=1.0)
    found = {"dense": perplexity(mean_loss(model, val))}

    # Wanda reads a few batches of text; mask="magnitude" needs none.
    first = next(iter(DataLoader(data.train, batch_size=16)))
    settings = slope.SparsityConfig(pattern="2:4", mask="wanda", adapter_rank=4)
    print(slope.sparsify(model, settings, [{"input_ids": first}]))
    found["2:4"] = perplexity(mean_loss(model, val))
    train(model, data, max_steps // 3, lora_start=0.5)
    found[f"2:4, {max_steps // 3} steps on"] = perplexity(mean_loss(model, val))
    return found


if __name__ == "__main__":
    for name, value in main().items():
        print(f"{name:<18} {value:8.1f}")
