"""What a check of `kvist cache doctor` has found; and the host that it looks at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Level = Literal["ok", "warn", "bad"]


@dataclass(frozen=True, slots=True)
class Finding:
    """The outcome of one check.

    Attributes:
        name: of what was looked at, one or two words.
        level: "bad": Kvist will not work, or not as told; "warn": slower or riskier than need be.
        found: what is so.
        fix: what to change, with the command; "" when nothing is to be done.
    """

    name: str
    level: Level
    found: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Host:
    """The machine, seen through its files.

    Attributes:
        root: before /proc, /sys and /dev; a test puts a tree of its own there.
        environment: variables.
    """

    root: Path = Path("/")
    environment: Mapping[str, str] = field(default_factory=dict)

    def path(self, name: str) -> Path:
        """Where an absolute path lies."""
        return self.root / name.lstrip("/")

    def text(self, name: str) -> str:
        """Content of a small file; "" when there is none to be read."""
        try:
            return self.path(name).read_text(errors="replace").strip()
        except OSError:
            return ""

    def number(self, name: str) -> int | None:
        """A number alone in a file; None when there is none, or "max"."""
        text = self.text(name)
        return int(text) if text.isdecimal() else None

    def chosen(self, name: str) -> str:
        """The word in brackets of a file of choices, like "always [madvise] never"."""
        _, bracket, rest = self.text(name).partition("[")
        return rest.partition("]")[0] if bracket else ""

    def limit(self, name: str) -> int | None:
        """Soft limit of a process, by its name in /proc/self/limits; None is unlimited."""
        for line in self.text("/proc/self/limits").splitlines():
            if line.startswith(name):
                word = line[len(name) :].split()[0]
                return int(word) if word.isdecimal() else None
        return None

    def memory(self, name: str) -> int:
        """Bytes of a line of /proc/meminfo, 0 when it is not there."""
        for line in self.text("/proc/meminfo").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
        return 0

    @property
    def kernel(self) -> tuple[int, int]:
        """Version, (0, 0) when it cannot be read."""
        parts = self.text("/proc/sys/kernel/osrelease").split(".")
        minor = "".join(digit for digit in parts[1] if digit.isdecimal()) if len(parts) > 1 else ""
        return (int(parts[0]), int(minor)) if parts[0].isdecimal() and minor else (0, 0)

    def cgroup(self, name: str) -> str:
        """A file of this process's cgroup (version 2), or of the nearest one above that has it."""
        own = next(
            (line[3:] for line in self.text("/proc/self/cgroup").splitlines() if line[:3] == "0::"),
            "/",
        )
        parts = [part for part in own.split("/") if part and part != ".."]
        for depth in range(len(parts), -1, -1):
            text = self.text("/".join(["/sys/fs/cgroup", *parts[:depth], name]))
            if text:
                return text
        return ""
