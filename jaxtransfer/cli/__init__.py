"""The command `jaxtransfer`; each subcommand is a file, and a row here."""

import sys
import warnings
from collections.abc import Sequence

import tyro

from jaxtransfer.cli.evaluate import Evaluate
from jaxtransfer.cli.finetune import Finetune
from jaxtransfer.cli.listing import Datasets, Models
from jaxtransfer.cli.predict import Predict
from jaxtransfer.cli.pretrain import Pretrain
from jaxtransfer.errors import InputError

COMMANDS = {
    "pretrain": Pretrain,
    "finetune": Finetune,
    "evaluate": Evaluate,
    "predict": Predict,
    "datasets": Datasets,
    "models": Models,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    Args:
      arguments: the words after `jaxtransfer`; those of the process by default.

    Returns:
      0 on success, 2 on unusable input, with one line on stderr; 130 when interrupted.
    """
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        command = tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="jaxtransfer",
            description="Transfer learning for JAX. `jaxtransfer COMMAND --help` teaches each command.",
            args=arguments,
            config=(tyro.conf.OmitArgPrefixes,),
        )
        command.run()
    except InputError as error:
        print(f"jaxtransfer: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except SystemExit as stop:  # tyro ends --help with 0, and what it can't read with 2
        return stop.code if isinstance(stop.code, int) else 2
    except KeyboardInterrupt:
        print("jaxtransfer: interrupted; the same command resumes from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def run() -> None:
    """The console script."""
    sys.exit(main())
