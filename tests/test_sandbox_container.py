"""The sandbox in a container: with a stand-in for the engine everywhere, with a real one where its image is there."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from openglm.agent import isolation
from openglm.agent.isolation import Container, SandboxUnavailable, find_isolation
from openglm.agent.sandbox import Sandbox, SandboxConfig

ENGINE = """#!{python}
import os, sys
given = sys.argv[1:]
if given[0] == "run":
    assert "--network=none" in given and "--read-only" in given and "--cap-drop=ALL" in given, given
    if given[-2:] == ["-c", "pass"]:
        sys.exit(0)
    assert not any("nr_inodes" in option for option in given), "podman knows no limit of inodes"
    place = given.index("python3")
    inside = given[place + 4].replace("/tmp", {folder!r}).replace("/workspace", {folder!r} + "/w")
    inside = inside.replace("/openglm/", {programs!r} + "/").replace('"/usr/bin/env", "python3"', '"{python}"')
    inside = inside.replace('"/usr/bin/env"', '"{python}"')
    os.execv("{python}", ["{python}", "-I", "-S", {programs!r} + "/enter.py", inside])
"""


def test_a_container_engine_is_driven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the engine that checks what it is told and runs the same programs."""
    if reason := isolation.missing_packages():
        pytest.skip(reason)
    (tmp_path / "w").mkdir()
    engine = tmp_path / "podman"
    engine.write_text(ENGINE.format(python=sys.executable, folder=str(tmp_path), programs=str(isolation.INSIDE)))
    engine.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    config = SandboxConfig(isolation="container")
    assert isinstance(find_isolation(config), Container)
    with Sandbox(config) as sandbox:
        assert sandbox.run("8 * 8").result == "64"
        assert sandbox.run("import os; os.memfd_create('x')").error_name == "PermissionError", "our own filter holds"
        assert sandbox.run("import os; os._exit(0)").error_name == "Died"


def test_a_real_container_engine() -> None:
    """Where there is one with the image of docs/TOOLS.md: state, packages, a plot, files; no network, no writing."""
    config = SandboxConfig(isolation="container", memory_bytes=1 << 30)
    try:
        way = find_isolation(config)
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    assert isinstance(way, Container)
    with Sandbox(config) as sandbox:
        assert sandbox.run("x = 6 * 7; x").result == "42"
        plot = sandbox.run(
            "import matplotlib.pyplot as plt; plt.plot([1, 2]); open('a.txt', 'w').write('hi'); plt.show()"
        )
        assert [image.name for image in plot.images] == ["image-1.png"] and [f.name for f in plot.files] == ["a.txt"]
        assert sandbox.run("import socket; socket.create_connection(('1.1.1.1', 80), 3)").error_name == "OSError"
        assert sandbox.run("open('/etc/x', 'w')").error_name == "OSError"
        assert sandbox.run("import os; os.memfd_create('x')").error_name == "PermissionError"
        assert sandbox.run("while True: pass", timeout_s=1).error_name == "Stopped"
        assert sandbox.run("x").result == "42"
