"""trace_gradients: measure the gradient norm of every layer on probes and on ordinary text.

Leaves the model exactly as it was: gradients, training flags, requires_grad, random state. Updates
no parameter and chooses no layer. What is put aside and put back is in `trace_guard`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import torch

from gradloc.grad_norms import check_measurable, layer_grad_norms
from gradloc.layers import LayerMap
from gradloc.measurement import REFERENCE_LOSSES, Measurement, ProfiledLayer
from gradloc.profile import GradientProfile
from gradloc.trace_batches import Batch, BatchSet, matched_to, read_batches, warn_of_sizes
from gradloc.trace_guard import keeping_random_state, tracing_only


def trace_gradients(
    model: torch.nn.Module,
    probes: Iterable[Batch] | Mapping[str, Iterable[Batch]],
    reference: Iterable[Batch],
    *,
    layers: LayerMap | None = None,
    reference_loss: str | Sequence[str] = "all",
    seed: int = 0,
    progress: bool = True,
    step: int = 0,
) -> GradientProfile:
    """Measure how strongly each layer reacts to probes, against ordinary text.

    For every batch the model runs forward and backward once, in eval mode, and each layer's
    gradient norm is `sqrt(sum of squares)` over its parameters; the profile holds means over
    batches, their standard errors and the ratio of probe to reference (Fernandez, Bisk & Strubell,
    arXiv 2411.04448). The device is waited for once, at the end.

    Args:
        model: called as `model(**batch)`; returns a loss: `output.loss`, `output["loss"]`, the
            first of a tuple, or a scalar tensor.
        probes: batches (dicts of tensors with `labels`, [batch, length], -100 where there is no
            loss), or {kind: batches}. Batches alone are of the kind "probe". Iterables are read
            once, before the first pass.
        reference: batches of ordinary text. A norm depends on how many tokens a batch averages
            over: give batches of as many sequences as the probes'. A UserWarning says where batches
            differ.
        layers: what to measure; None: `LayerMap.from_model(model)`.
        reference_loss: "all": the reference's loss falls on all its labels, as in the paper.
            "matched-spans": on one random span a sequence, as long as the probes' (drawn for each
            kind from its own lengths, and measured for each kind). Or both, in a sequence; the
            profile then holds both and uses the first.
        seed: of the random spans.
        progress: show a progress bar on stderr.
        step: recorded in the profile: the training step at which it was measured.

    Returns:
        The profile.

    Raises:
        ValueError: before anything is changed: no batches, a batch without labels or with none but
            -100, layers that don't fit the model, an unknown reference_loss, a complex parameter,
            parameters on several devices, a parameter whose hook acts as soon as it has a
            gradient. After everything is restored: an output without loss,
            a norm that is not finite, a layer that has a gradient on probes and none on the
            reference.
    """
    losses = (reference_loss,) if isinstance(reference_loss, str) else tuple(reference_loss)
    if not losses or len(set(losses)) != len(losses) or not set(losses) <= set(REFERENCE_LOSSES):
        raise ValueError(
            f"reference_loss={reference_loss!r}: choose 'all', 'matched-spans' or both"
        )
    layer_map = LayerMap.from_model(model) if layers is None else layers
    named = [(name, parameter) for name, parameter, _ in layer_map.parameters(model)]
    check_measurable((f"parameter {name!r}", parameter) for name, parameter in named)
    traced = [parameter for _, parameter in named]
    # Before the first batch is read: even a DataLoader that does not shuffle draws from the global
    # generator.
    with keeping_random_state():
        kinds, reference_batches = read_batches(probes, reference)
        first = _first_scored(model)
        sets = [BatchSet(f"the {kind!r} probes", batches, first) for kind, batches in kinds.items()]
        general = BatchSet("the reference", reference_batches, first)
        for one in (*sets, general):
            one.check()
        warn_of_sizes([*sets, general])
        wanted = list(sets)
        for loss in losses:
            if loss == "all":
                wanted.append(general)
            else:
                wanted += [
                    matched_to(general, one, seed, kind)
                    for kind, one in zip(kinds, sets, strict=True)
                ]
        with tracing_only(model, traced):
            rows = _run(model, layer_map, wanted, progress)
    measured = iter(
        [_summary(one, norms, layer_map.names) for one, norms in zip(wanted, rows, strict=True)]
    )
    by_kind = {kind: next(measured) for kind in kinds}
    references = {
        loss: dict.fromkeys(kinds, next(measured))
        if loss == "all"
        else {kind: next(measured) for kind in kinds}
        for loss in losses
    }
    return GradientProfile(
        layers=tuple(
            ProfiledLayer(layer.name, layer.kind, layer.stack, layer.block, layer.num_elements)
            for layer in layer_map
        ),
        probes=by_kind,
        references=references,
        reference_loss=losses[0],
        granularity=layer_map.granularity,
        seed=seed,
        step=step,
        gradloc_version=_own_version(),
        torch_version=str(torch.__version__),
    )


def _first_scored(model: torch.nn.Module) -> int:
    """First position whose label has a loss: 1 where a transformers model shifts labels."""
    config = getattr(model, "config", None)
    return 0 if config is None or getattr(config, "is_encoder_decoder", False) else 1


def _run(
    model: torch.nn.Module, layers: LayerMap, sets: Sequence[BatchSet], progress: bool
) -> list[torch.Tensor]:
    """Norms of every batch: for each set a float64 CPU tensor [num_batches, num_layers]."""
    device = next(
        (p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu")
    )
    parameters = list(model.parameters())
    rows: list[list[torch.Tensor]] = []
    with _bar(sum(len(one.batches) for one in sets), progress) as advance:
        for one in sets:
            rows.append([])
            for index, batch in enumerate(one.batches):
                advance(one.what)
                for parameter in parameters:
                    parameter.grad = None
                where = f"batch {index} of {one.what}"
                moved = {
                    k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()
                }
                _loss(model(**moved), where).backward()  # type: ignore[no-untyped-call]
                # A copy: the norms may be handed out in a buffer that the next call reuses.
                rows[-1].append(layer_grad_norms(model, layers).clone())
    # To the CPU before float64, which some devices lack.
    return [torch.stack(norms).cpu().double() for norms in rows]


def _loss(output: Any, where: str) -> torch.Tensor:
    loss = output
    if isinstance(output, Mapping):
        loss = output.get("loss")
    elif hasattr(output, "loss"):
        loss = output.loss
    elif isinstance(output, (tuple, list)) and output:
        loss = output[0]
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        raise ValueError(
            f"{where}: the model gave no loss (a {type(output).__name__}): it must return a "
            "scalar, an object with .loss, a dict with 'loss', or a tuple that begins with the loss"
        )
    if not loss.requires_grad:
        raise ValueError(f"{where}: the loss depends on no parameter of the layers traced")
    return loss.reshape(())


def _summary(one: BatchSet, norms: torch.Tensor, names: Sequence[str]) -> Measurement:
    wrong = (~norms.isfinite()).nonzero()
    if len(wrong):
        batch, layer = wrong[0].tolist()
        raise ValueError(
            f"batch {batch} of {one.what}: the gradient norm of layer {names[layer]!r} is "
            f"{norms[batch, layer].item()}. Trace in float32 or bfloat16, and check the batch and "
            "the weights for inf and nan"
        )
    count = len(norms)
    errors = (
        norms.std(dim=0) / math.sqrt(count) if count > 1 else torch.full_like(norms[0], math.nan)
    )
    return Measurement(
        norms=tuple(norms.mean(dim=0).tolist()),
        standard_errors=tuple(errors.tolist()),
        num_batches=count,
        num_sequences=sum(len(one.labels(index)) for index in range(count)),
        num_tokens=sum(one.num_tokens(index) for index in range(count)),
    )


@contextmanager
def _bar(total: int, progress: bool) -> Iterator[Callable[[str], None]]:
    """Give a function that says what is worked on now and counts what is done."""
    if not progress:
        yield lambda what: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc="tracing", unit="batch") as bar:
        started = 0

        def advance(what: str) -> None:
            nonlocal started
            bar.set_description(f"tracing {what}", refresh=False)
            bar.update(min(started, 1))
            started += 1

        yield advance
        bar.update(min(started, 1))


def _own_version() -> str:
    try:
        return metadata.version("gradloc")
    except metadata.PackageNotFoundError:
        return "unknown"
