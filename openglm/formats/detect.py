"""Which chat format a model was trained with, from its special tokens and its chat template.

    detect_format(tokenizer.special_ids, template)      # "glm-4", "chatml", "jinja", ..., or None

Names of models are never looked at.
"""

from __future__ import annotations

from collections.abc import Mapping

from openglm.formats.calls import dump, function_object
from openglm.formats.chatml import END, START, TOOLS_AFTER, TOOLS_BEFORE
from openglm.formats.codegeex import CODE_PARTS
from openglm.formats.glm4 import INTRODUCTION, TOOLS_HEADING
from openglm.formats.parser import THINK
from openglm.formats.roles import ROLE_TOKENS
from openglm.formats.template import Template
from openglm.types import Message, ToolSpec

__all__ = ["chatml_default", "detect_format"]

GLM = {"[gMASK]", "<sop>"}
PROBE = [Message("user", "q1"), Message("assistant", "a1"), Message("user", "q2")]


def detect_format(special_ids: Mapping[str, int], chat_template: str | None) -> str | None:
    """Name of the format; None when neither tokens nor template tell of one.

    ChatGLM-6B's tokens are GLM-130B's, and ChatGLM2's are CodeGeeX2's: of such a pair the chat model is named.
    """
    names = set(special_ids)
    if {*ROLE_TOKENS.values(), *GLM} <= names:
        return _glm_with_roles(special_ids, chat_template)
    if chat_template:
        if {START, END} <= names and _is_chatml(special_ids, chat_template):
            return "chatml"
        return "jinja"
    if {START, END} <= names:
        return "chatml"
    if {*GLM, "<ENC>"} <= names:
        return "chatglm-6b"
    if {*GLM, "<eop>", "</s>"} <= names and "[CLS]" not in names:
        return "chatglm2"
    return None


def _glm_with_roles(special_ids: Mapping[str, int], template: str | None) -> str:
    names = set(special_ids)
    if "</s>" in names and "<|endoftext|>" not in names:
        return "chatglm3"
    if template is None:
        return "codegeex4" if set(CODE_PARTS) <= names else "glm-4"
    try:
        shown = _shown(Template(template, special_ids), [Message("system", "s"), *PROBE], ())
    except ValueError:
        return "jinja"
    # White space apart, which releases of one template differ in; only behind the last header does it tell them apart.
    packed = "".join(shown.split())
    turns = "[gMASK]<sop><|system|>s<|user|>q1<|assistant|>a1<|user|>q2<|assistant|>"
    if packed == turns + THINK:
        return "glm-z1"
    if packed != turns or (shown.endswith("\n") and not set(CODE_PARTS) <= names):
        return "jinja"
    if shown.endswith("\n"):
        return "codegeex4"
    return "glm-4-0414" if TOOLS_HEADING in template and INTRODUCTION[:6] not in template else "glm-4"


# -------------------------------------------------------------------- ChatML


def chatml_default(special_ids: Mapping[str, int], template: str) -> str | None:
    """The system text that a ChatML template puts where there is none; None if it adds no system turn."""
    shown = _shown(Template(template, special_ids), [PROBE[0]], ())
    begin = f"{START}system\n"
    return shown.removeprefix(begin).split(END)[0] if shown.startswith(begin) else None


def _is_chatml(special_ids: Mapping[str, int], text: str) -> bool:
    """Whether the template writes the turns, and the tools if it knows any, as our ChatML does."""
    template = Template(text, special_ids)
    try:
        default = chatml_default(special_ids, text)
        plain = [Message("system", "s"), *PROBE]
        same = _shown(template, plain, ()) == _chatml(plain)
        bare = PROBE if default is None else [Message("system", default), *PROBE]
        same = same and _shown(template, PROBE, ()) == _chatml(bare)
        if same and "tools" in text:
            tool = ToolSpec("f", "d", {"type": "object", "properties": {}})
            declared = dump({"type": "function", "function": function_object(tool)})
            system = Message("system", f"s\n\n{TOOLS_BEFORE}\n{declared}{TOOLS_AFTER}")
            same = _shown(template, plain, (tool,)) == _chatml([system, *PROBE])
        return same
    except ValueError:
        return False


def _chatml(messages: list[Message]) -> str:
    return "".join(f"{START}{m.role}\n{m.content}{END}\n" for m in messages) + f"{START}assistant\n"


def _shown(template: Template, messages: list[Message], tools: tuple[ToolSpec, ...]) -> str:
    names = {i: name for name, i in template.special_ids.items()}
    return "".join(p if isinstance(p, str) else names[p] for p in template.pieces(messages, tools))
