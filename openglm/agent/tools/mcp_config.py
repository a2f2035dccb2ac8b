"""Which MCP servers an agent uses: a command, a URL, or a file of them in the usual form.

{"mcpServers": {"files": {"command": "npx", "args": ["-y", "some-server", "."], "env": {"TOKEN": "${MY_TOKEN}"}},
                "web": {"url": "https://host/mcp", "headers": {"Authorization": "Bearer ${MY_KEY}"}}}}
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from openglm.config import nearest

__all__ = ["MCPServerConfig", "parse_servers"]

FIELDS = ("command", "args", "env", "cwd", "url", "headers", "timeout_s", "start_timeout_s", "type", "disabled")
VARIABLE = re.compile(r"\$\{(\w+)\}")


@dataclass(frozen=True, kw_only=True)
class MCPServerConfig:
    """One server: `command` with `args` (a child process, spoken to over its standard input and output), or `url`.

    env: added to the few variables that a child is given (PATH, HOME, USER, SHELL, TERM). timeout_s: of a call, where
    the caller gives none. start_timeout_s: until it has said which tools it has.
    """

    name: str
    command: str = ""
    args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str = ""
    url: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    timeout_s: float = 60.0
    start_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        if bool(self.command) == bool(self.url):
            raise ValueError(f"the MCP server {self.name!r} needs a command or a url, and not both")
        if self.url and urlsplit(self.url).scheme not in ("http", "https"):
            raise ValueError(f"the MCP server {self.name!r}: {self.url!r} is no http or https URL")
        if not self.timeout_s > 0 or not self.start_timeout_s > 0:
            raise ValueError(f"the MCP server {self.name!r}: timeout_s and start_timeout_s must be above 0")

    @property
    def place(self) -> str:
        """For messages: no headers and no arguments, which may hold keys."""
        return f"{self.name} ({self.url.partition('?')[0] or self.command})"

    @classmethod
    def from_dict(cls, name: str, value: Any, where: str) -> MCPServerConfig:
        """One entry of "mcpServers". ${NAME} stands for an environment variable. ValueError naming server and field."""
        here = f"{where}: the MCP server {name!r}"
        if not isinstance(value, Mapping):
            raise ValueError(f"{here} must be an object, not {type(value).__name__}")
        for key in value:
            if key not in FIELDS:
                raise ValueError(f"{here} has an unknown field {key!r}{nearest(key, list(FIELDS))}")
        if value.get("type", "stdio") not in ("stdio", "http", "streamable-http", "streamableHttp"):
            raise ValueError(f"{here}: type {value['type']!r} is not spoken: there are stdio and http (streamable)")
        given = {key: item for key, item in value.items() if key not in ("type", "disabled")}
        for key, kind in (("args", list), ("env", Mapping), ("headers", Mapping)):
            if not isinstance(given.get(key, kind() if kind is list else {}), kind):
                raise ValueError(f"{here}: {key} must be {'a list' if kind is list else 'an object'}")
        for key in ("timeout_s", "start_timeout_s"):
            if not isinstance(given.get(key, 1.0), int | float):
                raise ValueError(f"{here}: {key} must be a number of seconds")
        try:
            filled: dict[str, Any] = {key: _filled(item) for key, item in given.items()}
            return cls(name=name, **{**filled, "args": tuple(filled.get("args", ()))})
        except KeyError as missing:
            raise ValueError(f"{here}: the environment variable {missing.args[0]} is not set") from None


def _filled(value: Any) -> Any:
    """With environment variables in place of their names; KeyError for one that is not set."""
    if isinstance(value, str):
        return VARIABLE.sub(lambda match: os.environ[match.group(1)], value)
    if isinstance(value, Mapping):
        return {str(key): _filled(item) for key, item in value.items()}
    return (
        [_filled(item) if isinstance(item, str) else str(item) for item in value] if isinstance(value, list) else value
    )


def parse_servers(text: str) -> list[MCPServerConfig]:
    """What one --mcp names: a URL, a .json file of servers, or a command line. ValueError for anything else."""
    if text.startswith(("http://", "https://")):
        return [MCPServerConfig(name=re.sub(r"\W+", "_", urlsplit(text).netloc), url=text)]
    path = Path(text).expanduser()
    if path.suffix == ".json":
        return _of_file(path)
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"--mcp {text!r} is no command line: {error}") from None
    if not words:
        raise ValueError("--mcp needs a command, a URL or a .json file")
    return [MCPServerConfig(name=Path(words[0]).stem, command=words[0], args=tuple(words[1:]))]


def _of_file(path: Path) -> list[MCPServerConfig]:
    if not path.is_file():
        raise ValueError(f"no file {path} with MCP servers")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    servers = value.get("mcpServers") if isinstance(value, Mapping) else None
    if not isinstance(servers, Mapping):
        raise ValueError(f'{path} has no "mcpServers"')
    wanted = {
        name: entry for name, entry in servers.items() if not (isinstance(entry, Mapping) and entry.get("disabled"))
    }
    return [MCPServerConfig.from_dict(str(name), entry, str(path)) for name, entry in wanted.items()]
