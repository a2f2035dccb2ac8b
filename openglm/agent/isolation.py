"""How the Python process of a sandbox is cut off from the machine: bubblewrap, a container, or (said loudly) not.

python -m openglm.agent.isolation        says which of them can be used here, and why not the others
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import logging
import os
import platform
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Protocol

from openglm.agent.sandbox_config import SandboxConfig
from openglm.agent.seccomp import ARCHITECTURES, seccomp_program

__all__ = ["Bubblewrap", "Container", "Isolation", "NoIsolation", "SandboxUnavailable", "find_isolation"]

INSIDE = Path(__file__).parent / "inside"
PROGRAMS, WORKDIR, SCRATCH, USER = "/openglm", "/workspace", "/scratch", 1000
NEEDED = ("ipykernel", "jupyter_client", "matplotlib_inline")
DEVICES = ("null", "zero", "full", "random", "urandom")
GIB = 1 << 30
log = logging.getLogger(__name__)


class SandboxUnavailable(ValueError):
    """No way to run code safely here; the text says why, and what to do."""


class Isolation(Protocol):
    """A way to start the kernel. `watchable`: its processes are children of ours, so that their use can be summed."""

    name: str
    watchable: bool

    def why_not(self) -> str:
        """The reason why it cannot be used here, or nothing."""

    def start(self, config: SandboxConfig) -> subprocess.Popen[bytes]: ...

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """Everything that was started in it, at once; returns when it is over."""


def entry(config: SandboxConfig, python: str, programs: str, workdir: str, scratch: str) -> dict[str, Any]:
    """What inside/enter.py is told: the limits, and how the kernel is called."""
    settings = {"workdir": workdir, "runtime": f"{scratch}/.kernel", "flood_bytes": config.flood_bytes}
    environment = {
        "PATH": f"{os.path.dirname(python)}:/usr/local/bin:/usr/bin:/bin", "HOME": f"{scratch}/home", "TMPDIR": scratch,
        "LANG": "C.UTF-8", "USER": "sandbox", "TERM": "dumb", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUTF8": "1",
        "MPLBACKEND": "module://matplotlib_inline.backend_inline", "MPLCONFIGDIR": f"{scratch}/.matplotlib",
        "IPYTHONDIR": f"{scratch}/.ipython",
        **{f"{library}_NUM_THREADS": str(config.n_threads) for library in ("OMP", "OPENBLAS", "MKL", "NUMEXPR")},
    }  # fmt: skip
    limits = {
        "DATA": config.memory_bytes, "AS": config.memory_bytes + 4 * GIB, "CPU": int(config.cpu_s) + 1,
        "FSIZE": config.file_bytes, "NOFILE": 512, "CORE": 0, "MSGQUEUE": 0, "SIGPENDING": 1024,
    }  # fmt: skip
    return {
        "limits": limits, "folders": [f"{scratch}/home", settings["runtime"]], "workdir": workdir,
        "command": [python, "-I", f"{programs}/kernel.py", json.dumps(settings)], "environment": environment,
    }  # fmt: skip


def missing_packages() -> str:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    return f"{missing[0]} is not installed: pip install 'openglm[agent]'" if missing else ""


class Bubblewrap:
    """Name spaces of Linux, set up by `bwrap`; then inside/enter.py narrows further (see docs/TOOLS.md)."""

    name, watchable = "bubblewrap", True

    def why_not(self) -> str:
        if sys.platform != "linux":
            return "bubblewrap is for Linux"
        if shutil.which("bwrap") is None:
            return "bwrap is not installed (on Debian and Ubuntu: apt install bubblewrap)"
        return missing_packages() or _bubblewrap_fails()

    def start(self, config: SandboxConfig) -> subprocess.Popen[bytes]:
        arguments = entry(config, sys.executable, PROGRAMS, WORKDIR, SCRATCH)
        arguments["uid"] = USER
        arguments["seccomp"] = {platform.machine(): seccomp_program().hex()}
        arguments["mounts"] = [
            (WORKDIR, config.disk_bytes, config.n_files, "1777"),
            (SCRATCH, config.scratch_bytes, 4096, "1777"),
            ("/dev/shm", config.scratch_bytes, 256, "1777"),
        ]
        if _kernel_version() >= (5, 14):  # before, the limit counts all that the user runs on the machine
            arguments["limits"]["NPROC"] = config.n_processes
        return self.launch(arguments, config)

    def launch(self, arguments: dict[str, Any], config: SandboxConfig) -> subprocess.Popen[bytes]:
        """`bwrap` reads its options from a file, so that paths of the host stand in no command line inside."""
        with Handshake(config.host_uid) if os.geteuid() == 0 else NoHandshake() as handshake:
            options = [*_namespaces(config), *handshake.options]
            passwd = f"sandbox:x:{USER}:{USER}::{SCRATCH}/home:/bin/sh\n"
            files = {"/etc/passwd": passwd, "/etc/group": f"sandbox:x:{USER}:\n"}
            data = [(_memory_file(text), name) for name, text in files.items()]
            for fd, name in data:
                options += ["--perms", "0644", "--ro-bind-data", str(fd), name]
            listing = _memory_file("\0".join([*options, "--remount-ro", "/dev", "--remount-ro", "/"]))
            fds = [listing, *(fd for fd, _ in data), *handshake.fds]
            try:
                process = subprocess.Popen(
                    [shutil.which("bwrap") or "bwrap", "--args", str(listing), sys.executable, "-I", "-S",
                     f"{PROGRAMS}/enter.py", json.dumps(arguments)],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0,
                    pass_fds=fds, env={"PATH": "/usr/bin:/bin"}, cwd="/",
                )  # fmt: skip
            finally:
                for fd in (listing, *(fd for fd, _ in data)):
                    os.close(fd)
            handshake.complete()
        return process

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        process.kill()  # the first process inside dies with its parent, and all others with the first
        process.wait()


def _namespaces(config: SandboxConfig) -> list[str]:
    """Options of bwrap: what exists inside."""
    options = [
        "--unshare-user", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try",
        "--die-with-parent", "--new-session", "--clearenv", "--hostname", "sandbox", "--cap-drop", "ALL",
        "--cap-add", "CAP_SYS_ADMIN", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID", "--cap-add", "CAP_SETPCAP",
        "--ro-bind", "/usr", "/usr", "--perms", "0755", "--dir", "/etc",
    ]  # fmt: skip
    for name in ("/bin", "/sbin", "/lib", "/lib32", "/lib64"):
        if os.path.islink(name):
            options += ["--symlink", os.readlink(name), name]
        elif os.path.isdir(name):
            options += ["--ro-bind", name, name]
    for name in ("/etc/ld.so.cache", "/etc/alternatives", "/etc/localtime", "/etc/fonts"):
        options += ["--ro-bind-try", name, name]
    prefixes = sorted({os.path.realpath(sys.base_prefix), sys.base_prefix, sys.prefix})
    if not any(Path(prefix).is_relative_to("/tmp") for prefix in prefixes):
        options += ["--symlink", SCRATCH, "/tmp"]
    for prefix in prefixes:
        if not Path(prefix).is_relative_to("/usr"):
            options += [*_parents(prefix), "--ro-bind", prefix, prefix]
    options += ["--ro-bind", str(INSIDE), PROGRAMS, "--proc", "/proc", "--ro-bind", os.devnull, "/proc/cmdline"]
    options += ["--tmpfs", "/dev", "--dir", "/dev/shm", "--symlink", "/proc/self/fd", "/dev/fd"]
    for name in DEVICES:
        options += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
    for folder in config.read_only:
        seen = f"/inputs/{folder.name}"
        options += [*_parents(seen), "--ro-bind", str(folder.resolve()), seen]
    return [*options, "--dir", WORKDIR, "--dir", SCRATCH]


def _parents(path: str) -> list[str]:
    """The folders above it, empty and open to every user: bwrap makes missing ones for root alone."""
    above = [str(folder) for folder in reversed(Path(path).parents)][1:]
    return [option for folder in above for option in ("--perms", "0755", "--dir", folder)]


class NoHandshake:
    """For callers that are not root: bwrap maps the caller, enter.py nests a name space."""

    def __init__(self) -> None:
        self.options: list[str] = []
        self.fds: list[int] = []

    def __enter__(self) -> NoHandshake:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def complete(self) -> None:
        pass


class Handshake(NoHandshake):
    """For root: the user inside is `host_uid` outside, who owns nothing. bwrap waits until the map is written."""

    def __init__(self, host_uid: int) -> None:
        super().__init__()
        self.host_uid = host_uid

    def __enter__(self) -> Handshake:
        self.info, info = os.pipe()
        wait, self.go = os.pipe()
        self.fds = [info, wait]
        self.options = ["--info-fd", str(info), "--userns-block-fd", str(wait)]
        return self

    def complete(self) -> None:
        pid = self._child_pid()
        if pid is None:
            return  # bwrap has failed, and says why on its standard error
        for name in ("uid_map", "gid_map"):
            path = Path(f"/proc/{pid}/{name}")
            try:
                path.write_text(f"0 0 1\n{USER} {self.host_uid} 1\n")
            except OSError:  # root of a container that does not own that number
                path.write_text("0 0 1\n")
        os.write(self.go, b"1")

    def _child_pid(self) -> int | None:
        os.close(self.fds.pop(0))
        text, deadline = b"", time.monotonic() + 10
        while not text.rstrip().endswith(b"}"):
            ready = select.select([self.info], [], [], max(0.0, deadline - time.monotonic()))[0]
            piece = os.read(self.info, 4096) if ready else b""
            if not piece:
                return None
            text += piece
        return int(json.loads(text)["child-pid"])

    def __exit__(self, *_: object) -> None:
        for fd in (*self.fds, self.info, self.go):
            os.close(fd)


def _memory_file(text: str) -> int:
    fd = os.memfd_create("options", 0)
    os.write(fd, text.encode())
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _kernel_version() -> tuple[int, int]:
    major, minor = platform.release().split(".")[:2]
    return int(major), int("".join(c for c in minor if c.isdigit()) or 0)


@functools.cache
def _bubblewrap_fails() -> str:
    """Starts a sandbox that does nothing; what went wrong, in a line."""
    config = SandboxConfig()
    box = Bubblewrap()
    try:
        arguments = entry(config, sys.executable, PROGRAMS, WORKDIR, SCRATCH)
        arguments |= {
            "uid": USER,
            "seccomp": {platform.machine(): seccomp_program().hex()},
            "mounts": [(WORKDIR, 1 << 20, 16, "1777")],
        }
        arguments |= {"command": [sys.executable, "-I", "-S", "-c", "pass"], "folders": []}
        process = box.launch(arguments, config)
    except (OSError, ValueError) as error:
        return f"bwrap cannot be started: {error}"
    try:
        error_text = process.communicate(timeout=30)[1].decode(errors="replace").strip()
    except subprocess.TimeoutExpired:
        box.kill(process)
        return "bwrap did not answer within 30 s"
    if process.returncode == 0:
        return ""
    hint = " (user name spaces may be forbidden: see docs/TOOLS.md)" if os.geteuid() != 0 else ""
    return f"bwrap fails: {error_text.splitlines()[-1] if error_text else process.returncode}{hint}"


class Container:
    """Docker or podman, with an image that holds Python and the packages of the extra `agent`."""

    name, watchable = "container", False

    def __init__(self, image: str) -> None:
        self.image = image
        self.engine = shutil.which("podman") or shutil.which("docker")
        self._names: dict[int, str] = {}

    def why_not(self) -> str:
        if self.engine is None:
            return "neither podman nor docker is installed"
        name = os.path.basename(self.engine)
        found = subprocess.run([self.engine, "image", "inspect", self.image], capture_output=True, text=True)
        if found.returncode != 0:
            reason = (found.stderr.strip().splitlines() or ["no answer"])[-1]
            return f"{name} has no image {self.image!r} ({reason}); docs/TOOLS.md says how to build it"
        options = self.options(SandboxConfig(), f"openglm-{secrets.token_hex(8)}")
        command = [self.engine, *options, "python3", "-c", "pass"]
        tried = subprocess.run(command, capture_output=True, text=True, cwd=tempfile.gettempdir())
        if tried.returncode != 0:
            return f"{name} runs no container: {(tried.stderr.strip().splitlines() or ['no answer'])[-1]}"
        return ""

    def start(self, config: SandboxConfig) -> subprocess.Popen[bytes]:
        arguments = entry(config, "/usr/bin/env", PROGRAMS, WORKDIR, SCRATCH)
        arguments["command"] = ["/usr/bin/env", "python3", *arguments["command"][1:]]
        # What an engine filters differs from one to the next; on macOS it runs Linux, perhaps of another processor.
        arguments["seccomp"] = {machine: seccomp_program(machine).hex() for machine in ARCHITECTURES}
        name = f"openglm-{secrets.token_hex(8)}"
        process = subprocess.Popen(
            [self.engine or "", *self.options(config, name), "python3", "-I", "-S", f"{PROGRAMS}/enter.py",
             json.dumps(arguments)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0,
            cwd=tempfile.gettempdir(),  # podman's monitor leaves a file "oom" where it stands
        )  # fmt: skip
        self._names[process.pid] = name
        return process

    def options(self, config: SandboxConfig, name: str) -> list[str]:
        # Podman has no limit of inodes for a tmpfs; the memory limit holds for them as well.
        inodes = "" if os.path.basename(self.engine or "") == "podman" else f"nr_inodes={config.n_files},"
        disk = f"size={config.disk_bytes},{inodes}mode=1777"
        folders = [f"--volume={folder.resolve()}:/inputs/{folder.name}:ro" for folder in config.read_only]
        return [
            "run", "--rm", "--interactive", "--pull=never", f"--name={name}", "--network=none", "--read-only",
            "--cap-drop=ALL", "--security-opt=no-new-privileges", f"--user={USER}:{USER}", "--hostname=sandbox",
            "--ulimit=nofile=1024", "--ulimit=nproc=4096",  # what engines would set may be more than the caller may
            f"--pids-limit={config.n_processes}", f"--memory={config.memory_bytes}",
            f"--memory-swap={config.memory_bytes}", f"--shm-size={config.scratch_bytes}",
            f"--tmpfs={WORKDIR}:{disk}", f"--tmpfs={SCRATCH}:size={config.scratch_bytes},mode=1777",
            f"--volume={INSIDE}:{PROGRAMS}:ro", *folders, self.image,
        ]  # fmt: skip

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        if name := self._names.pop(process.pid, None):
            subprocess.run([self.engine or "", "kill", name], capture_output=True, timeout=30)
        process.kill()
        process.wait()


class NoIsolation:
    """A plain process with the caller's rights, in a temporary folder. Only for code that is trusted."""

    name, watchable = "none", sys.platform == "linux"

    def __init__(self) -> None:
        self._folders: dict[int, tempfile.TemporaryDirectory[str]] = {}

    def why_not(self) -> str:
        return missing_packages()

    def start(self, config: SandboxConfig) -> subprocess.Popen[bytes]:
        log.warning("unsafe_python: code of the model runs WITHOUT ISOLATION, with all rights of this user")
        folder = tempfile.TemporaryDirectory(prefix="openglm-", ignore_cleanup_errors=True)
        workdir = os.path.join(folder.name, "workspace")
        os.mkdir(workdir)
        arguments = entry(config, sys.executable, str(INSIDE), workdir, folder.name)
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(INSIDE / "enter.py"), json.dumps(arguments)], start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0, env={},
        )  # fmt: skip
        self._folders[process.pid] = folder
        return process

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()
        if folder := self._folders.pop(process.pid, None):
            folder.cleanup()


def candidates(config: SandboxConfig) -> list[Isolation]:
    ways: list[Isolation] = [Bubblewrap(), Container(config.container_image)]
    return [way for way in ways if config.isolation in ("auto", way.name)]


def find_isolation(config: SandboxConfig) -> Isolation:
    """The first way that works here. SandboxUnavailable gives the reason of each that does not."""
    if config.unsafe_python:
        ways: list[Isolation] = [NoIsolation()]
    else:
        ways = candidates(config)
    reasons = []
    for way in ways:
        if not (reason := way.why_not()):
            return way
        reasons.append(f"{way.name}: {reason}")
    raise SandboxUnavailable("Python cannot be run safely here; " + "; ".join(reasons))


def main() -> None:
    for way in candidates(dataclasses.replace(SandboxConfig(), isolation="auto")):
        print(f"{way.name:12} {way.why_not() or 'ready'}")


if __name__ == "__main__":
    main()
