"""The exceptions that end a command in a known way, and how each ends it.

`UserError` is one sentence on stderr and exit status 2: the same command fails again until the user changes
something. `StorageError` is one sentence and status 1: a launcher may start the command again. `Preempted`
ends with 128 + its signal. Any other exception keeps its traceback and ends with status 1, so that a bug is
visible. `flags.run_command` prints them. This module must not import JAX, since grading processes import it.
"""

import contextlib
import errno
import pathlib
import signal
from collections.abc import Iterator

# errno of storage that fails: no space, no quota, input or output fails, a stale file of a network.
_FAILED = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE}
# A path that the user named wrongly, or may not use: by class (libraries raise these without errno) or errno.
_MISNAMED = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)
_UNUSABLE = {errno.EROFS, errno.ENAMETOOLONG}


class UserError(ValueError):
    """What the user can mend: a setting, a flag, a file, a row. Its text is one sentence that says how."""


class StorageError(OSError):
    """Storage that fails (disk full, I/O error). Its text is one sentence with the path."""


class Preempted(Exception):
    """The end of a command because of a signal, with a sentence on how to go on."""

    def __init__(self, number: int, sentence: str):
        super().__init__(f"stopped by {signal.Signals(number).name}; {sentence}")
        self.signal = number


def require(condition: bool, sentence: str) -> None:
    """Raises UserError with the sentence unless the condition holds."""
    if not condition:
        raise UserError(sentence)


def is_storage_failure(error: BaseException) -> bool:
    """Whether an exception comes from storage that fails, and from nothing that the user or the code did."""
    return isinstance(error, StorageError) or (isinstance(error, OSError) and error.errno in _FAILED)


def exit_of(error: BaseException) -> tuple[int, str | None]:
    """Exit status and sentence of a command that ends by `error`; None where its traceback is printed."""
    text = " ".join(str(error).split())
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT, "stopped by the keyboard."
    if isinstance(error, Preempted):
        return 128 + error.signal, text
    if isinstance(error, UserError | FloatingPointError):  # the same command would end the same way again
        return 2, f"error: {text}"
    return 1, f"error: {text}" if is_storage_failure(error) else None


@contextlib.contextmanager
def storage(path: str | pathlib.Path, verb: str = "read") -> Iterator[None]:
    """Turns an OSError of what is done to `path` ("read", "written") inside of the block into one sentence.

    Raises:
      UserError: the path does not exist, may not be used, or is a directory where a file is meant.
      StorageError: storage fails.
    """
    try:
        yield
    except OSError as error:
        sentence = f"{path} cannot be {verb}: {error.strerror or error}."
        if isinstance(error, _MISNAMED) or error.errno in _UNUSABLE:
            raise UserError(sentence) from error
        if error.errno in _FAILED:
            raise StorageError(sentence) from error
        raise


@contextlib.contextmanager
def explained(
    kinds: type[Exception] | tuple[type[Exception], ...], fault: str, remedy: str
) -> Iterator[None]:
    """Turns exceptions of these classes inside of the block into a UserError, "FAULT (first line); REMEDY".

    A UserError stays as it is, and so does storage that fails, which the user cannot mend.
    """
    try:
        yield
    except kinds as error:
        if isinstance(error, UserError) or is_storage_failure(error):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{fault} ({reason}); {remedy}") from error
