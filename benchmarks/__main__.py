"""Every ratio to an ideal, in one Markdown file.

    python -m benchmarks --write benchmarks/results/speed.md

All contenders of a table take turns in one process, on one thread, in process CPU time: whatever else the machine does
falls on all alike. The reference of each table runs twice; how far the ratio of "again" is from 1 is what the machine
cannot tell apart.
"""

import argparse
from pathlib import Path

import torch

from benchmarks import kernels, masks, step
from benchmarks.machine import heading, write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12, help="of each step; kernels run three times as often")
    parser.add_argument("--write", type=Path, help="write the tables to this file, too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    parts = [
        heading("Speed, as ratios", f"python -m benchmarks --rounds {args.rounds}", seed=0),
        "One thread, process CPU time; medians over the rounds.",
        "## A training step over the ideal: student forward and backward, teacher forward, nothing else",
        *step.tables(args.rounds),
        "## The loss and its region",
        *kernels.tables(3 * args.rounds),
        "## Learning masks",
        *masks.tables(args.rounds),
    ]
    write("\n\n".join(parts), args.write)


if __name__ == "__main__":
    main()
