"""Which replica answers: a name that all requests of one conversation share, for whatever chooses by a hash.

    affinity("/v1/chat/completions", body)

What was said before lies in one replica's prefix cache, so the next turn should go there.
"""

from __future__ import annotations

import hashlib
import json

__all__ = ["affinity"]

_OPENING = 512  # characters or token ids of a plain text; a text that grows keeps them


def affinity(path: str, body: bytes, caller: str = "") -> str:
    """Empty where any replica will do. caller: whose request it is; files are kept for their caller.

    A conversation is known by what stays in front of it: instructions, tools, the messages up to the first of the user.
    """
    if path.startswith("/v1/files"):
        return caller
    try:
        asked = json.loads(body)
        turns = asked.get("messages") or asked.get("input") or asked.get("prompt") or asked.get("text")
        if isinstance(turns, list):
            of_user = [i for i, turn in enumerate(turns) if isinstance(turn, dict) and turn.get("role") == "user"]
            turns = turns[: of_user[0] + 1] if of_user else turns[:_OPENING]
        elif isinstance(turns, str) and "prompt" in asked:
            turns = turns[:_OPENING]
        opening = [asked.get("system"), asked.get("instructions"), asked.get("tools"), turns]
        return hashlib.sha256(json.dumps(opening, sort_keys=True).encode()).hexdigest()
    except (ValueError, AttributeError, RecursionError):
        return ""  # no request of ours: whichever replica gets it says what is wrong
