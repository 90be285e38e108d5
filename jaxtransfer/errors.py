"""What goes wrong for a reason the caller can mend: one class, one clear line."""


class InputError(ValueError):
    """Unusable input: the message says what was expected, what came, and the remedy.

    The command line prints the message alone and ends with exit code 2.
    """


class NonFiniteLossError(InputError):
    """The loss or the parameters stopped being finite; the message names the step and the term."""


class LostProcessError(RuntimeError):
    """Another process of the job ended or can't be reached; what was saved is there, and the same call goes on."""


class StuckDataError(RuntimeError):
    """A batch that did not come; what was saved is there, and the same call goes on."""


def unknown(kind: str, name: str, known) -> InputError:
    """Returns the error for a name that is not among the `known` ones, with the closest of them."""
    import difflib

    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return InputError(f"unknown {kind} {name!r}{hint}; known: {', '.join(known)}")
