"""A process that has imported what training needs, and forks for every command: real processes, to be killed for real.

Each command starts in a moment instead of seconds. It runs in one thread, so that forking is safe.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback


class Zygote:
    """Starts vlkit commands."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def start(self, *args: object, log: object, **env: str) -> int:
        """Start `vlkit ARGS...` in a process of its own and return its id; its output goes into the file `log`."""
        return self._ask({"args": list(map(str, args)), "env": env, "log": str(log)})

    def wait(self, pid: int) -> int:
        """Wait for a process and return its exit code; -9 after SIGKILL."""
        return self._ask({"wait": pid})

    def run(self, *args: object, log: object, **env: str) -> int:
        """Start a command, wait for it, and return its exit code."""
        return self.wait(self.start(*args, log=log, **env))

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait(30)

    def _ask(self, question: dict) -> int:
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def run_command(question: dict) -> None:
    """Become the command, in the forked process."""
    log = os.open(question["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(question["env"])
    sys.argv = ["vlkit", *question["args"]]
    code = 1
    try:
        from vlkit.cli import main

        main()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def fork_on_request() -> None:
    """Import what training needs, then fork for every line on stdin."""
    import peft  # noqa: F401
    import transformers  # noqa: F401
    from transformers import CLIPModel, SiglipModel, SiglipTokenizer  # noqa: F401

    import vlkit.cli
    import vlkit.training.train_retrieval  # noqa: F401

    for line in sys.stdin:
        question = json.loads(line)
        if "wait" in question:
            status = os.waitpid(question["wait"], 0)[1]
            print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            run_command(question)
        print(json.dumps(pid), flush=True)


if __name__ == "__main__":
    fork_on_request()
