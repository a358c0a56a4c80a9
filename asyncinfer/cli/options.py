"""Options that commands share: settings, server, tenant, timeout, JSON; and examples in --help."""

import functools
import math
import os
import re
from collections.abc import Callable
from typing import Any, Final, TypeVar

import click
from msgspec import Struct

from asyncinfer.settings import Knob, Settings, knobs
from asyncinfer.settings import read as read_settings
from asyncinfer.settings import text as setting_text

DEFAULT_URL: Final = "http://127.0.0.1:8000"

_Function = TypeVar("_Function", bound=Callable[..., Any])


def command(
    name: str, *examples: str, **more: Any
) -> Callable[[Callable[..., int | None]], click.Command]:
    """A decorator that makes a function a click command; its docstring becomes the --help.

    That ends with `examples`, each a line to paste; `more` are arguments of `click.command`.
    """
    epilog = "\n".join(["\b", "Examples:", *(f"  {example}" for example in examples)])
    return click.command(name, epilog=epilog, **more)


# --- settings ------------------------------------------------------------------------------


def all_settings(*, hidden: bool = False) -> Callable[[_Function], _Function]:
    """A decorator that adds a flag for each setting; the command receives all as `settings`.

    Settings without a flag are read from the environment. `hidden` leaves the flags out of --help.
    A value that cannot be used raises InvalidSetting when the command runs.
    """

    def add(function: Callable[..., Any]) -> Any:
        @functools.wraps(function)
        def run(*args: Any, **values: Any) -> Any:
            flags = {knob.name: values.pop(knob.name) for knob in knobs()}
            return function(*args, settings=_read(flags), **values)

        for knob in reversed(knobs()):
            run = _option(knob, hidden)(run)
        return run

    return add


def _read(flags: dict[str, Any]) -> Settings:
    """Settings from flags by name, of which None is not given, and from the environment."""
    given = {name: str(value) for name, value in flags.items() if value is not None}
    return read_settings(os.environ, given)


def _option(knob: Knob, hidden: bool) -> Callable[[_Function], _Function]:
    """A decorator that adds the flag of one setting; a boolean setting gets a --no- flag too."""
    is_switch = isinstance(knob.default, bool)
    flag = f"{knob.flag}/--no-{knob.flag.removeprefix('--')}" if is_switch else knob.flag
    metavar = None if is_switch else (knob.unit or knob.name).upper()
    return click.option(
        flag,
        knob.name,
        cls=_AdvancedOption if knob.advanced else None,
        metavar=metavar,
        help=_help(knob),
        hidden=hidden,
        default=None,
    )


class _AdvancedOption(click.Option):
    """The flag of a setting that most deployments leave as it is."""


class SettingsCommand(click.Command):
    """A command whose --help lists the flags of advanced settings under a heading of their own."""

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the options into --help, then those of advanced settings."""
        sections: dict[str, list[tuple[str, str]]] = {"Options": [], "Advanced": []}
        for parameter in self.get_params(context):
            if record := parameter.get_help_record(context):
                title = "Advanced" if isinstance(parameter, _AdvancedOption) else "Options"
                sections[title].append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


def _help(knob: Knob) -> str:
    """The text of a setting in --help, with its default and its variable."""
    default = setting_text(knob.default)
    unit = re.sub("(?<=ss)es$|s$", "", knob.unit) if default == "1" else knob.unit
    default = f"{default} {unit}".strip() if default else knob.unset
    return f"{knob.help} Default: {default}. [{knob.variable}]"


# --- the server ----------------------------------------------------------------------------


class ServerOptions(Struct, frozen=True):
    """The address of a service, and the API key to send."""

    url: str
    api_key: str | None
    ca: str | None = None
    """A PEM file with the CA of an https:// address."""


api_key: Final = click.option(
    "--api-key",
    envvar="ASYNCINFER_API_KEY",
    metavar="KEY",
    help="Your API key. Prefer the variable: `ps` shows what is given here. [ASYNCINFER_API_KEY]",
)


ca: Final = click.option(
    "--ca",
    envvar="ASYNCINFER_CA",
    metavar="FILE",
    help="PEM file with the CA of an https:// address, if the system does not trust it. "
    "[ASYNCINFER_CA]",
)


def server(function: Callable[..., Any]) -> Any:
    """A decorator that adds --url, --api-key and --ca; the command receives them as `server`."""

    @click.option(
        "--url",
        envvar="ASYNCINFER_URL",
        default=DEFAULT_URL,
        show_default=True,
        help="Address of the service. [ASYNCINFER_URL]",
    )
    @api_key
    @ca
    @functools.wraps(function)
    def run(*args: Any, url: str, api_key: str | None, ca: str | None, **values: Any) -> Any:
        return function(*args, server=ServerOptions(url, api_key, ca), **values)

    return run


def tenant(what: str, more: str = "") -> Callable[[_Function], _Function]:
    """A decorator that adds --tenant and --all-tenants; the command receives `tenant`.

    That is the API's parameter: a name, `*` for all tenants, or None for the key's own. Giving both
    flags raises click.UsageError. `what` is what the command does with which things of a tenant,
    such as `List jobs`, and `more` what is to be said of it.
    """

    def add(function: Callable[..., Any]) -> Any:
        @click.option(
            "--tenant",
            metavar="NAME",
            help=f"{what} of this tenant{more}. Needs the scope `operator`.",
        )
        @click.option("--all-tenants", is_flag=True, help=f"{what} of all tenants, likewise.")
        @functools.wraps(function)
        def run(*args: Any, tenant: str | None, all_tenants: bool, **values: Any) -> Any:
            if tenant is not None and all_tenants:
                raise click.UsageError("Give --tenant or --all-tenants, not both.")
            return function(*args, tenant="*" if all_tenants else tenant, **values)

        return run

    return add


class _Seconds(click.FloatRange):
    """A range of seconds that also refuses `nan`, which a comparison does not."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The number of seconds; fails with a usage error if it is none, NaN or out of range."""
        seconds = float(super().convert(value, param, ctx))
        if math.isnan(seconds):
            self.fail(f"{value!r} is not a number of seconds.", param, ctx)
        return seconds


def timeout(help_text: str, *, above_zero: bool = False) -> Callable[[_Function], _Function]:
    """A decorator that adds --timeout; the command gets `timeout` in seconds, None without it.

    With 0 seconds a command that only reads ends at once. One that submits jobs would submit none,
    so it needs `above_zero`.
    """
    seconds = _Seconds(0, min_open=above_zero)
    return click.option("--timeout", type=seconds, metavar="SECONDS", help=help_text)


as_json: Final = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
