"""A real Slurm of two nodes on this one machine, for tests of submission, preemption and requeue.

It needs root and Debian's packages `slurm-wlm` and `munge`, and touches nothing outside a folder of its own: own keys,
own ports, daemons that end with the block. A job in partition `urgent` preempts one in `debug`, which gets SIGTERM,
some time of grace, and is requeued. There is no accounting (no `sacct`).

    python tests/slurm.py      start one, print what to export, stop at Ctrl-C
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

HOST = socket.gethostname().split(".")[0]
NODES = ("127.0.0.1", "127.0.0.2")  # names, and such that resolve: the ranks look for rank 0 under that of its node

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={base}/munge.socket
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool-%n
SlurmctldPidFile={base}/ctld.pid
SlurmdPidFile={base}/d-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerType=sched/backfill
SchedulerParameters=requeue_delay=1,sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
MpiDefault=none
KillWait=10
NodeName={nodes[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 RealMemory=500 State=UNKNOWN
NodeName={nodes[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 RealMemory=500 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=60 State=UP PriorityTier=1 GraceTime={grace_s}
PartitionName=urgent Nodes=ALL MaxTime=60 State=UP PriorityTier=10
"""


def why_not_here() -> str | None:
    """What this machine lacks for a Slurm, None if nothing."""
    if os.geteuid() != 0:
        return "needs root"
    missing = [name for name in ("slurmctld", "slurmd", "sbatch", "munged") if shutil.which(name) is None]
    return f"needs Debian's slurm-wlm and munge (no {', '.join(missing)})" if missing else None


def wait_until(condition: Callable[[], object], what: str, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds:.0f} s in vain until {what}"
        time.sleep(0.2)


class Cluster:
    """Slurm's commands against the cluster in `base`."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.environ = {"SLURM_CONF": str(base / "slurm.conf")}

    def run(self, *command: str) -> str:
        environ = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH"))}
        done = subprocess.run(
            command, env=environ | self.environ, capture_output=True, text=True, timeout=60, check=False, cwd=self.base
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """Fields of `scontrol show job`."""
        shown = self.run("scontrol", "show", "job", "--oneliner", number)
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def submit_urgent(self) -> str:
        """A job on both nodes that preempts what runs in `debug`."""
        command = ("sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--output=/dev/null", "--wrap=sleep 1")
        return self.run(*command).strip()

    def wait_for(self, number: str, seconds: float = 60, **fields: str) -> None:
        wait_until(
            lambda: self.job(number).items() >= fields.items(), f"job {number} has {fields}: {self.base}", seconds
        )

    def start_now(self, number: str) -> None:
        """Let a requeued job start at once, not after two minutes."""
        self.run("scontrol", "update", f"jobid={number}", "starttime=now")


@contextlib.contextmanager
def slurm(*, grace_s: int = 30) -> Iterator[Cluster]:
    """Start a cluster, and stop it with all that runs on it."""
    # Not pytest's temporary folder: the path of a socket must be short.
    base = Path(tempfile.mkdtemp(prefix="slurm-"))
    for name in ("state", *(f"spool-{node}" for node in NODES)):
        (base / name).mkdir()
    (base / "munge.key").write_bytes(secrets.token_bytes(128))
    (base / "munge.key").chmod(0o600)
    with contextlib.ExitStack() as sockets:
        ports = [_free_port(sockets) for _ in range(3)]
    conf = CONF.format(base=base, host=HOST, nodes=NODES, ports=ports, grace_s=grace_s)
    (base / "slurm.conf").write_text(conf)
    cluster = Cluster(base)
    munge = [f"--{key}-file={base}/munge.{key}" for key in ("key", "pid", "log", "seed")]
    with contextlib.ExitStack() as daemons:
        daemons.enter_context(
            _daemon(cluster, "munged", "--foreground", "--force", f"--socket={base}/munge.socket", *munge)
        )
        wait_until((base / "munge.socket").exists, f"munged runs; see {base}", 10)
        daemons.enter_context(_daemon(cluster, "slurmctld", "-D"))
        for node in NODES:
            daemons.enter_context(_daemon(cluster, "slurmd", "-D", "-N", node))
        wait_until(lambda: _states(cluster) == {"idle"}, f"the nodes are up; see {base}", 60)
        try:
            yield cluster
        finally:
            for job in cluster.run("squeue", "--noheader", "--format=%i").split():
                cluster.run("scancel", job)
            wait_until(lambda: not cluster.run("squeue", "--noheader"), "all jobs are gone", 60)
    shutil.rmtree(base)


def _states(cluster: Cluster) -> set[str]:
    with contextlib.suppress(AssertionError):  # slurmctld does not answer yet
        return set(cluster.run("sinfo", "--noheader", "--format=%t").split())
    return set()


@contextlib.contextmanager
def _daemon(cluster: Cluster, *command: str) -> Iterator[None]:
    log = cluster.base / f"{'-'.join(command[:1] + command[2:] if command[0] == 'slurmd' else command[:1])}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command, env=os.environ | cluster.environ, stdout=file, stderr=file, start_new_session=True
        )
    try:
        yield
    finally:
        process.terminate()
        process.wait(30)


def _free_port(sockets: contextlib.ExitStack) -> int:
    server = sockets.enter_context(socket.socket())
    server.bind(("127.0.0.1", 0))
    return server.getsockname()[1]


if __name__ == "__main__":
    with slurm() as started:
        sys.stdout.write(f"export SLURM_CONF={started.environ['SLURM_CONF']}\n")
        sys.stdout.flush()
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
