"""The command `jaxtransfer`; each subcommand is a file, and a row here."""

import contextlib
import errno
import logging
import os
import signal
import sys
import textwrap
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import tyro

from jaxtransfer.cli.adapt import Adapt
from jaxtransfer.cli.cache_teacher import CacheTeacher
from jaxtransfer.cli.contrast import Contrast
from jaxtransfer.cli.convert import Convert
from jaxtransfer.cli.distill import Distill
from jaxtransfer.cli.dry_run import DryRunEnd, written_nowhere
from jaxtransfer.cli.evaluate import Evaluate
from jaxtransfer.cli.export import Export
from jaxtransfer.cli.finetune import Finetune
from jaxtransfer.cli.inspect import Inspect
from jaxtransfer.cli.launch import Launch
from jaxtransfer.cli.listing import Datasets, Models
from jaxtransfer.cli.merge import Merge
from jaxtransfer.cli.meta import Meta
from jaxtransfer.cli.multitask import Multitask
from jaxtransfer.cli.precision import multiplied
from jaxtransfer.cli.predict import Predict
from jaxtransfer.cli.pretrain import Pretrain
from jaxtransfer.cli.settings import with_settings
from jaxtransfer.cli.shard_options import in_shard_words
from jaxtransfer.cli.together import LOST, says, together
from jaxtransfer.cli.words import asks_for_help, check_words, placed
from jaxtransfer.data.cache import cache_dir
from jaxtransfer.devices import processes
from jaxtransfer.devices.ahead import compiling
from jaxtransfer.devices.programs import programs_kept
from jaxtransfer.errors import InputError, LostProcessError, NonFiniteLossError, StuckDataError
from jaxtransfer.train.interrupt import Interrupted, Terminated
from jaxtransfer.version import VERSION

