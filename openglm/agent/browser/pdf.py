"""The text of a PDF, read by pypdf in a process of its own: a broken file can use up neither our memory nor our time.

python -m openglm.agent.browser.pdf < FILE.pdf          # the text as JSON
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from openglm.agent.browser.fetch import FetchError

__all__ = ["PdfText", "read_pdf"]

TIMEOUT_S = 30
MEMORY_BYTES = 2 << 30
MAX_PAGES = 300
MAX_CHARS = 1_000_000


N_KNOWN = 64


@dataclass(frozen=True)
class PdfText:
    """text: pages one after another. date: of its making, YYYY-MM-DD. note: what is missing."""

    text: str
    title: str = ""
    date: str = ""
    note: str = ""


_known: dict[bytes, PdfText] = {}


def read_pdf(body: bytes, name: str) -> PdfText:
    """FetchError for what cannot be read. What was read lately is remembered."""
    digest = hashlib.sha256(body).digest()
    if digest not in _known:
        if len(_known) >= N_KNOWN:
            _known.pop(next(iter(_known)))
        _known[digest] = _read(body, name)
    return _known[digest]


def _read(body: bytes, name: str) -> PdfText:
    environment = {"PYTHONPATH": str(Path(__file__).parents[3]), "PATH": os.defpath}  # no key of ours
    command = [sys.executable, "-m", "openglm.agent.browser.pdf"]
    try:
        done = subprocess.run(command, input=body, capture_output=True, timeout=TIMEOUT_S, env=environment, check=False)
    except subprocess.TimeoutExpired:
        raise FetchError(f"{name}: the PDF could not be read within {TIMEOUT_S} s.") from None
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise FetchError(f"{name}: the PDF cannot be read: {said[-1][:200] if said else f'exit {done.returncode}'}")
    return PdfText(**json.loads(done.stdout))


def extract(body: bytes) -> PdfText:
    from pypdf import PdfReader

    reader = PdfReader(io.BytesIO(body))
    if reader.is_encrypted and not reader.decrypt(""):
        raise ValueError("it is locked with a password")
    texts: list[str] = []
    size, n_pages, note = 0, len(reader.pages), ""
    for number, page in enumerate(reader.pages, 1):
        text = page.extract_text() or ""
        if number > MAX_PAGES or size + len(text) > MAX_CHARS:
            note = f"cut: {number - 1} of {n_pages} pages were read"
            break
        texts.append(f"[page {number} of {n_pages}]\n{text}" if n_pages > 1 else text)
        size += len(text)
    if not any(text.strip() for text in texts):
        note = "the PDF holds no text (perhaps pictures of pages)"
    meta = reader.metadata
    made = meta.creation_date if meta is not None else None
    return PdfText("\n\n".join(texts), str((meta.title if meta is not None else "") or ""),
                   made.strftime("%Y-%m-%d") if made else "", note)  # fmt: skip


def main() -> None:
    import logging

    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CPU, (TIMEOUT_S, TIMEOUT_S))
    except (ImportError, ValueError, OSError):  # no such limits on this system: the time-out of the caller remains
        pass
    logging.disable(logging.CRITICAL)
    try:
        found = extract(sys.stdin.buffer.read())
    except Exception as error:  # whatever a damaged file does to the reader is told in one line
        sys.exit(f"{type(error).__name__}: {error}".splitlines()[0])
    print(json.dumps(asdict(found)))


if __name__ == "__main__":
    main()
