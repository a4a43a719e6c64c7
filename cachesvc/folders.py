"""Folders: a user's own, those of one living process, and what dead ones left behind."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from kvist.proto.errors import ConfigInvalid

LOCK_NAME = "lock"
STORE_LOCK_NAME = "store.lock"
ADDRESS_NAME = "kvistd.address"


def home_folders(user: int, environment: Mapping[str, str]) -> tuple[str, str]:
    """Where a user's sidecar lives when nothing is said.

    Returns:
        folder of the socket, the lock and the bell; folder of arena, index and rings.
    """
    if user == 0:
        return "/run/kvist", "/dev/shm/kvist"
    runtime = environment.get("XDG_RUNTIME_DIR", "")
    run = f"{runtime}/kvist" if runtime.startswith("/") else f"/tmp/kvist-{user}"
    return run, f"/dev/shm/kvist-{user}"


def leave_address(run_dir: Path, socket: Path) -> Path:
    """Note for this user's tools where the sidecar that has locked a folder listens; the note.

    A disk without room for it is no reason not to serve.
    """
    note = run_dir / ADDRESS_NAME
    fresh = note.with_suffix(".new")
    with contextlib.suppress(OSError):
        fresh.write_text(f"{socket}\n")
        fresh.replace(note)
    return note


def left_address(run_dir: Path) -> str:
    """The socket that a sidecar of this user noted there; "" without a note of this user's own.

    A killed sidecar leaves its note: its socket does not answer, and the next one in the folder,
    which is the only one as long as it lives, writes its own.
    """
    try:
        handle = os.open(run_dir / ADDRESS_NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return ""
    with open(handle, encoding="utf-8", errors="replace") as note:
        is_own = os.fstat(handle).st_uid == os.geteuid()
        text = note.readline().strip() if is_own else ""
    return text if text.startswith("/") and text.isprintable() else ""


class OwnedFolder:
    """A folder that nobody else uses while this object, or the process, lives.

    The owner holds a lock on a file in it, which the kernel drops however the process ends.

    Args:
        path: made if it is not there, for its user only.

    Attributes:
        path: the folder.

    Raises:
        ConfigInvalid: another process owns it, or it cannot be made or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            handle = _lock(path)
        except OSError as error:
            raise ConfigInvalid(
                f"{path}: {error.strerror}; give a folder that this user may write"
            ) from None
        if handle is None:
            raise ConfigInvalid(
                f"{path}: another process of Kvist uses this folder; stop it or give another one"
            )
        self._handle = handle

    def close(self) -> None:
        """Give the folder up and leave its content."""
        os.close(self._handle)

    def remove(self) -> None:
        """Give the folder up and delete it with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._handle)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A folder that no other store has; the kernel lets go of it however this process ends.

    Raises: ConfigInvalid: another sidecar has it.
    """
    handle = os.open(folder / STORE_LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ConfigInvalid(
            f"run_dir, shm_dir: another sidecar uses {folder}; stop it or choose another folder"
        ) from None
    try:
        yield
    finally:
        os.close(handle)


def _lock(path: Path) -> int | None:
    """A descriptor that holds the folder's lock, or None when somebody else holds it."""
    while True:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            handle = os.open(path / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            continue  # swept between the two lines
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _same_file(handle, path / LOCK_NAME):
                return handle
        except BlockingIOError:
            if _same_file(handle, path / LOCK_NAME):
                os.close(handle)
                return None
        os.close(handle)  # the folder was swept before we had the lock: make it again


def _same_file(handle: int, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle), path.stat())
    return False


def sweep(parent: Path, prefix: str) -> int:
    """Delete what dead processes of this user left.

    Args:
        parent: where to look; need not exist.
        prefix: of the names of OwnedFolders in it; nothing else is touched.

    Returns: how many folders went.
    """
    swept = 0
    for path in sorted(parent.glob(f"{prefix}*")):
        lock = path / LOCK_NAME
        # Without a lock file it is not, or not yet, an owned folder; and others' stay theirs.
        with contextlib.suppress(OSError):
            if lock.is_file() and not lock.is_symlink() and lock.stat().st_uid == os.getuid():
                handle = _lock(path)
                if handle is not None:
                    shutil.rmtree(path, ignore_errors=True)
                    os.close(handle)
                    swept += 1
    return swept
