"""What a sandbox is for: state between calls, pictures, files in and out, a stop that keeps the state, and the pool.

python -m pytest tests/test_sandbox.py
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from openglm.agent import isolation
from openglm.agent.isolation import Bubblewrap, SandboxUnavailable, find_isolation
from openglm.agent.sandbox import Sandbox, SandboxConfig
from openglm.agent.sandbox_pool import SandboxPool
from openglm.agent.tools.python import PythonTool
from openglm.types import StatefulTool, ToolContext
from tests.sandbox_helpers import gone, processes_that_say

REASON = Bubblewrap().why_not()
needs_sandbox = pytest.mark.skipif(bool(REASON), reason=f"no sandbox here: {REASON}")
CONFIG = SandboxConfig(isolation="bubblewrap", grace_s=1.5, n_images=4, n_live=2, output_bytes=3000)


@pytest.fixture(scope="module")
def box() -> Iterator[Sandbox]:
    if REASON:
        pytest.skip(f"no sandbox here: {REASON}")
    with Sandbox(CONFIG) as sandbox:
        yield sandbox
        sandbox.check_integrity()


# -- what a cell gives


@pytest.mark.parametrize(
    ("code", "field", "value"),
    [
        ("6 * 7", "result", "42"),
        ("x = 3", "result", "3"),
        ("x = 3;", "result", ""),
        ("print('a'); print('b', end='')", "stdout", "a\nb"),
        ("import sys; print('e', file=sys.stderr)", "stderr", "e\n"),
        ("'文字 \U0001f600'", "result", "'文字 \U0001f600'"),
        ("print('\\udcff half a pair'); 'ok'", "result", "'ok'"),
        ("import sys; sys.stdout.flush(); import os; os.write(1, b'\\xff\\xfe ok\\n'); 1", "stdout", "�� ok\n"),
        ("import subprocess; _ = subprocess.run(['echo', 'from a child'])", "stdout", "from a child\n"),
        ("!echo shell", "stdout", "shell\n"),
        ("_ = subprocess.run('echo to stderr >&2', shell=True)", "stderr", "to stderr\n"),
        ("%%bash\necho cell", "stdout", "cell\n"),
        ("None", "result", ""),
        ("a = 6\nproduct = 7 * a", "result", "42"),
        ("object.__new__(type('Odd', (), {'__repr__': lambda self: 3}))", "error_name", "TypeError"),
        ("1/0", "error_name", "ZeroDivisionError"),
        ("def f(:", "error_name", "SyntaxError"),
        ("raise SystemExit(3)", "error_name", "SystemExit"),
        ("exit()", "error_name", "SystemExit"),
        ("input()", "error_name", "StdinNotImplementedError"),
        ("import sys; sys.stdin.read()", "result", "''"),
        ("import os; os.getcwd()", "result", "'/workspace'"),
        ("import getpass; getpass.getuser()", "result", "'sandbox'"),
        ("import urllib.request; urllib.request.urlopen('http://1.1.1.1', timeout=3)", "error_name", "URLError"),
        ("async def g(): return 5\nawait g()", "result", "5"),
        ("import multiprocessing as m\nwith m.Pool(2) as p: print(p.map(abs, [-1, -2]))", "stdout", "[1, 2]\n"),
        ("from sympy import *; v = symbols('v'); integrate(v**2, v)", "result", "v**3/3"),
        ("import numpy as np; np.arange(3) + 1", "result", "array([1, 2, 3])"),
        ("from scipy.optimize import brentq; round(brentq(lambda z: z*z - 2, 0, 2), 6)", "result", "1.414214"),
    ],
)  # fmt: skip
def test_results(box: Sandbox, code: str, field: str, value: str) -> None:
    assert getattr(box.run(code), field) == value
    assert not box.run("1").error


def test_state_stays_and_errors_point_to_the_line(box: Sandbox) -> None:
    box.run("total = 40\ndef add(n): return total + n")
    assert box.run("add(2)").result == "42"
    result = box.run("a = 1\nb = add(nothing_here)")
    assert result.error_name == "NameError" and "line 2" in result.error and "add(nothing_here)" in result.error
    assert box.run("a").result == "1" and "\x1b" not in result.error


def test_large_output_is_cut_in_the_middle(box: Sandbox) -> None:
    result = box.run("print('start'); print('x' * 50_000); print('end')")
    assert result.stdout.startswith("start\n") and result.stdout.endswith("x\nend\n")
    assert len(result.stdout) < 3200 and result.truncated == ("stdout",) and "characters left out" in result.stdout
    frame = box.run("import pandas as pd; pd.DataFrame({'a': range(10**6), 'b': 'text'})")
    assert "1000000 rows" in frame.result and not frame.truncated
    deep = box.run("def f(n): return f(n + 1)\nf(0)")
    assert deep.error_name == "RecursionError" and len(deep.error) < 5000
    assert len(box.run("raise ValueError('z' * 10**6)").error) < 5000
    assert len(box.run("[list(range(900))] * 20").result) < 5000


def test_pictures_come_with_words(box: Sandbox) -> None:
    code = "import matplotlib.pyplot as plt\nplt.plot([0, 4], [1, 3], label='speed'); plt.title('Run'); plt.legend()\n"
    result = box.run(code + "plt.xlabel('t / s'); plt.show()\nplt.figure(); plt.bar(['a', 'b'], [1, 2]);")
    assert [image.mime for image in result.images] == ["image/png", "image/png"] and not result.error
    first = result.images[0]
    assert first.content is not None and first.content.startswith(b"\x89PNG") and len(first.content) > 1000
    for word in ("pixels", "'Run'", "x 't / s' from -0.2 to 4.2", "1 lines", "'speed'"):
        assert word in first.description
    assert "2 bars and patches" in result.images[1].description
    many = box.run("for i in range(6): plt.figure(figsize=(1, 1)); plt.axes()")
    assert len(many.images) == 4 and many.n_images_dropped == 2


@pytest.mark.skipif(not list(Path("/usr/share/fonts").rglob("NotoSansCJK-Regular.ttc")), reason="needs fonts-noto-cjk")
def test_pictures_have_chinese_words(box: Sandbox) -> None:
    """Without a warning of a missing glyph, or of fonts that cannot be listed."""
    drawn = box.run("import matplotlib.pyplot as plt; plt.title('中文 -1'); plt.plot([-1, 1]); plt.show()")
    assert len(drawn.images) == 1 and not drawn.stderr and not drawn.error, drawn


def test_files_go_in_and_out(box: Sandbox) -> None:
    box.put("in/table.csv", b"a,b\n1,2\n")
    assert box.run("import pandas as pd; int(pd.read_csv('in/table.csv').b[0])").result == "2"
    box.run("import os; os.makedirs('out', exist_ok=True); os.remove('in/table.csv')")
    result = box.run("open('out/new.txt', 'w').write('made')")
    assert [file.name for file in result.files] == ["out/new.txt"] and result.files[0].read() == b"made"
    assert "in/table.csv" not in box.files.names()
    result = box.run("open('out/new.txt', 'a').write('!'); open('.hidden', 'w')")
    assert [file.name for file in result.files] == ["out/new.txt"]
    assert box.run("2").files == ()
    linked = box.run("os.symlink('/etc/passwd', 'link'); os.mkfifo('pipe'); open('out/link-free', 'w').close()")
    assert [file.name for file in linked.files] == ["out/link-free"]
    assert (box.files.folder / "out" / "new.txt").read_bytes() == b"made!"
    with pytest.raises(ValueError, match="a file may have"):
        box.put("huge", bytes(CONFIG.file_bytes + 1))
    with pytest.raises(ValueError, match="not the name of a file"):
        box.put("../huge", b"")


def test_folders_to_read(tmp_path: Path) -> None:
    if REASON:
        pytest.skip(REASON)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("to read")
    config = SandboxConfig(isolation="bubblewrap", read_only=(tmp_path / "corpus",))
    with Sandbox(config) as sandbox:
        assert sandbox.run("open('/inputs/corpus/a.txt').read()").result == "'to read'"
        assert sandbox.run("open('/inputs/corpus/a.txt', 'w')").error_name == "OSError"


# -- stopping


def test_a_loop_is_stopped_and_the_state_stays(box: Sandbox) -> None:
    box.run("kept = 41")
    result = box.run("while True: kept += 0", timeout_s=0.5)
    assert result.error_name == "Stopped" and "longer than 0.5 s" in result.error and "Cell In" in result.error
    assert box.run("kept + 1").result == "42"
    assert box.run("import time; time.sleep(60)", timeout_s=0.3).error_name == "Stopped"
    assert box.run("kept").result == "41"


def test_interrupt_from_another_thread(box: Sandbox) -> None:
    heard = threading.Event()

    def interrupt() -> None:
        heard.wait(30)
        box.interrupt()

    threading.Thread(target=interrupt).start()
    result = box.run("n = 7; print('begun', flush=True)\nwhile True: pass", on_output=lambda stream, text: heard.set())
    assert "was interrupted" in result.error and box.run("n").result == "7"


def test_a_listener_that_fails_leaves_nothing_behind(box: Sandbox) -> None:
    def fail(stream: str, text: str) -> None:
        raise KeyError(text)

    with pytest.raises(KeyError):
        box.run("print('one', flush=True); import time; time.sleep(1); print('two')", on_output=fail)
    after = box.run("3")
    assert (after.result, after.stdout) == ("3", "") and "given up" in after.state_lost


def test_files_that_do_not_fit_are_refused_and_stay(tmp_path: Path) -> None:
    if REASON:
        pytest.skip(REASON)
    (tmp_path / "large.bin").write_bytes(bytes(2 << 20))
    with pytest.raises(ValueError, match="a file may have"):
        Sandbox(SandboxConfig(isolation="bubblewrap", file_bytes=1 << 20), tmp_path)
    many = SandboxConfig(isolation="bubblewrap", n_files=4)  # folders count inside
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "a.txt").write_text("x")
    with Sandbox(many, tmp_path) as sandbox, pytest.raises(ValueError, match="does not fit"):
        sandbox.run("1")
    assert len(list(tmp_path.iterdir())) == 3


def test_code_that_does_not_stop_is_ended(box: Sandbox) -> None:
    stubborn = (
        "import time\nwhile True:\n    try:\n        while True: time.sleep(1)\n    except KeyboardInterrupt: pass"
    )
    box.put("kept.txt", b"before")
    result = box.run(stubborn, timeout_s=0.5)
    assert result.error_name == "Died" and "did not stop" in result.error
    after = box.run("open('kept.txt').read()")
    assert after.result == "'before'" and "did not stop" in after.state_lost


def test_death_is_told_and_a_new_kernel_works(box: Sandbox) -> None:
    assert "exit code 3" in box.run("import os; os._exit(3)").error
    assert "exit code 3" in box.run("2").state_lost and box.run("2").state_lost == ""
    assert "SIGSEGV" in box.run("import ctypes; ctypes.string_at(0)").error
    box.run("1")
    box.restart()
    assert "restarted" in box.run("2").state_lost


def test_what_is_left_running_does_not_hold_up(box: Sandbox) -> None:
    started = "import threading, subprocess, time\nthreading.Thread(target=time.sleep, args=(300,)).start()\n"
    assert not box.run(started + "child = subprocess.Popen(['sleep', '300.25']); 1").error
    assert box.run("child.poll() is None").result == "True" and processes_that_say("300.25")
    box.restart()
    assert gone("300.25")


def test_a_late_thread_is_heard(box: Sandbox) -> None:
    box.run("import threading, time\nthreading.Timer(0.2, lambda: print('late')).start()")
    assert "late" in box.run("time.sleep(0.6)").stdout


def test_nothing_outlives_a_parent_that_is_killed() -> None:
    if REASON:
        pytest.skip(REASON)
    code = ("from openglm.agent.sandbox import *\ns = Sandbox(SandboxConfig(isolation='bubblewrap'))\n"
            "s.run('import subprocess; subprocess.Popen([\"sleep\", \"311.5\"])')\nprint('up', flush=True)\n"
            "import time; time.sleep(100)")  # fmt: skip
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None and parent.stdout.readline() == "up\n" and processes_that_say("311.5")
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    assert gone("311.5")


# -- many conversations


@needs_sandbox
def test_ten_conversations_at_once(tmp_path: Path) -> None:
    with SandboxPool(SandboxConfig(isolation="bubblewrap", n_live=10), tmp_path) as pool:
        results: dict[int, str] = {}

        def converse(number: int) -> None:
            pool.get(f"c{number}").run(f"mine = {number}; open('n.txt', 'w').write(str(mine))")
            results[number] = pool.get(f"c{number}").run("import os; mine, open('n.txt').read(), os.listdir()").result

        threads = [threading.Thread(target=converse, args=(number,)) for number in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == {n: f"({n}, '{n}', ['n.txt'])" for n in range(10)}
        pool.check_integrity()
        live = [sandbox for n in range(10) if (sandbox := pool.peek(f"c{n}"))]
        assert all(sandbox.is_live for sandbox in live)
    assert not any(sandbox.is_live for sandbox in live)
    assert (tmp_path / "c3" / "n.txt").read_text() == "3"


@needs_sandbox
def test_a_pool_makes_room() -> None:
    with SandboxPool(CONFIG) as pool:
        pool.get("a").run("x = 1")
        pool.get("b").run("x = 2")
        working = threading.Semaphore(0)
        code = "print('at work', flush=True); import time; time.sleep(60)"
        b = threading.Thread(target=lambda: pool.get("b").run(code, None, lambda stream, text: working.release()))
        b.start()
        assert working.acquire(timeout=30)
        assert pool.get("c").run("3").result == "3"  # takes the place of a
        pool.check_integrity()
        c = threading.Thread(target=lambda: pool.get("c").run(code, None, lambda stream, text: working.release()))
        c.start()
        assert working.acquire(timeout=30)
        with pytest.raises(ValueError, match="are at work"):
            pool.get("a")
        for name, thread in (("b", b), ("c", c)):
            pool.get(name).interrupt()
            thread.join()
        assert "to make room" in pool.get("a").run("1").state_lost
        pool.end("a")
        assert pool.peek("a") is None
    with pytest.raises(ValueError, match="closed"):
        pool.get("a")


@needs_sandbox
def test_a_pool_stops_what_is_idle() -> None:
    with SandboxPool(SandboxConfig(isolation="bubblewrap", idle_s=0.5)) as pool:
        box = pool.get("a")
        box.run("open('f', 'w').write('kept')")
        deadline = time.monotonic() + 30
        while box.is_live and time.monotonic() < deadline:
            time.sleep(0.05)
        result = pool.get("a").run("open('f').read()")
        assert "without use" in result.state_lost and result.result == "'kept'"


@needs_sandbox
def test_a_call_while_the_idle_kernel_is_being_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for the end of the old one; the keeper, which stops it, does not wait for the call."""
    with SandboxPool(SandboxConfig(isolation="bubblewrap", idle_s=0.5)) as pool:
        box = pool.get("a")
        kill, stopping, wanted = box.isolation.kill, threading.Event(), threading.Event()

        def slow_kill(process: subprocess.Popen[bytes]) -> None:
            stopping.set()
            wanted.wait(30)
            time.sleep(0.2)  # the call is at its lock by now
            kill(process)

        monkeypatch.setattr(box.isolation, "kill", slow_kill)
        assert stopping.wait(30)
        monkeypatch.setattr(box.isolation, "kill", kill)
        found: list[str] = []
        call = threading.Thread(target=lambda: found.append(pool.get("a").run("1 + 1").result), daemon=True)
        call.start()
        wanted.set()
        call.join(60)
        assert found == ["2"]


