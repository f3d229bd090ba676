"""Settings of torch that a caller may have switched on for everything, and that no answer may depend on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def plain_modes(device: str) -> Iterator[None]:
    """Inside the block torch computes in the tensors' own precision, makes float32 tensors, and makes them on
    the CPU unless a device is named.

    Under a caller's ``torch.autocast``, ``set_default_dtype`` or ``set_default_device`` states would be kept,
    on disk too, that are not the model's. ``device`` is the type of the model's device.
    """
    with ExitStack() as stack:
        for kind in {"cpu", device}:
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if (dtype := torch.get_default_dtype()) != torch.float32:
            stack.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(torch.float32)
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield
