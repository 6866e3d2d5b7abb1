"""transformers without its progress bars and notices; `HUBKIT_DEBUG=1` brings them back."""

import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr


@contextmanager
def quiet(*, stderr: bool = False) -> Iterator[None]:
    """Silence transformers within the block; with `stderr`, all that is written there (bars that have no
    switch)."""
    if os.environ.get("HUBKIT_DEBUG") == "1":
        yield
        return
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()) if stderr else nullcontext():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
