"""The parts of the sandbox that trust nothing from inside, each by itself: limits, channel, work folder, texts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from openglm.agent.channel import Channel, ChannelClosed, ProtocolError
from openglm.agent.run_state import Tail
from openglm.agent.sandbox_config import SandboxConfig
from openglm.agent.work_folder import WorkFolder


def test_names_of_files_that_lead_out(tmp_path: Path) -> None:
    folder = WorkFolder(tmp_path / "in" / "here", SandboxConfig(disk_bytes=32 << 20))
    changed: list[str] = []
    for name in (
        "../x",
        "/abs",
        "a/../../x",
        "a//x",
        "a\\..\\x",
        ".hidden",
        "a/.b/c",
        "",
        "x\0",
        "d/" * 9 + "x",
        "y" * 300,
    ):
        folder.receive(name, b"data", True, changed)
        with pytest.raises(ValueError, match="not the name of a file"):
            folder.write(name, b"data")
    assert not changed and sorted(path.name for path in tmp_path.rglob("*")) == ["here", "in"]
    with pytest.raises(ProtocolError):
        for _ in range(100):
            folder.receive("endless", bytes(1 << 20), False, changed)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("timeout_s", 0, "above 0"), ("memory_bytes", 1 << 20, "at least"), ("isolation", "jail", "must be auto"),
     ("n_processes", 2, "at least 24"), ("read_only", ("absent",), "read_only")],
)  # fmt: skip
def test_limits_that_cannot_be(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SandboxConfig(**{field: value})  # type: ignore[arg-type]


def test_the_ends_of_a_text_are_kept() -> None:
    for pieces in (["ab"], ["abc" * 10], list("abcdefghijklmnop"), ["a", "", "b" * 100]):
        tail, text = Tail(9), "".join(pieces)
        for piece in pieces:
            tail.add(piece)
        assert tail.is_cut == (len(text) > 9)
        assert str(tail) == text if len(text) <= 9 else str(tail).startswith(text[:6]) and str(tail).endswith(text[-3:])


def test_a_channel_trusts_nobody() -> None:
    def pair() -> tuple[Channel, int, int]:
        (read, theirs), (their_read, write) = os.pipe(), os.pipe()
        return Channel(write, read), theirs, their_read

    for bad in (b"\xff" * 8, b"\0\0\0\2{}", b"\0\0\0\2[]", b"\0\0\0\1{", b'\0\0\0\x0a{"op": "x"}'):
        channel, theirs, _ = pair()
        os.write(theirs, bad)
        with pytest.raises(ProtocolError):
            channel.receive(1)
            channel.receive(1)
    channel, theirs, _ = pair()
    assert channel.receive(0.01) is None
    os.write(theirs, b'\0\0\0\x16{"op": "x", "size": 3}ab')
    assert channel.receive(0.01) is None
    os.write(theirs, b"c")
    assert channel.receive(1) == ({"op": "x", "size": 3}, b"abc")
    with pytest.raises(ChannelClosed, match="does not read"):
        channel.send("put", bytes(1 << 20), timeout_s=0.1)
    os.close(theirs)
    with pytest.raises(ChannelClosed):
        channel.receive(1)
