"""Faults of the machine during a run: memory that is used up, a disk that is full.

Nothing of torch is imported here: a command line that fails early should not wait for it.
"""

from __future__ import annotations

import ctypes
import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from unike.system.text import one_line
from unike.types import UserError

GO_ON = "what is recorded is kept, continue with --resume"
# What a disk, a quota or a folder's rights refuse; other errors of the system are bugs until shown otherwise.
_REFUSED = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "EIO")
    if hasattr(errno, name)
}
# A name that no file system takes: the user gets an error.
_BAD_NAMES = {errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR}
_FULL_MEMORY = ("out of memory", "DefaultCPUAllocator", "can't allocate memory", "not enough memory")
# Both write by themselves and raise errors of their own.
_LIBRARIES_WRITE = ("I/O error", "os error", "PytorchStreamWriter", "inline_container")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is used up: Python's, torch's on the CPU, or a device's."""
    if isinstance(error, MemoryError):
        return True
    # torch.OutOfMemoryError is a RuntimeError; its CPU allocator raises a plain one.
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _FULL_MEMORY)


def release_memory() -> None:
    """Hands freed memory back to the system, as glibc does by itself only at the end of its heap."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


@contextmanager
def explain_write_errors(what: object, resumable: bool = True) -> Iterator[None]:
    """An OSError inside the block becomes a UserError that names ``what`` and, where a run is
    ``resumable``, how to go on."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(f"{what}: cannot be written: {reason}" + f"; {GO_ON}" * resumable) from error


def describe_fault(error: BaseException) -> str | None:
    """One line about a fault of the machine; None for any other error."""
    if is_out_of_memory(error):
        return f"out of memory; make edit_batch_size smaller, or use dtype: bfloat16; {GO_ON}"
    if isinstance(error, OSError) and error.errno in _REFUSED:
        at = "" if error.filename is None else f"{error.filename}: "
        return f"{at}cannot be written or read: {error.strerror}; {GO_ON}"
    if isinstance(error, OSError) and error.errno in _BAD_NAMES and error.filename is not None:
        return f"{one_line(error.filename, 80)}: {error.strerror}"
    library = type(error).__module__.partition(".")[0]
    wrote = library == "safetensors" or isinstance(error, RuntimeError)
    if wrote and any(words in str(error) for words in _LIBRARIES_WRITE):
        return f"cannot be written: {' '.join(str(error).split())[:200]}; {GO_ON}"
    return None
