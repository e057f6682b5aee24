"""What a user should know once, such as that slower kernels run than were asked for."""

import functools
import logging


@functools.cache
def once(text: str) -> None:
    """Say it once per process, on stderr unless the program has set up logging."""
    logging.getLogger("moejax").warning(text)
