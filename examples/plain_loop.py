"""SLoPe in a PyTorch loop of your own: two lines, here with accumulation and mixed precision.

python examples/plain_loop.py
"""

from __future__ import annotations

import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import slope
from slope.data import prepare
from slope.evaluation import mean_loss, perplexity

TEXT = {
    "dataset": "demo", "max_documents": 300, "tokenizer": "bpe:512", "max_length": 64,
    "val_ratio": 0.05,
}  # fmt: skip
SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 64, "initializer_range": 0.1, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


def main(max_steps: int = 60, accumulate: int = 2, directory: str = "sparse-model") -> float:
    """Pretrain a small 2:4 GPT on Wikipedia introductions; its validation perplexity."""
    torch.manual_seed(0)
    data = prepare(TEXT, progress=False)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=data.vocab_size))
    print(slope.sparsify(model, slope.SparsityConfig(pattern="2:4", adapter_rank=4)))

    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)  # after sparsify()
    schedule = slope.SlopeSchedule(max_steps, lora_start=0.9)  # 0.99 in the paper
    batches = iter(DataLoader(data.train, batch_size=8, shuffle=True))
    for step in range(max_steps):
        schedule.apply(model, step)  # before the first micro-batch
        total = 0.0
        for _ in range(accumulate):
            ids = next(batches, None)
            if ids is None:
                batches = iter(DataLoader(data.train, batch_size=8, shuffle=True))
                ids = next(batches)
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=ids, labels=ids).loss / accumulate
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 20 == 0:
            print(f"step {step + 1}: loss {total:.3f}")

    slope.save_pretrained(model, directory, data.tokenizer, force=True)
    return perplexity(mean_loss(model, DataLoader(data.val, batch_size=8)))


if __name__ == "__main__":
    print(f"validation perplexity {main():.1f}")
