"""`asyncinfer completion`: scripts that let a shell complete commands and options."""

import click

from asyncinfer.cli import options
from asyncinfer.cli.output import say

_SHELLS = ("bash", "zsh", "fish")


@options.command(
    "completion",
    "asyncinfer completion bash > ~/.asyncinfer.bash    # then: source ~/.asyncinfer.bash",
    "mkdir -p ~/.zfunc && asyncinfer completion zsh > ~/.zfunc/_asyncinfer",
    "asyncinfer completion fish > ~/.config/fish/completions/asyncinfer.fish",
)
@click.argument("shell", type=click.Choice(_SHELLS))
def completion(shell: str) -> None:
    """Print the completion script of a shell."""
    from click.shell_completion import get_completion_class

    from asyncinfer.cli.commands import COMPLETE_VARIABLE, NAME, commands

    completion_class = get_completion_class(shell)
    assert completion_class, "click supports each of _SHELLS"
    say(completion_class(commands, {}, NAME, COMPLETE_VARIABLE).source() + "\n")
