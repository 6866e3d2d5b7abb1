"""What an operating system's refusal means to a user: one sentence of cause, one of what to do."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hubkit.errors import StorageError

ROOM = "Free some space (`hubkit gc --dry-run` says what hubkit can give back), or set HUBKIT_HOME to another disk."
PERMISSION = "Check its owner and mode, or set HUBKIT_HOME to a folder of your own."
MEANINGS = {
    errno.ENOSPC: ("There is no room left for {path}.", ROOM),
    errno.EDQUOT: ("Your disk quota leaves no room for {path}.", ROOM),
    errno.EFBIG: ("{path} is larger than a file may be here.", "Raise the limit (`ulimit -f`), or use another disk."),
    errno.EROFS: ("{path} is on a read-only file system.", "Set HUBKIT_HOME to a folder that can be written."),
    errno.EACCES: ("There is no permission to use {path}.", PERMISSION),
    errno.EPERM: ("There is no permission to change {path}.", PERMISSION),
    errno.EIO: ("The disk failed at {path}.", "Check the disk, then run `hubkit verify`."),
    errno.EMFILE: ("Too many files are open in this process.", "Raise the limit, for example `ulimit -n 4096`."),
    errno.ENFILE: ("Too many files are open on this machine.", "Close other programs and try again."),
    errno.ENOTDIR: ("A part of the path {path} is no folder.", "Check the path and HUBKIT_HOME."),
    errno.EISDIR: ("{path} is a folder where a file should be.", "Move it out of the way."),
    errno.ENAMETOOLONG: ("The path {path} is too long.", "Use a shorter one."),
    errno.ELOOP: ("{path} is a symbolic link that leads nowhere.", "Check the link."),
    errno.ENOLCK: ("The file system of {path} has no locks.", "Set HUBKIT_HOME to a disk of this machine."),
    errno.EOPNOTSUPP: ("The file system of {path} has no locks.", "Set HUBKIT_HOME to a disk of this machine."),
}
# these are about the process or the machine, not about the file that it happened to be opening
EXHAUSTED = (errno.EMFILE, errno.ENFILE)


def meaning(error: OSError, place: Path | None = None) -> StorageError | None:
    """The error to show for an `OSError`, or None where it has no fixed meaning (a missing file may be anything).

    `place` stands for the path where the system did not say which file it was about.
    """
    from hubkit.policy.names import escape  # the policy explains errors as well

    known = MEANINGS.get(error.errno or 0)
    if known is None:
        return None
    path = error.filename if isinstance(error.filename, str) else place
    shown = escape(str(path)) if path else "the file"
    return StorageError(known[0].format(path=shown), known[1])


@contextmanager
def explained(place: Path) -> Iterator[None]:
    """Turn the `OSError`s of a block that works on `place` into `StorageError`s, where they have a known meaning."""
    try:
        yield
    except OSError as error:
        known = meaning(error, place)
        if known is None:
            raise
        raise known from error
