"""SLoPe in a Lightning trainer of your own: one callback, nothing else changes.

python examples/lightning_module.py
"""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import slope
from slope.data import TokenData, prepare
from slope.integrations.lightning import SlopeCallback

TEXT = {"dataset": "demo", "max_documents": 300, "tokenizer": "bpe:512", "max_length": 64}
SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 64, "initializer_range": 0.1, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


class LanguageModel(pl.LightningModule):
    """A small 2:4 GPT."""

    def __init__(self, data: TokenData) -> None:
        super().__init__()
        self.model = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=data.vocab_size))
        slope.sparsify(self.model, slope.SparsityConfig(pattern="2:4", adapter_rank=4))

    def training_step(self, ids: torch.Tensor, index: int) -> torch.Tensor:
        """Mean cross-entropy of the next token."""
        loss: torch.Tensor = self.model(input_ids=ids, labels=ids).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Any optimizer that works element by element."""
        return torch.optim.AdamW(self.parameters(), lr=5e-3)


def main(max_steps: int = 60) -> LanguageModel:
    """Pretrain on Wikipedia introductions; the adapters wake in the last tenth of the steps."""
    pl.seed_everything(0)
    data = prepare(TEXT, progress=False)
    module = LanguageModel(data)
    trainer = pl.Trainer(
        max_steps=max_steps, accelerator="cpu", precision="bf16-mixed", gradient_clip_val=1.0,
        accumulate_grad_batches=2, logger=False, enable_checkpointing=False,
        callbacks=[SlopeCallback(lora_start=0.9)],  # 0.99 in the paper
    )  # fmt: skip
    trainer.fit(module, DataLoader(data.train, batch_size=8, shuffle=True))
    return module


if __name__ == "__main__":
    main()
