"""`python -m sweep`: every architecture through the whole chain, and docs/architectures.md written.

Results are kept as they come, so a run that was cut off goes on where it was; `--again` takes what failed once more.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sweep.cases import Case, cases
from sweep.chain import chain, reading
from sweep.running import Limits, forget, results, run, state
from sweep.shrinking import Sizes
from sweep.table import page

PAGE = Path("docs/architectures.md")


def main() -> None:
    """Run what is left of the sweep and write the page."""
    parser = argparse.ArgumentParser(prog="python -m sweep", description=__doc__)
    parser.add_argument("families", nargs="*", help="these families only")
    parser.add_argument("--first", action="store_true", help="one head a family")
    parser.add_argument("--read", action="store_true", help="trace and anatomy only; no page is written")
    parser.add_argument("--again", action="store_true", help="what failed once more")
    parser.add_argument("--anew", action="store_true", help="what was run by other code than this once more")
    parser.add_argument("--jobs", type=int, default=2, help="processes beside each other")
    parser.add_argument("--seconds", type=int, default=120, help="of processor time a case")
    parser.add_argument("--gigabytes", type=float, default=6.0, help="of memory a case")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(".cache/architectures.jsonl"),
        help="where results are kept; the page is of those kept by default",
    )
    args = parser.parse_args()
    every = cases()
    wanted = [c for c in every if not args.families or c.family in args.families]
    if args.first:
        wanted = list({c.family: c for c in reversed(wanted)}.values())[::-1]
    code = state()
    if args.again or args.anew:
        forget(args.out, wanted, failed=args.again, but=code if args.anew else None)
    chain(Case("bert", "masked-lm"), {}, [Sizes(layers=1)])  # loads all that a case needs, before processes are forked
    work = reading if args.read else chain
    run(wanted, work, args.out, jobs=args.jobs, limits=Limits(args.seconds, args.gigabytes), code=code)
    if not args.read and args.out == parser.get_default("out"):
        PAGE.write_text(page(results(args.out), every), encoding="utf-8")


if __name__ == "__main__":
    main()
