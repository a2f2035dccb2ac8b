"""ChatModel: an Engine with a Tokenizer and a ChatFormat. Text in, text out; what `openglm.load` returns.

python -c "import openglm; print(openglm.load().chat([{'role': 'user', 'content': 'Hello!'}]).content)"
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from openglm.config import nearest
from openglm.engine import Engine, FinishReason, fill_blanks, score
from openglm.engine.fill import MASKS
from openglm.engine.grammar import Grammars
from openglm.formats.matcher import StopText
from openglm.loading import default_dtype, open_weights, pick_device, resolve, with_text
from openglm.model.checkpoint import CheckpointMeta
from openglm.model.cost import is_small
from openglm.model.load import load_weights, start_loading
from openglm.quant.random_model import open_random
from openglm.tokenizer import Detokenizer, Tokenizer
from openglm.types import Event, Message, SamplingParams, ToolSpec, Usage

if TYPE_CHECKING:
    import numpy as np

    from openglm.formats import ChatFormat, Parser

__all__ = ["ChatModel", "FillResult", "Generated", "load"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FILL_MAX_NEW_TOKENS = 64


class Generated(str):
    """Generated text, a str that remembers its tokens (a stop id that ended it is the last one)."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason

    @property
    def text(self) -> str:
        return str(self)


@dataclass(frozen=True)
class FillResult:
    """text: the given text with every blank filled. blanks: the answers in the order of the text.

    candidates: for each blank, (answer, score) best first: all beams of a beam search, else the one that was drawn.
    """

    text: str
    blanks: tuple[str, ...]
    finish_reasons: tuple[FinishReason, ...]
    candidates: tuple[tuple[tuple[str, float], ...], ...]


def _to_stderr(notice: str) -> None:
    print(f"openglm: {notice}", file=sys.stderr)


