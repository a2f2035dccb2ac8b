"""`openglm train`: a run config to a trained model, with samples of what the model writes as training goes on.

    python -m openglm train runs/nano-pretrain.yaml sample_every=100
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openglm.model.transformer import Transformer
    from openglm.tokenizer import Tokenizer
    from openglm.train.config import TrainConfig
    from openglm.train.run import RunResult
    from openglm.train.trainer import Sampler

__all__ = ["samples", "train"]

SAMPLE_TOKENS = 24  # of one continuation or answer; a blank takes what it needs, up to this
PROMPTS = {
    "infill": (
        "The capital of France is [MASK], a city on the river Seine.",
        "Water [MASK] at one hundred degrees, and it [MASK] at zero.",
        "北京是[MASK]的首都，位于华北平原。",
        "The sun went down behind the hills. [gMASK]",
        "从前有一座山，[gMASK]",
    ),
    "lm": ("The sun went down behind the hills.", "从前有一座山，"),
    "sft": ("Hello! Who are you?", "What is the capital of France?", "你好，请介绍一下你自己。"),
}


def train(path: str, overrides: list[str], resume: str) -> RunResult:
    """Run the config at `path` with `a.b=c` overrides; ValueError in one line for every mistake of the user's."""
    from openglm.train.config import load_config
    from openglm.train.run import run

    config = load_config(path, overrides)
    return run(config, resume, sampler_of(config))


def sampler_of(config: TrainConfig) -> Sampler:
    """What the trainer calls every `sample_every` steps; its tokenizer is read at the first call."""

    @cache
    def tokenizer() -> Tokenizer:
        from openglm.tokenizer import Tokenizer

        folder = config.tokenizer or config.init_from
        assert folder is not None, "the run would not have started"
        return Tokenizer.load(Path(folder))

    chat_format = str(config.data.get("format", "glm-4"))
    return lambda model: samples(model, tokenizer(), config.objective, chat_format)


def samples(model: Transformer, tokenizer: Tokenizer, objective: str, chat_format: str) -> list[dict[str, Any]]:
    """{"prompt", "fills"} or {"prompt", "text"} of fixed prompts, drawn greedily: no generator is touched.

    A prompt that the context does not hold is left out.
    """
    from openglm.chat import ChatModel
    from openglm.engine import Engine
    from openglm.formats import get_format
    from openglm.model.checkpoint import CheckpointMeta

    form = get_format(chat_format, tokenizer) if objective == "sft" else None
    engine = Engine(model, tokenizer.special_ids, tokenizer.vocab_size)
    chat = ChatModel(engine, tokenizer, form, CheckpointMeta())
    drawn: list[dict[str, Any]] = []
    for prompt in PROMPTS[objective]:
        options: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": SAMPLE_TOKENS}
        try:
            if objective == "infill" and model.config.mask == "prefix":
                drawn.append({"prompt": prompt, "fills": list(chat.fill(prompt, **options).blanks)})
            elif objective == "sft":
                answer = chat.chat([{"role": "user", "content": prompt}], **options)
                drawn.append({"prompt": prompt, "text": answer.content})
            else:
                drawn.append({"prompt": prompt, "text": str(chat.generate(prompt, **options))})
        except ValueError:  # too long for a very small context
            continue
    return drawn
