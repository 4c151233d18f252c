"""Which mount, and so which file system, does a path lie on?"""

import re
from typing import NamedTuple

__all__ = ["is_mount_point", "network_file_system"]

# Where several machines may have the file open, or where mmap isn't shared between them.
_NETWORK = frozenset(
    {"9p", "afs", "beegfs", "ceph", "cifs", "coda", "gfs2", "glusterfs", "gpfs", "lustre", "ncpfs"}
    | {"nfs", "nfs4", "ocfs2", "orangefs", "smb3", "smbfs", "vboxsf"}
    | {"fuse.ceph", "fuse.glusterfs", "fuse.rclone", "fuse.s3fs", "fuse.sshfs"}
)
_MOUNTINFO = "/proc/self/mountinfo"
_ESCAPE = re.compile(r"\\([0-7]{3})")  # so the kernel writes spaces, tabs, newlines, backslashes


class _Mount(NamedTuple):
    number: str
    parent: str
    point: str
    kind: str


def network_file_system(path: str, mountinfo: str = _MOUNTINFO) -> str | None:
    """The kind of network file system that `path` lies on; None: a local one, or unknown.

    Args:
        path: Absolute and resolved; the file itself need not exist.
        mountinfo: See proc(5); where there is none (macOS), nothing is known.
    """
    mount = _mount_of(path, mountinfo)
    return mount.kind if mount is not None and mount.kind in _NETWORK else None


def is_mount_point(path: str, mountinfo: str = _MOUNTINFO) -> bool:
    """Whether something is mounted on just this path; arguments as above."""
    mount = _mount_of(path, mountinfo)
    return mount is not None and mount.point == path


def _mount_of(path: str, mountinfo: str) -> _Mount | None:
    """Walk from the root mount down the tree, as the kernel walks the path.

    The longest mount point isn't always the answer: a mount on /a that came after one on /a/b
    hides it.
    """
    try:
        with open(mountinfo, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
            lines = file.read().split("\n")  # splitlines would split at more
    except OSError:
        return None
    mounts = [mount for mount in map(_parse, filter(None, lines)) if _lies_under(path, mount.point)]
    numbers = {mount.number for mount in mounts}
    # A root's parent isn't listed, or is itself.
    below = [mount for mount in mounts if mount.parent not in numbers - {mount.number}]
    found = None
    while below:
        # The first that the path comes to; of several on one point the last hides the others.
        found = min(reversed(below), key=lambda mount: len(mount.point))
        mounts.remove(found)
        below = [mount for mount in mounts if mount.parent == found.number]
    return found


def _parse(line: str) -> _Mount:
    fields, _, rest = line.partition(" - ")
    number, parent, _, _, point, *_ = fields.split(" ")
    return _Mount(number, parent, _unescape(point), rest.split(" ")[0])


def _lies_under(path: str, point: str) -> bool:
    return path == point or path.startswith(point.rstrip("/") + "/")


def _unescape(text: str) -> str:
    return _ESCAPE.sub(lambda match: chr(int(match[1], 8)), text)
