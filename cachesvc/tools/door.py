"""The way from a tool to a running sidecar: its flags, its calls, and errors in words."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from kvist.cachesvc.folders import home_folders, left_address
from kvist.cachesvc.tools.words import counted
from kvist.proto.errors import BlockMissing, ConfigInvalid
from kvist.proto.keys import DIGEST_BYTES, KEY_BYTES, BlockKey

if TYPE_CHECKING:
    from kvist.proto import cache_pb2

TIMEOUT_S = 10.0
# Clear answers when the last of its blocks is dropped; up to 20 us a block.
CLEAR_TIMEOUT_S = 600.0
CHOICES_SHOWN = 8
SOCKET_HELP = (
    "of the sidecar: its socket's path, or host:port; default: $KVIST_SOCKET, or this user's kvistd"
)
_HEX = re.compile(r"[0-9a-f]+")


@dataclass(frozen=True, slots=True)
class Address:
    """Where a sidecar is asked.

    Attributes:
        where: path of a socket, or host:port.
        said_by: the flag or variable that says so; "" when nobody said anything.
        is_noted: it is what this user's kvistd noted in its folder, see folders.left_address.
    """

    where: str
    said_by: str = ""
    is_noted: bool = False

    def unanswered(self, why: str) -> ConfigInvalid:
        """The error when nobody answers there; why is gRPC's text."""
        why = short_words(why)
        if self.said_by:
            return ConfigInvalid(f"{self.said_by}: no sidecar answers at {self.where}: {why}")
        return ConfigInvalid(
            f"no sidecar answers at {self.where}, where this user's kvistd would be: {why}; say "
            "which one with --socket or KVIST_SOCKET"
        )


def short_words(text: str) -> str:
    """What a person wants of gRPC's text: "Connection refused", without the way there."""
    return text.strip().rpartition(": ")[2]


def socket_of(
    flag: str | None, environment: Mapping[str, str] = os.environ, user: int | None = None
) -> Address:
    """The flag's, else $KVIST_SOCKET, else where this user's running kvistd noted that it listens,
    else where it listens when it is told nothing."""
    if flag:
        return Address(flag, "--socket")
    if environment.get("KVIST_SOCKET"):
        return Address(environment["KVIST_SOCKET"], "KVIST_SOCKET")
    run, _ = home_folders(os.geteuid() if user is None else user, environment)
    noted = left_address(Path(environment.get("KVIST_RUN_DIR") or run))
    return Address(noted or f"{run}/kvistd.sock", is_noted=bool(noted))


def add_door_flags(parser: argparse.ArgumentParser) -> None:
    """The flag that says which sidecar."""
    parser.add_argument(
        "--socket",
        "--address",
        dest="socket",
        metavar="WHERE",
        help=SOCKET_HELP,
    )


class Door:
    """Calls of a sidecar, for a with statement.

    Every call raises BlockMissing for what is not there, and ConfigInvalid when nobody answers or
    the sidecar refuses what was asked.

    Args:
        where: see socket_of; a tool that has looked already gives what it found.

    Attributes:
        address: of the sidecar.
    """

    def __init__(self, where: str | Address | None) -> None:
        # Here: the other tools need no gRPC, which takes 0.2 s to import.
        import grpc

        from kvist.proto.cache_pb2_grpc import CacheStub

        self.address = where if isinstance(where, Address) else socket_of(where)
        path = self.address.where.removeprefix("unix:")
        if self.address.is_noted and where is None:
            print(f"of the sidecar at {self.address.where}", file=sys.stderr)
        target = f"unix:{path}" if path.startswith("/") else path
        self._grpc = grpc
        options = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0))
        self._channel = grpc.insecure_channel(target, options=options)
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
                f"--socket: the sidecar at {self.address.where} is older than this tool and has no "
                f"{method}; run one version of Kvist"
            )
        if code in (status.UNAVAILABLE, status.DEADLINE_EXCEEDED):
            raise self.address.unanswered(text or "")
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
            f"{one.namespace.hex()[:12]} ({counted(one.blocks, 'block')})"
            for one in found[:CHOICES_SHOWN]
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
