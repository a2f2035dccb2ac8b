"""Code that tries to get out of the sandbox, to harm the machine, or to use it up. Each attempt must fail for real.

    python -m pytest tests/test_sandbox_abuse.py

Canaries of the host (files, a process, listening sockets, a secret in the environment) are looked at afterwards.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from openglm.agent.isolation import Bubblewrap
from openglm.agent.sandbox import ExecutionResult, Sandbox, SandboxConfig
from tests.sandbox_helpers import PRELUDE, Host, host_with_canaries

REASON = Bubblewrap().why_not()
pytestmark = pytest.mark.skipif(bool(REASON), reason=f"no sandbox here: {REASON}")

MIB = 1 << 20
CONFIG = SandboxConfig(
    isolation="bubblewrap", memory_bytes=512 * MIB, disk_bytes=32 * MIB, scratch_bytes=16 * MIB, file_bytes=8 * MIB,
    n_files=400, n_processes=40, flood_bytes=2 * MIB, grace_s=3.0, timeout_s=30.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    os.environ["CANARY_API_KEY"] = "sk-canary-0123456789"
    with host_with_canaries(tmp_path_factory.mktemp("host")) as found:
        yield found
    del os.environ["CANARY_API_KEY"]


@pytest.fixture(scope="module")
def shared(host: Host) -> Iterator[Sandbox]:
    with Sandbox(CONFIG) as sandbox:
        yield sandbox


@pytest.fixture
def box(shared: Sandbox, host: Host) -> Iterator[Sandbox]:
    """A sandbox that works before and after."""
    if not shared.is_live:
        shared.run("0")
    assert not shared.run(PRELUDE).error
    yield shared
    host.check()
    shared.check_integrity()
    assert shared.run("20 + 22").result == "42"


# Name, code whose last expression is the outcome, and the outcomes that are right (repr). {…} are things of the host.
ATTEMPTS: list[tuple[str, str, str]] = [
    ("mount", "native('mount', b'tmpfs', b'/scratch', b'tmpfs', 0, 0)", "EPERM"),
    ("bind mount of /proc", "native('mount', b'/proc', b'/scratch', 0, 4096, 0)", "EPERM"),
    ("unmount", "native('umount2', b'/workspace', 2)", "EPERM"),
    ("chroot", "native('chroot', b'/scratch')", "EPERM"),
    ("pivot_root", "native('syscall', 155, b'/scratch', b'/scratch')", "EPERM"),
    ("new user name space", "native('unshare', 0x10000000)", "EPERM"),
    ("new mount name space", "native('unshare', 0x00020000)", "EPERM"),
    ("clone into a user name space", "native('syscall', 56, 0x10000000 | 17, 0, 0, 0, 0)", "EPERM"),
    ("clone3", "native('syscall', 435, 0, 0)", "ENOSYS"),
    ("a system call from the future", "native('syscall', 470)", "ENOSYS"),
    ("another name space", "[native('setns', os.open('/proc/self/ns/net', os.O_RDONLY), 0)]", "['EPERM']"),
    ("name spaces of the first process", "attempt(os.open, '/proc/1/ns/net', os.O_RDONLY)", "refused"),
    ("ptrace", "native('ptrace', 16, 1, 0, 0)", "EPERM"),
    ("process_vm_writev", "native('process_vm_writev', 1, 0, 0, 0, 0, 0)", "EPERM"),
    ("memory of the first process", "attempt(open, '/proc/1/mem', 'r+b')", "refused"),
    ("environment of the first process", "b'KEY' in (reads('/proc/1/environ') or b'') if isinstance("
     "reads('/proc/1/environ'), bytes) else False", "False"),
    ("root of the first process", "attempt(os.listdir, '/proc/1/root/home')", "refused"),
    ("setuid", "attempt(os.setuid, 0)", "refused"),
    ("setgroups", "attempt(os.setgroups, [0])", "refused"),
    ("chown", "attempt(os.chown, '/workspace', 0, 0)", "refused"),
    ("setuid program", "[os.getuid(), attempt(open, '/etc/shadow')]", "[1000, 'refused']"),
    ("bpf", "native('syscall', 321, 0, 0, 0)", "EPERM"),
    ("io_uring", "native('syscall', 425, 1, 0)", "EPERM"),
    ("userfaultfd", "native('syscall', 323, 0)", "EPERM"),
    ("perf events", "native('syscall', 298, 0, 0, 0, 0, 0)", "EPERM"),
    ("keyring", "native('syscall', 250, 0, 0)", "EPERM"),
    ("kernel module", "native('syscall', 313, 0, b'', 0)", "EPERM"),
    ("reboot", "native('syscall', 169, 0xfee1dead, 672274793, 0, 0)", "EPERM"),
    ("kernel log", "native('klogctl', 3, 0, 0)", "EPERM"),
    ("anonymous memory file", "attempt(os.memfd_create, 'x')", "refused"),
    ("shared memory segment", "native('shmget', 0, 1 << 20, 0o1600)", "EPERM"),
    ("terminal input", "native('ioctl', 0, 0x5412, b'x')", "EPERM"),
    ("a second seccomp filter", "native('syscall', 317, 1, 0, 0)", "EPERM"),
    ("higher limits", "attempt(resource.setrlimit, resource.RLIMIT_NPROC, (10**6, 10**6))", "refused"),
    ("capabilities", "[l.split()[1] for l in open('/proc/self/status') "
     "if l.startswith(('CapEff', 'CapPrm', 'CapBnd'))]",
     "['0000000000000000', '0000000000000000', '0000000000000000']"),
    ("no new privileges", "[l.split()[1] for l in open('/proc/self/status') "
     "if l.startswith(('NoNewPrivs', 'Seccomp:'))]",
     "['1', '2']"),
    ("the host's files", "[sees({file!r}), sees({home_file!r}), sees({repository!r})]", "[False, False, False]"),
    ("/etc/shadow", "[reads('/etc/shadow'), open('/etc/passwd').read().count('\\n')]", "['ENOENT', 1]"),
    ("the caller's home", "os.path.isdir({home!r}) and [n for n in os.listdir({home!r}) if not n.startswith('.')]",
     "False|[]"),
    ("a symbolic link out", "os.path.lexists('out') or os.symlink({file!r}, 'out'); reads('out')", "'ENOENT'"),
    ("a link to the outer root", "reads('/proc/self/root/../../..' + {file!r})", "'ENOENT'"),
    ("/proc of other processes", "any({marker!r}.encode() in open(f'/proc/{{n}}/cmdline', 'rb').read() "
     "for n in os.listdir('/proc') if n.isdigit())", "False"),
    ("kernel settings", "attempt(open, '/proc/sys/kernel/core_pattern', 'w')", "refused"),
    ("magic keys", "attempt(open, '/proc/sysrq-trigger', 'w')", "refused"),
    ("start line of the host", "reads('/proc/cmdline') in (b'', 'EACCES', 'EPERM')", "True"),
    ("/sys", "sees('/sys')", "False"),
    ("devices", "sorted(os.listdir('/dev'))", "['fd', 'full', 'null', 'random', 'shm', 'urandom', 'zero']"),
    ("make a device", "attempt(os.mknod, '/scratch/disk', 0o060600, os.makedev(8, 0))", "refused"),
    ("make a character device", "attempt(os.mknod, '/scratch/kmem', 0o020600, os.makedev(1, 2))", "refused"),
    ("write into the system", "[attempt(open, p, 'w') for p in ('/usr/x', '/etc/x', '/x', '/dev/x', '/openglm/x', "
     "sys.prefix + '/x')]", "['refused', 'refused', 'refused', 'refused', 'refused', 'refused']"),
    ("change a library", "attempt(os.chmod, os.__file__, 0o777)", "refused"),
    ("TCP to the host", "connects(socket.AF_INET, ('127.0.0.1', {port}))", "refused"),
    ("TCP to the world", "connects(socket.AF_INET, ('1.1.1.1', 53))", "refused"),
    ("names of the network", "attempt(socket.getaddrinfo, 'example.org', 80)", "refused"),
    ("the metadata address", "connects(socket.AF_INET, ('169.254.169.254', 80))", "refused"),
    ("interfaces", "[name for _, name in socket.if_nameindex()]", "['lo']"),
    ("unix socket of the host", "connects(socket.AF_UNIX, {unix!r})", "refused"),
    ("abstract unix socket of the host", "connects(socket.AF_UNIX, {abstract!r})", "refused"),
    ("raw socket", "attempt(socket.socket, socket.AF_PACKET, socket.SOCK_RAW)", "refused"),
    ("raw IP socket", "attempt(socket.socket, socket.AF_INET, socket.SOCK_RAW, 1)", "refused"),
    ("socket to the hypervisor", "attempt(socket.socket, socket.AF_VSOCK)", "refused"),
    ("netlink audit", "attempt(socket.socket, socket.AF_NETLINK, socket.SOCK_RAW, 9)", "refused"),
    ("signal a process of the host", "attempt(os.kill, {pid}, 9)", "refused"),
    ("signal the first process", "[attempt(os.kill, 1, 0), os.path.exists('/proc/1')][1]", "True"),
    ("read the environment", "[k for k in os.environ if 'KEY' in k or 'TOKEN' in k or 'SECRET' in k]", "[]"),
    ("environment by libc", "libc.getenv(b'CANARY_API_KEY')", "0"),
    ("who the host is", "[socket.gethostname(), os.getlogin() if attempt(os.getlogin) == 'done' else '']",
     "['sandbox', '']"),
    ("open descriptors of the host", "[p for p in (os.readlink(f'/proc/self/fd/{{n}}') "
     "for n in os.listdir('/proc/self/fd') if sees(f'/proc/self/fd/{{n}}')) "
     "if p[0] == '/' and not p.startswith(('/dev/', '/proc/', '/usr/'))]", "[]"),
    ("lower the OOM score", "attempt(lambda: os.write(os.open('/proc/self/oom_score_adj', os.O_WRONLY), b'-999'))",
     "refused"),
    ("real-time priority", "attempt(os.sched_setscheduler, 0, os.SCHED_FIFO, os.sched_param(50))", "refused"),
    ("negative niceness", "attempt(os.nice, -5)", "refused"),
]  # fmt: skip


@pytest.mark.parametrize(("code", "right"), [(c, r) for _, c, r in ATTEMPTS], ids=[name for name, _, _ in ATTEMPTS])
def test_attempts_to_get_out(box: Sandbox, host: Host, code: str, right: str) -> None:
    if "'syscall'" in code and os.uname().machine != "x86_64":
        pytest.skip("system call numbers of x86_64")
    things = {
        "file": str(host.file), "home_file": str(host.home_file), "home": str(Path.home()), "port": host.port,
        "unix": str(host.unix_path), "abstract": host.abstract_name, "pid": host.process.pid,
        "repository": str(Path(__file__)), "marker": "time.sleep(600)",
    }  # fmt: skip
    result = box.run(code.format(**things))
    assert not result.error, result.error
    expected = [right] if right.startswith("[") else right.split("|")
    assert result.result.replace("\n", "").strip("'") in [text.strip("'") for text in expected]


# Code that uses things up: what must be said of it. "Died" is fine where it says so, and the next call works.
def contains(result: ExecutionResult, *words: str) -> bool:
    return any(word in f"{result.error}{result.stdout}{result.result}" for word in words)


def test_fork_bomb(box: Sandbox) -> None:
    result = box.run("while True:\n    if not os.fork(): time.sleep(60); os._exit(0)")
    assert contains(result, "BlockingIOError", "processes")
    assert len(os.listdir("/proc")) < 20_000


def test_fork_bomb_that_grows_by_itself(box: Sandbox) -> None:
    result = box.run("while True:\n    try: os.fork()\n    except OSError: pass", timeout_s=2)
    assert result.error_name in ("Stopped", "Died", "OSError", "BlockingIOError")
    assert sum(1 for name in os.listdir("/proc") if name.isdigit()) < 5000
    box.restart()


def test_thread_bomb(box: Sandbox) -> None:
    result = box.run("wait = threading.Event()\nwhile True: threading.Thread(target=wait.wait, daemon=True).start()")
    assert contains(result, "can't start new thread", "processes")
    box.run("wait.set()")


def test_memory_bomb_in_one_process(box: Sandbox) -> None:
    result = box.run("held = []\nwhile True: held.append(bytearray(1 << 24))")
    assert contains(result, "MemoryError", "MiB of memory")
    box.run("held = None")
    assert contains(box.run("import numpy; numpy.ones(1 << 31)"), "MemoryError", "Unable to allocate")


def test_memory_bomb_of_many_processes(box: Sandbox) -> None:
    code = "for _ in range(12):\n    if not os.fork(): held = bytearray(100 << 20); time.sleep(30); os._exit(0)"
    result = box.run(code + "\ntime.sleep(20)")
    assert result.error_name == "Died" and "512 MiB of memory" in result.error
    assert "512 MiB of memory" in box.run("1").state_lost


def test_shared_memory_counts(box: Sandbox) -> None:
    code = "import mmap\nheld = mmap.mmap(-1, 900 << 20)\nfor i in range(0, 900 << 20, 4096): held[i] = 1"
    result = box.run(code)
    assert contains(result, "MiB of memory", "Cannot allocate"), result


def test_processor_time(host: Host) -> None:
    with Sandbox(SandboxConfig(isolation="bubblewrap", cpu_s=2.0)) as sandbox:
        result = sandbox.run("import threading\nwhile True: pass", timeout_s=120)
        assert result.error_name == "Died" and "2 s of processor time" in result.error


def test_disk_fill(box: Sandbox) -> None:
    fill = "for i in range(100): open(f'{where}/big{{i}}', 'wb').write(bytes(1 << 20))"
    assert "No space left" in box.run(fill.format(where="/workspace")).error
    assert box.files.folder.exists() and sum(box.files.sizes.values()) <= CONFIG.disk_bytes
    assert "No space left" in box.run(fill.format(where="/scratch")).error
    assert "No space left" in box.run(fill.format(where="/dev/shm")).error
    box.run("subprocess.run('rm -f /workspace/big* /scratch/big* /dev/shm/big*', shell=True)")
    assert not [name for name in box.files.names() if name.startswith("big")]


def test_one_large_file(box: Sandbox) -> None:
    result = box.run("with open('large', 'wb') as f:\n    for _ in range(64): f.write(bytes(1 << 20))")
    assert contains(result, "File too large", "SIGXFSZ")
    box.run("os.path.exists('large') and os.remove('large')")


def test_many_small_files(box: Sandbox) -> None:
    result = box.run("os.makedirs('many', exist_ok=True)\nfor i in range(100_000): open(f'many/{i}', 'w').close()")
    assert "No space left" in result.error and len(box.files.names()) <= CONFIG.n_files
    box.run("import shutil; shutil.rmtree('many')")


def test_output_flood(box: Sandbox) -> None:
    result = box.run("while True: print('x' * 1000)")
    assert "2 MiB" in result.error and len(result.stdout) < CONFIG.output_bytes + 200
    assert "stdout" in result.truncated
    assert "2 MiB" in box.run("while True: os.write(2, b'y' * 1000)").error


def test_false_frames(box: Sandbox, host: Host) -> None:
    """Code that takes the channel to the host over is worth no more than its process."""
    for frame in ("b'\\xff' * 8", "b'\\0\\0\\0\\2{}'", 'b\'\\0\\0\\0\\x1b{"op": "files", "size": -1}\''):
        code = (
            "for fd in range(3, 30):\n    try:\n        if os.readlink(f'/proc/self/fd/{fd}').startswith('pipe'): "
            f"os.write(fd, {frame})\n    except OSError: pass"
        )
        result = box.run(code, timeout_s=10)
        assert not result.error or "Died" in result.error_name or "Stopped" in result.error_name
        box.restart()
        box.run(PRELUDE)


def test_what_another_conversation_has(box: Sandbox, host: Host) -> None:
    with Sandbox(CONFIG) as other:
        other.run("open('private.txt', 'w').write('theirs'); open('/scratch/private.txt', 'w').write('theirs')\n"
                  "import subprocess; child = subprocess.Popen(['sleep', '300'])")  # fmt: skip
        assert other.files.names() == ["private.txt"]
        places = ["/workspace/private.txt", "/scratch/private.txt", str(other.files.folder / "private.txt")]
        assert box.run(f"[reads(p) for p in {places!r}]").result == "['ENOENT', 'ENOENT', 'ENOENT']"
        assert box.run("subprocess.run(['pgrep', 'sleep'], capture_output=True).returncode").result != "0"


def test_kill_everything_inside(box: Sandbox) -> None:
    result = box.run("child = subprocess.Popen(['sleep', '100']); os.kill(-1, 9); os.kill(os.getpid(), 9)")
    assert result.error_name == "Died" and "SIGKILL" in result.error
    assert "SIGKILL" in box.run("1").state_lost


def test_python_of_the_host_is_the_one_inside(box: Sandbox) -> None:
    assert box.run("sys.version").result.strip("'") == sys.version.replace("\n", "")
