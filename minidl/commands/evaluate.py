"""Test a network: accuracy, per class and by superclass."""

import argparse

from minidl.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def main(args: argparse.Namespace) -> None:
    raise UsageError("this command is being written")
