"""Write Kvist's Grafana boards: `make boards`, or `python deploy/grafana/boards.py [FOLDER]`.

From the lists of metrics that /metrics is made from (cachesvc/view/definitions.py and
engine/definitions.py): a query that names another metric is refused, selectors follow from a
metric's labels, and a panel's description says what its metrics mean.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER))

from board_parts import disaggregated, serving, tiers, worth  # noqa: E402
from board_parts.board import Board, as_json  # noqa: E402

BOARDS = (tiers.BOARD, serving.BOARD, disaggregated.BOARD, worth.BOARD)


def main() -> None:
    """Write a file for each board."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER / "boards")
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for board in BOARDS:
        path = folder / f"{board.uid}.json"
        path.write_text(text_of(board))
        print(path)


def text_of(board: Board) -> str:
    """The content of its file."""
    return json.dumps(as_json(board), indent=1) + "\n"


if __name__ == "__main__":
    main()
