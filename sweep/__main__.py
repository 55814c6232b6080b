"""`python -m sweep`: every architecture through the whole chain; `--read` stops at the anatomy."""

from __future__ import annotations

import argparse
from pathlib import Path

from sweep.cases import cases
from sweep.chain import chain, reading
from sweep.running import Limits, run

OUT = Path(".cache/architectures.jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sweep", description=__doc__)
    parser.add_argument("--read", action="store_true", help="trace and anatomy only")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--first", action="store_true", help="one head a family")
    parser.add_argument("families", nargs="*")
    args = parser.parse_args()
    wanted = [c for c in cases() if not args.families or c.family in args.families]
    if args.first:
        wanted = list({c.family: c for c in reversed(wanted)}.values())
        wanted.sort(key=lambda c: c.family)
    run(wanted, reading if args.read else chain, args.out, jobs=args.jobs, limits=Limits())


if __name__ == "__main__":
    main()
