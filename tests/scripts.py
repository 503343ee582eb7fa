"""Run scripts in forks of a server process that has already imported their libraries.

Importing torch, transformers and peft takes longer than most of what tests let a script do. This
module is both sides: tests use ``ScriptServer``, which runs the module as the server. A request is
a line of JSON with the arguments of ``run``. The answer is two lines: the id of the process when
the script starts, and its exit status when it ends, negative for a signal.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
TIMEOUT = 600  # seconds


class ScriptServer:
    """Starts the server process; it ends with the process that started it."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(
        self,
        command: list[str],
        folder: Path,
        environment: dict[str, str] | None = None,
        while_running: Callable[[int], None] = lambda pid: None,
    ) -> tuple[int, str, str]:
        """Run a script, without a terminal.

        Args:
            command: the script and its flags.
            folder: where to run it.
            environment: variables to add; with any, a new interpreter runs the script.
            while_running: called with the id of the process.

        Returns:
            The exit status and what was written to stdout and stderr.
        """
        requests, answers = self.process.stdin, self.process.stdout
        assert requests and answers
        with tempfile.TemporaryDirectory() as streams:
            output, errors = Path(streams, "output"), Path(streams, "errors")
            request = {
                "command": command,
                "folder": folder,
                "environment": {**os.environ, **(environment or {})},
                "new_interpreter": bool(environment),
                "output": output,
                "errors": errors,
            }
            print(json.dumps(request, default=str), file=requests, flush=True)
            pid = int(answers.readline())
            try:
                while_running(pid)
            except BaseException:
                os.kill(pid, signal.SIGKILL)
                raise
            finally:
                status = int(answers.readline())
            return status, output.read_bytes().decode(), errors.read_bytes().decode()


def serve() -> None:
    """Answer requests until there are no more. A fork returns when its script ends."""
    for request in sys.stdin:
        child = os.fork()
        if child == 0:
            return run(**json.loads(request))
        print(child, flush=True)
        status = os.waitpid(child, 0)[1]
        print(os.waitstatus_to_exitcode(status), flush=True)


def run(
    command: list[str],
    folder: str,
    environment: dict[str, str],
    new_interpreter: bool,
    output: str,
    errors: str,
) -> None:
    """Run a script in this process.

    Args:
        command: the script and its flags.
        folder: where to run it.
        environment: all variables.
        new_interpreter: whether the script imports the libraries itself, so that they read their
            variables. With CUDA it always does, because a fork cannot use what its parent began.
        output: file for stdout.
        errors: file for stderr.
    """
    signal.alarm(TIMEOUT)
    # A shell starts background jobs, perhaps the tests, with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, path in enumerate([os.devnull, output, errors]):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    os.chdir(folder)
    if new_interpreter or torch.cuda.is_available():
        os.execve(sys.executable, [sys.executable, *command], environment)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    import process

    process.silence_libraries()  # must precede the libraries
    import accelerate  # noqa: F401
    import pandas  # noqa: F401
    import peft  # noqa: F401
    import torch

    serve()
