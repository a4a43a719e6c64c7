"""The engine's log: the sidecar's format, also for what other libraries say by `logging`."""

from __future__ import annotations

import logging
import sys

from kvist.cachesvc.log import FORMATS, LEVELS, Format, Level, Log
from kvist.engine.config import EngineConfig
from kvist.engine.request import Delta
from kvist.engine.sequence import Sequence


def open_log(config: EngineConfig) -> Log:
    """To standard error, as the settings say."""
    return Log(
        sys.stderr, _level(config.log_level), _format(config.log_format), detail=config.log_detail
    )


def _level(text: str) -> Level:
    return next(level for level in LEVELS if level == text)


def _format(text: str) -> Format:
    return next(form for form in FORMATS if form == text)


def tell_request(log: Log, sequence: Sequence, last: Delta, now_s: float) -> None:
    """One line for a request that has ended."""
    if not log.shows(1):
        return
    cached, scheduled, first = sequence.cached, sequence.scheduled_s, sequence.first_token_s
    fields: dict[str, object] = {
        "request": sequence.id,
        "finish": last.finish_reason,
        "prompt": sequence.prompt_tokens,
        "output": len(sequence.tokens) - sequence.prompt_tokens,
        "hbm": cached.hbm,
        "dram": cached.dram,
        "flash": cached.flash,
        "cache_end": sequence.found_end,
        "total_s": now_s - sequence.arrived_s,
    }
    if scheduled is not None:
        fields["queue_s"] = scheduled - sequence.arrived_s
    if first is not None:
        fields["ttft_s"] = first - sequence.arrived_s
    if sequence.preempted:
        fields["preempted"] = sequence.preempted
    if last.error:
        fields["error"] = last.error
    log.debug("request ended", **fields)


class LibraryLines(logging.Handler):
    """Hands what libraries log to our log, so that there is one format.

    Args:
        log: gets it, an event per library.
    """

    def __init__(self, log: Log) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        """See logging.Handler."""
        tell = self._log.error if record.levelno >= logging.ERROR else self._log.warning
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + logging.Formatter().formatException(record.exc_info)
        tell("library", name=record.name, text=text)
