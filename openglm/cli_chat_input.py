"""Where `openglm chat` reads from: a pipe, a plain terminal, or one with line editing, history and completion.

In each, three quotes open a message of several lines and three quotes close it. With prompt_toolkit, Esc then Enter
begins a new line as well, Tab completes commands and paths, Ctrl-X Ctrl-E opens $EDITOR, and what was typed is kept.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from openglm.cli_chat_view import notice

if TYPE_CHECKING:
    from prompt_toolkit.completion import Completer
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings

__all__ = ["Input", "make_input", "state_folder"]

QUOTES = '"""'
TAKES_PATH = ("/file", "/save", "/load", "/tools")


class Input(Protocol):
    """can_edit: whether `text` comes up to be changed."""

    can_edit: bool

    def read(self, prompt: str, text: str = "") -> str:
        """The next message, without the quotes of one of several lines. Raises EOFError and KeyboardInterrupt."""
        ...


def make_input(terminal: bool, commands: Sequence[str], status: Callable[[], str]) -> Input:
    """status: what the line at the bottom says."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if terminal and os.environ.get("TERM") not in ("dumb", "unknown"):
        try:
            return PromptInput(commands, status)
        except ImportError:
            pass
    return PlainInput(terminal)


def state_folder() -> Path:
    """Where what was typed is kept: openglm under $XDG_STATE_HOME, else under ~/.local/state."""
    base = os.environ.get("XDG_STATE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".local" / "state") / "openglm"


def is_open(text: str) -> bool:
    """Whether a text has begun with three quotes and lacks the closing ones."""
    body = text.strip()
    return body.startswith(QUOTES) and not (len(body) >= 2 * len(QUOTES) and body.endswith(QUOTES))


def unquoted(text: str) -> str:
    body = text.strip()
    return body[len(QUOTES) : -len(QUOTES)].strip("\n") if body.startswith(QUOTES) and not is_open(body) else body


class PlainInput:
    """input(), in a terminal with readline's editing where Python has it."""

    def __init__(self, terminal: bool) -> None:
        self._terminal = terminal
        self._readline: Any = None
        if terminal:
            try:
                import readline

                self._readline = readline
            except ImportError:
                pass
        self.can_edit = self._readline is not None

    def read(self, prompt: str, text: str = "") -> str:
        if text and self._readline:
            self._readline.set_startup_hook(lambda: self._readline.insert_text(text.replace("\n", " ")))
        try:
            lines = [input(prompt if self._terminal else "")]
        finally:
            if self._readline:
                self._readline.set_startup_hook(None)
        while is_open("\n".join(lines)):
            lines.append(input("...> " if self._terminal else ""))
        return unquoted("\n".join(lines))


class PromptInput:
    """prompt_toolkit. Raises ImportError where it is not installed."""

    can_edit = True

    def __init__(self, commands: Sequence[str], status: Callable[[], str]) -> None:
        from prompt_toolkit import PromptSession

        self._session: PromptSession[str] = PromptSession(
            history=_history(), key_bindings=_keys(), completer=_completer(commands), complete_while_typing=False,
            multiline=True, prompt_continuation="...> ", bottom_toolbar=status, enable_open_in_editor=True,
        )  # fmt: skip

    def read(self, prompt: str, text: str = "") -> str:
        return unquoted(self._session.prompt(prompt, default=text))


def _keys() -> KeyBindings:
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("enter")
    def enter(event: KeyPressEvent) -> None:
        if is_open(event.current_buffer.text):
            event.current_buffer.insert_text("\n")
        else:
            event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _completer(commands: Sequence[str]) -> Completer:
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document

    class Commands(Completer):
        """Names of commands, then the path that some of them take."""

        def get_completions(self, document: Document, event: CompleteEvent) -> Iterator[Completion]:
            name, space, rest = document.text_before_cursor.partition(" ")
            if space and name in TAKES_PATH:
                yield from PathCompleter(expanduser=True).get_completions(Document(rest), event)
            elif not space and name.startswith("/"):
                yield from (Completion(c, -len(name)) for c in commands if c.startswith(name))

    return Commands()


def _history() -> History:
    """Kept in a file that only its owner reads; in memory where there can be no such file."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    path = state_folder() / "chat_history"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        path.chmod(0o600)
    except OSError as error:
        notice(f"what you type is not kept: {path}: {error.strerror}")
        return InMemoryHistory()
    return FileHistory(str(path))
