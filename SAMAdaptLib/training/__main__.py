"""`python -m SAMAdaptLib.training FILE`: run a training file."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from SAMAdaptLib.errors import SAMAdaptError
from SAMAdaptLib.training.config import read_config
from SAMAdaptLib.training.run import run_training


def main(arguments: list[str] | None = None) -> int:
    """Run the file named on the command line; 2 means that it cannot be run as it is."""
    parser = argparse.ArgumentParser(prog="python -m SAMAdaptLib.training", description=__doc__)
    parser.add_argument("file", type=Path, help="training file in YAML")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    try:
        run_training(read_config(options.file), logging.getLogger("training").info)
    except SAMAdaptError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
