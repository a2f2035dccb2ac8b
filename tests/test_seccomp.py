"""The filter of system calls, judged by an interpreter of BPF and by the numbers that libseccomp knows."""

from __future__ import annotations

import ctypes
import ctypes.util
import errno
import struct

import pytest

from openglm.agent import seccomp
from openglm.agent.seccomp import ARCHITECTURES, DENIED, seccomp_program

ALLOW, KILL = 0x7FFF0000, 0x80000000
MACHINES = list(ARCHITECTURES)


def judge(program: bytes, audit: int, number: int, *arguments: int) -> int:
    """What the kernel would answer to a call: runs the instructions that the program uses, each as the manual says."""
    data = struct.pack("<IIQ6Q", number, audit, 0, *(list(arguments) + [0] * 6)[:6])
    code = [struct.unpack_from("<HBBI", program, at) for at in range(0, len(program), 8)]
    accumulator = at = 0
    while True:
        operation, if_true, if_false, value = code[at]
        at += 1
        if operation == 0x20:  # ld [k]
            accumulator = struct.unpack_from("<I", data, value)[0]
        elif operation == 0x06:  # ret k
            return value
        else:  # jeq, jge, jset
            truth = {0x15: accumulator == value, 0x35: accumulator >= value, 0x45: bool(accumulator & value)}[operation]
            at += if_true if truth else if_false


def refused(answer: int) -> int:
    assert answer & 0xFFFF0000 == 0x00050000, hex(answer)
    return answer & 0xFFFF


@pytest.mark.parametrize("machine", MACHINES)
def test_what_the_filter_says(machine: str) -> None:
    which, (audit, last), program = MACHINES.index(machine), ARCHITECTURES[machine], seccomp_program(machine)
    denied = {numbers[which] for numbers in DENIED.values() if numbers[which] is not None}
    special = {
        call[which] for call in (seccomp.CLONE, seccomp.CLONE3, seccomp.SOCKET, seccomp.SOCKETPAIR, seccomp.IOCTL)
    }
    for number in range(last + 1):
        if number in denied:
            assert refused(judge(program, audit, number)) == errno.EPERM, number
        elif number not in special:
            assert judge(program, audit, number, 1 << 28, 99, 99) == ALLOW, number
    for number in (last + 1, 1000, 0x40000000, 0x40000000 + 165, 0xFFFFFFFF):
        assert refused(judge(program, audit, number)) == errno.ENOSYS
    assert judge(program, 0x40000003, 0) == KILL  # 32-bit calls of x86
    clone, socket, pair, ioctl = (
        call[which] for call in (seccomp.CLONE, seccomp.SOCKET, seccomp.SOCKETPAIR, seccomp.IOCTL)
    )
    assert refused(judge(program, audit, seccomp.CLONE3[which])) == errno.ENOSYS
    assert judge(program, audit, clone, 0x003D0F00) == ALLOW  # a thread
    for flag in (0x10000000, 0x20000000, 0x00020000, 0x40000000, 0x08000000, 0x04000000, 0x02000000):
        assert refused(judge(program, audit, clone, flag | 17)) == errno.EPERM
    for family in range(46):
        for call in (socket, pair):
            answer = judge(program, audit, call, family, 1, 0)
            assert answer == ALLOW if family in (1, 2, 10, 16) else refused(answer) == errno.EAFNOSUPPORT
    assert refused(judge(program, audit, socket, 16, 3, 9)) == errno.EPERM  # netlink audit
    assert judge(program, audit, socket, 2, 1, 6) == ALLOW  # a TCP socket with its protocol
    assert (
        refused(judge(program, audit, ioctl, 0, 0x5412))
        == refused(judge(program, audit, ioctl, 0, 0x541C))
        == errno.EPERM
    )
    assert judge(program, audit, ioctl, 0, 0x5401) == ALLOW


@pytest.mark.parametrize("machine", MACHINES)
def test_the_numbers_are_those_of_libseccomp(machine: str) -> None:
    if (name := ctypes.util.find_library("seccomp")) is None:
        pytest.skip("libseccomp is not on this machine")
    resolve = ctypes.CDLL(name).seccomp_syscall_resolve_name_arch
    calls = {name: getattr(seccomp, name.upper()) for name in ("clone", "clone3", "socket", "socketpair", "ioctl")}
    for call, numbers in {**DENIED, **calls}.items():
        known = resolve(ctypes.c_uint32(ARCHITECTURES[machine][0]), call.encode())
        assert known < 0 if numbers[MACHINES.index(machine)] is None else known == numbers[MACHINES.index(machine)], (
            call
        )


def test_other_processors_are_told_of() -> None:
    with pytest.raises(ValueError, match="no table of system calls for vax"):
        seccomp_program("vax")
