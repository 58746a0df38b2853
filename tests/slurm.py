"""A Slurm cluster of one machine for the tests: its own munged, slurmctld and slurmd on the
loopback interface.

    with Cluster(folder) as cluster:
        subprocess.run(["sbatch", ...], env=cluster.environment)

It reads no configuration of the machine's, and nothing of it is left, however the tests end: each
daemon is in a PID namespace of its own, and ending that ends its jobs too. Partition `low` is
preempted, with a time of grace and a requeue, by `high`; `down` takes jobs and starts none. There
is no accounting.
"""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

PROGRAMS = [
    "munged",
    "slurmctld",
    "slurmd",
    "sbatch",
    "srun",
    "squeue",
    "scancel",
    "scontrol",
    "sinfo",
    "setpriv",
    "unshare",
]
SEARCHED = os.pathsep.join(
    [os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin"]
)  # not on all PATHs
PATIENCE = 60.0  # seconds for a daemon to start or to end
# A daemon's PID namespace ends with its caller, even if that is killed. Its first process must wait
# for what others
# leave behind, which bash does.
ALONE = [
    "setpriv",
    "--pdeathsig",
    "KILL",
    "unshare",
    "--pid",
    "--mount-proc",
    "--fork",
    "--kill-child",
]
INIT = ["bash", "-c", '"$@" & wait $!', "init"]

# The node may pretend to have more than the machine (config_overrides). A job that was requeued
# waits a second more
# than cred_expire, of which 5 s is the least and 120 s the default.
CONFIGURATION = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1,bf_continue
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MaxArraySize={max_array_size}
ReturnToService=2
KillWait={kill_wait}
NodeName=node NodeHostname={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=1000000
PartitionName=low Nodes=node Default=YES PriorityTier=1 PreemptMode={preempt_mode} \
GraceTime={grace} MaxTime=60
PartitionName=high Nodes=node PriorityTier=10 PreemptMode=OFF MaxTime=60
PartitionName=down Nodes=node State=DOWN
"""


def missing() -> list[str]:
    """Return what a Cluster needs and this machine lacks; nothing where it can run."""
    lacks = [program for program in PROGRAMS if not shutil.which(program, path=SEARCHED)]
    if os.geteuid():
        lacks.append("root")
    elif (
        "unshare" not in lacks and subprocess.run([*ALONE, "true"], capture_output=True).returncode
    ):
        lacks.append("the right to make namespaces")
    return lacks


def free_ports(number: int) -> list[int]:
    """Return ports of the loopback interface that nothing listens on, below those that the kernel
    gives away itself.
    """
    ports: list[int] = []
    while len(ports) < number:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as probe:
            if port not in ports and probe.connect_ex(("127.0.0.1", port)):
                ports.append(port)
    return ports


class Cluster:
    """The daemons of one cluster: `with` starts them, waits until the node is idle, and ends them
    and all jobs.

    environment -- for the client programs and whatever calls them: os.environ, and where this
    cluster is
    """

    def __init__(
        self,
        folder: Path,
        *,
        cpus: int = 4,
        grace: int = 30,
        kill_wait: int = 5,
        preempt_mode: str = "REQUEUE",
        max_array_size: int = 1001,
    ) -> None:
        """Describe the cluster.

        folder          -- for everything it writes; the path must be short, as it holds a socket
        cpus            -- of the node, however many the machine has
        grace           -- seconds that a preempted job has until it is ended
        kill_wait       -- seconds between SIGTERM and SIGKILL of a job that is ended
        preempt_mode    -- REQUEUE or CANCEL: what becomes of a job that is preempted
        max_array_size  -- one more than the greatest index of a job array
        """
        self.folder = folder.resolve()
        host = socket.gethostname().partition(".")[0]
        self.configuration = CONFIGURATION.format(
            host=host,
            ports=free_ports(2),
            folder=self.folder,
            cpus=cpus,
            grace=grace,
            kill_wait=kill_wait,
            preempt_mode=preempt_mode,
            max_array_size=max_array_size,
        )
        inherited = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith(("SLURM", "SBATCH", "SQUEUE", "SRUN"))
        }
        self.environment = inherited | {
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PATH": SEARCHED,
        }
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.namespaces: set[str] = set()

    def __enter__(self) -> Cluster:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start the daemons one after the other."""
        for name in ("state", "spool"):
            (self.folder / name).mkdir(parents=True)
        (self.folder / "slurm.conf").write_text(self.configuration)
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        files = {"socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        flags = [f"--{flag}={self.folder / 'munge'}.{ending}" for flag, ending in files.items()]
        # Forced: it would trust no folder that others may write to, such as those for temporary
        # files.
        self.spawn("munged", "--foreground", "--force", f"--key-file={key}", *flags)
        self.until("munged", (self.folder / "munge.socket").exists)
        self.spawn("slurmctld", "-D")
        self.until("slurmctld", lambda: "is UP" in self.call("scontrol", "ping", check=False))
        self.spawn("slurmd", "-D", "-N", "node")
        self.until("slurmd", lambda: self.call("sinfo", "-h", "-p", "low", "-o", "%T") == "idle")

    def spawn(self, name: str, *flags: str) -> None:
        """Start a daemon, with what it says in NAME.log."""
        with open(self.folder / f"{name}.log", "ab") as log:
            # A session of its own: Ctrl-C is for the tests.
            self.daemons[name] = daemon = subprocess.Popen(
                [*ALONE, *INIT, name, *flags],
                env=self.environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        mine = os.readlink("/proc/self/ns/pid")
        while daemon.poll() is None:
            with suppress(OSError):
                theirs = os.readlink(f"/proc/{daemon.pid}/ns/pid_for_children")
                if theirs != mine:
                    self.namespaces.add(theirs)
                    break
            time.sleep(0.01)

    def until(self, name: str, ready: Callable[[], bool]) -> None:
        """Wait until `ready`; the daemon must not have ended by then."""
        deadline = time.monotonic() + PATIENCE
        while not ready():
            log = (self.folder / f"{name}.log").read_text()[-2000:]
            assert self.daemons[name].poll() is None, f"{name} ended: {log}"
            assert time.monotonic() < deadline, f"{name} is not ready after {PATIENCE} s: {log}"
            time.sleep(0.1)

    def call(self, *command: str, text: str | None = None, check: bool = True) -> str:
        """Return what a client program prints; it must succeed, unless `check` is off."""
        done = subprocess.run(
            command, env=self.environment, input=text, capture_output=True, text=True, timeout=180
        )
        assert done.returncode == 0 or not check, f"{' '.join(command)}: {done.stderr}{done.stdout}"
        return done.stdout.strip()

    def processes(self) -> list[int]:
        """Return the processes of the daemons and the jobs."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has ended
                if os.readlink(path / "ns/pid") in self.namespaces:
                    found.append(int(path.name))
        return found

    def stop(self) -> None:
        """End the daemons and the jobs, and wait until they are gone."""
        for daemon in self.daemons.values():
            daemon.kill()
            daemon.wait()
        deadline = time.monotonic() + PATIENCE
        while left := self.processes():
            assert time.monotonic() < deadline, f"processes {left} are left"
            time.sleep(0.02)
