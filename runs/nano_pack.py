"""Store a trained model small: weights in bfloat16, sampling defaults in its config.

    python runs/nano_pack.py out/nano/chat/model out/nano/model
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import torch

from openglm.model.checkpoint import save_checkpoint
from openglm.model.load import load_checkpoint

GENERATION = {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1}


def main(source: str, target: str) -> None:
    model, meta = load_checkpoint(source)
    files = {name: (Path(source) / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    meta = dataclasses.replace(meta, generation=GENERATION)
    save_checkpoint(target, model, model.config, meta, files, torch.bfloat16)


if __name__ == "__main__":
    main(*sys.argv[1:])
