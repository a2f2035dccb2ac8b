"""The slash commands of `openglm chat`, and the conversation they work on.

    printf '/help\\n' | python -m openglm chat

A command is a function of the chat and the rest of its line. It returns None, False to leave the program, or a text
that comes up at the next prompt to be changed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from openglm.cli_chat_input import Input
from openglm.cli_chat_view import notice
from openglm.config import nearest
from openglm.types import Message, SamplingParams, ToolSpec, Usage

__all__ = ["COMMANDS", "Conversation", "Session", "Stats", "run_command"]

MAX_FILE_BYTES = 1 << 20
SETTINGS = ("temperature", "top_p", "top_k", "min_p", "max_new_tokens", "repetition_penalty", "frequency_penalty",
            "presence_penalty", "seed")  # fmt: skip


class Conversation:
    """Messages and the system message in front of them.

    tools: functions the model may call. attached: (name, text) of files that go with the next question. unanswered:
    the last question, while it has no answer.
    """

    def __init__(self, system: str | None) -> None:
        self.system = system
        self.messages: list[Message] = []
        self.tools: list[ToolSpec] = []
        self.attached: list[tuple[str, str]] = []
        self.unanswered: Message | None = None

    def all(self) -> list[Message]:
        return ([Message("system", self.system)] if self.system else []) + self.messages

    def question(self, text: str) -> Message:
        """A message with the files attached to it in front."""
        return Message("user", self.files() + text)

    def files(self) -> str:
        return "".join(f"{name}:\n{_fence(content)}\n\n" for name, content in self.attached)

    def answered(self, turn: list[Message]) -> None:
        self.messages += turn
        if turn[0].content.startswith(self.files()):  # else they are still to go: an earlier question was asked again
            self.attached.clear()
        self.unanswered = None

    def last_question(self) -> int | None:
        """Index of the last question among the messages."""
        return next((i for i in reversed(range(len(self.messages))) if self.messages[i].role == "user"), None)

    def save(self, path: Path) -> None:
        rows = [_as_dict(m) for m in self.all()]
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(json.dumps(rows, ensure_ascii=False, indent=1) + "\n")
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def load(self, path: Path) -> None:
        """Take the place of this conversation. Raises ValueError for a file that holds none."""
        value = json.loads(_read(path))
        rows = value.get("messages") if isinstance(value, dict) else value
        if not isinstance(rows, list):
            raise ValueError("it holds no list of messages")
        messages = [Message.from_dict(row, f"messages[{i}]") for i, row in enumerate(rows)]
        system = [m.content for m in messages if m.role == "system"]
        self.system = "\n\n".join(system) or None
        self.messages = [m for m in messages if m.role != "system"]
        self.unanswered = None


@dataclass
class Stats:
    """Of one answer. first_s: until its first piece; n_pieces stands for its tokens where they are not told."""

    first_s: float = 0.0
    total_s: float = 0.0
    n_pieces: int = 0
    usage: Usage | None = None

    @property
    def tokens_per_s(self) -> float | None:
        """After the first one."""
        n = self.usage.completion_tokens if self.usage else self.n_pieces
        span = self.total_s - self.first_s
        return (n - 1) / span if n > 1 and span > 0 else None


class Session(Protocol):
    """What commands work on: the chat of cli_chat.py."""

    conversation: Conversation
    sampling: dict[str, Any]
    stats: list[Stats]
    input: Input
    context: int | None

    def ask(self, question: Message) -> bool: ...


def _as_dict(m: Message) -> dict[str, Any]:
    value: dict[str, Any] = {"role": m.role, "content": m.content}
    if m.reasoning:
        value["reasoning_content"] = m.reasoning
    if m.tool_calls:
        value["tool_calls"] = [
            {"type": "function", "function": {"name": c.name, "arguments": c.arguments}}
            | ({"id": c.id} if c.id else {})
            for c in m.tool_calls
        ]
    return value | {k: v for k, v in (("tool_call_id", m.tool_call_id), ("name", m.name)) if v is not None}


def _fence(text: str) -> str:
    """A code block around a text, longer than any in it."""
    ticks = "```"
    while ticks in text:
        ticks += "`"
    return f"{ticks}\n{text.rstrip()}\n{ticks}"


def _read(path: Path) -> str:
    """A UTF-8 text of at most 1 MiB."""
    with open(path, "rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"it is larger than {MAX_FILE_BYTES >> 20} MiB")
    if b"\0" in data:
        raise ValueError("it is no text")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 (byte {error.start})") from None


# -------------------------------------------------------------------- commands


def _help(chat: Session, argument: str) -> None:
    width = max(len(f"{name} {takes}") for name, (takes, _, _) in COMMANDS.items()) + 2
    for name, (takes, about, _) in COMMANDS.items():
        print(f"{f'{name} {takes}'.strip():<{width}}{about}")
    print(f"{'Ctrl-C':<{width}}stop the answer")
    print(f"{chr(34) * 3:<{width}}opens and closes a message of several lines; or Esc Enter")


def _clear(chat: Session, argument: str) -> None:
    chat.conversation.messages.clear()
    chat.conversation.attached.clear()
    chat.conversation.unanswered = None


def _system(chat: Session, argument: str) -> None:
    chat.conversation.system = argument or None


def _undo(chat: Session, argument: str) -> None:
    start = chat.conversation.last_question()
    if start is None:
        raise ValueError("there is no question yet")
    question = chat.conversation.messages[start].content
    del chat.conversation.messages[start:]
    chat.conversation.unanswered = None
    print(f"forgotten: {_short(question)}")


def _retry(chat: Session, argument: str) -> None:
    _ask_again(chat, None)


def _edit(chat: Session, argument: str) -> str | None:
    conversation = chat.conversation
    if argument:
        _ask_again(chat, argument)
        return None
    if not chat.input.can_edit:
        raise ValueError("/edit needs the new text here")
    if conversation.unanswered is not None:
        text, conversation.unanswered = conversation.unanswered.content, None
        return text.removeprefix(conversation.files())
    start = conversation.last_question()
    if start is None:
        raise ValueError("there is no question yet")
    text = conversation.messages[start].content
    del conversation.messages[start:]
    return text


def _ask_again(chat: Session, text: str | None) -> None:
    """The last question, or `text` in its place. Without an answer, all stays as it was."""
    conversation = chat.conversation
    before, start = list(conversation.messages), conversation.last_question()
    question = conversation.unanswered
    if question is None:
        if start is None:
            raise ValueError("there is no question yet")
        question = conversation.messages[start]
        del conversation.messages[start:]
    if not chat.ask(question if text is None else conversation.question(text)):
        conversation.messages = before


def _save(chat: Session, argument: str) -> None:
    path = _path(argument, "/save")
    chat.conversation.save(path)
    print(f"saved {len(chat.conversation.all())} messages to {path}")


def _load(chat: Session, argument: str) -> None:
    path = _path(argument, "/load")
    try:
        chat.conversation.load(path)
    except ValueError as error:
        raise ValueError(f"cannot load {path}: {error}") from None
    print(f"loaded {len(chat.conversation.all())} messages from {path}")


def _file(chat: Session, argument: str) -> None:
    path = _path(argument, "/file")
    try:
        text = _read(path)
    except ValueError as error:
        raise ValueError(f"cannot attach {path}: {error}") from None
    chat.conversation.attached.append((path.name, text))
    print(f"attached {path.name} ({len(text)} characters): it goes with the next message")


def _tools(chat: Session, argument: str) -> None:
    if argument:
        path = _path(argument, "/tools")
        try:
            value = json.loads(_read(path))
            chat.conversation.tools = [ToolSpec.from_dict(v) for v in (value if isinstance(value, list) else [value])]
        except (ValueError, AttributeError) as error:
            raise ValueError(f"cannot read tools from {path}: {error}") from None
    for tool in chat.conversation.tools:
        print(f"{tool.name}  {tool.description}")
    if not chat.conversation.tools:
        print("no tools: /tools FILE reads their descriptions; you type what a called one gives")


def _set(chat: Session, argument: str) -> None:
    name, _, text = argument.replace("=", " ").partition(" ")
    if not name:
        for setting in SETTINGS:
            print(f"{setting} {chat.sampling.get(setting, 'default')}")
        return
    if name not in SETTINGS:
        raise ValueError(f"no setting {name!r}{nearest(name, list(SETTINGS))}: {', '.join(SETTINGS)}")
    if text.strip() in ("", "default"):
        chat.sampling.pop(name, None)
        return
    try:
        value = json.loads(text)
    except ValueError:
        raise ValueError(f"{name} must be a number, not {text.strip()!r}") from None
    SamplingParams(**{name: value})  # says what is wrong with it
    chat.sampling[name] = value


def _stats(chat: Session, argument: str) -> None:
    if not chat.stats:
        raise ValueError("there is no answer yet")
    last = chat.stats[-1]
    print(f"first piece after {last.first_s:.2f} s, all after {last.total_s:.2f} s")
    if last.tokens_per_s is not None:
        unit = "tokens/s" if last.usage else "pieces/s (the server tells no tokens)"
        print(f"{last.tokens_per_s:.1f} {unit}")
    if last.usage:
        held = f" of the context's {chat.context}" if chat.context else ""
        total = last.usage.prompt_tokens + last.usage.completion_tokens
        print(
            f"prompt {last.usage.prompt_tokens}, answer {last.usage.completion_tokens}, together {total}{held} tokens"
        )


def _quit(chat: Session, argument: str) -> bool:
    return False


def _path(argument: str, name: str) -> Path:
    if not argument:
        raise ValueError(f"{name} needs a file name")
    return Path(argument).expanduser()


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else line[:59] + "…"


Function = Callable[[Session, str], "str | bool | None"]
COMMANDS: Mapping[str, tuple[str, str, Function]] = {  # what it takes, what it does
    "/system": ("TEXT", "set the system message; without TEXT, remove it", _system),
    "/clear": ("", "forget the conversation (the system message stays)", _clear),
    "/undo": ("", "forget the last question and its answer", _undo),
    "/retry": ("", "ask the last question again", _retry),
    "/edit": ("TEXT", "ask TEXT in place of the last question; alone, edit that", _edit),
    "/file": ("PATH", "attach a text file to the next message", _file),
    "/tools": ("FILE", "functions the model may call, from a JSON file; list them", _tools),
    "/set": ("NAME VALUE", "as in /set temperature 0.7; default takes it back; list them", _set),
    "/stats": ("", "speed and tokens of the last answer", _stats),
    "/save": ("FILE", "write the conversation as JSON", _save),
    "/load": ("FILE", "go on with a saved conversation", _load),
    "/help": ("", "this list", _help),
    "/quit": ("", "leave, as /exit and Ctrl-D do", _quit),
    "/exit": ("", "leave", _quit),
}


def run_command(chat: Session, line: str) -> str | bool | None:
    """Do what a line that begins with a slash says. Mistakes are told and end nothing."""
    name, _, argument = line.partition(" ")
    if name not in COMMANDS:
        notice(f"unknown command {name}{nearest(name, list(COMMANDS))}; /help lists them")
        return None
    try:
        return COMMANDS[name][2](chat, argument.strip())
    except OSError as error:
        verb = "write" if name == "/save" else "read"
        notice(f"cannot {verb} {argument.strip()}: {error.strerror}")
    except ValueError as error:
        notice(" ".join(str(error).split()))
    return None
