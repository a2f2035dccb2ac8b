"""Reading an answer back while it is generated: text, reasoning and tool calls, whatever the format.

    parser = get_format("glm-4", tokenizer).parser(tools)
    events = [event for id in generated for event in parser.feed(id)] + parser.finish()

A format says in a `Syntax` how its answers are written; the parser is the same for all. What it gives does not depend
on how the text is cut into ids. Text is passed on as it comes, except for an end of it that may yet become a mark.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from openglm.formats.matcher import ReplyText, cut
from openglm.tokenizer import Detokenizer, Tokenizer
from openglm.types import Event, Message, ToolCall

__all__ = ["THINK", "THINK_END", "AnswerParser", "Block", "Reader", "Syntax"]

THINK, THINK_END = "<think>", "</think>"
# A call's body, and whether the model itself ended the turn, to the calls in it; none: it was no call but text.
Reader = Callable[[str, bool], list[ToolCall]]


class Block(NamedTuple):
    """A call inside a turn: between an opening mark and the closing one.

    stop: the id that must end the turn right after it for the block to be a call.
    """

    opens: tuple[str, ...]
    close: str
    read: Reader
    stop: int | None = None


@dataclass(frozen=True)
class Syntax:
    """How answers are written.

    lead: beginnings of a text that belong to the format; the first that fits is dropped.
    headers: first lines that make the turn a call, each with the reader of the rest of it.
    blocks: calls inside a turn.
    whole: (first characters, reader) of a turn that is nothing but a call.
    thinks: whether an answer begins with reasoning: never, maybe between <think> and </think>, or always, because the
    prompt has already opened it.
    next_turn: the id between two turns of one answer.
    spelled: special tokens that are marks of the above, which the parser sees as text.
    reply: the clean-up of the text.
    """

    lead: tuple[str, ...] = ()
    headers: Mapping[str, Reader] = field(default_factory=dict)
    blocks: tuple[Block, ...] = ()
    whole: tuple[tuple[str, ...], Reader] | None = None
    thinks: Literal["never", "maybe", "always"] = "never"
    next_turn: int | None = None
    spelled: tuple[str, ...] = ()
    reply: Callable[[], ReplyText] | None = None


class AnswerParser:
    """Parser (see `formats.base`) of every format."""

    def __init__(self, tokenizer: Tokenizer, stop_ids: Sequence[int], syntax: Syntax) -> None:
        self._syntax = syntax
        self._detokenizer = Detokenizer(tokenizer)
        self._stop_ids = frozenset(stop_ids)
        special = tokenizer.special_ids
        self._spelled = {special[name]: name for name in syntax.spelled if name in special}
        self._opens = {mark: block for block in syntax.blocks for mark in block.opens}
        self._reply = None if syntax.reply is None else syntax.reply()
        self._mode = "think" if syntax.thinks == "always" else "start"
        self._thought = syntax.thinks == "always"  # reasoning has begun: a second <think> is text
        self._after_thought = False
        self._held = ""
        self._header = ""
        self._open, self._block = "", Block((), "", _no_calls)
        self._closed = ""  # a block that waits for the turn to end
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[ToolCall] = []
        self._waiting: list[int] = []  # ids not yet attached to an event
        self._stop: int | None = None
        self._stopped = False

    @property
    def message(self) -> Message:
        return Message("assistant", "".join(self._text), tuple(self._calls), reasoning="".join(self._reasoning))

    def feed(self, id: int) -> list[Event]:
        if self._stopped:
            return []
        if id in self._stop_ids:
            self._stopped, self._stop = True, id
            return self._end_turn(complete=True) + self._last_text()
        self._waiting.append(id)
        if id == self._syntax.next_turn:
            return self._end_turn(complete=True)
        if id in self._spelled:
            self._held += self._detokenizer.finish() + self._spelled[id]
        else:
            self._held += self._detokenizer.feed(id)
        return self._advance(end=False, complete=False)

    def finish(self) -> list[Event]:
        if self._stopped:
            return []
        self._stopped = True
        return self._end_turn(complete=False) + self._last_text()

    def _end_turn(self, complete: bool) -> list[Event]:
        """complete: the model ended the turn itself."""
        self._held += self._detokenizer.finish()
        events = self._advance(end=True, complete=complete)
        self._mode, self._held, self._after_thought = "start", "", False
        return events

    def _last_text(self) -> list[Event]:
        return [] if self._reply is None else self._text_event(self._reply.finish())

    # -------------------------------------------------------------------- modes: each step consumes what it can

    def _advance(self, end: bool, complete: bool) -> list[Event]:
        steps = {
            "start": self._start, "text": self._plain, "think": self._think, "block": self._in_block,
            "closed": self._after_block, "call": self._in_call, "whole": self._in_whole,
        }  # fmt: skip
        events: list[Event] = []
        while True:
            before = self._mode
            events += steps[self._mode](end, complete)
            if self._mode == before:
                return events

    def _start(self, end: bool, complete: bool) -> list[Event]:
        """The beginning of a turn, or what follows the reasoning: is it a call, reasoning or text?"""
        syntax = self._syntax
        if self._after_thought:
            self._held = self._held.lstrip("\n")
        thinks = () if self._thought or syntax.thinks == "never" else (THINK, "\n" + THINK)
        lead = () if self._text or self._after_thought else syntax.lead
        for header in syntax.headers:
            if self._held.startswith(header):
                self._mode, self._header, self._held = "call", header, self._held.removeprefix(header)
                return []
        for mark in thinks:
            if self._held.startswith(mark):
                self._mode, self._thought, self._held = "think", True, self._held.removeprefix(mark)
                return []
        firsts = syntax.whole[0] if syntax.whole else ()
        begun = self._held.lstrip()
        if begun.startswith(firsts) and begun:
            self._mode = "whole"
            return []
        may_come = any(mark.startswith(self._held) for mark in (*syntax.headers, *thinks, *lead))
        may_come = may_come or any(first.startswith(begun) for first in firsts)
        if self._held and (end or not may_come):
            for mark in lead:
                if self._held.startswith(mark):
                    self._held = self._held.removeprefix(mark)
                    break
            self._mode = "text"
        return []

    def _plain(self, end: bool, complete: bool) -> list[Event]:
        before, mark, self._held = cut(self._held, tuple(self._opens))
        if mark:
            self._mode, self._open, self._block = "block", mark, self._opens[mark]
        elif end:
            before, self._held = before + self._held, ""
        return self._emit(before)

    def _think(self, end: bool, complete: bool) -> list[Event]:
        before, mark, self._held = cut(self._held, ("\n" + THINK_END, THINK_END))
        if mark:
            self._mode, self._after_thought = "start", True
        elif end:
            before, self._held = before + self._held, ""
        before = before if self._reasoning else before.lstrip("\n")
        if not before:
            return []
        self._reasoning.append(before)
        return [Event(reasoning=before, token_ids=self._ids())]

    def _in_block(self, end: bool, complete: bool) -> list[Event]:
        close = self._block.close
        at = self._held.find(close)
        while at >= 0:
            body, whole = self._held[:at], self._open + self._held[: at + len(close)]
            calls = self._block.read(body, True)
            if calls or not _inside_string(body):
                self._held, self._mode = self._held[at + len(close) :], "text"
                if calls and self._block.stop is not None:
                    self._mode, self._closed = "closed", whole
                    return []
                return [self._call_event(call) for call in calls] or self._emit(whole)
            at = self._held.find(close, at + 1)  # the mark is part of a string in the call
        if not end:
            return []
        body, self._held, self._mode = self._held, "", "text"
        whole_body = cut(body, (close,))[0]  # the closing mark may be cut off: half of it is no part of the call
        calls = [] if self._block.stop is not None else self._block.read(whole_body, False)
        return [self._call_event(call) for call in calls] or self._emit(self._open + body)

    def _after_block(self, end: bool, complete: bool) -> list[Event]:
        """A block that is a call only if the turn ends with it."""
        if self._held.strip() or (end and self._stop != self._block.stop):
            self._mode = "text"
            return self._emit(self._closed)
        if not end:
            return []
        self._held, self._mode = "", "text"
        body = self._closed.removeprefix(self._open).removesuffix(self._block.close)
        return [self._call_event(call) for call in self._block.read(body, complete)]

    def _in_call(self, end: bool, complete: bool) -> list[Event]:
        if not end:
            return []
        body, self._held = self._held, ""
        calls = self._syntax.headers[self._header](body, complete)
        return [self._call_event(call) for call in calls] or self._emit(self._header + body)

    def _in_whole(self, end: bool, complete: bool) -> list[Event]:
        if not end or self._syntax.whole is None:
            return []
        body, self._held = self._held, ""
        calls = self._syntax.whole[1](body, complete)
        return [self._call_event(call) for call in calls] or self._emit(body)

    # -------------------------------------------------------------------- events

    def _emit(self, text: str) -> list[Event]:
        return self._text_event(text if self._reply is None else self._reply.feed(text))

    def _text_event(self, text: str) -> list[Event]:
        if not text:
            return []
        self._text.append(text)
        return [Event(text=text, token_ids=self._ids())]

    def _call_event(self, call: ToolCall) -> Event:
        self._calls.append(call)
        return Event(token_ids=self._ids(), tool_call=call)

    def _ids(self) -> tuple[int, ...]:
        ids, self._waiting = tuple(self._waiting), []
        return ids


def _no_calls(body: str, complete: bool) -> list[ToolCall]:
    return []


def _inside_string(text: str) -> bool:
    """Whether JSON text ends inside a string."""
    inside = escaped = False
    for c in text:
        if escaped:
            escaped = False
        elif c == "\\":
            escaped = inside
        elif c == '"':
            inside = not inside
    return inside
