"""Runs one program, and ends it when its own standard input ends or it is told to.

The write end of that pipe is held by the process that started us, so the program cannot outlive it, however it
dies. Standard library only, no import of this package: it starts in a few milliseconds.

    python keeper.py STOP_TIMEOUT PROGRAM [ARGUMENT ...]
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading

PR_SET_PDEATHSIG = 1


def die_with_keeper() -> None:
    """Linux: the program gets SIGKILL when the keeper itself is killed. Runs in the child before exec."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main(stop_timeout: float, command: list[str]) -> int:
    on_linux = sys.platform.startswith("linux")
    program = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,  # our own output says one thing: which process it is
        preexec_fn=die_with_keeper if on_linux else None,
    )

    def stop(*_: object) -> None:
        if program.poll() is None:
            program.terminate()

    def watch() -> None:
        while os.read(0, 4096):
            pass
        stop()
        with contextlib.suppress(subprocess.TimeoutExpired):
            program.wait(stop_timeout)
        program.kill()

    signal.signal(signal.SIGTERM, stop)
    if hasattr(signal, "SIGINT"):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for whoever started us
    print(program.pid, flush=True)
    threading.Thread(target=watch, daemon=True).start()
    return program.wait()


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