@needs_sandbox
def test_the_tool() -> None:
    async def converse() -> None:
        tool = PythonTool(CONFIG)
        assert isinstance(tool, StatefulTool)
        heard: list[str] = []
        context = ToolContext("one", on_output=lambda stream, text: heard.append(text))
        first = await tool.call({"code": "v = 5\nprint('seen')\nopen('f.txt', 'w').write('hi')"}, context)
        assert first.content == "seen\n2\n[files written: f.txt]" and not first.error and "seen\n" in heard
        assert first.data is not None and first.data["stdout"] == "seen\n" and first.files[0].name == "f.txt"
        failed = await tool.call({"code": "1/0"}, context)
        assert failed.error and "ZeroDivisionError" in failed.content and "-----" not in failed.content.splitlines()[0]
        assert (await tool.call({"code": "pass"}, context)).content == "(no output: print what should be seen)"
        assert (await tool.call({"code": "v"}, ToolContext("two"))).error  # another conversation
        with pytest.raises(ValueError, match="one argument"):
            await tool.call({"text": "1"}, context)
        late = await tool.call({"code": "while True: pass"}, ToolContext("one", timeout_s=0.4))
        assert late.error and "0.4 s" in late.content
        task = asyncio.create_task(tool.call({"code": "print('go', flush=True)\nwhile True: pass"}, context))
        while "go\n" not in heard:
            await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await tool.call({"code": "v"}, context)).content == "5"
        await tool.end("one")
        assert (await tool.call({"code": "v"}, context)).error
        await tool.close()

    asyncio.run(converse())


