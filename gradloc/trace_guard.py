"""What tracing puts aside and back: random state, gradients, training flags, requires_grad."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def keeping_random_state() -> Iterator[None]:
    """Put back the states of torch (CPU, CUDA if in use), Python and NumPy at the end."""
    python, numpy = random.getstate(), np.random.get_state()
    # A device count > 0 does not mean that CUDA is in use here; asking for its state would
    # initialise it.
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def tracing_only(model: torch.nn.Module, traced: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    """Make gradients flow to exactly `traced`, in eval mode, and put everything back at the end.

    Gradients that were there come back as the same tensor objects; inside the block they are None.
    Works inside `torch.no_grad()` and `torch.inference_mode()`.

    Raises:
        ValueError: before anything is changed, if a parameter has a hook that acts as soon as its
            gradient is there.
    """
    for name, parameter in model.named_parameters():
        if getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise ValueError(
                f"parameter {name!r} has a hook that runs when its gradient is ready, as "
                "optimizers that step inside the backward pass use, and tracing would run it: "
                "remove the hook and trace again"
            )
    wanted = {id(parameter) for parameter in traced}
    training = [(module, module.training) for module in model.modules()]
    parameters = [
        (parameter, parameter.grad, parameter.requires_grad) for parameter in model.parameters()
    ]
    try:
        # The flags and not model.eval(): some modules do more there (merge adapters into weights,
        # for example), and going back would round.
        for module, _ in training:
            module.training = False
        for parameter, _, _ in parameters:
            parameter.grad = None
            parameter.requires_grad_(id(parameter) in wanted)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for parameter, grad, requires_grad in parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        for module, was_training in training:
            module.training = was_training
