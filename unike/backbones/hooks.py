"""Forward hooks, set and removed again: no other module registers one.

Everything here is a context manager that removes its hooks on the way out, after an exception too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

K = TypeVar("K")
# What a module is called with, and what it returns: any of its arguments, and a tensor, or a tuple with one.
Args = tuple[Any, ...]
Kwargs = dict[str, Any]
Inputs = tuple[Args, Kwargs]
Outputs = torch.Tensor | tuple[Any, ...]


class _StopForwardError(Exception):
    """Ends a forward pass once the wanted module is reached."""


def first_tensor(value: Outputs) -> torch.Tensor:
    """The tensor itself, or the first entry of a tuple output."""
    tensor: torch.Tensor = value[0] if isinstance(value, tuple) else value
    return tensor


def replace_first(value: Outputs, tensor: torch.Tensor) -> Outputs:
    """``value`` with its tensor (or its first entry) replaced."""
    return (tensor, *value[1:]) if isinstance(value, tuple) else tensor


def hidden_states(args: Args, kwargs: Kwargs) -> torch.Tensor:
    """The hidden state that a module is called with, by position or by keyword."""
    states: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    return states


@contextmanager
def capture(modules: Mapping[K, nn.Module]) -> Iterator[dict[K, torch.Tensor]]:
    """Collects the hidden state that each module receives, under the module's key."""
    seen: dict[K, torch.Tensor] = {}

    def keep(key: K) -> Callable[..., None]:
        def hook(module: nn.Module, args: Args, kwargs: Kwargs) -> None:
            seen[key] = hidden_states(args, kwargs)

        return hook

    handles = []
    try:
        for key, module in modules.items():
            handles.append(module.register_forward_pre_hook(keep(key), with_kwargs=True))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watch(module: nn.Module, see: Callable[[torch.Tensor], object]) -> Iterator[None]:
    """Inside the block ``see`` is called with each hidden state that the module receives."""

    def hook(_: nn.Module, args: Args, kwargs: Kwargs) -> None:
        see(hidden_states(args, kwargs))

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@dataclass(frozen=True)
class Passed:
    """What went into a linear module and what came out, as one forward pass left them."""

    inputs: torch.Tensor
    outputs: torch.Tensor


@contextmanager
def tape(modules: Mapping[K, nn.Module]) -> Iterator[dict[K, Passed]]:
    """Collects inputs and outputs of each module, under the module's key, for ``torch.autograd.grad``.

    The output of a frozen module that reads a constant has no history: it is made to require gradients here,
    so that the layers above become part of a graph.
    """
    seen: dict[K, Passed] = {}

    def keep(key: K) -> Callable[..., None]:
        def hook(module: nn.Module, args: Args, output: torch.Tensor) -> None:
            if torch.is_grad_enabled() and not output.requires_grad:
                output.requires_grad_()
            seen[key] = Passed(args[0], output)

        return hook

    handles = []
    try:
        for key, module in modules.items():
            handles.append(module.register_forward_hook(keep(key)))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def guard(module: nn.Module, check: Callable[[], None]) -> Iterator[None]:
    """Inside the block ``check`` is called whenever the module is."""
    handle = module.register_forward_pre_hook(lambda *_: check())
    try:
        yield
    finally:
        handle.remove()


def inputs_of(module: nn.Module, run: Callable[[], object]) -> Inputs:
    """What ``module`` is called with when ``run`` runs; the pass ends there.

    Raises RuntimeError if ``run`` never reaches the module.
    """
    seen: list[Inputs] = []

    def hook(_: nn.Module, args: Args, kwargs: Kwargs) -> None:
        seen.append((args, kwargs))
        raise _StopForwardError

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        run()
    except _StopForwardError:
        return seen[0]
    finally:
        handle.remove()
    raise RuntimeError(f"the forward pass never reached {type(module).__name__}")


After = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@contextmanager
def transform(afters: list[tuple[nn.Module, nn.Module, After]]) -> Iterator[None]:
    """Changes outputs: for each ``(reader, writer, after)``, the writer's output becomes
    ``after(hidden state that the reader received, writer's output)``.

    Reader and writer may be one module (a self-attention) or two (the first and the last
    projection of a feed-forward network).
    """
    handles: list[RemovableHandle] = []
    try:
        for reader, writer, after in afters:
            _install(reader, writer, after, handles)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _install(reader: nn.Module, writer: nn.Module, after: After, handles: list[RemovableHandle]) -> None:
    received: list[torch.Tensor] = []

    def read(_: nn.Module, args: Args, kwargs: Kwargs) -> None:
        received[:] = [hidden_states(args, kwargs)]

    def write(_: nn.Module, args: Args, output: Outputs) -> Outputs:
        return replace_first(output, after(received.pop(), first_tensor(output)))

    handles.append(reader.register_forward_pre_hook(read, with_kwargs=True))
    handles.append(writer.register_forward_hook(write))


@contextmanager
def unhooked(module: nn.Module) -> Iterator[None]:
    """Inside the block the module has no forward hooks, for a hook that calls its own module."""
    before, after = module._forward_pre_hooks, module._forward_hooks
    module._forward_pre_hooks, module._forward_hooks = type(before)(), type(after)()
    try:
        yield
    finally:
        module._forward_pre_hooks, module._forward_hooks = before, after


# Hooks of these packages are part of how their models run.
_LIBRARIES = ("transformers.", "accelerate.")
_KNOWN_PACKAGES = ("unike.", *_LIBRARIES)


def list_foreign_hooks(module: nn.Module) -> tuple[int, ...]:
    """The hooks of a module that neither this package nor its libraries have set, each by a number of its
    own."""
    return _list_hooks(module, _KNOWN_PACKAGES)


def is_hooked(module: nn.Module) -> bool:
    """Whether anybody but the libraries has set a hook on a module, this package included."""
    return bool(_list_hooks(module, _LIBRARIES))


def _list_hooks(module: nn.Module, known: tuple[str, ...]) -> tuple[int, ...]:
    both = (module._forward_pre_hooks, module._forward_hooks)
    return tuple(
        number
        for hooks in both
        if hooks
        for number, hook in hooks.items()
        if not str(getattr(hook, "__module__", "")).startswith(known)
    )
