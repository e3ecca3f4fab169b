"""System calls that Python 3.11 does not wrap: namespaces, mounts and capabilities (Linux man pages of section 2)."""

import ctypes
import errno
import os
import platform
import struct

CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
NAMESPACES = CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWNET

MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 0x1000, 0x4000, 0x40000
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC = 1, 2, 4, 8
_MNT_DETACH = 2
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_SYS_MOUNT_SETATTR = 442  # the same number on every architecture
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_CAPABILITY_VERSION_3 = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(name: str, result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def unshare(flags: int) -> None:
    """New namespaces for this process (for its children, where the namespace is one of processes)."""
    _checked("unshare", _libc.unshare(flags))


def set_namespace(descriptor: int, kind: int) -> None:
    """Puts this process (its children, for CLONE_NEWPID) into the namespace of an open file of /proc/PID/ns."""
    _checked("setns", _libc.setns(descriptor, kind))


def mount(source: str, target: str, kind: str | None, flags: int, data: str = "") -> None:
    """Mounts `source`, of file system `kind` (None: a change of an existing mount), on the folder or file `target`."""
    encode = os.fsencode
    done = _libc.mount(encode(source), encode(target), encode(kind) if kind else None, flags, encode(data))
    _checked(f"mount {source} on {target}", done)


def restrict_mount(path: str, attributes: int, recursive: bool = False) -> None:
    """Adds attributes (MOUNT_ATTR_…) to a mount, with all below it if `recursive`. Linux 5.12."""
    change = ctypes.create_string_buffer(struct.pack("=QQQQ", attributes, 0, 0, 0))
    flags = _AT_RECURSIVE if recursive else 0
    done = _libc.syscall(
        _SYS_MOUNT_SETATTR, _AT_FDCWD, ctypes.c_char_p(os.fsencode(path)), flags, change, ctypes.c_size_t(32)
    )
    _checked(f"mount_setattr {path}", done)


def detach(path: str) -> None:
    """Removes the topmost mount at `path` from this mount namespace."""
    _checked(f"umount {path}", _libc.umount2(os.fsencode(path), _MNT_DETACH))


def enter_root(folder: str) -> None:
    """Makes a mount the root of this mount namespace and detaches the old root."""
    machine = platform.machine()
    if machine not in _SYS_PIVOT_ROOT:
        raise OSError(errno.ENOSYS, f"pivot_root: number unknown on {machine}")
    os.chdir(folder)
    _checked("pivot_root", _libc.syscall(_SYS_PIVOT_ROOT[machine], b".", b"."))
    detach(".")
    os.chdir("/")


def drop_capabilities() -> None:
    """Gives up every capability in this user namespace. A user other than 0 regains none by starting a program."""
    header = ctypes.create_string_buffer(struct.pack("=II", _CAPABILITY_VERSION_3, 0))
    _checked("capset", _libc.capset(header, ctypes.create_string_buffer(24)))


def forbid_new_privileges() -> None:
    """No program that this process or its children start gains rights by its file (set-user-ID, capabilities)."""
    _checked("prctl", _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


def hide_memory() -> None:
    """No other process of this user may read this one's memory or trace it."""
    _checked("prctl", _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0))


def show_memory() -> None:
    """Undoes what a change of user does to the owner of /proc/self, which is written to next."""
    _checked("prctl", _libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0))


def die_with_parent(signal_number: int) -> None:
    """The kernel sends this process a signal when the thread that started it ends."""
    _checked("prctl", _libc.prctl(_PR_SET_PDEATHSIG, signal_number, 0, 0, 0))


def install_filter(program: bytes) -> None:
    """Installs a filter of system calls (`seccomp.program`) for this process and its children, for good."""
    instructions = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(instructions))
    _checked("seccomp", _libc.prctl(_PR_SET_SECCOMP, 2, ctypes.create_string_buffer(header), 0, 0))
