"""The `--help` of a verb: its usage, flags without a value, and examples to copy."""

from typing import Any

from typer.core import TyperCommand, TyperGroup

from jobs.terminal.examples import EXAMPLES
from jobs.terminal.output import say


class Verb(TyperCommand):
    """A verb. Its usage shows the arguments by name, optional ones in brackets."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:  # noqa: ARG002, click passes it
        return ["[OPTIONS]", *(_usage(each) for each in self.params if each.param_type_name == "argument")]

    def get_params(self, ctx: Any) -> Any:
        return _without_types(super().get_params(ctx))

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        say(" Examples:")
        for example in EXAMPLES[str(self.name)]:
            say(f"   visual-memory {example}")
        say("")


class Verbs(TyperGroup):
    """All verbs."""

    def get_params(self, ctx: Any) -> Any:
        return _without_types(super().get_params(ctx))


def _without_types(parameters: Any) -> Any:
    """The parameters, without types in their help: a flag takes no value, and an argument's name explains it."""
    for parameter in parameters:
        if getattr(parameter, "is_flag", False):
            parameter.metavar = ""
        elif parameter.param_type_name == "argument":
            parameter.display_type_rich = _nothing
    return parameters


def _nothing(**_: Any) -> str:
    return ""


def _usage(argument: Any) -> str:
    name = argument.metavar or argument.name.upper()
    name = name if argument.nargs == 1 or name.endswith("...") else f"{name}..."
    return name if argument.required else f"[{name}]"
