"""Fine-tune a pruned model of transformers so that its zeros stay zeros.

python examples/finetune_sparse.py [a folder of save_pretrained with 2:4 zeros in its weights]
"""

from __future__ import annotations

import sys

import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import slope
from slope.data import prepare
from slope.deploy import prune_by_zeros

TEXT = {"dataset": "demo", "max_documents": 300, "tokenizer": "bpe:512", "max_length": 64}
SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 64, "initializer_range": 0.1, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


def somebodys_pruned_model(vocab_size: int) -> PreTrainedModel:
    """Stands in for a model that was pruned by any tool: dense layers with 2:4 zeros."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=vocab_size))
    slope.sparsify(model)
    return slope.densify(model)


def main(path: str | None = None, max_steps: int = 30) -> PreTrainedModel:
    """Fine-tune; the model that comes back is dense again, with the zeros it came with."""
    torch.manual_seed(0)
    data = prepare(TEXT, progress=False)
    load = LlamaForCausalLM.from_pretrained
    model = load(path) if path else somebodys_pruned_model(data.vocab_size)
    before = {name: weight == 0 for name, weight in model.state_dict().items()}

    print(prune_by_zeros(model, "2:4"))  # from here on, pruned weights do not exist
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step, ids in zip(range(max_steps), DataLoader(data.train, batch_size=8), strict=False):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 10 == 0:
            print(f"step {step + 1}: loss {loss.item():.3f}")

    layers = [name for name, _ in slope.sparse_layers(model)]
    slope.densify(model)
    kept = all(not model.state_dict()[f"{n}.weight"][before[f"{n}.weight"]].any() for n in layers)
    print(f"zeros of {len(layers)} layers kept: {kept}")
    return model  # model.save_pretrained() writes a folder that needs nothing of ours


if __name__ == "__main__":
    main(*sys.argv[1:2])
