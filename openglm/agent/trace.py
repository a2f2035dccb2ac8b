"""Traces: every event of a run as a line of JSON, written as it happens.

    with TraceWriter("run.jsonl") as trace:
        async for event in agent.run(messages, trace=trace): ...
    trace = read_trace("run.jsonl"); trace.outcome.answer

The first line says what was asked, of whom, with which tools; the last one what came of it. A run that was stopped or
killed leaves the lines it had, so its trace can be read too.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from openglm.agent.events import (
    AgentConfig,
    AgentEvent,
    Answered,
    Asked,
    Called,
    CallRecord,
    Finished,
    Observed,
    Outcome,
    Output,
    Planned,
    Said,
    Thought,
)
from openglm.types import Grammar, Message, Observation, ToolCall, ToolFile, ToolSpec, Usage

__all__ = ["Trace", "TraceWriter", "event_dict", "message_dict", "message_of", "read_trace", "tool_dict", "trace_of"]

VERSION = 1
MAX_FILE_BYTES = 2 << 20  # larger files of tools are named, not kept
EVENTS = {
    "planned": Planned, "thought": Thought, "said": Said, "called": Called, "asked": Asked, "output": Output,
    "answered": Answered, "observed": Observed, "finished": Finished,
}  # fmt: skip
NAMES = {kind: name for name, kind in EVENTS.items()}


@dataclass(frozen=True)
class Trace:
    """One run. begin: messages, tools, external tools, config, sampling, model. times: seconds of each event.

    answers: what the model gave, one for each time that it was asked.
    """

    messages: tuple[Message, ...]
    tools: tuple[ToolSpec, ...]
    external: tuple[ToolSpec, ...]
    config: AgentConfig
    sampling: Mapping[str, Any]
    model: str
    events: tuple[AgentEvent, ...]
    times: tuple[float, ...]
    answers: tuple[Answered, ...]

    @property
    def outcome(self) -> Outcome | None:
        """None: the run was stopped before its end."""
        last = self.events[-1] if self.events else None
        return last.outcome if isinstance(last, Finished) else None


class TraceWriter:
    """Writes one run to a file, which must not exist. model: the name of what answers."""

    def __init__(self, path: str | Path, model: str = "") -> None:
        self.path, self._model = Path(path), model
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "x", encoding="utf-8")
        except FileExistsError:
            raise ValueError(f"{path} exists already: a trace is never written over") from None
        except OSError as error:
            raise ValueError(f"the trace {path} cannot be written: {error.strerror}") from None
        self._started = time.monotonic()

    @classmethod
    def new(cls, folder: Path, model: str = "") -> TraceWriter:
        """In a file of its own; names sort by the time they were made."""
        now = time.time_ns()
        stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(now // 10**9))
        return cls(folder / f"{stamp}-{now % 10**9:09d}-{secrets.token_hex(3)}.jsonl", model)

    def begin(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec], external: Sequence[ToolSpec], config: AgentConfig,
        sampling: Mapping[str, Any],
    ) -> None:  # fmt: skip
        """What is asked, before the first event."""
        given = {k: v for k, v in sampling.items() if v is not None}
        if isinstance(grammar := given.get("grammar"), Grammar):
            given["grammar"] = dataclasses.asdict(grammar)
        self._line(
            {
                "type": "begin", "version": VERSION, "model": self._model,
                "messages": [message_dict(m) for m in messages],
                "tools": [tool_dict(spec) for spec in tools],
                "external": [tool_dict(spec) for spec in external],
                "config": dataclasses.asdict(config), "sampling": given,
            }
        )  # fmt: skip

    def write(self, event: AgentEvent | Answered) -> None:
        self._line({"type": NAMES[type(event)], **event_dict(event)})

    def _line(self, value: dict[str, Any]) -> None:
        value["t"] = round(time.monotonic() - self._started, 4)
        self._file.write(json.dumps(value, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_trace(path: str | Path) -> Trace:
    """ValueError for what is no trace. A last line that was not written whole is left out."""
    try:
        lines = Path(path).read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the trace {path} cannot be read: {error}") from None
    values = []
    for number, line in enumerate(lines, 1):
        try:
            values += [json.loads(line)] if line else []
        except ValueError:
            if number < len(lines):
                raise ValueError(f"{path}:{number} is no JSON: this is no trace, or a broken one") from None
    return trace_of(values, str(path))


def trace_of(values: Sequence[Any], where: str = "trace") -> Trace:
    """From the values of its lines."""
    head = values[0] if values and isinstance(values[0], dict) else {}
    if head.get("type") != "begin" or head.get("version") != VERSION:
        raise ValueError(f"{where} does not begin as a trace of version {VERSION} does")
    try:
        lines = [(_event_of(value), float(value["t"])) for value in values[1:]]
        events = [(event, t) for event, t in lines if not isinstance(event, Answered)]
        return Trace(
            messages=tuple(message_of(m) for m in head["messages"]),
            tools=tuple(_spec_of(tool) for tool in head["tools"]),
            external=tuple(_spec_of(tool) for tool in head["external"]),
            config=AgentConfig(**head["config"]), sampling=_sampling_of(head["sampling"]), model=head["model"],
            events=tuple(event for event, _ in events), times=tuple(t for _, t in events),
            answers=tuple(event for event, _ in lines if isinstance(event, Answered)),
        )  # fmt: skip
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where} is a broken trace: {type(error).__name__} {error}") from None


# -------------------------------------------------------------------- JSON


def message_dict(message: Message) -> dict[str, Any]:
    """In OpenAI's shape, as data for training has it."""
    value: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning:
        value["reasoning_content"] = message.reasoning
    if message.tool_calls:
        value["tool_calls"] = [_call_dict(call) for call in message.tool_calls]
    if message.tool_call_id is not None:
        value["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        value["name"] = message.name
    return value


def message_of(value: Mapping[str, Any]) -> Message:
    return Message.from_dict(value)


def tool_dict(spec: ToolSpec) -> dict[str, Any]:
    """In OpenAI's shape, with a mark on those that GLM models know without a schema."""
    function = {"name": spec.name, "description": spec.description, "parameters": dict(spec.parameters)}
    return {"type": "function", "function": function, **({"builtin": True} if spec.builtin else {})}


def _spec_of(value: Mapping[str, Any]) -> ToolSpec:
    return dataclasses.replace(ToolSpec.from_dict(value), builtin=bool(value.get("builtin", False)))


def _call_dict(call: ToolCall) -> dict[str, Any]:
    named = {"id": call.id} if call.id else {}
    return {**named, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _call_of(value: Mapping[str, Any]) -> ToolCall:
    return ToolCall(value["function"]["name"], value["function"]["arguments"], value.get("id"))


def _sampling_of(value: Mapping[str, Any]) -> dict[str, Any]:
    return {k: Grammar(**v) if k == "grammar" else v for k, v in value.items()}


def _observation_dict(observation: Observation) -> dict[str, Any]:
    value: dict[str, Any] = {"content": observation.content}
    if observation.files:
        value["files"] = [_file_dict(file) for file in observation.files]
    if observation.data is not None:
        value["data"] = observation.data
    return {**value, **({"error": True} if observation.error else {})}


def _file_dict(file: ToolFile) -> dict[str, Any]:
    try:
        content = file.read()
    except OSError as error:
        return {"name": file.name, "mime": file.mime, "description": file.description, "lost": str(error)}
    value = {
        "name": file.name, "mime": file.mime, "description": file.description, "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }  # fmt: skip
    if len(content) <= MAX_FILE_BYTES:
        value["base64"] = base64.b64encode(content).decode()
    return value


def _observation_of(value: Mapping[str, Any]) -> Observation:
    files = tuple(
        ToolFile(f["name"], f["mime"], base64.b64decode(f["base64"]), None, f["description"])
        for f in value.get("files", ())
        if "base64" in f
    )
    return Observation(value["content"], files, value.get("data"), value.get("error", False))


def event_dict(event: AgentEvent | Answered) -> dict[str, Any]:
    match event:
        case Called():
            return {"call": _call_dict(event.call), "round": event.round, "repaired": event.repaired}
        case Observed():
            seconds = round(event.seconds, 4)
            observation = _observation_dict(event.observation)
            full = {"full": event.full} if event.full else {}
            return {"call_id": event.call_id, "name": event.name, "observation": observation,
                    "status": event.status, "seconds": seconds, **full}  # fmt: skip
        case Finished(outcome):
            return {
                "answer": outcome.answer, "stop": outcome.stop, "n_rounds": outcome.n_rounds,
                "messages": [message_dict(m) for m in outcome.messages],
                "calls": [_record_dict(record) for record in outcome.calls],
                "pending": [_call_dict(call) for call in outcome.pending],
                "usage": dataclasses.asdict(outcome.usage), "seconds": round(outcome.seconds, 4),
            }  # fmt: skip
    return dataclasses.asdict(event)


def _record_dict(record: CallRecord) -> dict[str, Any]:
    """Without the files, which stand with the event of the call."""
    plain = dataclasses.replace(record.observation, files=())
    return {"call": _call_dict(record.call), "observation": _observation_dict(plain), "status": record.status,
            "seconds": round(record.seconds, 4)}  # fmt: skip


def _event_of(value: Mapping[str, Any]) -> AgentEvent | Answered:
    kind = EVENTS.get(value["type"])
    if kind is None:
        raise KeyError(f"event {value['type']!r}")
    match value["type"]:
        case "called":
            return Called(_call_of(value["call"]), value["round"], value["repaired"])
        case "observed":
            observation = _observation_of(value["observation"])
            full = value.get("full", "")
            return Observed(value["call_id"], value["name"], observation, value["status"], value["seconds"], full)
        case "answered":
            pieces = tuple((str(kind), str(text)) for kind, text in value["pieces"])
            return Answered(pieces, value["finish_reason"], Usage(**value["usage"]), value["whole"])
        case "finished":
            records = tuple(
                CallRecord(_call_of(r["call"]), _observation_of(r["observation"]), r["status"], r["seconds"])
                for r in value["calls"]
            )
            return Finished(
                Outcome(
                    value["answer"], value["stop"], tuple(message_of(m) for m in value["messages"]), records,
                    tuple(_call_of(call) for call in value["pending"]), value["n_rounds"], Usage(**value["usage"]),
                    value["seconds"],
                )
            )  # fmt: skip
    fields = {field.name: value[field.name] for field in dataclasses.fields(kind)}
    return cast(AgentEvent, kind(**fields))
