"""Run program.py of the working folder within limits; a program of its own, started by programs.py.

    python -I sandbox.py SECONDS MEGABYTES

Limits are of CPU time, address space, size and number of files. Where the kernel has Landlock
(Linux 5.13, docs.kernel.org/userspace-api/landlock.html), files outside the working folder cannot
be written, none but Python's and the system's own can be read, and from Linux 6.7 on no TCP port
can be reached. Only the standard library is imported here.
"""

import ctypes
import os
import resource
import runpy
import sys
import sysconfig

FILE_BYTES = 16 * 2**20
OPEN_FILES = 64
_CREATE, _ADD, _RESTRICT = 444, 445, 446  # the system calls, of all processors alike
_NO_NEW_PRIVILEGES = 38
# Rights, a bit each: 13 of ABI 1; to truncate came with ABI 3, to bind and connect TCP with 4.
_EXECUTE, _WRITE, _READ, _LIST, _TRUNCATE = 1, 2, 4, 8, 2**14
_ALL, _TCP = 2**13 - 1, 3


def limit_resources(seconds: int, megabytes: int) -> None:
    """Set hard limits, which nothing without privileges raises again."""
    for kind, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, megabytes * 2**20),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))


def landlock_version() -> int:
    """Version of the kernel's Landlock interface, 0 without one."""
    if sys.platform != "linux":
        return 0
    return max(0, int(ctypes.CDLL(None).syscall(_CREATE, None, 0, 1)))


def limit_files() -> None:
    """Leave the working folder to write, and what Python needs to read, where Landlock is."""
    libc, abi = ctypes.CDLL(None), landlock_version()
    if abi == 0:
        return
    every = _ALL | (_TRUNCATE if abi >= 3 else 0)
    handled = (ctypes.c_uint64 * 2)(every, _TCP)
    rules = libc.syscall(_CREATE, handled, 16 if abi >= 4 else 8, 0)
    readable = {sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), "/usr", "/lib"}
    allowed = dict.fromkeys(readable | {"/lib64", "/bin"}, _EXECUTE | _READ | _LIST)
    allowed |= dict.fromkeys(["/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"], _READ)
    allowed |= {"/dev/null": _READ | _WRITE, os.getcwd(): every}
    for path, rights in allowed.items():
        try:
            file = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        rule = rights.to_bytes(8, sys.byteorder) + file.to_bytes(4, sys.byteorder)
        libc.syscall(_ADD, rules, 1, rule, 0)
        os.close(file)
    libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    libc.syscall(_RESTRICT, rules, 0)
    os.close(rules)


if __name__ == "__main__":
    seconds, megabytes = map(int, sys.argv[1:])
    # The first process of a namespace ignores the signals that limits send; a second obeys them.
    child = os.fork()
    if child:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0)
    sys.argv[:] = ["program.py"]
    limit_files()
    limit_resources(seconds, megabytes)
    runpy.run_path("program.py", run_name="__main__")
