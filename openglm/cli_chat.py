"""`openglm chat`: a conversation in the terminal, or over a pipe, with a model here or on a server.

    printf 'Hello!\\n/quit\\n' | python -m openglm chat
    python -m openglm chat --url http://localhost:8000

Ctrl-C stops the answer and not the program; what was said so far stays in the conversation. Lines that begin with a
slash are commands, see cli_chat_commands.py. cli_chat_input.py reads lines, cli_chat_view.py shows answers.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

from openglm.cli_chat_commands import COMMANDS, Conversation, Stats, run_command
from openglm.cli_chat_input import Input, make_input
from openglm.cli_chat_view import View, make_view, notice
from openglm.cli_options import (
    Parser,
    answer_options,
    clean,
    load_model,
    model_name,
    model_option,
    place_options,
    sampling_options,
)
from openglm.types import ChatBackend, Event, Message

__all__ = ["Chat", "Interrupt", "chat_options", "chat_partner", "interruptible"]


def chat_options(p: Parser) -> None:
    model_option(p)
    p.add_argument("--url", metavar="URL", help="talk to the OpenAI-compatible server there instead")
    p.add_argument("--model", metavar="NAME", dest="name", help="with --url: its model (default: the only one)")
    p.add_argument("--api-key", metavar="KEY", help="with --url: its key (default: OPENAI_API_KEY)")
    p.add_argument("--system", metavar="TEXT", help="system message to start with")
    answer_options(p)
    sampling_options(p, "256", "the checkpoint's")
    place_options(p)


def chat_partner(o: argparse.Namespace) -> tuple[ChatBackend, str, int | None]:
    """Who answers: the model here or the one at the URL; its name, and the tokens of its context where known."""
    if o.url is None:
        for option, value in (("--model", o.name), ("--api-key", o.api_key)):
            if value is not None:
                raise ValueError(f"{option} goes with --url; a model here is named without an option")
        model = load_model(o)
        model.require_format()
        name = model.meta.description.get("name") or model_name(o.model)
        return model, str(name), model.engine.config.max_seq_len
    local = {"MODEL": o.model, "--adapter": o.adapter, "--dtype": o.dtype, "--threads": o.threads,
             "--device": None if o.device == "auto" else o.device}  # fmt: skip
    for option, value in local.items():
        if value is not None:
            raise ValueError(f"{option} is for a model here, not for the one at --url (--model NAME chooses there)")
    from openglm.agent.http_backend import HttpBackend

    if o.regex is not None:
        raise ValueError("--regex is for a model here: servers take a schema (--json-schema) and no regular expression")
    backend = HttpBackend(o.url, o.name, o.api_key)
    return backend, backend.model, None


T = TypeVar("T")


class Interrupt:
    """Ctrl-C while an answer is being made: the first sets `hit`, a second one breaks off whatever runs.

    at_once: the first breaks off as well where the next event is waited for, which a silent network may keep back.
    """

    def __init__(self, at_once: bool) -> None:
        self.hit = self.waits = False
        self.at_once = at_once

    def __call__(self, number: int, frame: FrameType | None) -> None:
        again, self.hit = self.hit, True
        if again or (self.at_once and self.waits):
            raise KeyboardInterrupt

    def until_hit(self, events: Iterator[T]) -> Iterator[T]:
        while not self.hit:
            self.waits = True
            event = next(events, None)
            self.waits = False
            if event is None:
                return
            yield event


@contextmanager
def interruptible(at_once: bool) -> Iterator[Interrupt]:
    interrupt = Interrupt(at_once)
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)


class Chat:
    """A conversation with a backend. name: of the model. context: what it holds in tokens, where that is known.

    remote: it is far away, so Ctrl-C does not wait for it.
    """

    def __init__(
        self, backend: ChatBackend, name: str, context: int | None, system: str | None = None,
        sampling: Mapping[str, Any] | None = None, remote: bool = False,
    ) -> None:  # fmt: skip
        self.backend, self.name, self.context, self.remote = backend, name, context, remote
        self.sampling = dict(sampling or {})
        self.conversation = Conversation(system)
        self.stats: list[Stats] = []
        self.terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self.view: View = make_view(self.terminal)
        self.input: Input = make_input(self.terminal, list(COMMANDS), self.status)

    def run(self) -> int:
        """Read messages and answer until /quit or the end of input; the exit code: on a pipe, 2 where the last message
        has no answer.
        """
        if self.terminal:
            print(f"{self.name}. Type a message; /help lists commands, Ctrl-D leaves.")
        text = ""
        while True:
            try:
                line, text = self.input.read("you> ", text), ""
                if line.startswith("/"):
                    if (result := run_command(self, line)) is False:
                        return self._exit_code()
                    text = result if isinstance(result, str) else ""
                elif line:
                    self.ask(self.conversation.question(clean(line)))
            except EOFError:
                if self.terminal:
                    print()
                return self._exit_code()
            except KeyboardInterrupt:
                text = ""
                print(file=sys.stderr)
                notice("/quit or Ctrl-D leaves")

    def _exit_code(self) -> int:
        return 2 if self.conversation.unanswered is not None and not self.terminal else 0

    def status(self) -> str:
        """The line below the prompt."""
        parts = [self.name]
        if self.stats:
            last = self.stats[-1]
            if last.tokens_per_s is not None:
                parts.append(f"{last.tokens_per_s:.1f} tokens/s")
            if last.usage is not None:
                used = last.usage.prompt_tokens + last.usage.completion_tokens
                parts.append(f"{used} tokens" if self.context is None else f"{used} of {self.context} tokens")
        if self.conversation.attached:
            parts.append(f"attached: {', '.join(name for name, _ in self.conversation.attached)}")
        return " · ".join(parts)

    def ask(self, question: Message) -> bool:
        """One turn: the question, the answer, and what tools gave back between. False: it was not answered."""
        conversation = self.conversation
        conversation.unanswered = question
        turn = [question]
        while (reply := self._answer([*conversation.all(), *turn])) is not None:
            results = self._results(reply) if reply.tool_calls else None
            if results is None:  # a call without a result cannot stay in a conversation
                turn.append(Message("assistant", reply.content, reasoning=reply.reasoning))
                conversation.answered(turn)
                return True
            turn += [reply, *results]
        return False

    def _answer(self, messages: list[Message]) -> Message | None:
        """Show one answer; None where there was an error. Stopped by Ctrl-C it is what was said so far."""
        seen: list[Event] = []
        error = None
        tools = self.conversation.tools
        stats, started = Stats(), time.monotonic()
        with interruptible(self.remote) as interrupt:
            self.view.begin()
            try:
                events = self.backend.stream(messages, tools, **self.sampling)
                try:
                    for event in interrupt.until_hit(events):
                        stats.first_s = stats.first_s if seen else time.monotonic() - started
                        seen.append(event)
                        self._show(event)
                finally:
                    getattr(events, "close", lambda: None)()
            except KeyboardInterrupt:
                interrupt.hit = True
            except ValueError as wrong:
                error = str(wrong)
            finally:
                self.view.end()
        last = seen[-1] if seen else Event()
        stats.total_s, stats.usage = time.monotonic() - started, last.usage
        stats.n_pieces = sum(bool(e.text or e.reasoning) for e in seen)
        if error is not None:
            notice(error)
            return None
        self.stats.append(stats)
        if interrupt.hit:
            notice("stopped")
        elif last.finish_reason == "length":
            notice("the answer was cut at its length limit")
        calls = () if interrupt.hit else tuple(e.tool_call for e in seen if e.tool_call is not None)
        thought = "".join(e.reasoning for e in seen)
        return Message("assistant", "".join(e.text for e in seen), calls, reasoning=thought)

    def _show(self, event: Event) -> None:
        if event.reasoning:
            self.view.reasoning(event.reasoning)
        if event.text:
            self.view.text(event.text)
        if event.tool_call is not None:
            self.view.call(event.tool_call)

    def _results(self, reply: Message) -> list[Message] | None:
        """What the called functions give, typed by hand; None: not given."""
        results = []
        for call in reply.tool_calls:
            try:
                content = clean(self.input.read(f"result of {call.name}> "))
            except (EOFError, KeyboardInterrupt):
                content = ""
            if not content:
                notice(f"no result of {call.name} given: the turn ends here")
                return None
            self.view.result(call.name, content)
            results.append(Message("tool", content, tool_call_id=call.id, name=call.name))
        return results
