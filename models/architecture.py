"""A named architecture: a builder, its settings, and what its authors report."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from minidl.errors import UsageError
from minidl.layer import Layer

Choice = TypeVar("Choice", str, int, bool)


@dataclass(frozen=True)
class Architecture:
    """builder: function (classes, **settings) -> Layer; settings: of this name; published: top-1 per cent on CIFAR-100
    as the source reports it, "-" where it reports none."""

    builder: Callable[..., Layer]
    settings: Mapping[str, Any]
    published: str
    source: str

    def options(self) -> list[str]:
        """What may be chosen besides the settings of this name."""
        return [name for name, parameter in inspect.signature(self.builder).parameters.items()
                if name not in ("classes", *self.settings) and parameter.kind != parameter.VAR_KEYWORD]

    def create(self, classes: int, options: Mapping[str, Any]) -> Layer:
        """The network, not initialized, with {name: value} of options besides its own settings.

        Raises UsageError for an option that the builder does not have or whose value it refuses.
        """
        builder = inspect.signature(self.builder)
        takes_any = any(parameter.kind == parameter.VAR_KEYWORD for parameter in builder.parameters.values())
        for name in options:
            if name not in self.options() and not takes_any:
                raise UsageError(f"unknown model option {name!r}: this architecture has {', '.join(self.options()) or 'none'}")
        try:
            builder.bind(classes, **self.settings, **options)
        except TypeError as error:
            raise UsageError(f"{self.builder.__name__} cannot be called with classes and options: {error}") from None
        try:
            network = self.builder(classes, **self.settings, **options)
            if not isinstance(network, Layer):
                raise ValueError(f"{self.builder.__name__} returns a {type(network).__name__}, not a Layer")
            return network
        except (ValueError, TypeError) as error:
            if isinstance(error, TypeError) and not options:
                raise  # no value that was given is at fault
            given = ", ".join(f"{name}={value}" for name, value in options.items())
            reason = error if isinstance(error, ValueError) else "a value is of the wrong type"
            raise UsageError(f"model options {given}: {reason}" if given else str(reason)) from None


def one_of(option: str, value: Choice, *choices: Choice) -> Choice:
    """value, if it is one of `choices`. Raises ValueError otherwise."""
    if value not in choices:
        raise ValueError(f"{option} is {value!r}, not one of {', '.join(map(str, choices))}")
    return value


def parse_options(words: Sequence[str]) -> dict[str, Any]:
    """["dropout=0.3", "extra_pool=true"] -> {"dropout": 0.3, "extra_pool": True}. Raises UsageError for another form."""
    options: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not (name and equals and text):
            raise UsageError(f"model option {word!r} is not of the form NAME=VALUE")
        options[name] = _value(text)
    return options


def _value(text: str) -> bool | int | float | str:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
