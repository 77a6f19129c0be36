"""report.py: makes one HTML file of one or several runs, with pictures and what they mean."""

from __future__ import annotations

import argparse
from pathlib import Path

from errors import InputError, run
from report_page import page
from report_theme import MAX_RUNS
from runs import read_runs
from trackers import write_tensorboard, write_wandb


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Make a report of runs: one HTML file that needs no other file and no network.",
        epilog="example: python tools/report.py runs/quickstart/safegrad runs/quickstart/plain",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN",
                        help=f"folder that safegrad train wrote; up to {MAX_RUNS} are overlaid")
    parser.add_argument("--out", type=Path, metavar="FILE",
                        help="the HTML file (default: report.html in the first RUN)")
    parser.add_argument("--tensorboard", action="store_true",
                        help="also write RUN/tensorboard, for tensorboard --logdir")
    parser.add_argument("--wandb", action="store_true",
                        help="also write an offline run into RUN/wandb, for wandb sync")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    if len(given.runs) > MAX_RUNS:
        raise InputError(f"{len(given.runs)} runs were given; at most {MAX_RUNS} can be told apart"
                         " in one picture")
    runs = read_runs(given.runs)
    out = given.out or given.runs[0] / "report.html"
    content, _ = page(runs)
    out.write_text(content, encoding="utf-8")
    print(f"{out}: {len(runs)} run{'s' * (len(runs) > 1)}, {len(content.encode()) / 1e3:.0f} kB")
    for one in runs:
        if given.tensorboard:
            print(write_tensorboard(one))
        if given.wandb:
            print(write_wandb(one))


if __name__ == "__main__":
    run(main)
