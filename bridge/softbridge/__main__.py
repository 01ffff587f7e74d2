"""The program: ``softbridge``, and ``python -m softbridge``.

It imports nothing before it can be interrupted: whoever presses Ctrl-C while torch is being imported sees no traceback.
"""

from __future__ import annotations

import signal
import sys

INTERRUPTED = 130  # what a shell reports of a program that SIGINT ends


def main() -> None:
    """Run the command line; see `softbridge.cli` for the exit status."""
    try:
        from softbridge.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # what is left is to leave


if __name__ == "__main__":
    main()
