"""SLoPe in the Trainer of transformers: one callback, nothing else changes.

python examples/hf_trainer.py
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import slope
from slope.data import prepare
from slope.integrations.transformers import SlopeTrainerCallback

TEXT = {
    "dataset": "demo", "max_documents": 300, "tokenizer": "bpe:512", "max_length": 64,
    "val_ratio": 0.05,
}  # fmt: skip
SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 64, "initializer_range": 0.1, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


def collate(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Sequences that all have one length; the model shifts the labels."""
    ids = torch.stack(rows)
    return {"input_ids": ids, "labels": ids}


def main(max_steps: int = 60, directory: str = "hf-trainer") -> Trainer:
    """Pretrain a small 2:4 GPT on Wikipedia introductions."""
    torch.manual_seed(0)
    data = prepare(TEXT, progress=False)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=data.vocab_size))
    print(slope.sparsify(model, slope.SparsityConfig(pattern="2:4", adapter_rank=4)))

    arguments = TrainingArguments(
        directory, max_steps=max_steps, per_device_train_batch_size=8, learning_rate=5e-3,
        gradient_accumulation_steps=2, max_grad_norm=1.0, bf16=True, use_cpu=True,
        logging_steps=20, save_steps=20, eval_strategy="steps", eval_steps=20, report_to="none",
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, data_collator=collate, train_dataset=data.train, eval_dataset=data.val,
        callbacks=[SlopeTrainerCallback(lora_start=0.9, diagnostics=True)],  # 0.99 in the paper
    )  # fmt: skip
    trainer.train()  # resume_from_checkpoint=True goes on from the last checkpoint
    slope.save_pretrained(model, f"{directory}/sparse", data.tokenizer, force=True)
    return trainer


if __name__ == "__main__":
    print(main().evaluate())
