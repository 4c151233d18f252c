"""Which file system does a path lie on?"""

import os

__all__ = ["network_file_system"]

# Where several machines may have the file open, or where mmap isn't shared between them.
_NETWORK = frozenset(
    {"9p", "afs", "ceph", "cifs", "coda", "gfs2", "glusterfs", "lustre", "ncpfs", "nfs", "nfs4"}
    | {"ocfs2", "smb3", "smbfs"}
    | {"fuse.ceph", "fuse.glusterfs", "fuse.rclone", "fuse.s3fs", "fuse.sshfs"}
)


def network_file_system(path: str, mountinfo: str = "/proc/self/mountinfo") -> str | None:
    """The kind of network file system that `path` lies on; None: a local one, or unknown.

    Args:
        path: Absolute and resolved; the file itself need not exist.
        mountinfo: See proc(5); where there is none (macOS), nothing is known.
    """
    try:
        with open(mountinfo, encoding="utf-8", errors="surrogateescape") as file:
            lines = file.read().splitlines()
    except OSError:
        return None
    best, kind = "", None
    for line in lines:
        fields, _, rest = line.partition(" - ")
        mount = _unescape(fields.split(" ")[4])
        # The last mount on a point hides those before it.
        if len(mount) >= len(best) and os.path.commonpath([path, mount]) == mount:
            best, kind = mount, rest.split(" ")[0]
    return kind if kind in _NETWORK else None


def _unescape(text: str) -> str:
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, character)
    return text
