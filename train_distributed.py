"""Submit a training to Slurm. Where, how large and how long is in the section `launcher` of its configuration.

    python train_distributed.py config.yaml [more.yaml ...] [a.b=c ...]     submit train_capi.py
    python train_distributed.py config.yaml a.b=c --dry-run                 print the sbatch script and submit nothing
    python train_distributed.py --script train_mine.py config.yaml          submit another script of this folder

A script can be submitted if `--print-config` makes it check its arguments and print the resolved configuration, with
the section `launcher` and the key `train.output_dir`, and if it starts its ranks with `distributed.session`.
"""

from utils import add_sources, command_line

with command_line(__doc__, __name__) as parser:
    add_sources(parser)
    parser.add_argument("--script", default="train_capi.py", help="training script; default: %(default)s")
    parser.add_argument("--dry-run", action="store_true", help="print the sbatch script and submit nothing")

import logging
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from config import LauncherConfig, build
from launch import ROOT, Job
from utils import UserError, ending_in_words, setup_logging

logger = logging.getLogger("launch")


def find_script(name: str) -> Path:
    """A script of this repository.

    Raises: UserError if there is none of that name.
    """
    script = (ROOT / name).absolute()
    if not script.is_file() or not script.is_relative_to(ROOT):
        raise UserError(f"--script {name}: must be the name of a training script in {str(ROOT)!r}")
    return script


def read_job(script_name: str, sources: list[str]) -> Job | None:
    """Have the script check its configuration; None if it found a mistake, which it then has explained itself.

    Raises: UserError if there is no such script in this repository.
    """
    script = find_script(script_name)
    done = subprocess.run(
        [sys.executable, str(script), *sources, "--print-config"], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode != 0:
        return None
    cfg: dict[str, Any] = yaml.safe_load(done.stdout)
    launcher = build(LauncherConfig, cfg["launcher"], "launcher")
    return Job(script, done.stdout, Path(cfg["train"]["output_dir"]), launcher, is_training=True)


def check_slurm(job: Job, sources: list[str]) -> None:
    """Raise a UserError that says how to start the run without Slurm if there is none."""
    if shutil.which("sbatch") is None:
        machines = (
            "" if job.launcher.num_nodes == 1 else " on each machine, with the name of one of them for FIRST_MACHINE"
        )
        raise UserError(
            f"there is no Slurm here (no sbatch on the PATH). Without it, run{machines}:\n"
            f"    {job.torchrun_line(sources)}"
        )


@ending_in_words
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 0 submitted or shown, 2 a mistake that the message explains."""
    args = parser.parse_intermixed_args(arguments)
    setup_logging()
    if args.schema or args.help_all is not None:
        asked = ["--schema"] if args.schema else [f"--help-all={args.help_all}"]
        return subprocess.run([sys.executable, find_script(args.script), *args.sources, *asked], check=False).returncode
    job = read_job(args.script, args.sources)
    if job is None:
        return 2
    if args.dry_run:
        sys.stdout.write(job.sbatch_script(job.new_folder()))
        return 0
    check_slurm(job, args.sources)
    number, log = job.submit()
    logger.info("submitted job %s; its output: %s", number, log)
    return 0


if __name__ == "__main__":
    sys.exit(main())