class ChatModel:
    """One model with its text side. tokenizer and chat_format are None where a checkpoint has none.

    notify: called with one line when something was left out of a prompt.
    """

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer | None, chat_format: ChatFormat | None, meta: CheckpointMeta
    ) -> None:
        self.engine, self.meta, self.chat_format = engine, meta, chat_format
        self._tokenizer = tokenizer
        self.notify: Callable[[str], None] = _to_stderr

    @classmethod
    def load(
        cls,
        reference: str | Path | None = None,
        device: str = "auto",
        dtype: str | None = None,
        adapter: str | Path | None = None,
        chat_format: str | None = None,
    ) -> ChatModel:
        """A checkpoint folder (ours or as released), a .gguf file, "random:PRESET?field=value" (random weights, no
        tokenizer; `open_random` says what goes there), or None: the bundled model.

        device: "auto" (cuda where present), "cpu", "cuda", "cuda:1". dtype: float32, bfloat16, float16; None: as
        stored on a GPU; on a CPU float32, or as stored where that does not fit. adapter: a LoRA or P-Tuning v2 folder
        to put on top. chat_format: a name of `openglm.formats`, where the checkpoint's own is not wanted. Raises
        ValueError in one line for whatever cannot be loaded.
        """
        source = resolve(reference)
        place = pick_device(device)
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"unknown dtype {dtype!r}: give one of {', '.join(DTYPES)}")
        if isinstance(source, str):
            if adapter is not None or chat_format is not None:
                raise ValueError(f"{source} takes no adapter and no chat format: give a checkpoint")
            opened = open_random(source)
            kind = DTYPES[dtype] if dtype else default_dtype(opened, place)
            return cls(Engine(load_weights(opened, place, kind, packed=True), {}), None, None, opened.meta)
        opened = open_weights(source, adapter)
        kind = DTYPES[dtype] if dtype else default_dtype(opened, place)
        finish = start_loading(opened, place, kind, packed=True)
        found = with_text(opened, chat_format)
        tokenizer, meta, model = found.tokenizer, found.meta, finish()
        special = meta.special_ids or (tokenizer.special_ids if tokenizer else {})
        if tokenizer is None:
            return cls(Engine(model, special), None, found.chat_format, meta)
        engine = Engine(model, special, tokenizer.vocab_size, grammar_state=Grammars(tokenizer))
        return cls(engine, tokenizer, found.chat_format, meta)

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise ValueError(
                "this model has no tokenizer, so it takes no text: put its tokenizer files beside the weights, or give "
                "token ids"
            )
        return self._tokenizer

    # ---------------------------------------------------------------- text

    def generate(self, prompt: str | Sequence[int], **sampling: Any) -> Generated:
        """Continue a text, or token ids as they are. sampling: fields of SamplingParams.

        Defaults come from the checkpoint. Around a text goes what the model was trained with ([gMASK] <sop>, say).
        """
        stream = self.stream_text(prompt, **sampling)
        list(stream)
        return stream.result()

    def stream_text(self, prompt: str | Sequence[int], **sampling: Any) -> TextStream:
        """`generate` piece by piece: iterate for text, then ask `result()`."""
        ids = self.text_ids(prompt) if isinstance(prompt, str) else list(prompt)
        params = self._params(self.text_stops(), {}, sampling)
        if params.stop_strings and self._tokenizer is None:
            raise ValueError("stop_strings are text, and this model has no tokenizer: give stop_ids")
        return TextStream(self, ids, params)

    def text_ids(self, text: str) -> list[int]:
        """ids of a text to be continued, with what the model was trained with around it."""
        before = self.text_head() if self.meta.prompt_prefix is None else self.meta.prompt_prefix
        return [*before, *self.tokenizer.encode(text), *self.meta.prompt_suffix]

    def fill(
        self,
        text: str,
        n_beams: int = 1,
        length_penalty: float = 0.7,
        no_repeat_ngram: int = 3,
        min_new_tokens: int = 1,
        **sampling: Any,
    ) -> FillResult:
        """Fill every [MASK] (words), [sMASK] (a sentence) and [gMASK] (all that follows), left to right.

        Greedy by default; a temperature draws; n_beams above 1 searches, and only then the three options after it
        count. A space in front of a blank belongs to its first word, as the tokenizer cuts words.
        """
        if n_beams > 1 and sampling.get("temperature"):
            raise ValueError("beam search does not draw: give either n_beams or a temperature")
        defaults = {"temperature": 0.0, "max_new_tokens": FILL_MAX_NEW_TOKENS}
        params = self._params(self.text_stops(), defaults, sampling)
        ids, joined, shown = self.fill_prompt(text)
        ids, blanks = fill_blanks(
            self.engine, ids, params, n_beams, length_penalty, no_repeat_ngram, min_new_tokens, joined
        )
        return FillResult(
            self.tokenizer.decode(ids),
            tuple(shown(i, b.ids) for i, b in enumerate(blanks)),
            tuple(b.finish_reason for b in blanks),
            tuple(tuple((shown(i, c), value) for c, value in b.candidates) for i, b in enumerate(blanks)),
        )

    def fill_prompt(
        self, text: str
    ) -> tuple[list[int], Callable[[int, list[int]], list[int]], Callable[[int, Sequence[int]], str]]:
        """(ids of a text with blanks, what puts a blank's answer in its place, what shows it); see `fill_blanks`."""
        tokenizer = self.tokenizer
        names = [name for name in MASKS if name in tokenizer.special_ids]
        marks = re.compile("(" + "|".join(map(re.escape, names)) + ")") if names else re.compile("(?!)")
        pieces = marks.split(text)  # text, mask, text, mask, ..., text
        spaced = [pieces[i].endswith(" ") for i in range(0, len(pieces) - 1, 2)]
        for blank, space in enumerate(spaced):
            if space:
                pieces[2 * blank] = pieces[2 * blank][:-1]

        def joined(blank: int, answer: list[int]) -> list[int]:
            lacks_space = spaced[blank] and not tokenizer.decode(answer)[:1].isspace()
            return [*tokenizer.encode(" "), *answer] if lacks_space else answer

        def shown(blank: int, answer: Sequence[int]) -> str:
            found = tokenizer.decode(answer)
            return found[1:] if spaced[blank] and found.startswith(" ") else found

        ids = tokenizer.encode_marked("".join(pieces), names)
        if ids and ids[-1] not in {tokenizer.special_ids[name] for name in names}:
            ids += self.meta.fill_suffix
        ids = [*(self.meta.prompt_prefix or ()), *ids] if self.meta.prompt_suffix else ids
        return ids, joined, shown

    # ---------------------------------------------------------------- chat

    def chat(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        tools: Sequence[ToolSpec | Mapping[str, Any]] | None = None,
        **sampling: Any,
    ) -> Message:
        """The assistant's next message. messages and tools: ours, or plain dicts in OpenAI's shape."""
        text, calls, reasoning = [], [], []
        for event in self.stream(messages, tools, **sampling):
            text.append(event.text)
            reasoning.append(event.reasoning)
            if event.tool_call is not None:
                calls.append(event.tool_call)
        return Message("assistant", "".join(text), tuple(calls), reasoning="".join(reasoning))

    def stream(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        tools: Sequence[ToolSpec | Mapping[str, Any]] | None = None,
        **sampling: Any,
    ) -> Iterator[Event]:
        """`chat` as events; the last one carries the finish reason and the ones before it none."""
        chat_format = self.require_format()
        params = self._params(chat_format.stop_ids, {}, sampling)
        parsed = [
            m if isinstance(m, Message) else Message.from_dict(m, f"messages[{i}]") for i, m in enumerate(messages)
        ]
        specs = [t if isinstance(t, ToolSpec) else ToolSpec.from_dict(t) for t in tools or ()]
        return self._events(chat_format.parser(specs), self._fitted(chat_format, parsed, specs, params), params)

    def _events(self, parser: Parser, ids: list[int], params: SamplingParams) -> Iterator[Event]:
        steps, stop = self.engine.stream(ids, _for_engine(params)), StopText(params.stop_strings)

        def events() -> Iterator[Event]:
            reason: FinishReason | None = None
            called, n_drawn = False, 0
            for step in steps:
                reason, n_drawn = step.finish_reason, n_drawn + 1
                found = list(parser.feed(step.token_id)) or [Event()]
                found[0] = dataclasses.replace(found[0], token_ids=(step.token_id,))
                for event in found:
                    called = called or event.tool_call is not None
                    yield dataclasses.replace(event, text=stop.feed(event.text), finish_reason=None)
                if stop.found:
                    reason = "stop"
                    steps.close()
                    break
            for event in () if stop.found else parser.finish():
                called = called or event.tool_call is not None
                yield dataclasses.replace(event, text=stop.feed(event.text), token_ids=(), finish_reason=None)
            if rest := stop.finish():
                yield Event(rest)
            assert reason != "error" and reason != "cancelled", "a stream raises, or just ends"
            usage = Usage(len(ids), n_drawn)
            yield Event(finish_reason="tool_calls" if called and reason == "stop" else reason, usage=usage)

        return events()

    def _fitted(
        self, chat_format: ChatFormat, messages: list[Message], tools: list[ToolSpec], params: SamplingParams
    ) -> list[int]:
        """Prompt ids. The oldest turns are left out until prompt and some answer fit; system messages stay."""
        context = self.engine.config.max_seq_len
        room = min(params.max_new_tokens, context // 4)  # an answer gets at least this much
        dropped = 0
        while True:
            ids = chat_format.render(messages, tools).ids
            if len(ids) + room <= context:
                break
            users = [i for i, m in enumerate(messages) if m.role == "user"]
            if len(users) < 2:
                if len(ids) < context:
                    break  # the last turn alone: a short answer is better than none
                raise ValueError(
                    f"the last message makes a prompt of {len(ids)} tokens but the context holds {context} with the "
                    "answer: shorten it"
                )
            older = [m for m in messages[: users[1]] if m.role != "system"]
            messages = [m for m in messages[: users[1]] if m.role == "system"] + messages[users[1] :]
            dropped += len(older)
        if dropped:
            self.notify(f"the conversation outgrew the context of {context} tokens: {dropped} oldest messages left out")
        return ids

    @property
    def builtin_tools(self) -> frozenset[str]:
        """Names of the tools that the model was trained to use without a schema; see types.BUILTIN_TOOLS."""
        return frozenset() if self.chat_format is None else self.chat_format.builtin_tools

    @property
    def wants_guide(self) -> bool:
        """Whether an agent leads it from tool to tool: a small model that knows no tool by name."""
        return not self.builtin_tools and is_small(self.engine.config)

    def require_format(self) -> ChatFormat:
        """The chat format, or ValueError for a model that was not tuned for chat."""
        if self.chat_format is None:
            raise ValueError("this model has no chat format, it was not tuned for chat: use generate or fill")
        return self.chat_format

    # ---------------------------------------------------------------- scores

    def logits(self, ids: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """(T, vocab_size) float32: row t scores token t + 1. Context and positions as for a prompt of these ids."""
        return self.engine.logits(ids).float().cpu().numpy()

    def perplexity(self, text: str, window: int = 1024, stride: int = 512) -> dict[str, float]:
        """nll_per_token (nats), bits_per_byte and tokens of a text, every token scored once in sliding windows.

        A model with [gMASK] and <sop> gets them in front of each window, so each sees only what comes before.
        """
        if not text:
            raise ValueError("the text is empty: there is nothing to score")
        ids, head = self.tokenizer.encode(text), self.text_head()
        result = score(self.engine, ids, head, min(window, self.engine.config.max_seq_len), stride)
        scored = self.tokenizer.decode_bytes(ids[len(ids) - result.n_tokens :])
        return {
            "nll_per_token": result.nll / result.n_tokens,
            "bits_per_byte": result.nll / math.log(2) / len(scored),
            "tokens": result.n_tokens,
        }

    # ---------------------------------------------------------------- helpers

    def text_head(self) -> list[int]:
        return self.meta.text_head(self.engine.special_ids)

    def text_stops(self) -> tuple[int, ...]:
        special = self.engine.special_ids
        ends = [special[name] for name in ("<eop>", "<|endoftext|>") if name in special]
        return tuple(sorted({*self.meta.stop_ids, *ends}))

    def _params(self, stop_ids: Sequence[int], defaults: dict[str, Any], sampling: dict[str, Any]) -> SamplingParams:
        known = [f.name for f in dataclasses.fields(SamplingParams)]
        for name in sampling:
            if name not in known:
                raise ValueError(f"unknown sampling option {name!r}{nearest(name, known)}; known: {', '.join(known)}")
        given = {name: value for name, value in sampling.items() if value is not None}
        return SamplingParams(**{"stop_ids": tuple(stop_ids), **self.meta.generation, **defaults, **given})


class TextStream:
    """Iterator over pieces of generated text, never half a character."""

    def __init__(self, model: ChatModel, ids: list[int], params: SamplingParams) -> None:
        self._steps, self._stop = model.engine.stream(ids, _for_engine(params)), StopText(params.stop_strings)
        self._detokenizer = None if model._tokenizer is None else Detokenizer(model._tokenizer)
        self._seen: list[Any] = []
        self._text: list[str] = []

    def __iter__(self) -> Iterator[str]:
        for step in self._steps:
            self._seen.append(step)
            if self._detokenizer is None:
                continue
            piece = self._stop.feed(self._detokenizer.feed(step.token_id))
            if step.finish_reason is not None:
                piece += self._stop.feed(self._detokenizer.finish()) + self._stop.finish()
            if piece:
                self._text.append(piece)
                yield piece
            if self._stop.found:
                self._seen[-1] = dataclasses.replace(step, finish_reason="stop")
                self._steps.close()
                return

    def result(self) -> Generated:
        """All of it; to be asked after the last piece. The text is empty where there is no tokenizer."""
        out = Generated("".join(self._text))
        out.token_ids = tuple(s.token_id for s in self._seen)
        out.logprobs = tuple(s.logprob for s in self._seen)
        out.finish_reason = self._seen[-1].finish_reason
        return out


def load(
    reference: str | Path | None = None, device: str = "auto", dtype: str | None = None,
    adapter: str | Path | None = None, chat_format: str | None = None,
) -> ChatModel:  # fmt: skip
    """`ChatModel.load`: the model at a folder or file, "random:PRESET", or, given nothing, the bundled one."""
    return ChatModel.load(reference, device, dtype, adapter, chat_format)


def _for_engine(params: SamplingParams) -> SamplingParams:
    """Without what only the text side knows."""
    return dataclasses.replace(params, stop_strings=()) if params.stop_strings else params
