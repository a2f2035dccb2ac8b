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
from openglm.formats.pieces import Opener, Pieces
from openglm.tokenizer import Detokenizer, Tokenizer
from openglm.types import CallDelta, Event, Message, ToolCall

__all__ = ["THINK", "THINK_END", "AnswerParser", "Block", "Reader", "Syntax"]

THINK, THINK_END = "<think>", "</think>"


class Reader(NamedTuple):
    """How a call's body is read.

    read: the whole body, and whether the model itself ended the turn, to the calls in it; none: it was text after all.
    opens: where its arguments can be told while they come.
    """

    read: Callable[[str, bool], list[ToolCall]]
    opens: Opener | None = None


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
    """Parser (see `formats.base`) of every format.

    pieces: calls are told while they are written, as `Event.call_delta`, before the event with the whole call. What
    has begun so is a call, even if it is cut off or turns out broken: then its arguments are no JSON.
    """

    def __init__(self, tokenizer: Tokenizer, stop_ids: Sequence[int], syntax: Syntax, pieces: bool = False) -> None:
        self._syntax, self._wants_pieces = syntax, pieces
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
        self._open, self._block = "", Block((), "", Reader(lambda body, complete: []))
        self._pieces: Pieces | None = None  # of the call that is being told,
        self._body: list[str] = []  # whose body so far is this
        self._told: list[str] = []  # and whose arguments so far are these
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
        if self._begun(self._block.read):
            return self._in_told_block(end)
        close = self._block.close
        at = self._held.find(close)
        while at >= 0:
            body, whole = self._held[:at], self._open + self._held[: at + len(close)]
            calls = self._block.read.read(body, True)
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
        calls = [] if self._block.stop is not None else self._block.read.read(whole_body, False)
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
        return [self._call_event(call) for call in self._block.read.read(body, complete)]

    def _in_call(self, end: bool, complete: bool) -> list[Event]:
        return self._to_the_end(self._syntax.headers[self._header], self._header, end, complete)

    def _in_whole(self, end: bool, complete: bool) -> list[Event]:
        assert self._syntax.whole is not None
        return self._to_the_end(self._syntax.whole[1], "", end, complete)

    def _to_the_end(self, reader: Reader, header: str, end: bool, complete: bool) -> list[Event]:
        """A call whose body is the rest of the turn."""
        events: list[Event] = []
        if self._begun(reader):
            text, self._held = self._held, ""
            events = self._grow(text)
            if end and (ended := self._shut()):
                return events + ended
        if not end:
            return events
        body, self._held = self._held, ""
        calls = reader.read(body, complete)
        return [self._call_event(call) for call in calls] or self._emit(header + body)

    # -------------------------------------------------------------------- a call that is told while it comes

    def _begun(self, reader: Reader) -> bool:
        """Whether the held text is the body of a call that can be told."""
        if self._pieces is None and self._wants_pieces and reader.opens is not None:
            found = reader.opens(self._held)
            if found is not None:
                self._pieces, start = found
                self._body, self._told = [self._held[:start]], []
                self._held = self._held[start:]
        return self._pieces is not None

    def _in_told_block(self, end: bool) -> list[Event]:
        assert self._pieces is not None
        events, close = [], self._block.close
        while (at := self._held.find(close)) >= 0:
            events += self._grow(self._held[:at])
            self._held = self._held[at + len(close) :]
            if not self._pieces.inside_string:
                self._mode = "text"
                return events + self._shut()
            events += self._grow(close)  # it is part of a string in the call
        text, _, self._held = cut(self._held, (close,))
        events += self._grow(text)
        if end:
            self._held, self._mode = "", "text"  # half of the closing mark is no part of the call
            events += self._shut()
        return events

    def _grow(self, text: str) -> list[Event]:
        assert self._pieces is not None
        self._body.append(text)
        return self._piece(self._pieces.feed(text))

    def _piece(self, text: str) -> list[Event]:
        if not text or self._pieces is None:
            return []
        name = "" if self._told else self._pieces.name
        self._told.append(text)
        return [Event(token_ids=self._ids(), call_delta=CallDelta(name, text))]

    def _shut(self) -> list[Event]:
        """The call is at its end. If nothing of it was told its body is held text again."""
        assert self._pieces is not None
        events, name = self._piece(self._pieces.finish()), self._pieces.name
        self._pieces = None
        if not self._told:
            self._held = "".join(self._body) + self._held
            return []
        return [*events, self._call_event(ToolCall(name, "".join(self._told)))]

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
