"""The `duetjax` command: generate, serve, bench, convert, explain, simulate, plan and others."""

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import NoReturn

from duetjax.cli_bench import add_bench
from duetjax.cli_doctor import add_doctor
from duetjax.cli_end import discard_output
from duetjax.cli_files import add_convert, add_trace_plot
from duetjax.cli_flags import EPILOG
from duetjax.cli_foretell import add_explain, add_plan, add_simulate
from duetjax.cli_generate import add_generate
from duetjax.cli_profile import add_compile, add_profile
from duetjax.cli_serve import add_serve
from duetjax.config import DuetJAXError
from duetjax.log_lines import LogFormat, log_to_stderr

_log = logging.getLogger("duetjax")
_COMMANDS = (
    *(add_generate, add_serve, add_convert, add_bench, add_explain, add_compile, add_profile),
    *(add_simulate, add_plan, add_trace_plot, add_doctor),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0; 1 for a fault or a dead engine; 130."""
    args = _parser().parse_args(argv)
    log_format = LogFormat(getattr(args, "log_format", LogFormat.TEXT))
    try:
        with log_to_stderr(log_format):
            try:
                return int(args.run(args))
            except DuetJAXError as error:
                _tell_error(error, log_format)
                return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        discard_output()
        return 0


def _tell_error(error: DuetJAXError, log_format: LogFormat) -> None:
    """The one line with which a command ends that cannot do what it should."""
    if log_format is LogFormat.JSON:
        _log.error("%s", error)
    else:
        print(f"duetjax: error: {error}", file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    """Refuses a command line in one line, as everything else is refused."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"duetjax: error: {message}; see `{self.prog} --help`\n")


def _parser() -> argparse.ArgumentParser:
    """Every command adds its flags and what it runs: see the modules `cli_*`."""
    parser: argparse.ArgumentParser = _Parser(prog="duetjax", description=__doc__, epilog=EPILOG)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in _COMMANDS:
        add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
