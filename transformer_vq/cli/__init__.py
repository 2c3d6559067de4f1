"""The console: parse, call, print.

A command is one function in a file of this folder, one name in the table below, and lines of use in examples.py.

torch is imported inside the commands only, so that `--help` and complaints about input come at once.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated

import typer
from typer.main import get_command

from transformer_vq import __version__
from transformer_vq.cli.adopt import adopt
from transformer_vq.cli.bench import bench
from transformer_vq.cli.console import Failure, flush_output, main_process, print_error, settle_streams
from transformer_vq.cli.convert import convert
from transformer_vq.cli.data import data
from transformer_vq.cli.describe import describe
from transformer_vq.cli.doctor import doctor
from transformer_vq.cli.evaluate import eval_
from transformer_vq.cli.examples import epilog
from transformer_vq.cli.export import export, import_
from transformer_vq.cli.generate import generate
from transformer_vq.cli.images import decode, encode, images
from transformer_vq.cli.inspect import inspect
from transformer_vq.cli.length import length
from transformer_vq.cli.plot import plot
from transformer_vq.cli.study import study
from transformer_vq.cli.train import train
from transformer_vq.files import WriteError, complaint

app = typer.Typer(
    name="transformer-vq",
    help="Language models whose attention keys are vector-quantized, in linear time.",
    no_args_is_help=True,
    add_completion=True,
    epilog=epilog(""),
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS: dict[str, Callable[..., None]] = {
    "train": train,
    "eval": eval_,
    "length": length,
    "inspect": inspect,
    "generate": generate,
    "describe": describe,
    "doctor": doctor,
    "plot": plot,
    "data": data,
    "convert": convert,
    "export": export,
    "import": import_,
    "adopt": adopt,
    "images": images,
    "encode": encode,
    "decode": decode,
}
for _name, _function in COMMANDS.items():
    app.command(_name, epilog=epilog(_name))(_function)
for _name, _group in {"study": study, "bench": bench}.items():
    app.add_typer(_group, name=_name, epilog=epilog(_name))
    for _command in _group.registered_commands:
        assert _command.callback is not None
        _command.epilog = epilog(f"{_name} {_command.name or _command.callback.__name__}")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"transformer-vq {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """What holds for every command."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and leave with its exit code: 0 done, 2 the user's input, 1 anything else.

    Input that is wrong and failures that are expected print one line. Anything unexpected keeps its traceback.
    """
    # A console script does not look for modules in the working folder, where a user's `my_module:my_estimator` lies.
    sys.path.insert(0, "")
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """The exit code of the command line `arguments`, those of the process when None."""
    settle_streams()
    code, reason = _run(arguments), flush_output()
    if reason is None or code:
        return code
    if reason != os.strerror(errno.EPIPE):  # `| head` has seen enough, and need not be told
        print_error(f"standard output: {reason}")
    return 1


def _run(arguments: Sequence[str] | None) -> int:
    try:
        return get_command(app).main(arguments, prog_name="transformer-vq", standalone_mode=False) or 0
    except typer.Abort:
        print_error("interrupted")
        return 1
    except typer.TyperException as error:  # an unknown option, a missing argument
        if error.format_message():  # no arguments at all: the help is on the screen
            print_error(error.format_message())
        return error.exit_code
    except (Failure, WriteError) as error:
        print_error(str(error))
        return 1
    except ModuleNotFoundError as error:
        from transformer_vq.config.extras import missing

        if (found := missing(error)) is None:
            raise
        print_error(str(found))
        return 2
    except MemoryError:
        print_error("there is not enough memory for this")
        return 1
    except OSError as error:
        if (text := complaint(error)) is None:
            raise
        print_error(text)
        return 1
    except ValueError as error:
        from transformer_vq.config import ConfigError

        if not isinstance(error, ConfigError):
            raise
        if main_process():  # every process of a launcher says the same
            print_error(str(error))
        return 2
