"""tfds without progress bars, log lines and warnings."""

import contextlib
import io
import logging
import warnings


@contextlib.contextmanager
def quiet_tfds():
    """A context that gives the `tensorflow_datasets` module; what it prints, logs and warns is dropped.

    Its progress bars stay off afterwards; printing, logging and warnings return to what they were.

    Yields:
      The module.
    """
    log = logging.getLogger("absl")
    disabled = log.disabled
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        log.disabled = True
        try:
            import tensorflow_datasets as tfds

            tfds.disable_progress_bar()
            yield tfds
        finally:
            log.disabled = disabled
