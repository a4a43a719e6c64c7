"""A real client on a store that the test drives by hand, both on the test's thread."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Generic, TypeVar

from kvist.cachesvc.api.answers import Answers
from kvist.cachesvc.api.calls import Pending
from kvist.cachesvc.client import CacheClient
from kvist.cachesvc.core.store import Store
from kvist.proto import cache_pb2
from kvist.proto.errors import Detached
from kvist.proto.keys import Namespace
from sim.sidecar import QUIET

WAIT_S = 20.0

Reply = TypeVar("Reply")


@dataclass(frozen=True)
class Done(Generic[Reply]):
    """A call that is answered already; see cachesvc.api.calls.Pending."""

    reply: Reply

    def result(self) -> Reply:
        """The reply."""
        return self.reply


class StoreControl:
    """See worker.control.Control. The client's own thread enters the store in attach only, and
    the test waits for it meanwhile.

    Attributes:
        away: nobody answers; sessions are ended by end.
    """

    def __init__(self, store: Store) -> None:
        self.calls = 0
        self.away = False
        self._store = store
        self._answers = Answers(store)
        self._session = ""
        self._ended = threading.Event()

    def _check(self) -> None:
        self.calls += 1
        if self.away:
            raise Detached("the sim was asked to be away")

    def attach(self, request: cache_pb2.AttachRequest) -> cache_pb2.AttachReply:
        """Open a session, unless away."""
        self._check()
        self._ended = threading.Event()
        reply = self._answers.attach(request)
        self._session = reply.session
        return reply

    def wait_ended(self) -> str:
        """Until hang_up."""
        self._ended.wait()
        return "the sim ended the session"

    def hang_up(self) -> None:
        """End the session."""
        session, self._session = self._session, ""
        if session:
            self._store.session_closed(session)
        self._ended.set()

    def reserve(self, request: cache_pb2.ReserveRequest) -> Pending[cache_pb2.ReserveReply]:
        """See Control.reserve."""
        self._check()
        return Done(self._answers.reserve(request))

    def commit(self, request: cache_pb2.CommitRequest) -> Pending[cache_pb2.CommitReply]:
        """See Control.commit."""
        self._check()
        return Done(self._answers.commit(request))

    def clear(self, request: cache_pb2.ClearRequest) -> Pending[cache_pb2.ClearReply]:
        """See Control.clear."""
        self._check()
        return Done(self._answers.clear(request))

    def close(self) -> None:
        """See Control.close."""
        self.hang_up()


def attached(control: StoreControl, namespace: Namespace, name: str = "sim") -> CacheClient:
    """A client with a session."""
    client = CacheClient(control, namespace, name, QUIET)
    client.start()
    assert client.wait_attached(WAIT_S)
    return client
