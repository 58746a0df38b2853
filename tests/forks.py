"""Start a script as a copy of a process that has imported torch already.

Importing torch and its optimisers takes four seconds; most runs that the tests start take less. So
one process imports it all, and forks for each run; what follows is as with `python SCRIPT`: a
process of its own, with its arguments, environment and files.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import random
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["forks", "torch._dynamo", "torch.utils.tensorboard", "tyro"])


def begin(command: list[str], cwd: Path, environment: dict[str, str], files: list[Path]) -> None:
    """Be the script command[0], with files as stdout and stderr."""
    for fd, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY), fd)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = command
    sys.path[:] = [str(Path(command[0]).parent), *(p for p in sys.path if Path(p) != HERE)]
    random.seed()  # so that a draw without a seed of its own differs between runs
    np.random.seed()
    try:
        runpy.run_path(command[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which a forked process leaves out


class Fork:
    """Such a process, with what tests need of subprocess.Popen."""

    def __init__(
        self, command: list[str], cwd: Path, environment: dict[str, str], files: list[Path]
    ) -> None:
        self.process = CONTEXT.Process(target=begin, args=(command, cwd, environment, files))
        self.process.start()
        assert self.process.pid
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        """The exit status, -N after signal N, None while it runs."""
        return self.process.exitcode

    def poll(self) -> int | None:
        """Return the exit status so far."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait for the end and return the exit status."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(sys.argv, timeout or 0)
        return self.process.exitcode

    def send_signal(self, signum: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, signum)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.process.kill()
