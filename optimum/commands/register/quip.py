"""`optimum-cli quip …`: Optimum finds this file by its path; it passes everything after `quip` to our command line."""

from argparse import REMAINDER, ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


def _main(arguments: list[str]) -> int:
    from transformers_quip.cli import main

    return main(arguments, program="optimum-cli quip")


class QuipCommand(BaseOptimumCLICommand):
    """All commands of `transformers-quip`, under Optimum's name."""

    COMMAND = CommandInfo(name="quip", help="Quantize language models to 2 bits with QuIP#.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Takes all arguments, including --help."""
        parser.add_argument("arguments", nargs=REMAINDER)
        parser.print_help = lambda file=None: _main(["--help"])

    def run(self) -> None:
        """Run it and leave with its exit code."""
        raise SystemExit(_main(self.args.arguments))


REGISTER_COMMANDS = [QuipCommand]
