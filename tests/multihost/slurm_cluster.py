"""A SLURM cluster of this one machine, without systemd, root or cgroups: all its state lies in one folder."""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
_PLACES = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def missing() -> str | None:
    """Why there can be no cluster here, None when there can."""
    absent = [name for name in COMMANDS if not shutil.which(name, path=_PLACES)]
    if sys.platform != "linux" or absent:
        return f"no {', '.join(absent)} here (Debian, Ubuntu: apt-get install slurm-wlm munge)"
    try:
        socket.gethostbyname(socket.gethostname())
    except OSError:
        return f"the name of this machine, {socket.gethostname()}, has no address"
    return None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Cluster:
    """One controller, one node, one queue; `with` starts and stops the daemons."""

    def __init__(self, folder: Path):
        """Write the configuration."""
        self.folder, self.daemons = folder, []
        node = socket.gethostname().split(".")[0]
        for name in ("state", "spool", "log"):
            (folder / name).mkdir(parents=True)
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o600)
        # cred_expire is also how long a requeued job waits (120 s by default).
        (folder / "slurm.conf").write_text(
            f"""ClusterName=test
SlurmctldHost={node}(127.0.0.1)
SlurmUser={getpass.getuser()}
SlurmdUser={getpass.getuser()}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=5
MpiDefault=none
ReturnToService=2
KillWait=10
SlurmctldPort={_free_port()}
SlurmdPort={_free_port()}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
NodeName={node} NodeAddr=127.0.0.1 CPUs={max(2, os.cpu_count() or 2)} State=UNKNOWN
PartitionName=main Nodes={node} Default=YES MaxTime=INFINITE State=UP
"""
        )

    def __enter__(self):
        """Start the daemons and wait for the node."""
        try:
            munge = [f"--{name}={self.folder}/munge.{name.split('-')[0]}" for name in ("key-file", "socket")]
            munge += [
                f"--{name}={self.folder}/munge.{name}" for name in ("pid-file", "log-file", "seed-file")
            ]
            self._start("munged", "--foreground", "--force", *munge)
            self._until(lambda: (self.folder / "munge.socket").exists(), "munged")
            self._start("slurmctld", "-D", "-f", f"{self.folder}/slurm.conf")
            self._start("slurmd", "-D", "-f", f"{self.folder}/slurm.conf")
            self._until(
                lambda: self.call("sinfo", "--noheader", "--format=%t", check=False) == "idle", "slurmd"
            )
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        """Cancel what runs and stop the daemons, the last one first."""
        if len(self.daemons) == 3:
            self.call("scancel", f"--user={getpass.getuser()}", check=False)
            deadline = time.monotonic() + 20
            while self.call("squeue", "--noheader", check=False) and time.monotonic() < deadline:
                time.sleep(0.5)
        for daemon in reversed(self.daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def _start(self, name: str, *arguments: str) -> None:
        with open(self.folder / "log" / name, "w") as log:
            self.daemons.append(
                subprocess.Popen(
                    [shutil.which(name, path=_PLACES), *arguments],
                    env=self.environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )

    def _until(self, ready, name: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            gone = [daemon.args[0] for daemon in self.daemons if daemon.poll() is not None]
            if gone or time.monotonic() > deadline:
                logs = {path.name: path.read_text()[-2000:] for path in (self.folder / "log").iterdir()}
                raise RuntimeError(f"{name} did not come up; ended: {gone}; {logs}")
            time.sleep(0.1)

    def environment(self) -> dict[str, str]:
        """Environment of a client."""
        return os.environ | {"SLURM_CONF": f"{self.folder}/slurm.conf", "PATH": _PLACES}

    def call(self, *command: str, check: bool = True, env: dict[str, str] | None = None) -> str:
        """Standard output of a client command."""
        run = subprocess.run(
            command, env=self.environment() | (env or {}), capture_output=True, text=True, timeout=60
        )
        if check and run.returncode:
            raise RuntimeError(f"{command}: {run.returncode}\n{run.stdout}{run.stderr}")
        return run.stdout.strip()

    def state(self, job: str) -> dict[str, str]:
        """What SLURM knows of a job: JobState, ExitCode, Restarts and so on."""
        fields = self.call("scontrol", "--oneliner", "show", "job", job).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)