COMMANDS = {
    "pretrain": Pretrain,
    "finetune": Finetune,
    "distill": Distill,
    "cache-teacher": CacheTeacher,
    "contrast": Contrast,
    "meta": Meta,
    "adapt": Adapt,
    "multitask": Multitask,
    "merge": Merge,
    "convert": Convert,
    "inspect": Inspect,
    "export": Export,
    "evaluate": Evaluate,
    "predict": Predict,
    "launch": Launch,
    "datasets": Datasets,
    "models": Models,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    Args:
      arguments: the words after `jaxtransfer`; those of the process by default.

    Returns:
      0 on success, 2 on unusable input, with one line on stderr; 130 when interrupted, 143 when terminated, 1 when the
      reader of our output went away, 75 where another process of the job is lost or no data came: to be run again.
    """
    command = None
    with warnings.catch_warnings(), _quiet_libraries():
        warnings.showwarning = lambda message, *_, **__: print(f"warning: {_one_line(message)}", file=sys.stderr)
        try:
            words = sys.argv[1:] if arguments is None else list(arguments)
            if words == ["--version"]:
                print(f"jaxtransfer {VERSION}")
                return 0
            words, after = _apart(words)
            words, keeps = _without_switch(words)
            command = _parse(words)
            if isinstance(command, Launch):
                return command.run_words(after)
            keeps = keeps and not isinstance(command, _COMPILE_NOTHING)
            with (
                multiplied(command),
                _begun(words, command),
                together(command),
                _programs(keeps=keeps),
                written_nowhere(command) as one,
            ):
                one.run()
            sys.stdout.flush()
        except DryRunEnd:
            sys.stdout.flush()
        except InputError as error:
            return _refuse(error)
        except Terminated as stop:
            return _stopped(stop, 128 + signal.SIGTERM)
        except (LostProcessError, StuckDataError) as error:
            says(f"error: {_in_options(error)}", agreed=False)
            return LOST
        except SystemExit as stop:  # --help, and completions, which end with no code
            return 0 if stop.code is None else stop.code if isinstance(stop.code, int) else 2
        except Interrupted as stop:
            return _stopped(stop, 128 + signal.SIGINT)
        except KeyboardInterrupt:
            again = "; the same command resumes from the last checkpoint" if isinstance(command, _TRAINING) else ""
            print(f"jaxtransfer: interrupted{again}", file=sys.stderr)
            return 130
        except BrokenPipeError:  # the reader of our output, such as `head`, had enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except OSError as error:  # a full disk, rights
            where = f" ({error.filename})" if error.filename else ""
            return _refuse(f"{error.strerror or error}{where}; what was saved before is unharmed")
        except (MemoryError, RuntimeError, ValueError) as error:
            if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
                raise
            where = "this machine" if isinstance(error, MemoryError) else "the device"
            told = f" ({_one_line(error)[:200]})" if str(error) else ""
            return _refuse(f"{where} has too little memory; choose a smaller --batch-size, or smaller images{told}")
        except OverflowError as error:
            return _refuse(f"a number is too large: {_one_line(error)[:200]}; choose a smaller one")
    return 0


def run() -> None:
    """The console script."""
    _hush_libraries()  # until the process ends
    code = main()
    # an ordinary end waits for a thread that compiles or waits for data, or takes away what it stands on, and crashes
    if (compiling() or code in _AT_ONCE) and not processes.joined():
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    processes.leave(code)


_AT_ONCE = (LOST, 128 + signal.SIGINT, 128 + signal.SIGTERM)
_COMPILE_NOTHING = (Inspect, Datasets, Models)
_SOON = 1.0  # seconds until a training says that it has begun
_NO_PROGRAMS, _PROGRAMS = "--no-program-cache", "JAXTRANSFER_PROGRAM_CACHE"
_TRAINING = (Pretrain, Finetune, Distill, Contrast, Meta, Adapt, Multitask)
_LOGGERS = ("absl", "asyncio")
_OPTIONS = {  # what the library calls an argument, where the remedy is an option here
    "pass image_shape=(height, width, channels)": (
        "add --image-shape (pretrain, contrast, adapt, multitask) or --resize (finetune, distill, cache-teacher, "
        "evaluate)"
    ),
    "the same call goes on": "the same command goes on",
    "data_patience=": "--data-patience ",
}


def _without_switch(words: Sequence[str]) -> tuple[list[str], bool]:
    """Returns the words without the switch that every command has, and whether compiled programs are to be kept."""
    left = [word for word in words if word != _NO_PROGRAMS]
    off = os.environ.get(_PROGRAMS, "").lower() in ("0", "false", "no", "off")
    return left, len(left) == len(words) and not off


@contextlib.contextmanager
def _begun(words: Sequence[str], command: Any) -> Iterator[None]:
    """Prints the first line of a training while data are read, devices made and programs compiled.

    It waits a moment, as what a command refuses at once is to be one line, the error.
    """
    if not isinstance(command, _TRAINING):
        yield
        return
    where = "a dry run" if command.training.dry_run else f"into {command.training.out}"
    line = f"jaxtransfer {VERSION}: {words[0]}, {where}"
    timer = threading.Timer(_SOON, lambda: print(line, file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _programs(*, keeps: bool) -> contextlib.AbstractContextManager:
    return programs_kept(cache_dir() / "programs") if keeps else contextlib.nullcontext()


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    own, teller = logging.getLogger("jaxtransfer"), _OnStderr()
    level, propagate = own.level, own.propagate
    own.setLevel(logging.INFO)
    own.propagate = False  # what a library attached to the root logger would print it again
    own.addHandler(teller)
    before = threading.excepthook, sys.unraisablehook, [logger.level for logger in loggers]
    _hush_libraries()
    try:
        yield
    finally:
        own.removeHandler(teller)
        own.setLevel(level)
        own.propagate = propagate
        threading.excepthook, sys.unraisablehook, levels = before
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _hush_libraries() -> None:
    """Keeps libraries from printing what we report ourselves: a loss that is not finite, a disk that is full.

    Where a checkpoint can't be written, Orbax's threads, pending futures and exit handlers each fail on their own,
    while the error reaches us too.
    """
    in_thread, unraisable = threading.excepthook, sys.unraisablehook

    def thread_hook(error: Any) -> None:
        if not type(error.thread).__module__.startswith("orbax."):
            in_thread(error)

    def unraisable_hook(error: Any) -> None:
        full = isinstance(error.exc_value, OSError) and error.exc_value.errno == errno.ENOSPC
        if not full and str(error.exc_value) != "Event loop is closed":
            unraisable(error)

    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")  # it is imported later
    threading.excepthook, sys.unraisablehook = thread_hook, unraisable_hook
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _one_line(message: Any) -> str:
    return " ".join(str(message).split())


def _refuse(error: Any) -> int:
    all_know = isinstance(error, processes.ToldError | NonFiniteLossError)
    says(f"error: {_in_options(error)}", agreed=all_know)
    return 2


def _in_options(error: Any) -> str:
    """Returns an error in one line, its remedies as options."""
    message = in_shard_words(_one_line(error))
    for argument, options in _OPTIONS.items():
        message = message.replace(argument, options)
    return message


def _stopped(stop: BaseException, code: int) -> int:
    says(str(stop).replace("the same call goes on", "resume with the same command"), agreed=True)
    return code


class _OnStderr(logging.Handler):
    """Prints what the library tells of a run, such as where it resumes."""

    def emit(self, record: logging.LogRecord) -> None:
        """Prints a line; of the silent ones among several processes, too, where it is about one of them."""
        of_any = getattr(record, "of_any_process", False) and processes.joined()
        print(record.getMessage(), file=sys.__stderr__ if of_any else sys.stderr)


def _apart(words: list[str]) -> tuple[list[str], list[str]]:
    """Returns the words of `launch`, and those of the command that it runs, after --."""
    if "--" not in words or COMMANDS.get(words[0]) is not Launch:
        return words, []
    place = words.index("--")
    return words[:place], words[place + 1 :]


def _parse(words: Sequence[str]) -> Any:
    """Returns the command that the words describe.

    Raises:
      InputError: where they describe none, in one line.
      SystemExit: after --help.
    """
    words = with_settings(placed(words, COMMANDS), COMMANDS)
    check_words(words, COMMANDS)
    shown: Any = _ShortUsage(sys.stdout)
    asks = asks_for_help(words)
    try:
        with contextlib.redirect_stdout(shown):
            return tyro.extras.subcommand_cli_from_dict(
                COMMANDS,
                prog="jaxtransfer",
                description=(
                    "Transfer learning for JAX. `jaxtransfer COMMAND --help` teaches each command.\n\n"
                    "`jaxtransfer --version` prints the version.\n\n"
                    "Compiled programs are kept in ~/.cache/jaxtransfer/programs, at most 2 GiB.\n\n"
                    f"With {_NO_PROGRAMS} or {_PROGRAMS}=0 none are."
                ),
                args=words,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone),
                console_outputs=asks,
            )
    except SystemExit as stop:
        if asks or not stop.code:
            raise
        raise InputError(f"cannot read {' '.join(words)!r}; see jaxtransfer {words[0]} --help") from None


class _ShortUsage:
    """A stream that breaks the list of commands in the usage line, which tyro writes in one.

    Completions for bash find the names of files, too, where they have nothing of their own: a run directory, say.
    """

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes the text, its usage in lines of up to 80 columns."""
        usage, newline, rest = text.partition("\n")
        if usage.startswith("usage: ") and len(usage) > 80:
            usage = "\n".join(textwrap.wrap(usage.replace(",", ", "), 80, subsequent_indent=" " * 7))
        rest = rest.replace("\ncomplete -F ", "\ncomplete -o default -F ")
        return self._stream.write(usage + newline + rest)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
