"""`openglm chat`: a conversation in the terminal, or over a pipe.

    printf 'Hello!\\n/quit\\n' | python -m openglm chat

Ctrl-C stops the answer and not the program; what was said so far stays in the conversation. Lines that begin with a
slash are commands, see `HELP`.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from openglm.config import nearest
from openglm.types import Message

if TYPE_CHECKING:
    from openglm.chat import ChatModel

__all__ = ["chat_loop"]

HELP = """\
/clear          forget the conversation (the system message stays)
/system TEXT    set the system message; without TEXT, remove it
/save FILE      write the conversation as JSON
/help           this list
/quit           leave, as Ctrl-D does
Ctrl-C          stop the answer"""
COMMANDS = ["/clear", "/system", "/save", "/help", "/quit"]
# A model may write any character; those that steer the terminal are left out.
CONTROL = {c: None for c in [*range(32), 127, *range(0x80, 0xA0)] if chr(c) not in "\n\t"}


class Interrupt:
    """Ctrl-C while an answer is being made: the first sets `hit`, a second one breaks off whatever runs."""

    def __init__(self) -> None:
        self.hit = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.hit:
            raise KeyboardInterrupt
        self.hit = True


@contextmanager
def _interruptible() -> Iterator[Interrupt]:
    interrupt = Interrupt()
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)


class Conversation:
    """Messages and the system message in front of them."""

    def __init__(self, system: str | None) -> None:
        self.system = system
        self.messages: list[Message] = []

    def all(self) -> list[Message]:
        return ([Message("system", self.system)] if self.system else []) + self.messages

    def save(self, path: Path) -> None:
        rows = [
            {"role": m.role, "content": m.content} | ({"reasoning_content": m.reasoning} if m.reasoning else {})
            for m in self.all()
        ]
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(json.dumps(rows, ensure_ascii=False, indent=1) + "\n")
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def chat_loop(model: ChatModel, system: str | None = None, sampling: dict[str, Any] | None = None) -> int:
    """Read lines from stdin and stream answers to stdout until /quit or the end of input; returns the exit code."""
    model.require_format()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        import readline  # noqa: F401  gives input() line editing and history

        print("Type a message; /help lists commands, Ctrl-D leaves.")
    conversation = Conversation(system)
    while True:
        try:
            line = input("you> " if terminal else "").strip()
            if line.startswith("/"):
                if not _command(line, conversation):
                    return 0
            elif line:
                _answer(model, conversation, line, sampling or {}, terminal)
        except EOFError:
            if terminal:
                print()
            return 0
        except KeyboardInterrupt:
            print(file=sys.stderr)
            _notice("/quit or Ctrl-D leaves")


def _command(line: str, conversation: Conversation) -> bool:
    """Do a slash command; False to leave."""
    name, _, argument = line.partition(" ")
    argument = argument.strip()
    if name == "/quit":
        return False
    if name == "/help":
        print(HELP)
    elif name == "/clear":
        conversation.messages.clear()
    elif name == "/system":
        conversation.system = argument or None
    elif name == "/save":
        if not argument:
            _notice("/save needs a file name")
            return True
        path = Path(argument).expanduser()
        try:
            conversation.save(path)
            print(f"saved {len(conversation.all())} messages to {path}")
        except OSError as error:
            _notice(f"cannot write {path}: {error.strerror}")
    else:
        _notice(f"unknown command {name}{nearest(name, COMMANDS)}; /help lists them")
    return True


def _answer(model: ChatModel, conversation: Conversation, text: str, sampling: dict[str, Any], terminal: bool) -> None:
    """Stream one answer and add both messages, unless the question could not be asked at all."""
    question = Message("user", text)
    said: list[str] = []
    thought: list[str] = []
    reason = None
    try:
        with _interruptible() as interrupt:
            if terminal:
                print("glm> ", end="", flush=True)
            try:
                for event in model.stream([*conversation.all(), question], **sampling):
                    reason = event.finish_reason
                    if event.reasoning:
                        thought.append(event.reasoning)
                        if terminal:  # dim; a pipe gets the answer alone
                            print(f"\x1b[2m{event.reasoning.translate(CONTROL)}\x1b[0m", end="", flush=True)
                    if event.text:
                        said.append(event.text)
                        print(event.text.translate(CONTROL), end="", flush=True)
                    if interrupt.hit:
                        break
            except KeyboardInterrupt:
                interrupt.hit = True
    except ValueError as error:
        print(flush=True)
        _notice(str(error))
        return
    print(flush=True)
    if interrupt.hit:
        _notice("stopped")
    elif reason == "length":
        _notice("the answer was cut at its length limit")
    conversation.messages += [question, Message("assistant", "".join(said), reasoning="".join(thought))]


def _notice(text: str) -> None:
    print(f"openglm: {text}", file=sys.stderr, flush=True)
