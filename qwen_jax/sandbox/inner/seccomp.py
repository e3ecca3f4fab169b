"""The filter of system calls: denies what reaches other processes or widens the kernel that a program can talk to.

Namespaces and missing capabilities already forbid most of it. The filter is the second wall, and the only one against
user namespaces within the sandbox, sockets of families that no network namespace holds (AF_VSOCK, AF_ALG), and memory
that belongs to no process (memfd_create, System V).
"""

import errno
import platform
import struct

# System call: numbers on x86_64 and aarch64; None where there is no such call.
_DENIED = {
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "setns": (308, 268),
    "unshare": (272, 97),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "syslog": (103, 116),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "fanotify_init": (300, 262),
    "vhangup": (153, 58),
    "modify_ldt": (154, None),
    "iopl": (172, None),
    "ioperm": (173, None),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
}
# Said to be missing, so that the C library and language runtimes take another way.
_MISSING = {
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "clone3": (435, 435),  # its flags lie in memory, where no filter sees them
}
_NEWEST_KNOWN = 449  # futex_waitv; the same on both
_SOCKET, _CLONE = (41, 198), (56, 220)
_FAMILIES = (1, 2, 10)  # AF_UNIX, AF_INET, AF_INET6
_NEW_NAMESPACES = 0x7E020000  # every CLONE_NEW… flag that clone takes
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

_LOAD, _EQUAL, _ABOVE, _ANY_BIT, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_NUMBER_AT, _ARCHITECTURE_AT, _FIRST_ARGUMENT_AT = 0, 4, 16


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("HBBI", code, if_true, if_false, value)


def _fail(number: int) -> bytes:
    return _instruction(_RETURN, _ERRNO | number)


def program() -> bytes:
    """The filter in classic BPF (kernel documentation, userspace-api/seccomp_filter), 8 bytes an instruction.

    Raises:
      OSError: the numbers of system calls are not known for this processor.
    """
    machine = platform.machine()
    if machine not in _ARCHITECTURES:
        raise OSError(errno.ENOSYS, f"no filter of system calls for {machine}")
    column, architecture = _ARCHITECTURES[machine]
    code = [
        _instruction(_LOAD, _ARCHITECTURE_AT),
        _instruction(_EQUAL, architecture, if_true=1),
        _instruction(_RETURN, _KILL),
        _instruction(_LOAD, _NUMBER_AT),
        _instruction(_ABOVE, _NEWEST_KNOWN, if_false=1),  # the x32 calls too: they have bit 30 set
        _fail(errno.ENOSYS),
    ]
    for calls, number in ((_DENIED, errno.EPERM), (_MISSING, errno.ENOSYS)):
        for numbers in calls.values():
            call = numbers[column]
            if call is not None:
                code += [_instruction(_EQUAL, call, if_false=1), _fail(number)]
    families = [_instruction(_EQUAL, family, if_true=len(_FAMILIES) - i) for i, family in enumerate(_FAMILIES)]
    code += [
        _instruction(_EQUAL, _SOCKET[column], if_false=len(families) + 3),
        _instruction(_LOAD, _FIRST_ARGUMENT_AT),
        *families,
        _fail(errno.EAFNOSUPPORT),
        _instruction(_RETURN, _ALLOW),
        _instruction(_EQUAL, _CLONE[column], if_false=3),
        _instruction(_LOAD, _FIRST_ARGUMENT_AT),
        _instruction(_ANY_BIT, _NEW_NAMESPACES, if_false=1),
        _fail(errno.EPERM),
        _instruction(_RETURN, _ALLOW),
    ]
    return b"".join(code)
