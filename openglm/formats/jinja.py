"""The chat format of any other model: its own Jinja template.

    get_format("jinja", tokenizer, template=text).render(messages, tools)

What ends an answer and where an answer begins is found by rendering short conversations. Calls are read in the way
that the template shows them: between <tool_call> tags, behind GLM's role tokens, or as one JSON object that is the
whole answer.
"""

from __future__ import annotations

from collections.abc import Sequence

from openglm.formats.base import BaseFormat, CallStyle, Part
from openglm.formats.calls import headed_call, json_calls
from openglm.formats.chatml import HERMES, hermes_block
from openglm.formats.parser import THINK, THINK_END, Syntax
from openglm.formats.roles import ASSISTANT, OBSERVATION
from openglm.formats.template import Template
from openglm.tokenizer import Tokenizer
from openglm.types import Message, ToolSpec

__all__ = ["JinjaFormat"]

# Names of the tokens that begin and end texts, for templates that write them by variable.
BEGIN_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "<|startoftext|>", "<｜begin▁of▁sentence｜>")
END_NAMES = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>", "<eos>",
    "<|endoftext|>",
)  # fmt: skip
CALL_PREFIXES = ("[TOOL_CALLS]", "<|python_tag|>")
QUESTION, ANSWER = Message("user", "question-1729"), Message("assistant", "answer-1729")
Pieces = list[int | str]


class JinjaFormat(BaseFormat):
    """ChatFormat "jinja". bos_token, eos_token: names for the template's variables, where the common ones are wrong."""

    name = "jinja"

    def __init__(
        self, tokenizer: Tokenizer, *, template: str | None = None, bos_token: str | None = None,
        eos_token: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(tokenizer)
        if not template:
            raise ValueError("chat format jinja needs the model's chat template, and this model has none")
        begin = self._first(BEGIN_NAMES) if bos_token is None else bos_token
        end = self._first(END_NAMES) if eos_token is None else eos_token
        self.template = Template(template, self._id, begin, end)
        opened = "".join(p for p in self.template.pieces([QUESTION])[-1:] if isinstance(p, str))
        self.thinks_always = opened.rstrip().endswith(THINK)
        if "<tool_call>" in template:
            self.call_style = HERMES
        elif OBSERVATION in self._id:
            self.call_style = CallStyle("{name}\n", text="\n")
        elif "tools" in template:
            self.call_style = CallStyle('{"name": "{name}", "arguments": ', "}", mark="{")
        self.stop_ids = self._stops(end)

    def _first(self, names: Sequence[str]) -> str:
        return next((name for name in names if name in self._id), "")

    def _stops(self, end: str) -> tuple[int, ...]:
        """What the template writes behind an answer, and the tokens that end a text in any case."""
        for chat in ([QUESTION, ANSWER], [QUESTION, ANSWER, QUESTION]):
            shown = self.template.pieces(chat, add_generation_prompt=False)
            at = max((i for i, p in enumerate(shown) if isinstance(p, str) and ANSWER.content in p), default=-1)
            after = [p for p in shown[at + 1 :] if isinstance(p, int)]
            if at >= 0 and after:
                break
        first = after[:1] if at >= 0 else []
        others = self._ends(end, "<|eom_id|>", "<|observation|>", "<|endoftext|>", "<|end_of_text|>")
        return tuple(dict.fromkeys([*first, *others]))

    # -------------------------------------------------------------------- rendering

    def parts(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec] = (), add_generation_prompt: bool = True
    ) -> list[Part]:
        """As for every format. ValueError also where an answer cannot be found again in a conversation to be learnt,
        because the template writes earlier turns anew.
        """
        if not messages:
            return []
        whole = self.template.pieces(messages, tools, add_generation_prompt)
        parts = [Part(piece) for piece in whole]
        answers = [i for i, m in enumerate(messages) if m.role == "assistant"]
        for i in reversed(answers):
            span = self._span(whole, messages[:i], tools)
            if span is not None:
                parts = _targeted(parts, *span)
            elif not add_generation_prompt:
                raise ValueError(
                    f"the chat template writes messages before number {i} anew, so its answer cannot be marked for "
                    "training: use another chat format"
                )
        if not add_generation_prompt and messages[-1].role == "assistant":
            while parts and not parts[-1].target:
                parts.pop()
        return parts

    def _span(self, whole: Pieces, before: Sequence[Message], tools: Sequence[ToolSpec]) -> tuple[int, int] | None:
        """Where in `whole`, counted as in `_flat`, the answer to `before` lies, its stop token included."""
        flat = _flat(whole)
        start = 0
        if before:
            history = _flat(self.template.pieces(before, tools, False))
            if flat[: len(history)] != history:
                return None
            start = len(history)
        # The header, as far as the answer has it: a prompt may open reasoning that the history no longer shows.
        prompt = _flat(self.template.pieces(before, tools, True)) if before else []
        while start < min(len(prompt), len(flat)) and flat[start] == prompt[start]:
            start += 1
        stops = set(self.stop_ids)
        end = next((i + 1 for i in range(start, len(flat)) if flat[i] in stops), len(flat))
        return start, end

    # -------------------------------------------------------------------- parsing

    def syntax(self, tools: Sequence[ToolSpec]) -> Syntax:
        names, text = [tool.name for tool in tools], self.template.text
        hermes = "<tool_call>" in text
        headed = bool(names) and not hermes and OBSERVATION in self._id
        generic = bool(names) and not hermes and not headed and "tools" in text
        return Syntax(
            lead=("\n",) if OBSERVATION in self._id else (),
            headers={f"{name}\n": headed_call(name) for name in names} if headed else {},
            next_turn=self._id.get(ASSISTANT) if headed else None,
            blocks=(hermes_block(names),) if names and hermes else (),
            whole=(("{", "[{", *CALL_PREFIXES), json_calls(names, prefixes=CALL_PREFIXES)) if generic else None,
            thinks="always" if self.thinks_always else "maybe" if THINK in text else "never",
            spelled=(THINK, THINK_END, "<tool_call>", "</tool_call>", *(CALL_PREFIXES if generic else ())),
        )


def _flat(pieces: Sequence[int | str]) -> list[int | str]:
    """Specials and single characters, so that two renderings can be compared place by place."""
    flat: list[int | str] = []
    for piece in pieces:
        flat += [piece] if isinstance(piece, int) else piece
    return flat


def _targeted(parts: Sequence[Part], start: int, end: int) -> list[Part]:
    """The parts with the places start .. end, counted as in `_flat`, as targets; texts are cut where need be."""
    out: list[Part] = []
    at = 0
    for content, target in parts:
        if isinstance(content, int):
            out.append(Part(content, target or start <= at < end))
            at += 1
            continue
        cuts = sorted({0, len(content), *(c - at for c in (start, end) if at < c < at + len(content))})
        for a, b in zip(cuts[:-1], cuts[1:], strict=True):
            out.append(Part(content[a:b], target or start <= at + a < end))
        at += len(content)
    return out
