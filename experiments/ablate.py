"""Which of a method's choices matter: trainings that differ in one choice each, under one budget, in one table.

    python experiments/ablate.py experiments/paper_choices.yaml [more.yaml ...] [a.b=c ...]

It is compare.py for another kind of table: `shared` has the script and its configuration, each entry of `trainings` the
overrides by which it differs, and `metrics` the columns that show how a training went. All else is as there.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the repository is not installed

from utils import add_sources, command_line

with command_line(__doc__, __name__) as parser:
    add_sources(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the trainings and stop")
    parser.add_argument("--part", help=argparse.SUPPRESS)

import compare

main = partial(compare.main, own_parser=parser)

if __name__ == "__main__":
    sys.exit(main())
