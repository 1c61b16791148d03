"""Whether all processes of a run have the same masks: hashes of the masks, compared.

Masks are buffers that every process chooses or carries for itself. Those that differ make the
processes train different models without an error; this finds the layer and the processes.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn

from slope.layers import adapted_layers


def mask_hashes(model: nn.Module) -> dict[str, int]:
    """A hash of 63 bits of each mask buffer, by layer and buffer: ``"h.0.mlp.c_fc: metadata"``."""
    hashes = {}
    for name, layer in adapted_layers(model):
        for buffer, tensor in layer.named_buffers(recurse=False):
            if tensor.dtype in (torch.uint8, torch.bool):
                data = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
                digest = hashlib.blake2b(data, digest_size=8).digest()
                hashes[f"{name}: {buffer}"] = int.from_bytes(digest, "little") >> 1
    return hashes


def check_masks(model: nn.Module, device: torch.device | str = "cpu", when: str = "") -> None:
    """Compare the masks of all processes; all of them must call it at the same point.

    Args:
        model: with sparse layers, sharded or not.
        device: that the processes exchange tensors on.
        when: put before the error, for example ``"step 100: "``.

    Raises:
        RuntimeError: on every process, if masks differ, naming layers, buffers and ranks.
    """
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return
    hashes = mask_hashes(model)
    if not hashes:
        return
    own = torch.tensor(list(hashes.values()), dtype=torch.int64, device=device)
    everyone = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
    distributed.all_gather(everyone, own)
    table = torch.stack(everyone).cpu()
    differs = table != table[0]
    found = [
        f"{name} of rank {_listed(differs[:, place].nonzero().flatten().tolist())}"
        for place, name in enumerate(hashes)
        if bool(differs[:, place].any())
    ]
    if found:
        more = f", and {len(found) - 3} more" if len(found) > 3 else ""
        raise RuntimeError(
            f"{when}masks differ between processes: {', '.join(found[:3])}{more} is not that of "
            "rank 0. The processes no longer train the same model; compare torch versions and "
            "hardware of the nodes, and go on from the last checkpoint with resume=True."
        )


def _listed(ranks: list[Any]) -> str:
    return ", ".join(map(str, ranks[:4])) + (f" and {len(ranks) - 4} more" if ranks[4:] else "")