# -- without bubblewrap


def test_reasons_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation.shutil, "which", lambda name: None)
    with pytest.raises(SandboxUnavailable, match="bwrap is not installed.*neither podman nor docker"):
        find_isolation(SandboxConfig())
    assert "apt install bubblewrap" in PythonTool.why_not()
    monkeypatch.setattr(isolation.sys, "platform", "darwin")
    assert "bubblewrap is for Linux" in PythonTool.why_not()
    with pytest.raises(SandboxUnavailable):
        Sandbox()


def test_without_isolation_it_is_said_loudly(caplog: pytest.LogCaptureFixture) -> None:
    if reason := isolation.missing_packages():
        pytest.skip(reason)
    os.environ["CANARY_TOKEN"] = "secret"
    try:
        with Sandbox(SandboxConfig(unsafe_python=True)) as sandbox:
            assert sandbox.run("21 * 2").result == "42"
            assert "WITHOUT ISOLATION" in caplog.text
            assert sandbox.run("import os; 'CANARY_TOKEN' in os.environ").result == "False"
            sandbox.run("import subprocess; subprocess.Popen(['sleep', '322.5'])")
            sandbox.put("a.txt", b"a")
            assert sandbox.run("open('a.txt').read()").result == "'a'"
        assert gone("322.5")
    finally:
        del os.environ["CANARY_TOKEN"]
