"""What commands share: their settings as flags, where the server is, JSON, examples."""

import functools
import math
import os
from collections.abc import Callable
from typing import Any, Final, TypeVar

import click
from msgspec import Struct

from asyncinfer import settings
from asyncinfer.settings import Knob, Settings

DEFAULT_URL: Final = "http://127.0.0.1:8000"

_Function = TypeVar("_Function", bound=Callable[..., Any])


def command(
    name: str, *examples: str, **more: Any
) -> Callable[[Callable[..., int | None]], click.Command]:
    """A command whose --help ends with examples: each a line that can be pasted."""
    epilog = "\n".join(["\b", "Examples:", *(f"  {example}" for example in examples)])
    return click.command(name, epilog=epilog, **more)


# --- settings --------------------------------------------------------------------------------


def knobs(*, hidden: bool = False) -> Callable[[_Function], _Function]:
    """All settings as flags; the command is given them as `chosen`, with the environment's."""

    def add(function: Callable[..., Any]) -> Any:
        @functools.wraps(function)
        def run(*args: Any, **given: Any) -> Any:
            flags = {knob.name: given.pop(knob.name) for knob in settings.knobs()}
            return function(*args, chosen=_read(flags), **given)

        for knob in reversed(settings.knobs()):
            run = _option(knob, hidden)(run)
        return run

    return add


def _read(flags: dict[str, Any]) -> Settings:
    given = {name: str(value) for name, value in flags.items() if value is not None}
    return settings.read(os.environ, given)


def _option(knob: Knob, hidden: bool) -> Callable[[_Function], _Function]:
    is_switch = isinstance(knob.default, bool)
    flag = f"{knob.flag}/--no-{knob.flag.removeprefix('--')}" if is_switch else knob.flag
    metavar = None if is_switch else (knob.unit or knob.name).upper()
    default: dict[str, Any] = {"default": None}
    return click.option(
        flag, knob.name, metavar=metavar, help=_help(knob), hidden=hidden, **default
    )


def _help(knob: Knob) -> str:
    default = f"{settings.text(knob.default)} {knob.unit}".strip() or knob.unset
    return f"{knob.help} Default: {default}. [{knob.variable}]"


# --- the server ------------------------------------------------------------------------------


class Server(Struct, frozen=True):
    """Where a service answers, and as whom to ask it."""

    url: str
    api_key: str | None


def server(function: Callable[..., Any]) -> Any:
    """--url and --api-key; the command is given them as `server`."""

    @click.option(
        "--url",
        envvar="ASYNCINFER_URL",
        default=DEFAULT_URL,
        show_default=True,
        help="Where the service answers. [ASYNCINFER_URL]",
    )
    @click.option(
        "--api-key",
        envvar="ASYNCINFER_API_KEY",
        metavar="KEY",
        help="Your API key; better in the environment, since `ps` shows it here. "
        "[ASYNCINFER_API_KEY]",
    )
    @functools.wraps(function)
    def run(*args: Any, url: str, api_key: str | None, **given: Any) -> Any:
        return function(*args, server=Server(url, api_key), **given)

    return run


def tenant(function: Callable[..., Any]) -> Any:
    """--tenant and --all-tenants; the command is given the API's `tenant`."""

    @click.option(
        "--tenant",
        metavar="NAME",
        help="Jobs of this tenant, without inputs and results. Needs the scope operator.",
    )
    @click.option("--all-tenants", is_flag=True, help="Jobs of all tenants, in the same way.")
    @functools.wraps(function)
    def run(*args: Any, tenant: str | None, all_tenants: bool, **given: Any) -> Any:
        if tenant is not None and all_tenants:
            raise click.UsageError("Give --tenant or --all-tenants, not both.")
        return function(*args, tenant="*" if all_tenants else tenant, **given)

    return run


class _Seconds(click.FloatRange):
    """Compares as a number, which `nan` does not."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        seconds = float(super().convert(value, param, ctx))
        if math.isnan(seconds):
            self.fail(f"{value!r} is not a number of seconds.", param, ctx)
        return seconds


def timeout(text: str, *, above_zero: bool = False) -> Callable[[_Function], _Function]:
    """--timeout; the command is given it as `timeout`, None where it was not. With 0 seconds a
    command that only looks is over at once, and one that sends something would send nothing."""
    seconds = _Seconds(0, min_open=above_zero)
    return click.option("--timeout", type=seconds, metavar="SECONDS", help=text)


as_json: Final = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
