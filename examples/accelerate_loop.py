"""SLoPe with Accelerate: the plain loop; devices, precision and accumulation are Accelerate's.

python examples/accelerate_loop.py            or   accelerate launch examples/accelerate_loop.py
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import slope
from slope.data import prepare

TEXT = {"dataset": "demo", "max_documents": 300, "tokenizer": "bpe:512", "max_length": 64}
SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 64, "initializer_range": 0.1, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


def main(max_steps: int = 40, accumulate: int = 2) -> torch.nn.Module:
    """Pretrain a small 2:4 GPT on Wikipedia introductions."""
    torch.manual_seed(0)
    # Adapters that sleep get no gradient: several processes must be told to look for that.
    ddp = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(gradient_accumulation_steps=accumulate, kwargs_handlers=[ddp])
    data = prepare(TEXT, progress=False)  # one process builds the token cache, the others wait
    model = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=data.vocab_size))
    slope.sparsify(model, slope.SparsityConfig(pattern="2:4", adapter_rank=4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    loader = DataLoader(data.train, batch_size=8, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    schedule = slope.SlopeSchedule(max_steps, lora_start=0.9)  # 0.99 in the paper
    step, first = 0, True
    while step < max_steps:
        for ids in loader:
            if first:
                schedule.apply(model, step)  # before the first micro-batch of a step
            with accelerator.accumulate(model):
                loss = model(input_ids=ids, labels=ids).loss
                accelerator.backward(loss)
                first = accelerator.sync_gradients  # that was the last micro-batch
                if first:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                step += first
                optimizer.step()
                optimizer.zero_grad()
            if step == max_steps:
                break
    accelerator.print(f"step {step}: loss {loss.item():.3f}")
    return accelerator.unwrap_model(model)


if __name__ == "__main__":
    main()
