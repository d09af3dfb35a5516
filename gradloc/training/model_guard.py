"""Puts back what a training run changes beside the parameters: flags, settings, progress bars.

Knows no plan and no Trainer; `gradloc.training.train` wraps a run in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def keeping_flags(model: torch.nn.Module) -> Iterator[None]:
    """Put back requires_grad of every parameter, and train or eval of every module."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode


@contextmanager
def keeping_use_cache(model: torch.nn.Module) -> Iterator[None]:
    """Put back `config.use_cache`: Trainer clears it, and a saved model would generate slowly."""
    config: Any = getattr(model, "config", None)
    before = getattr(config, "use_cache", None)
    try:
        yield
    finally:
        if before is not None:
            config.use_cache = before


@contextmanager
def without_saving_bars() -> Iterator[None]:
    """No bar for each model that transformers reads or writes: it is drawn across other lines."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
