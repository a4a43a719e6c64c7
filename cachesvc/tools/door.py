"""The way from a tool to a running sidecar: its flags, its calls, and errors in words."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

from kvist.cachesvc.folders import home_folders
from kvist.proto.errors import BlockMissing, ConfigInvalid
from kvist.proto.keys import DIGEST_BYTES, KEY_BYTES, BlockKey

if TYPE_CHECKING:
    from kvist.proto import cache_pb2

TIMEOUT_S = 10.0
# Clear answers when the last of its blocks is dropped; up to 20 us a block.
CLEAR_TIMEOUT_S = 600.0
CHOICES_SHOWN = 8
_HEX = re.compile(r"[0-9a-f]+")


def default_socket() -> str:
    """Where this user's kvistd listens: $KVIST_SOCKET, or where it does when nothing is said."""
    run, _ = home_folders(os.geteuid(), os.environ)
    return os.environ.get("KVIST_SOCKET") or f"{run}/kvistd.sock"


def add_door_flags(parser: argparse.ArgumentParser) -> None:
    """The flag that says which sidecar."""
    parser.add_argument(
        "--socket",
        "--address",
        dest="socket",
        metavar="WHERE",
        help="of the sidecar: its socket's path, or host:port; default: $KVIST_SOCKET, or this "
        "user's kvistd",
    )


class Door:
    """Calls of a sidecar, for a with statement.

    Every call raises BlockMissing for what is not there, and ConfigInvalid when nobody answers or
    the sidecar refuses what was asked.

    Args:
        where: path of a socket, or host:port; None is default_socket.
    """

    def __init__(self, where: str | None) -> None:
        # Here: the other tools need no gRPC, which takes 0.2 s to import.
        import grpc

        from kvist.proto.cache_pb2_grpc import CacheStub

        self.where = where or default_socket()
        path = self.where.removeprefix("unix:")
        address = f"unix:{path}" if path.startswith("/") else self.where
        self._grpc = grpc
        options = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0))
        self._channel = grpc.insecure_channel(address, options=options)
        self._stub = CacheStub(self._channel)

    def __enter__(self) -> Door:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._channel.close()

    def call(self, method: str, request: Any, timeout_s: float = TIMEOUT_S) -> Any:
        """The reply to a request of cache.proto."""
        try:
            return getattr(self._stub, method)(request, timeout=timeout_s)
        except self._grpc.RpcError as error:
            code, text = error.code(), error.details()
        status = self._grpc.StatusCode
        if code is status.NOT_FOUND:
            raise BlockMissing(text)
        if code is status.UNIMPLEMENTED:
            raise ConfigInvalid(
                f"--socket: the sidecar at {self.where} is older than this tool and has no "
                f"{method}; run one version of Kvist"
            )
        if code in (status.UNAVAILABLE, status.DEADLINE_EXCEEDED):
            raise ConfigInvalid(f"--socket: no sidecar answers at {self.where}: {text}")
        raise ConfigInvalid(text)

    def pages(self, **asked: Any) -> Iterator[cache_pb2.ListReply]:
        """All pages of a listing; the arguments are fields of ListRequest."""
        from kvist.proto import cache_pb2

        token = 0
        while True:
            page = self.call("List", cache_pb2.ListRequest(page_token=token, **asked))
            yield page
            token = page.next_page_token
            if not token:
                return

    def key(self, digits: str) -> BlockKey:
        """The key of a stored block that begins with these hex digits.

        Raises:
            ConfigInvalid: no hex digits, or several blocks begin so.
            BlockMissing: none does.
        """
        text = digits.lower()
        if not _HEX.fullmatch(text) or len(text) > 2 * KEY_BYTES:
            raise ConfigInvalid(
                f"KEY: {digits!r} is no key; give up to {2 * KEY_BYTES} hex digits, as "
                "`kvist cache ls` shows them"
            )
        if len(text) == 2 * KEY_BYTES:
            return BlockKey(bytes.fromhex(text))
        found: dict[str, None] = {}
        for page in self.pages(key=text):
            found |= {run.key.hex(): None for run in page.runs}
            if len(found) > CHOICES_SHOWN:
                break
        if not found:
            raise BlockMissing(f"no stored block has a key that begins with {text}")
        if len(found) > 1:
            shown = ", ".join(list(found)[:CHOICES_SHOWN])
            raise ConfigInvalid(f"KEY: several blocks begin with {text}: {shown}; give more digits")
        return BlockKey(bytes.fromhex(next(iter(found))))

    def namespaces(self) -> list[cache_pb2.NamespaceInfo]:
        """Those that have blocks, largest first."""
        return list(next(self.pages(limit=1)).namespaces)

    def namespace(self, digits: str | None) -> cache_pb2.NamespaceInfo:
        """The namespace that begins with these hex digits, or the only one.

        Raises: ConfigInvalid: none, or several.
        """
        wanted = checked_namespace(digits)
        found = [one for one in self.namespaces() if one.namespace.hex().startswith(wanted)]
        if len(found) == 1:
            return found[0]
        shown = ", ".join(
            f"{one.namespace.hex()[:12]} ({one.blocks} blocks)" for one in found[:CHOICES_SHOWN]
        )
        raise ConfigInvalid(
            f"--namespace: {len(found)} namespaces with blocks fit"
            + (
                f": {shown}; name one"
                if found
                else "; `kvist cache ls --json` lists those there are"
            )
        )


def checked_namespace(digits: str | None) -> str:
    """The first digits of a digest, or "". Raises: ConfigInvalid."""
    text = (digits or "").lower()
    if text and (not _HEX.fullmatch(text) or len(text) > 2 * DIGEST_BYTES):
        raise ConfigInvalid(
            f"--namespace: {digits!r} is no digest; give its first hex digits, as "
            "`kvist cache show` prints them"
        )
    return text
