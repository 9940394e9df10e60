"""The Hub as a process of its own: ``python -m tests.hub.server --folder F --port 0``."""

from __future__ import annotations

import argparse
from pathlib import Path

from .hub import PART_BYTES, Hub


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run a Hugging Face Hub on this machine.")
    parser.add_argument("--folder", type=Path, required=True, help="where repos are kept")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--part-bytes", type=int, default=PART_BYTES, help="LFS contents above this go in parts")
    parser.add_argument("--no-record", action="store_true", help="do not record what clients send")
    return parser.parse_args()


def main() -> None:
    """Serve until SIGINT or SIGTERM, the endpoint printed as the first line."""
    options = _parse()
    hub = Hub(options.folder, port=options.port, part_bytes=options.part_bytes, record_bodies=not options.no_record)
    print(hub.endpoint, flush=True)
    hub.serve()


if __name__ == "__main__":
    main()
