"""The command `samadapt`: everything the library does, for a terminal and for scripts."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from SAMAdaptLib import __version__
from SAMAdaptLib.errors import SAMAdaptError

BAD_INPUT = 2
STOPPED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: As typed, without the program's name; None for those of the process.

    Returns:
        0 when done, 1 when a check failed, 2 for input that cannot be used, 130 when stopped by the user.
    """
    parsed = _parser().parse_args(arguments)
    try:
        return int(parsed.run(parsed))
    except SAMAdaptError as error:
        print(f"samadapt: {error}", file=sys.stderr)
        return BAD_INPUT
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123
        return 0
    except KeyboardInterrupt:
        print("samadapt: stopped; what was finished is kept.", file=sys.stderr)
        return STOPPED


def _parser() -> argparse.ArgumentParser:
    from SAMAdaptLib.cli import check, models, segment

    parser = argparse.ArgumentParser(
        prog="samadapt",
        description="Segment medical volumes from a few prompts. For research use, not a medical device.",
    )
    parser.add_argument("--version", action="version", version=f"samadapt {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for part in (segment, models, check):
        part.add_commands(commands)
    return parser
