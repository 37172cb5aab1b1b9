#!/usr/bin/env python3
"""Train one of the architectures on CIFAR-100, CIFAR-10 or the bundled digits: `python train.py --help`.

The same as `minidl train`. A run, read from top to bottom, is minidl/fit.py.
"""

import argparse
import sys

from minidl import command
from minidl.commands import train


def main() -> int | None:
    parser = argparse.ArgumentParser(description=train.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    train.add_arguments(parser)
    return train.main(parser.parse_args())


if __name__ == "__main__":
    sys.exit(command.run(main))
