"""Which tenants a worker counts by themselves: a bounded number, the large ones among them."""

from __future__ import annotations

from typing import Final

from kvist.proto.shm import TENANT_ROWS

OTHERS_ROW = 0
# So many get a row at once; the other rows are left for those that turn out to be large.
FIRST_COME = TENANT_ROWS // 2
SHARE_MIN = 0.01
# Fifty prompts of 2,000 tokens: of the first few requests everybody's share is large.
TOKENS_MIN = 100_000
_WAITING_MAX = 1024


class TenantRows:
    """Gives out the rows of a ring. A row is kept for ever, so that every total only grows.

    The first FIRST_COME tenants get one at once. A later one is counted with the others until it
    has had TOKENS_MIN and a SHARE_MIN of all tokens, and by itself from then on; what was counted
    stays where it is. So the sum over the rows is the whole at any time, whoever comes.
    """

    def __init__(self) -> None:
        self._rows: Final[dict[str, int]] = {}
        self._waiting: dict[str, int] = {}
        self._tokens = 0

    def row_of(self, tenant: str | None, tokens: int) -> tuple[int, bool]:
        """Row of a tenant that asks for so many tokens, and whether it has just got it; None is of
        those that have none."""
        self._tokens += tokens
        if tenant is None:
            return OTHERS_ROW, False
        row = self._rows.get(tenant)
        if row is not None:
            return row, False
        if len(self._rows) >= TENANT_ROWS - 1 or not self._is_large(tenant, tokens):
            return OTHERS_ROW, False
        row = self._rows[tenant] = 1 + len(self._rows)
        return row, True

    def _is_large(self, tenant: str, tokens: int) -> bool:
        if len(self._rows) < FIRST_COME:
            return True
        heard = self._waiting.pop(tenant, 0) + tokens
        if heard >= max(TOKENS_MIN, SHARE_MIN * self._tokens):
            return True
        self._waiting[tenant] = heard
        if len(self._waiting) > _WAITING_MAX:
            largest = sorted(self._waiting, key=self._waiting.__getitem__)[_WAITING_MAX // 2 :]
            self._waiting = {name: self._waiting[name] for name in largest}
        return False
