"""First program inside a sandbox: narrows itself down, then becomes the Python kernel. Standard library only.

    python -I -S enter.py '{"mounts": [...], "limits": {...}, "uid": 1000, "seccomp": {...}, "command": [...]}'

It starts with the rights that bubblewrap left it in a user namespace of its own, sets the file systems of bounded size
up, gives every right away for good, and replaces itself. It imports nothing of the package, which is absent inside.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import sys
from typing import Any

LIBC = ctypes.CDLL(None, use_errno=True)
MS_NOSUID, MS_NODEV, CLONE_NEWUSER = 2, 4, 0x10000000
PR_CAPBSET_DROP, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 24, 22, 38, 47
PR_CAP_AMBIENT_CLEAR_ALL, SECCOMP_MODE_FILTER, CAPABILITY_VERSION_3 = 4, 2, 0x20080522


def check(result: int, what: str) -> None:
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")


def mount_tmpfs(path: str, size_bytes: int, n_files: int, mode: str) -> None:
    """A file system in memory that holds so many bytes and files, and not one more."""
    options = f"size={size_bytes},nr_inodes={n_files},mode={mode}".encode()
    check(LIBC.mount(b"tmpfs", path.encode(), b"tmpfs", MS_NOSUID | MS_NODEV, options), f"mount {path}")


def set_limits(limits: dict[str, int]) -> None:
    """Soft and hard limits at once: nothing inside can raise them again. A lower limit that already holds stays."""
    for name, value in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}", None)
        if kind is None:  # of another operating system
            continue
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def become(uid: int) -> None:
    """User `uid` of the namespace, no groups, no capability left or ever to be had."""
    with open("/proc/self/uid_map") as file:
        mapped = any(int(first) <= uid < int(first) + int(count) for first, _, count in map(str.split, file))
    if os.getuid() != uid and not mapped:
        nest_namespace(uid)
    for capability in range(64):  # the kernel refuses numbers beyond its last
        LIBC.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    LIBC.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    if os.getuid() != uid:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    check(LIBC.capset(header, (ctypes.c_uint32 * 6)()), "capset")


def nest_namespace(uid: int) -> None:
    """A second user namespace in which we are `uid`, for where only one user can be mapped.

    What it may do stops short of the first namespace, which owns the mounts and the first process.
    """
    outer_uid, outer_gid = os.getuid(), os.getgid()
    check(LIBC.unshare(CLONE_NEWUSER), "unshare")
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{uid} {outer_uid} 1"),
        ("gid_map", f"{uid} {outer_gid} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def install_seccomp(program: bytes) -> None:
    """program: BPF instructions of 8 bytes each."""

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]

    filter_ = Program(len(program) // 8, program)
    check(LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    check(LIBC.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(filter_), 0, 0), "seccomp")


def main(config: dict[str, Any]) -> None:
    for path, size_bytes, n_files, mode in config.get("mounts", ()):
        mount_tmpfs(path, size_bytes, n_files, mode)
    if "uid" in config:
        become(config["uid"])
    set_limits(config["limits"])
    try:
        with open("/proc/self/oom_score_adj", "w") as file:  # a host short of memory ends us before anything else
            file.write("1000")
    except OSError:
        pass  # not Linux, or already set by a container engine
    for folder in config["folders"]:
        os.makedirs(folder, mode=0o700, exist_ok=True)
    os.chdir(config["workdir"])
    if config.get("seccomp"):
        programs, machine = config["seccomp"], os.uname().machine
        if machine not in programs:
            raise OSError(f"no table of system calls for {machine}: there are {', '.join(programs)}")
        install_seccomp(bytes.fromhex(programs[machine]))
    os.execve(config["command"][0], config["command"], config["environment"])


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
