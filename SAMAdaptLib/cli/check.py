"""`samadapt verify`: are the numbers those of the official code?"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_commands(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "verify",
        help="compare a network with numbers recorded from its official code",
        description="Build the architecture that a set names, run its inputs and compare its outputs.",
    )
    parser.add_argument("sets", type=Path, help="folder of sets, or the JSON file of one")
    parser.add_argument(
        "--checkpoint", type=Path, help="file for a set whose published checkpoint is not stored"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps")
    parser.set_defaults(run=_verify)


def _verify(parsed: argparse.Namespace) -> int:
    from SAMAdaptLib.verify import verify

    rows = verify(parsed.sets, parsed.checkpoint, parsed.device)
    width = max((len(f"{row.set} {row.output}") for row in rows), default=0)
    for row in rows:
        verdict = "ok" if row.passed else "FAILED"
        print(
            f"{row.set} {row.output}".ljust(width),
            f"{row.difference:10.3g}  (at most {row.tolerance:g})  {verdict}",
        )
    failed = sum(not row.passed for row in rows)
    print(f"{len(rows) - failed} outputs agree, {failed} do not")
    return 1 if failed or not rows else 0
