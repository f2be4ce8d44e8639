"""What is downloaded: one question whether an address answers, and no retries where it does not."""

from __future__ import annotations

import contextlib
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator


def unreachable(address: str) -> str | None:
    """Returns why nothing answers at `address` within seven seconds, or None."""
    found: list[str | None] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=5).close()
        except urllib.error.HTTPError:
            pass  # an answer
        except (OSError, ValueError) as error:
            found.append(str(getattr(error, "reason", error)))
            return
        found.append(None)

    # The look-up of a name has no time limit of its own.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(7)
    return found[0] if found else "no answer within seven seconds"


@contextlib.contextmanager
def one_try() -> Iterator[None]:
    """Hugging Face's hub is asked once whether it is there. Where it is not, only what has been downloaded before is looked for:
    its client alone would try each of several files six times, for up to a minute.

    Raises:
        ConnectionError: it cannot be reached, and what was asked for has not been downloaded before.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    if constants.HF_HUB_OFFLINE or (reason := unreachable(constants.ENDPOINT)) is None:
        yield
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise ConnectionError(f"{constants.ENDPOINT} cannot be reached: {reason}") from error
    finally:
        constants.HF_HUB_OFFLINE = False


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars and the advice that transformers prints while it loads."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
