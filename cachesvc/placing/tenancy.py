"""Tenants: whose a block is, and what its owner may have.

A tenant is named by the salt of its prompts: the part before the first colon, as in
"acme:3f9a...", or a hash of the salt where there is none (proto.keys.tenant_of). A worker tells
the name with a prompt's first block; the sidecar remembers it by the block's namespace.

Rules are one setting, a list of

    WHO [quota=SIZE] [floor=SIZE] [flash_quota=SIZE] [flash_floor=SIZE] [ttl=TIME]

parted by semicolons or line ends. WHO is a tenant, "ns:" and the first hex digits of a namespace
digest (it goes before the tenant's), or "*" for every tenant that no rule names, each by itself.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from kvist.proto.errors import ConfigInvalid
from kvist.proto.sizes import format_bytes, parse_bytes

# Namespaces whose tenant is remembered; one that is forgotten is told again with its next prompt.
NAMESPACES_MAX = 65536
NAMESPACE_PREFIX = "ns:"
EVERYBODY = "*"

_WHO = re.compile(r"\*|ns:[0-9a-f]{8,64}|[A-Za-z0-9_.-]{1,64}")
_TIME = re.compile(r"(\d+)(s|m|h|d)")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True, slots=True)
class Limits:
    """What one tenant, or one namespace, may have; None where nothing is said.

    Attributes:
        quota: bytes of DRAM that it may fill; flash_quota likewise.
        floor: bytes of DRAM that others cannot take from it; flash_floor likewise.
        ttl: seconds after which a block is dropped. Its slots are overwritten when they are
            freed, and nothing of it is written to flash.
    """

    quota: int | None = None
    floor: int | None = None
    flash_quota: int | None = None
    flash_floor: int | None = None
    ttl: int | None = None


def parse_tenants(text: str) -> Mapping[str, Limits]:
    """Read the rules.

    Raises: ValueError: what is wrong, and with which rule.
    """
    rules: dict[str, Limits] = {}
    for line in re.split(r"[;\n]", text):
        words = line.split()
        if not words:
            continue
        who = words[0]
        if not _WHO.fullmatch(who) or len(words) == 1:
            raise ValueError(
                f"{line.strip()!r} is no rule; write one like: acme quota=4GiB ttl=24h"
            )
        if who in rules:
            raise ValueError(f"{who} has two rules; make them one")
        rules[who] = _limits(who, words[1:])
    everybody = rules.get(EVERYBODY, Limits())
    if everybody.floor is not None or everybody.flash_floor is not None:
        raise ValueError("*: a floor for everybody is none; give it to tenants by name")
    return rules


def check_floors(rules: Mapping[str, Limits], dram_bytes: int, flash_bytes: int) -> None:
    """Raises: ConfigInvalid: the floors do not fit into a tier together."""
    for key, size, floors in (
        ("dram_bytes", dram_bytes, [limits.floor or 0 for limits in rules.values()]),
        ("flash_bytes", flash_bytes, [limits.flash_floor or 0 for limits in rules.values()]),
    ):
        if sum(floors) > size:
            raise ConfigInvalid(
                f"tenants: the floors are {format_bytes(sum(floors))} together, more than {key}, "
                f"{format_bytes(size)}; lower them or raise it"
            )


def _limits(who: str, words: list[str]) -> Limits:
    known = [each.name for each in fields(Limits)]
    values: dict[str, int] = {}
    for word in words:
        name, _, value = word.partition("=")
        if name not in known or name in values:
            raise ValueError(f"{who}: {word!r} is not one of {', '.join(known)}, each once, with =")
        values[name] = _seconds(who, value) if name == "ttl" else _bytes(who, value)
    limits = Limits(**values)
    for floor, quota in ((limits.floor, limits.quota), (limits.flash_floor, limits.flash_quota)):
        if floor is not None and quota is not None and floor > quota:
            raise ValueError(f"{who}: the floor is over the quota; lower it")
    return limits


def _bytes(who: str, text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise ValueError(f"{who}: {error}") from None


def _seconds(who: str, text: str) -> int:
    match = _TIME.fullmatch(text)
    if match is None or not int(match.group(1)):
        raise ValueError(f"{who}: ttl={text} is no time; write one like 30m, 24h or 7d")
    return int(match.group(1)) * _SECONDS[match.group(2)]


@dataclass(slots=True, eq=False)
class Group:
    """Namespaces that one rule limits together.

    Attributes:
        name: the tenant, or the "ns:" of the rule.
        reserved: DRAM slots that workers are filling for it.
    """

    name: str
    limits: Limits
    reserved: int = 0


@dataclass(slots=True)
class Tenancy:
    """Which rule holds for which namespace. One thread.

    Args:
        rules: see parse_tenants.

    Attributes:
        version: grows whenever a namespace may have come under another rule.
    """

    rules: Mapping[str, Limits]
    version: int = 0
    _known: dict[bytes, Group | None] = field(default_factory=dict)
    _tenants: OrderedDict[bytes, str] = field(default_factory=OrderedDict)
    _groups: dict[str, Group] = field(default_factory=dict)

    def introduce(self, namespace: bytes, tenant: str) -> None:
        """A worker says whose a namespace is."""
        if self._tenants.get(namespace) != tenant:
            self._tenants[namespace] = tenant
            if len(self._tenants) > NAMESPACES_MAX:
                self._tenants.popitem(last=False)
            if self.rules:
                self.version += 1
                self._known.clear()

    def tenant(self, namespace: bytes) -> str:
        """Whose a namespace is, as workers said; "" for the common pool, or when none said it."""
        return self._tenants.get(namespace, "")

    def group(self, namespace: bytes) -> Group | None:
        """What limits a namespace; None when nothing does."""
        if not self.rules:
            return None
        if namespace not in self._known:
            if len(self._known) > NAMESPACES_MAX:
                self._known.clear()
            name, limits = self._rule(namespace)
            group = None if limits is None else self._groups.get(name) or Group(name, limits)
            if group is not None:
                self._groups[name] = group
            self._known[namespace] = group
        return self._known[namespace]

    def _rule(self, namespace: bytes) -> tuple[str, Limits | None]:
        digest = namespace.hex()
        for who, limits in self.rules.items():
            if who.startswith(NAMESPACE_PREFIX) and digest.startswith(who[len(NAMESPACE_PREFIX) :]):
                return who, limits
        tenant = self._tenants.get(namespace)
        if tenant is None:
            return "", None
        return tenant, self.rules.get(tenant) or self.rules.get(EVERYBODY)
