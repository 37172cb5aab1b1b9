"""Errors that a user can cause or mend: each ends a command with one line and its own exit code."""


class UserError(Exception):
    """A fault outside the program. Its text names the thing, its value and what is needed."""

    exit_code = 1


class UsageError(UserError):
    """A command line or a setting that cannot be carried out."""

    exit_code = 2


class DataError(UserError):
    """A data set that is missing, damaged or not what it claims to be."""

    exit_code = 3


class DeviceError(UserError):
    """A device, driver, compiler or library that is missing, or memory that does not suffice."""

    exit_code = 4


class CheckpointError(UserError):
    """A file of a run that cannot be read, written, or loaded into this network."""

    exit_code = 5


class DivergedError(UserError):
    """A training run whose numbers are no longer finite: loss, gradient or weights."""

    exit_code = 6
