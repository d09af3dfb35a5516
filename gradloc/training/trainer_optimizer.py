"""The LocalizedAdamW that a Trainer holds: found behind wrappers, checked, guarded until training.

Makes no optimizer and chooses no layer; `LocalizationCallback` does.
"""

from __future__ import annotations

from typing import Any

from gradloc.layers import LayerMap
from gradloc.optim import LocalizedAdamW


def localized_optimizer(optimizer: Any) -> LocalizedAdamW:
    """The LocalizedAdamW inside the wrappers that Accelerate puts around an optimizer.

    Raises:
        TypeError: there is none.
    """
    inner = optimizer
    while not isinstance(inner, LocalizedAdamW):
        inner = getattr(inner, "optimizer", None)
        if inner is None:
            raise TypeError(
                f"the optimizer is a {type(optimizer).__name__}, not LocalizedAdamW: pass "
                "Trainer(optimizer_cls_and_kwargs=callback.optimizer(args)), or use "
                "LocalizedTrainer"
            )
    return inner


def check_optimizer(localized: LocalizedAdamW, layers: LayerMap, args: Any) -> None:
    """Check that an optimizer, possibly the user's own, goes with the callback and with Trainer.

    Raises:
        ValueError: it was made with other layers, or Trainer would clip beside it.
    """
    if localized.layers is None or localized.layers.names != layers.names:
        raise ValueError(
            "the optimizer was made with other layers than the callback: make it by "
            "Trainer(optimizer_cls_and_kwargs=callback.optimizer(args)), or with "
            "LocalizedAdamW(..., layers=callback.layers)"
        )
    if args.max_grad_norm and localized.max_grad_norm is None:
        raise ValueError(
            f"args.max_grad_norm={args.max_grad_norm!r} and LocalizedAdamW has none: Trainer "
            "would clip by a norm that counts frozen layers. Give max_grad_norm to "
            "LocalizedAdamW (callback.optimizer(args) does), or set args.max_grad_norm=0"
        )


def refuse_steps(optimizer: LocalizedAdamW) -> Any:
    """Let every step raise until the handle returned is removed.

    For a Trainer that was given the optimizer and not the callback: the plan would be missing or
    never change, and gradients would be clipped twice, without a word. Copies and pickles of the
    optimizer do not take the hook along.
    """

    def refuse(*_: Any) -> None:
        raise RuntimeError(
            "the optimizer of a LocalizationCallback steps, but the callback was never told that "
            "training began: pass callbacks=[method] to Trainer beside "
            "optimizer_cls_and_kwargs=method.optimizer(args)"
        )

    return optimizer.register_step_pre_hook(refuse)
