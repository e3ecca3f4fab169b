"""The user namespace, and the file system that programs see: the folders they need, read-only, and nothing else."""

import os
import stat

from . import kernel

NOBODY = 65534
USER = 1000  # what programs see of their user and group
# Each run has a file system in memory of its own here: the only place where it may write.
_WRITABLE = "/box"
WORKING_FOLDER = "/box/work"
TEMPORARY_FOLDER = "/box/tmp"
_DEVICES = ("null", "zero", "full", "random", "urandom")
_LINKS = {
    "/dev/fd": "/proc/self/fd",
    "/dev/stdin": "/proc/self/fd/0",
    "/dev/stdout": "/proc/self/fd/1",
    "/dev/stderr": "/proc/self/fd/2",
    "/dev/shm": TEMPORARY_FOLDER,
    "/var/tmp": TEMPORARY_FOLDER,
}
_FILES = {
    "/etc/passwd": "user:x:1000:1000::/box/work:/bin/sh\n",
    "/etc/group": "user:x:1000:\n",
    "/etc/hosts": "127.0.0.1 localhost\n",
}
# A folder that every Linux has and no program needs: the new root is put together there, in this mount namespace.
_ASSEMBLED_AT = "/sys"


def enter_user_namespace() -> int:
    """A user namespace in which this process may do everything; returns the user that programs run as in it.

    The administrator's programs run as nobody, so that even a file that became visible by mistake would not be theirs.
    Another user can map only itself.
    """
    user, group = os.geteuid(), os.getegid()
    if user != 0:
        kernel.unshare(kernel.CLONE_NEWUSER)
        proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY)
        map_user(0, user, 0, group, proc)
        os.close(proc)
        return 0
    wait, go = os.pipe()
    process = os.getpid()
    helper = os.fork()
    if helper == 0:
        try:
            os.close(go)
            os.read(wait, 1)
            for kind in ("uid", "gid"):
                _write(f"/proc/{process}/{kind}_map", f"0 0 1\n{NOBODY} {NOBODY} 1\n")
            os._exit(0)
        except OSError:
            os._exit(1)
    os.close(wait)
    try:
        kernel.unshare(kernel.CLONE_NEWUSER)
    finally:
        os.close(go)
        _, status = os.waitpid(helper, 0)
    if status:
        raise OSError("the users 0 and 65534 cannot be mapped into a user namespace")
    return NOBODY


def map_user(user: int, outer_user: int, group: int, outer_group: int, proc: int) -> None:
    """Maps the one user and group of a user namespace that this process has just made; `proc` is an open /proc."""
    _write("self/setgroups", "deny", proc)
    _write("self/uid_map", f"{user} {outer_user} 1", proc)
    _write("self/gid_map", f"{group} {outer_group} 1", proc)


def _write(path: str, text: str, folder: int | None = None) -> None:
    descriptor = os.open(path, os.O_WRONLY, dir_fd=folder)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def enter(mounts: list[str]) -> None:
    """Makes a read-only root of `mounts` and devices, and enters it, in the first process of its namespaces.

    Args:
      mounts: absolute paths of folders and files, which appear under the same names.
    """
    kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    new = _ASSEMBLED_AT
    kernel.mount("tmpfs", new, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=755,size=1m")
    for folder in ("/dev", "/proc", "/etc", "/var", _WRITABLE):
        os.mkdir(new + folder, 0o755)
    for path in mounts:
        _show(path, new)
    for path, text in _FILES.items():
        with open(new + path, "w") as file:
            file.write(text)
    for path, target in _LINKS.items():
        os.symlink(target, new + path)
    if not os.path.lexists(f"{new}/tmp"):  # else something below it is mounted
        os.symlink(TEMPORARY_FOLDER, f"{new}/tmp")
    for name in _DEVICES:
        open(f"{new}/dev/{name}", "w").close()
        kernel.mount(f"/dev/{name}", f"{new}/dev/{name}", None, kernel.MS_BIND)
    harmless = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
    kernel.mount("proc", f"{new}/proc", "proc", harmless)
    kernel.enter_root(new)
    kernel.restrict_mount("/", kernel.MOUNT_ATTR_RDONLY)


def _show(path: str, new: str) -> None:
    """Puts a path of the host, read-only, under the same name into the new root."""
    place = new + path
    if os.path.lexists(place):
        return  # within a folder that is there already, or named twice
    os.makedirs(os.path.dirname(place), 0o755, exist_ok=True)
    kind = os.lstat(path).st_mode
    if stat.S_ISLNK(kind):
        os.symlink(os.readlink(path), place)
        return
    if stat.S_ISDIR(kind):
        os.mkdir(place, 0o755)
    else:
        open(place, "w").close()
    kernel.mount(path, place, None, kernel.MS_BIND | kernel.MS_REC)
    attributes = kernel.MOUNT_ATTR_RDONLY | kernel.MOUNT_ATTR_NOSUID | kernel.MOUNT_ATTR_NODEV
    kernel.restrict_mount(place, attributes, recursive=True)


def enter_run(user: int, disk_mb: int, with_proc: bool) -> None:
    """Namespaces of one run: an empty working folder of its own, no network, no rights. Called in its first process."""
    kernel.unshare(kernel.NAMESPACES)
    harmless = kernel.MS_NOSUID | kernel.MS_NODEV
    options = f"mode=700,uid={user},gid={user},size={disk_mb}m,nr_inodes={64 * disk_mb + 1024}"
    kernel.mount("tmpfs", _WRITABLE, "tmpfs", harmless, options)
    # The /proc of all runs: this process still needs it, the program must not see it.
    proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    _write("self/oom_score_adj", "1000", proc)  # if the host runs out of memory, this run is what it should lose
    if with_proc:
        kernel.mount("proc", "/proc", "proc", harmless | kernel.MS_NOEXEC)
    else:
        kernel.detach("/proc")
    if user == NOBODY:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
        kernel.show_memory()
    kernel.unshare(kernel.CLONE_NEWUSER)
    map_user(USER, user, USER, user, proc)
    os.close(proc)
    kernel.hide_memory()
    kernel.drop_capabilities()
    kernel.forbid_new_privileges()
    for folder in (WORKING_FOLDER, TEMPORARY_FOLDER):
        os.mkdir(folder, 0o700)
    os.chdir(WORKING_FOLDER)
