"""The READMEs are run: every bash, console and python block, in order, in an empty folder, with the bundled model.

    python -m pytest tests/test_readme.py

A block that needs a network, a terminal or much time has a comment `<!-- skip: reason -->` on the line above it. The
two READMEs hold the same blocks; only what stands between quotes, comments and here-documents may be translated.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
READMES = ("README.md", "README_zh.md")
BUNDLED = REPOSITORY / "openglm" / "assets" / "glm-nano"
RUN = ("bash", "console", "python")
FENCE = re.compile(r"^```(\w*)[ \t]*\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)
SKIP = re.compile(r"<!-- skip: (.+?) -->\n$")
MIN_RUN = 5
MAX_LINES = 200
TIMEOUT_S = 300


@dataclass(frozen=True)
class Block:
    """line: of the opening fence. skip: why it is not run, None where it is."""

    language: str
    text: str
    line: int
    skip: str | None

    @property
    def commands(self) -> str:
        """What a shell or Python would run; of a console block the lines after a prompt."""
        if self.language != "console":
            return self.text
        return "".join(line[2:] for line in self.text.splitlines(keepends=True) if line.startswith("$ "))

    @property
    def shape(self) -> list[str]:
        """Commands without what a translation changes: text between quotes, comments, Chinese and English words."""
        text = re.sub(r"<<\s*'?(\w+)'?(.*?)\n(.*?)^\1$", r"<<\1\2", self.commands, flags=re.MULTILINE | re.DOTALL)
        text = re.sub(r"\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'", '"…"', text)
        lines = (re.sub(r"(^|\s)#.*$", "", line).rstrip() for line in text.splitlines())
        return [line for line in lines if line]


def blocks_of(text: str) -> list[Block]:
    found = []
    for match in FENCE.finditer(text):
        if match.group(1) in RUN:
            skip = SKIP.search(text[: match.start()])
            line = text.count("\n", 0, match.start()) + 1
            found.append(Block(match.group(1), match.group(2), line, skip.group(1) if skip else None))
    return found


def read(readme: str) -> str:
    return (REPOSITORY / readme).read_text(encoding="utf-8")


def run_block(block: Block, folder: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = os.environ | {"PATH": path, "PYTHONUTF8": "1", "LC_ALL": "C.UTF-8"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-c"] if block.language == "python" else ["bash", "-euo", "pipefail", "-c"]
    return subprocess.run(
        [*command, block.commands], stdin=subprocess.DEVNULL, capture_output=True, text=True, encoding="utf-8",
        cwd=folder, env=environment, timeout=TIMEOUT_S,
    )  # fmt: skip


@pytest.mark.parametrize("readme", READMES)
def test_readme_commands_run(readme: str, tmp_path: Path) -> None:
    if not (BUNDLED / "config.json").is_file():
        pytest.skip("needs the bundled model in openglm/assets/glm-nano, which is not here")
    if not (Path(sys.executable).parent / "openglm").exists():
        pytest.skip("needs the installed command: pip install -e .")
    n_run = 0
    for block in blocks_of(read(readme)):
        if block.skip is None:
            result = run_block(block, tmp_path)
            assert result.returncode == 0, (
                f"{readme}:{block.line}: exit code {result.returncode}\n{block.text}\n{result.stdout}\n{result.stderr}"
            )
            n_run += 1
    assert n_run >= MIN_RUN


def test_the_two_readmes_hold_the_same_blocks() -> None:
    english, chinese = (blocks_of(read(readme)) for readme in READMES)
    assert [b.language for b in english] == [b.language for b in chinese]
    for one, other in zip(english, chinese, strict=True):
        assert one.shape == other.shape, f"README.md:{one.line} and README_zh.md:{other.line} differ"
        assert (one.skip is None) == (other.skip is None), f"README.md:{one.line} and README_zh.md:{other.line}"


@pytest.mark.parametrize("readme", READMES)
def test_readmes_are_short_and_skip_little(readme: str) -> None:
    text, blocks = read(readme), blocks_of(read(readme))
    assert len(text.splitlines()) < MAX_LINES
    skipped = [b for b in blocks if b.skip is not None]
    assert len(blocks) - len(skipped) >= MIN_RUN and len(skipped) <= 4


@pytest.mark.parametrize("readme", READMES)
def test_readmes_name_every_verb_and_no_other(readme: str) -> None:
    from openglm.cli import COMMANDS

    text = read(readme)
    named = {m.group(1) for m in re.finditer(r"`openglm ([a-z]+(?: [a-z]+)?)", text)}
    named |= {m.group(1) for m in re.finditer(r"^\s*(?:.*\| )?openglm ([a-z]+(?: [a-z]+)?)", text, re.MULTILINE)}
    for verb in COMMANDS:
        assert any(name == verb or name.split()[0] == verb for name in named), f"{readme} does not name {verb}"
    for name in named:
        assert name in COMMANDS or name.split()[0] in COMMANDS, f"{readme} names {name!r}, which is no verb"


@pytest.mark.parametrize("readme", READMES)
def test_run_configs_in_the_readmes_are_valid(readme: str) -> None:
    """Run configs in here-documents have only known keys of the right types."""
    import yaml

    from openglm.train.config import load_config

    configs = re.findall(r"> \S+\.yaml <<'END'\n(.*?)^END$", read(readme), re.MULTILINE | re.DOTALL)
    assert configs
    for text in configs:
        load_config(yaml.safe_load(text))


def test_blocks_are_read_as_written() -> None:
    text = "```bash\na 'b' # c\n```\n<!-- skip: slow -->\n```console\n$ x \"y\"\nout\n```\n```yaml\nk: v\n```\n"
    first, second = blocks_of(text)
    assert (first.line, first.skip, first.shape) == (1, None, ['a "…"'])
    assert (second.line, second.skip, second.commands) == (5, "slow", 'x "y"\n')
    assert blocks_of("```bash\ncat > f <<'END'\none\nEND\nx\n```\n")[0].shape == ["cat > f <<END", "x"]
