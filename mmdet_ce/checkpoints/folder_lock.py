"""One training at a time in a folder."""

from __future__ import annotations

import errno
import os
import weakref
from pathlib import Path
from typing import Optional


class FolderInUseError(RuntimeError):
    """A work directory that another training writes to."""


class FolderLock:
    """A folder that belongs to this process; it is given back when nothing refers to this object any more.

    Args:
        descriptor: The open and locked file.
    """

    def __init__(self, descriptor: int) -> None:
        weakref.finalize(self, os.close, descriptor)


# By process, since a fork copies this and not the locks, and by path. The system keeps one lock of a file for the whole
# process and drops it when any descriptor of the file is closed: so a process opens the file once.
_LOCKS: weakref.WeakValueDictionary[tuple[int, str], FolderLock] = weakref.WeakValueDictionary()


def lock_folder(folder: str | Path) -> Optional[FolderLock]:
    """Take a folder for this process, until nothing refers to the returned lock or the process ends.

    The process may take it again meanwhile, as a training does after one that failed: it gets the same lock.

    Returns:
        The lock; None where the system or the file system has no such locks.

    Raises:
        FolderInUseError: If another process has it.
    """
    path = os.path.realpath(os.path.join(folder, '.lock'))
    lock = _LOCKS.get((os.getpid(), path))
    if lock is not None:
        return lock
    try:
        import fcntl  # not on Windows

        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except (ImportError, OSError):
        return None
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not kept by data loader workers
    except OSError as error:
        os.close(descriptor)
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return None
        raise FolderInUseError(
            f'another training writes to {Path(folder).absolute()}; wait for it or stop it, or name another --work-dir'
        ) from None
    lock = _LOCKS[os.getpid(), path] = FolderLock(descriptor)
    return lock
