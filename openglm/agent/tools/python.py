"""The tool `python`: code of a model, run in a sandbox that keeps its variables through a conversation.

python -m openglm.agent.tools.python "import math; math.factorial(30)"
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from pathlib import Path
from typing import Any

from openglm.agent.isolation import SandboxUnavailable, find_isolation
from openglm.agent.sandbox import ExecutionResult, Sandbox, SandboxConfig
from openglm.agent.sandbox_pool import SandboxPool
from openglm.types import Observation, ToolContext, ToolSpec

__all__ = ["UNSAFE", "PythonTool"]

log = logging.getLogger(__name__)
MAX_TRACEBACK = 3000  # characters of it that the model is shown
DESCRIPTION = (
    "Runs Python code and returns what it prints, the value of its last expression, and pictures it plots. Variables "
    "stay until the end of the conversation. numpy, pandas, matplotlib, sympy and scipy are there. Files are read and "
    "written in the current folder."
)
ISOLATED = "There is no network."
UNSAFE = "--unsafe-python: Python code of the model runs WITHOUT ISOLATION, with all rights of this user"
UNSAFE_DESCRIPTION = "It runs WITHOUT ISOLATION on the user's machine: touch nothing that the task does not need."


class PythonTool:
    """A Tool that runs the model's code, one sandbox for each conversation; see SandboxConfig for what it may use.

    SandboxUnavailable (a ValueError) where nothing can isolate the code. folder: keeps the files of conversations.
    note: what people must know of it where it is offered, or nothing.
    """

    def __init__(self, config: SandboxConfig | None = None, folder: Path | None = None) -> None:
        self.config = config or SandboxConfig()
        find_isolation(self.config)
        self.note = UNSAFE if self.config.unsafe_python else ""
        if self.note:
            log.warning(self.note)
        text = f"{DESCRIPTION} {UNSAFE_DESCRIPTION if self.note else ISOLATED}"
        self.spec = ToolSpec("python", text, ToolSpec.of_builtin("python").parameters, builtin=True)
        self.pool = SandboxPool(self.config, folder)

    @staticmethod
    def why_not(config: SandboxConfig | None = None) -> str:
        """The reason why this tool cannot be offered here, or nothing."""
        try:
            find_isolation(config or SandboxConfig())
        except SandboxUnavailable as error:
            return str(error)
        return ""

    async def call(self, arguments: dict[str, Any], context: ToolContext) -> Observation:
        """arguments: {"code": text}. ValueError for others. A cancelled call is interrupted; its variables are kept."""
        code = arguments.get("code")
        if not isinstance(code, str) or len(arguments) != 1:
            raise ValueError('python takes one argument: {"code": "..."}')
        worker = asyncio.ensure_future(asyncio.to_thread(self._run, code, context))
        try:
            return await asyncio.shield(worker)
        except asyncio.CancelledError:
            await self._stop(worker, context.conversation)
            raise

    async def _stop(self, worker: asyncio.Future[Observation], conversation: str) -> None:
        """Interrupt until it is over: the call may not have begun when the first one comes."""
        sandbox = self.pool.peek(conversation)
        while not worker.done():
            if sandbox is not None:
                sandbox.interrupt()
            sandbox = sandbox or self.pool.peek(conversation)
            await asyncio.wait([worker], timeout=0.05)
        if not worker.cancelled():
            worker.exception()  # nobody is left to be told of it

    def _run(self, code: str, context: ToolContext) -> Observation:
        try:
            sandbox = self.pool.get(context.conversation)
            return observe(sandbox.run(code, context.timeout_s, context.on_output))
        except (RuntimeError, SandboxUnavailable) as error:
            return Observation(f"Python could not be run: {error}", error=True)

    async def put(self, conversation: str, name: str, content: bytes) -> None:
        """Give the code of a conversation a file, by a relative name. ValueError where there is no room."""
        await asyncio.to_thread(lambda: self.pool.get(conversation).put(name, content))

    async def end(self, conversation: str) -> None:
        await asyncio.to_thread(self.pool.end, conversation)

    async def close(self) -> None:
        await asyncio.to_thread(self.pool.close)


def observe(result: ExecutionResult) -> Observation:
    """What the model is told of a result, and what a page shows."""
    parts = []
    if result.state_lost:
        parts.append(f"Note: a new Python process ({result.state_lost}); earlier variables and imports are gone.")
    parts += [text.rstrip("\n") for text in (result.stdout, result.result) if text.strip()]
    if result.stderr.strip():
        parts.append(f"[stderr]\n{result.stderr.rstrip()}")
    if result.error:
        parts += [shorten(result.error), "Correct the code and call python again."]
    parts += [f"[{image.name}: {image.description}]" for image in result.images]
    if result.n_images_dropped:
        parts.append(f"[{result.n_images_dropped} more pictures were not kept]")
    if result.files:
        parts.append("[files written: " + ", ".join(file.name for file in result.files[:50]) + "]")
    data = {
        "stdout": result.stdout, "stderr": result.stderr, "result": result.result, "error": result.error,
        "error_name": result.error_name, "seconds": round(result.seconds, 3), "truncated": list(result.truncated),
        "images": [{"name": file.name, "mime": file.mime, "description": file.description} for file in result.images],
        "files": [file.name for file in result.files],
    }  # fmt: skip
    text = "\n".join(parts) or "(no output: print what should be seen)"
    return Observation(text, (*result.images, *result.files), data, error=bool(result.error))


def shorten(traceback: str) -> str:
    """Its end says the most; the line of the model's own code stands at its beginning."""
    lines = [line for line in traceback.splitlines() if line.strip("-")]
    text = "\n".join(lines)
    if len(text) <= MAX_TRACEBACK:
        return text
    return f"{text[: MAX_TRACEBACK // 3]}\n[...]\n{text[-MAX_TRACEBACK * 2 // 3 :]}"


def main(code: str) -> int:
    started = time.monotonic()
    try:
        with Sandbox() as sandbox:
            sandbox.start()
            ready = time.monotonic()
            observation = observe(sandbox.run(code))
    except SandboxUnavailable as error:
        print(error, file=sys.stderr)
        return 2
    print(observation.content)
    print(f"ready after {ready - started:.2f} s, run in {time.monotonic() - ready:.3f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(" ".join(sys.argv[1:]) or sys.stdin.read()))
