"""One list of events for each answer: all that is sent to any client, streamed or not, is made of it.

    answer = Answer(chat_format.parser(tools, pieces=True), stop_strings=("\\n\\n",))
    events = [event for step in steps for event in answer.feed(step)]        # Text, Reasoning, CallOpened, ..., Finish
    whole = fold(events)                                                     # what a client gets that does not stream

Streams are a rendering of the list and so is the whole answer, so they cannot differ.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate
from typing import Any, Literal, Protocol

from openglm.engine.request import NO_TOKEN, Step
from openglm.formats.matcher import StopText
from openglm.tokenizer import Detokenizer, Tokenizer
from openglm.types import Event

__all__ = [
    "Answer", "AnswerEvent", "CallArguments", "CallOpened", "Finish", "FinishReason", "Folded", "FoldedCall",
    "Observation", "PlainReader", "Reader", "Reasoning", "Text", "TokenInfo", "TokenSpelling", "fold", "merged",
]  # fmt: skip

FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True, slots=True)
class TokenInfo:
    """A drawn token: its bytes (of a special: its name), log-probability in nats, the likeliest at its place."""

    spelled: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Text:
    """tokens: those that this piece is made of, where log-probabilities were asked for."""

    text: str
    tokens: tuple[TokenInfo, ...] = ()


@dataclass(frozen=True, slots=True)
class Reasoning:
    text: str


@dataclass(frozen=True, slots=True)
class CallOpened:
    """A tool call begins; its arguments follow. index: its number in the answer, from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A piece of a call's arguments; all pieces together are them."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class Observation:
    """News of a call, where the server runs the tools itself; see docs/SERVING.md. None: nothing new of it.

    The last one of a call has content and seconds.
    """

    id: str
    name: str
    status: str
    arguments: str | None = None
    output: str | None = None
    content: str | None = None
    seconds: float | None = None
    files: tuple[Mapping[str, Any], ...] | None = None
    data: Mapping[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        found = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        return {**found, "files": list(self.files)} if self.files is not None else found


@dataclass(frozen=True, slots=True)
class Finish:
    """The last event. stop_string: the one that ended the answer."""

    reason: FinishReason
    stop_string: str | None = None


AnswerEvent = Text | Reasoning | CallOpened | CallArguments | Observation | Finish


class Reader(Protocol):
    """Part of `formats.Parser`: ids in, pieces of the answer out."""

    def feed(self, id: int) -> list[Event]: ...

    def finish(self) -> list[Event]: ...


class PlainReader:
    """Reader of text that is nothing but text. after_space: what it goes on from ends with the space it begins with."""

    def __init__(self, tokenizer: Tokenizer, stop_ids: Iterable[int], after_space: bool = False) -> None:
        self._after_space = after_space
        self._detokenizer = Detokenizer(tokenizer, continues=True)
        self._stop_ids = frozenset(stop_ids)
        self._waiting: list[int] = []

    def feed(self, id: int) -> list[Event]:
        if id in self._stop_ids:
            return []
        self._waiting.append(id)
        return self._piece(self._detokenizer.feed(id))

    def finish(self) -> list[Event]:
        return self._piece(self._detokenizer.finish())

    def _piece(self, text: str) -> list[Event]:
        if not text:
            return []
        text = text.removeprefix(" ") if self._after_space else text
        self._after_space = False
        ids, self._waiting = tuple(self._waiting), []
        return [Event(text, ids)]


class Answer:
    """Turns the steps of one request into events.

    spell: bytes of a token, where log-probabilities are wanted. max_calls: the answer ends with that many tool calls.
    finished: the last event was given; if `stopped` too, a stop string ended it, and the engine need not go on.
    """

    def __init__(
        self,
        reader: Reader,
        stop_strings: tuple[str, ...] = (),
        spelling: TokenSpelling | None = None,
        max_calls: int | None = None,
    ) -> None:
        self._reader, self._stop, self._spelling, self._max_calls = reader, StopText(stop_strings), spelling, max_calls
        self._stop_strings = stop_strings
        self._waiting: deque[TokenInfo] = deque()  # drawn, but not yet in an event of the reader
        self._pending: list[TokenInfo] = []  # of text that may yet become a stop string
        self._tail = ""  # the end of the text so far, with what came after it
        self._begun = False  # some text was given
        self.n_calls = 0  # that are complete
        self._in_call = False
        self.n_tokens = 0
        self.n_reasoning_tokens = 0
        self.finished = self.stopped = False

    def feed(self, step: Step) -> list[AnswerEvent]:
        if self.finished:
            return []
        events: list[AnswerEvent] = []
        found: list[Event] = []
        if step.token_id != NO_TOKEN:
            self.n_tokens += 1
            if self._spelling is not None:
                self._waiting.append(self._spelling.info(step))
            found = self._reader.feed(step.token_id)
        n_before_end = len(found)
        if step.finish_reason is not None:
            found = found + self._reader.finish()
        for i, event in enumerate(found):
            events += self._of(event)
            if self._stop.found:
                self.finished = self.stopped = True
                return [*events, Finish("stop", self._which())]
            if self.n_calls == self._max_calls:
                self.finished = self.stopped = True
                cut_off = step.finish_reason == "length" and i >= n_before_end
                return [*events, Finish("length" if cut_off else "tool_calls")]
        if step.finish_reason is not None:
            if rest := self._stop.finish():
                events.append(self._text(rest))
            self.finished = True
            length = step.finish_reason == "length"
            events.append(Finish("length" if length else "tool_calls" if self.n_calls else "stop"))
        return events

    def _of(self, event: Event) -> list[AnswerEvent]:
        tokens = [self._waiting.popleft() for _ in event.token_ids if self._waiting]
        if event.reasoning:
            self.n_reasoning_tokens += len(event.token_ids)
            return [Reasoning(event.reasoning)]
        if event.call_delta is not None:
            self._in_call = True
            return self._call(event.call_delta.name, event.call_delta.arguments)
        if event.tool_call is not None:
            call, told, self._in_call = event.tool_call, self._in_call, False
            events = [] if told else self._call(call.name, call.arguments, call.id)
            self.n_calls += 1
            return events
        self._pending += tokens
        self._tail = (self._tail + event.text)[-4096:]
        text = self._stop.feed(event.text)
        return [self._text(text)] if text else []

    def _call(self, name: str, arguments: str, id: str | None = None) -> list[AnswerEvent]:
        """name: of a call that begins here."""
        piece = CallArguments(self.n_calls, arguments)
        return [CallOpened(self.n_calls, id or f"call_{secrets.token_hex(12)}", name), piece] if name else [piece]

    def _text(self, text: str) -> Text:
        tokens, self._pending = self._pending, []
        room = len(text.encode())
        if self._stop.found:  # without the tokens that lie behind the end
            starts = list(accumulate((len(t.spelled) for t in tokens), initial=0))
            tokens = [token for token, start in zip(tokens, starts, strict=False) if start < room]
        if not self._begun:  # nor those in front that belong to the format
            surplus = sum(len(token.spelled) for token in tokens) - room
            while tokens and 0 < len(tokens[0].spelled) <= surplus:
                surplus -= len(tokens.pop(0).spelled)
        self._begun = True
        return Text(text, tuple(tokens))

    def _which(self) -> str | None:
        ends = [(self._tail.find(stop) + len(stop), stop) for stop in self._stop_strings if stop in self._tail]
        return min(ends)[1] if ends else None


class TokenSpelling:
    """Bytes of tokens for log-probabilities; specials by name. n_top: likeliest tokens that are told at each place."""

    def __init__(self, tokenizer: Tokenizer, n_top: int) -> None:
        self._tokenizer, self._n_top = tokenizer, n_top
        self._names = {id: name.encode() for name, id in tokenizer.special_ids.items()}

    def spell(self, id: int) -> bytes:
        return self._names[id] if id in self._names else self._tokenizer.token_bytes(id)

    def info(self, step: Step) -> TokenInfo:
        # Rounding may put the logarithm of a probability near 1 above 0.
        top = tuple((self.spell(id), min(logprob, 0.0)) for id, logprob in step.top_logprobs[: self._n_top])
        return TokenInfo(self.spell(step.token_id), min(step.logprob, 0.0), top)


# -------------------------------------------------------------------- the whole answer


@dataclass
class FoldedCall:
    id: str
    name: str
    arguments: str = ""


@dataclass
class Folded:
    """An answer as a whole. observations: the last one of each call, with its arguments."""

    text: str = ""
    reasoning: str = ""
    tokens: list[TokenInfo] = field(default_factory=list)
    calls: list[FoldedCall] = field(default_factory=list)
    observations: list[Observation] = field(default_factory=list)
    finish: Finish | None = None


def fold(events: Iterable[AnswerEvent]) -> Folded:
    """The answer that these events tell."""
    whole = Folded()
    arguments: dict[str, str | None] = {}  # of calls that the server makes
    text: list[str] = []
    reasoning: list[str] = []
    for event in events:
        match event:
            case Text():
                text.append(event.text)
                whole.tokens += event.tokens
            case Reasoning():
                reasoning.append(event.text)
            case CallOpened():
                whole.calls.append(FoldedCall(event.id, event.name))
            case CallArguments():
                whole.calls[event.index].arguments += event.text
            case Observation():
                arguments.setdefault(event.id, event.arguments)
                if event.content is not None:
                    whole.observations.append(replace(event, arguments=arguments[event.id]))
            case Finish():
                whole.finish = event
    whole.text, whole.reasoning = "".join(text), "".join(reasoning)
    return whole


def merged(first: AnswerEvent, second: AnswerEvent) -> AnswerEvent | None:
    """One event that says the same as two in a row; None where there is none."""
    if isinstance(first, Text) and isinstance(second, Text):
        return Text(first.text + second.text, first.tokens + second.tokens)
    if isinstance(first, Reasoning) and isinstance(second, Reasoning):
        return Reasoning(first.text + second.text)
    if isinstance(first, CallArguments) and isinstance(second, CallArguments) and first.index == second.index:
        return replace(first, text=first.text + second.text)
    return None
