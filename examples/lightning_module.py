"""SLoPe in a Lightning trainer of your own: one callback, nothing else changes.

python examples/lightning_module.py
"""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from torch import nn

import slope
from slope.integrations.lightning import SlopeCallback

MAX_STEPS = 20


class Regression(pl.LightningModule):
    """Learn y = 2x with a sparse MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        slope.sparsify(self.model, slope.SparsityConfig(pattern="2:4", adapter_rank=4))

    def training_step(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """Mean squared error of one batch."""
        loss = nn.functional.mse_loss(self.model(x), 2 * x)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Any optimizer that works element by element."""
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def main() -> Regression:
    """Train for a few steps; the adapters wake at step 18."""
    pl.seed_everything(0)
    module = Regression()
    trainer = pl.Trainer(
        max_steps=MAX_STEPS,
        callbacks=[SlopeCallback(MAX_STEPS, lora_start=0.9)],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches = torch.randn(MAX_STEPS, 16, 32)
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    return module


if __name__ == "__main__":
    main()
