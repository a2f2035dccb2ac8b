"""Which system calls code in a sandbox may make: a BPF program for the kernel, made from one table.

    python -m openglm.agent.seccomp          prints the table as it applies to this machine

Everything is allowed but what the table names, and whatever is newer than the table. Left out is what ordinary numeric
Python never needs: name spaces and mounts, unusual kinds of sockets, tracing, keys, modules, kernel features with
a long record of holes (io_uring, bpf, userfaultfd), and memory that belongs to no process and escapes accounting.
"""

from __future__ import annotations

import errno
import platform
import struct

__all__ = ["ARCHITECTURES", "DENIED", "seccomp_program"]

# Name -> audit architecture, last system call known (newer ones do not exist for the sandbox).
ARCHITECTURES = {"x86_64": (0xC000003E, 456), "aarch64": (0xC00000B7, 456)}

# Name -> number on x86_64 and on aarch64 (None: absent there). All are refused with EPERM.
DENIED: dict[str, tuple[int | None, int | None]] = {
    # name spaces, mounts and roots
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "quotactl": (179, 60), "quotactl_fd": (443, 443),
    # other processes
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_getfd": (438, 438), "process_madvise": (440, 440), "migrate_pages": (256, 238), "move_pages": (279, 239),
    # kernel features with much surface
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "fanotify_init": (300, 262), "seccomp": (317, 277),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "personality": (135, 92),
    "modify_ldt": (154, None), "uselib": (134, None), "vmsplice": (278, 75), "remap_file_pages": (216, 234),
    # memory and messages that outlive processes or are counted with none
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "shmat": (30, 196),
    "shmctl": (31, 195), "msgget": (68, 186), "msgsnd": (69, 189), "msgrcv": (70, 188), "msgctl": (71, 187),
    "semget": (64, 190), "semop": (65, 193), "semctl": (66, 191), "semtimedop": (220, 192), "mq_open": (240, 180),
    "mq_unlink": (241, 181), "mlock": (149, 228), "mlock2": (325, 284), "mlockall": (151, 230),
    # the machine
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104),
    "kexec_file_load": (320, 294), "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225),
    "acct": (163, 89), "syslog": (103, 116), "vhangup": (153, 58), "iopl": (172, None), "ioperm": (173, None),
    "sethostname": (170, 161), "setdomainname": (171, 162), "settimeofday": (164, 170), "adjtimex": (159, 171),
    "clock_settime": (227, 112), "clock_adjtime": (305, 266), "nfsservctl": (180, 42),
}  # fmt: skip

CLONE, CLONE3, SOCKET, SOCKETPAIR, IOCTL = (56, 220), (435, 435), (41, 198), (53, 199), (16, 29)
NAMESPACE_FLAGS = 0x7E020080  # CLONE_NEW{USER,PID,NET,IPC,UTS,CGROUP,NS,TIME}
TERMINAL_INPUT = (0x5412, 0x541C)  # TIOCSTI, TIOCLINUX: put words into the caller's terminal
NETLINK = 16
FAMILIES = (1, 2, 10, NETLINK)  # unix, IPv4, IPv6: sockets of the kernel itself; others may cross name spaces (vsock)

ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
NUMBER, ARCHITECTURE, ARGUMENT = 0, 4, (16, 24, 32)  # offsets in struct seccomp_data; low halves of the arguments


def instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("<HBBI", code, if_true, if_false, value)


def refuse(error: int) -> bytes:
    return instruction(RETURN, ERRNO | error)


def when_argument(number: int, argument: int, tests: list[tuple[int, int]], error: int, otherwise: bool) -> bytes:
    """For system call `number`: `error` if one of the tests (code, value) holds on the argument, or with `otherwise`
    if none does. The call is allowed in the other case.
    """
    body = instruction(LOAD, ARGUMENT[argument])
    for position, (code, value) in enumerate(tests):
        body += instruction(code, value, len(tests) - position, 0)
    last = [refuse(error), instruction(RETURN, ALLOW)]
    body += b"".join(last if otherwise else reversed(last))
    return instruction(EQUAL, number, 0, len(body) // 8) + body


def only_route_netlink(number: int) -> bytes:
    """Of netlink, libc reads the list of interfaces through protocol 0; the others configure the kernel."""
    body = instruction(LOAD, ARGUMENT[0]) + instruction(EQUAL, NETLINK, 0, 3)
    body += instruction(LOAD, ARGUMENT[2]) + instruction(EQUAL, 0, 1, 0) + refuse(errno.EPERM)
    body += instruction(LOAD, NUMBER)
    return instruction(EQUAL, number, 0, len(body) // 8) + body


def seccomp_program(machine: str | None = None) -> bytes:
    """The filter for this processor (or `machine`): BPF instructions of 8 bytes. ValueError where there is no table."""
    machine = machine or platform.machine()
    if machine not in ARCHITECTURES:
        raise ValueError(f"no table of system calls for {machine}: known are {', '.join(ARCHITECTURES)}")
    which = list(ARCHITECTURES).index(machine)
    audit, last = ARCHITECTURES[machine]
    program = instruction(LOAD, ARCHITECTURE) + instruction(EQUAL, audit, 1, 0) + instruction(RETURN, KILL)
    program += instruction(LOAD, NUMBER)
    program += instruction(AT_LEAST, last + 1, 0, 1) + refuse(errno.ENOSYS)  # also the x32 calls, from 0x40000000 on
    program += instruction(EQUAL, CLONE3[which], 0, 1) + refuse(errno.ENOSYS)  # flags in memory; libc falls back
    for numbers in DENIED.values():
        if (number := numbers[which]) is not None:
            program += instruction(EQUAL, number, 0, 1) + refuse(errno.EPERM)
    program += when_argument(CLONE[which], 0, [(ANY_BIT, NAMESPACE_FLAGS)], errno.EPERM, False)
    program += only_route_netlink(SOCKET[which])
    for call in (SOCKET, SOCKETPAIR):
        families = [(EQUAL, family) for family in FAMILIES]
        program += when_argument(call[which], 0, families, errno.EAFNOSUPPORT, True)
    program += when_argument(IOCTL[which], 1, [(EQUAL, value) for value in TERMINAL_INPUT], errno.EPERM, False)
    return program + instruction(RETURN, ALLOW)


def main() -> None:
    which = list(ARCHITECTURES).index(platform.machine())
    print(f"{len(seccomp_program()) // 8} instructions for {platform.machine()}; refused outright:")
    print(", ".join(name for name, numbers in DENIED.items() if numbers[which] is not None))


if __name__ == "__main__":
    main()
