"""The command line of launch/pretrain.py: an option for every key of ``pretraining.config``."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import inspect
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from pretraining.config import SECTIONS, ConfigError, describe


def parse(argv: Sequence[str] | None, about: str) -> tuple[str, list[str]]:
    """The config file and what replaces its values, as ``config.load_config`` takes both.

    Args:
        argv: without the program's name; None: ``sys.argv``'s.
        about: what stands above the options in the help.

    Raises:
        ConfigError: an option that there is not, or without what it needs; names a near one.
    """
    parser = _Parser(
        usage="%(prog)s CONFIG [--SECTION.KEY VALUE ...]", description=about, allow_abbrev=False
    )
    parser.add_argument(
        "config", metavar="CONFIG", help="a TOML file, e.g. configs/quickstart.toml"
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="SECTION.KEY=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="the same as --SECTION.KEY VALUE, several at once",
    )
    for section, owner in SECTIONS.items():
        title = " ".join((owner.__doc__ or "").replace("``", "").split()).rstrip(".")
        group = parser.add_argument_group(title)
        texts, hints = _docstrings(owner), get_type_hints(owner, include_extras=True)
        for field in dataclasses.fields(owner):
            hint = hints[field.name]
            choices = get_args(hint) if get_origin(hint) is Literal else ()
            kind = "" if choices else f"{describe(hint)}; "
            nargs = {bool: "?", tuple: "+"}.get(get_origin(hint) or hint)
            group.add_argument(
                f"--{section}.{field.name}",
                dest="overrides",
                metavar="|".join(map(str, choices)) or "VALUE",
                nargs=nargs,
                const="true" if nargs == "?" else None,
                action=_Override,
                help=f"{texts.get(field.name, '')} ({kind}{_default(field)})".replace("%", "%%"),
            )
    arguments, rest = parser.parse_known_args(argv)
    for word in rest:
        parser.error(_unknown(word))
    return arguments.config, arguments.overrides


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (--help has every option)")


class _Override(argparse.Action):
    """``--a.b VALUE`` as one text; of several values a list in TOML's syntax."""

    def __call__(
        self, parser: object, namespace: argparse.Namespace, values: Any, option: object = None
    ) -> None:
        if not isinstance(values, str):
            values = values[0] if len(values) == 1 else f"[{', '.join(values)}]"
        namespace.overrides = [*namespace.overrides, f"{self.option_strings[0]}={values}"]


def _default(field: dataclasses.Field[Any]) -> str:
    value = field.default
    if value is dataclasses.MISSING:
        return "required, here or in the file"
    if isinstance(value, bool) or value is None:
        value = str(value).lower()
    if isinstance(value, tuple):
        value = list(value)
    return f"default {'empty' if value == '' else value}"


def _docstrings(section: type) -> dict[str, str]:
    """What stands below each field of a dataclass in its source."""
    (node,) = ast.parse(inspect.getsource(section)).body
    assert isinstance(node, ast.ClassDef)
    return {
        field.target.id: " ".join(text.value.value.replace("``", "").split())
        for field, text in pairwise(node.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
    }


def _unknown(word: str) -> str:
    if not word.startswith("--"):
        return f"unexpected argument {word}"
    name = word[2:].partition("=")[0]
    keys = [
        f"{s}.{field.name}" for s, owner in SECTIONS.items() for field in dataclasses.fields(owner)
    ]
    # --lr, or a key in a section that is not its own
    near = [key for key in keys if key.partition(".")[2] == name.rpartition(".")[2]]
    near = near or difflib.get_close_matches(name, keys, n=1)
    return f"unknown option --{name}" + (f"; did you mean --{near[0]}?" if near else "")
