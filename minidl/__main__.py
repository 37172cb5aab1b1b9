"""python -m minidl COMMAND, and the script `minidl`. Each command is a file in minidl/commands."""

import argparse
import importlib
import sys

from minidl import command

# {command: its module}. Only the one that was asked for is imported: what it needs may be heavy, or an extra.
COMMANDS = {
    "train": "train",
    "lr-find": "lr_find",
    "summary": "summary",
    "export": "export_weights",
    "import": "import_weights",
    "eval": "evaluate",
    "predict": "predict",
    "plot": "plot",
    "data": "data",
    "doctor": "doctor",
    "gradcheck": "gradcheck",
    "bench": "bench",
}


def main() -> int | None:
    parser = argparse.ArgumentParser(prog="minidl", description="Train convolutional networks, and look into them.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    asked = next((word for word in sys.argv[1:] if not word.startswith("-")), None)
    for name, module_name in COMMANDS.items():
        if asked in COMMANDS and asked != name:
            continue
        module = importlib.import_module(f"minidl.commands.{module_name}")
        subparser = commands.add_parser(name, help=(module.__doc__ or "").partition("\n")[0], description=module.__doc__,
                                        formatter_class=argparse.RawDescriptionHelpFormatter)
        module.add_arguments(subparser)
        subparser.set_defaults(act=module.main)
    args = parser.parse_args()
    return args.act(args)


def script() -> int:
    """The entry point of the script `minidl` -> exit code."""
    return command.run(main)


if __name__ == "__main__":
    sys.exit(script())
