"""Finding marks in text that arrives in pieces: tags, fences, and the clean-up that released clients apply to replies.

    before, tag, rest = cut("Let me see.\\n<tool_c", ("\\n<tool_call>",))     # "Let me see.", "", "\\n<tool_c"
"""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["TRAINING_TIME", "ReplyText", "StopText", "cut"]

TRAINING_TIME = ("[[训练时间]]", "2023年")  # what the ChatGLM models write for the date of their data, and its meaning
FULL_WIDTH = str.maketrans(",!:;?", "，！：；？")
CHINESE = re.compile("[\u4e00-\u9fff]")


def cut(text: str, tags: Sequence[str]) -> tuple[str, str, str]:
    """(text before the first tag, the tag, what follows it).

    Without a tag the second is "", and the last is the end of the text that may yet become one, to be given again in
    front of the next piece. No tag may be the beginning of another.
    """
    at, found = min(((i, tag) for tag in tags if (i := text.find(tag)) >= 0), default=(-1, ""))
    if at >= 0:
        return text[:at], found, text[at + len(found) :]
    longest = max(map(len, tags), default=1) - 1
    for n in range(min(longest, len(text)), 0, -1):
        if any(tag.startswith(text[-n:]) for tag in tags):
            return text[:-n], "", text[-n:]
    return text, "", ""


class StopText:
    """Text up to the stop string that is complete first, however it comes in pieces; the string is no part of it.

    found: it was met; what is fed from then on is dropped.
    """

    def __init__(self, stop_strings: Sequence[str]) -> None:
        # One that begins with another is never complete first.
        self._stops = [s for s in stop_strings if not any(s != other and s.startswith(other) for other in stop_strings)]
        self._held = ""  # may become a stop string
        self.found = False

    def feed(self, text: str) -> str:
        """What is text for certain."""
        if not self._stops:
            return text
        out = []
        for character in text:
            if self.found:
                break
            before, stop, self._held = cut(self._held + character, self._stops)
            out.append(before)
            self.found = bool(stop)
        return "".join(out)

    def finish(self) -> str:
        """What was held back, which is text after all."""
        held, self._held = self._held, ""
        return "" if self.found else held


class ReplyText:
    """The text of a reply as the released ChatGLM clients show it, piece by piece: no white space at either end, the
    placeholder of the training date filled in.

    full_width: ChatGLM-6B also writes , ! : ; ? next to a Chinese character in their full width.
    """

    def __init__(self, full_width: bool = False) -> None:
        self._full_width = full_width
        self._raw = ""  # may become the placeholder
        self._held = ""  # white space that may be the last, or a mark whose neighbour is still to come
        self._last = ""  # the last character passed on, before any change

    def feed(self, text: str) -> str:
        placeholder, date = TRAINING_TIME
        self._raw += text
        while True:
            before, tag, self._raw = cut(self._raw, (placeholder,))
            self._held += before + (date if tag else "")
            if not tag:
                return self._take(end=False)

    def finish(self) -> str:
        self._held, self._raw = self._held + self._raw, ""
        return self._take(end=True)

    def _take(self, end: bool) -> str:
        text = self._held if self._last else self._held.lstrip()
        ready = text.rstrip()
        if self._full_width and not end and ready == text and ready[-1:] in tuple(",!:;?"):
            ready = ready[:-1]
        self._held = text[len(ready) :]
        follower = self._held[:1]
        if not ready:
            return ""
        around = self._last + ready + follower
        first = len(self._last)
        self._last = ready[-1]
        return self._widened(around, first, len(ready)) if self._full_width else ready

    @staticmethod
    def _widened(around: str, first: int, n: int) -> str:
        """Characters first .. first + n of a text, those marks in full width that have a Chinese neighbour."""
        out = []
        for i in range(first, first + n):
            near = around[max(i - 1, 0) : i] + around[i + 1 : i + 2]
            out.append(around[i].translate(FULL_WIDTH) if CHINESE.search(near) else around[i])
        return "".join(out)
