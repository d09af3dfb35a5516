"""Tiny models, batches and a schedule of plans, trained in one process and in several.

Sizes are odd, so that shards are uneven and some are empty. One training loop serves all of them;
how a model is made parallel is each test's.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from numerics import assert_within
from torch import Tensor, nn

from gradloc import LayerMap, LayerPlan, LocalizedAdamW, sharding

NUM_STEPS = 14
BATCH, LENGTH = 4, 8  # sequences of a step, over all ranks
# A larger eps, for key biases: their gradients are rounding errors of zero, which Adam scales up.
OPTIONS = {"lr": 4e-3, "betas": (0.9, 0.99), "eps": 1e-4, "weight_decay": 0.1}
MAX_GRAD_NORM = 0.5  # of norms between 0.4 and 4
# From a float64 run of one process. One in float32 is up to 1.1e-6 from it; in several processes
# only the order of sums is another.
TOLERANCE = 2e-6


def make_model(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """`gpt2`: tied head, 3 blocks; `llama`: untied, 2 blocks. The same weights every time."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        if name == "gpt2":
            config = GPT2Config(
                vocab_size=29,
                n_positions=LENGTH,
                n_embd=6,
                n_layer=3,
                n_head=2,
                bos_token_id=0,
                eos_token_id=0,
                initializer_range=0.3,
                resid_pdrop=0.0,  # a Trainer switches to training mode
                embd_pdrop=0.0,
                attn_pdrop=0.0,
            )
            return GPT2LMHeadModel(config).eval().to(dtype)
        config = LlamaConfig(
            vocab_size=31,
            hidden_size=9,
            intermediate_size=7,
            num_hidden_layers=2,
            num_attention_heads=3,
            num_key_value_heads=1,
            head_dim=2,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=False,
            initializer_range=0.3,
        )
        return LlamaForCausalLM(config).eval().to(dtype)


def blocks_of(model: nn.Module) -> nn.ModuleList:
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def fully_sharded(model: nn.Module, **options) -> nn.Module:
    """FSDP2, block by block and the rest."""
    from torch.distributed.fsdp import fully_shard

    for block in blocks_of(model):
        fully_shard(block, **options)
    fully_shard(model, **options)
    return model


def batch(step: int) -> Tensor:
    """Token ids [BATCH, LENGTH] of a step, the same in every process."""
    return torch.randint(0, 29, (BATCH, LENGTH), generator=torch.Generator().manual_seed(step))


def plan_at(layers: LayerMap, step: int) -> LayerPlan | None:
    """The plan that comes into force at a step; None: no change.

    Layers leave and return, one never trains before step 9, and scales are fractions from there.
    """
    names = layers.names
    if step == 0:
        scales = [float(i != 1) for i in range(len(names))]
    elif step == 3:
        scales = [float(i % 2 == 0) for i in range(len(names))]
    elif step == 6:
        scales = [float(i % 3 == 0) for i in range(len(names))]
    elif step == 9:
        scales = [(0.0, 0.5, 1.25)[i % 3] if i != 1 else 0.75 for i in range(len(names))]
    elif step == 12:
        scales = [1.0] * len(names)
    else:
        return None
    return LayerPlan(dict(zip(names, scales, strict=True)), policy=f"test at step {step}")


def make_optimizer(model: nn.Module, **options) -> LocalizedAdamW:
    layers = LayerMap.from_model(model)
    chosen = {**OPTIONS, "max_grad_norm": MAX_GRAD_NORM, **options}
    return LocalizedAdamW(
        model.named_parameters(), layers=layers, plan=plan_at(layers, 0), **chosen
    )


@dataclass
class Run:
    """What a run ended with, whole tensors, and what it saw on the way."""

    params: dict[str, Tensor] = field(default_factory=dict)
    moments: dict[str, Tensor] = field(default_factory=dict)  # "name.exp_avg"
    steps: dict[str, float] = field(default_factory=dict)
    norms: list[Tensor] = field(default_factory=list)  # of each step, [layers]
    state_bytes: list[int] = field(default_factory=list)  # after each step, of this rank
    expected_bytes: list[int] = field(default_factory=list)  # the moments of what has a state
    exact: dict[str, Tensor] = field(default_factory=dict)  # parameters of the same run in float64


def train(
    model: nn.Module,
    optimizer: LocalizedAdamW,
    *,
    rank: int = 0,
    num_ranks: int = 1,
    start: int = 0,
    stop: int = NUM_STEPS,
    backward: Callable[[nn.Module, Tensor], None] | None = None,
    inner: nn.Module | None = None,
) -> Run:
    """Train this rank's share of the batches through the schedule of plans.

    Args:
        model: what is called.
        optimizer: of its parameters, over the layers of it.
        rank: which share of each batch.
        num_ranks: of how many.
        start: the first step, whose plan is set too.
        stop: the step after the last one.
        backward: takes the model and this rank's token ids; default: one backward of the loss.
        inner: the model whose parameters have the plain names, where `model` wraps it.
    """
    run = Run()
    for step in range(start, stop):
        plan = plan_at(optimizer.layers, step)
        if plan is not None:
            optimizer.set_plan(plan)
        ids = batch(step).chunk(num_ranks)[rank]
        optimizer.zero_grad()
        (backward or one_backward)(model, ids)
        optimizer.step()
        run.norms.append(optimizer.grad_norms())
        run.state_bytes.append(optimizer.state_bytes())
        run.expected_bytes.append(bytes_needed(optimizer))
    collect(run, inner or model, optimizer)
    return run


def one_backward(model: nn.Module, ids: Tensor) -> None:
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


def bytes_needed(optimizer: LocalizedAdamW) -> int:
    """Float32 moments and anchors of this rank's shards of all parameters that have a state."""
    num_arrays = 3 if optimizer.param_groups[0]["amsgrad"] else 2
    num_arrays += optimizer.recadam is not None
    params = [param for param, state in optimizer.state.items() if state]
    return sum(4 * num_arrays * sharding.local(param).numel() for param in params)


def collect(run: Run, model: nn.Module, optimizer: LocalizedAdamW) -> None:
    for name, param in model.named_parameters():
        run.params[name] = whole(param)
        state = optimizer.state.get(param)
        if state:
            run.steps[name] = float(state["step"])
            for key in ("exp_avg", "exp_avg_sq"):
                run.moments[f"{name}.{key}"] = whole(state[key])


def whole(tensor: Tensor) -> Tensor:
    """The full tensor; a collective for shards."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if sharding.is_sharded(tensor) else tensor).clone()


@functools.cache
def alone(name: str, **options) -> Run:
    """The run of one process, which all others are compared with, and its float64 twin."""
    model = make_model(name)
    run = train(model, make_optimizer(model, **options))
    model = make_model(name, torch.float64)
    run.exact = train(model, make_optimizer(model, **options)).params
    return run


def assert_same_run(ours: Run, expected: Run, what: str) -> None:
    """Parameters near the float64 run's, moments and norms near `expected`'s, steps equal."""
    assert ours.steps == expected.steps, what
    assert ours.params.keys() == expected.exact.keys(), what
    for name, value in expected.exact.items():
        bound = TOLERANCE * value.double().abs().clamp(min=1)
        assert_within(ours.params[name], value, bound, f"{what}: {name}")
    assert ours.moments.keys() == expected.moments.keys(), what
    for name, value in expected.moments.items():
        # Relative to the largest: small elements are differences of large gradients.
        bound = 1e-5 * float(value.abs().max()) + 1e-9
        assert_within(ours.moments[name], value, bound, f"{what}: {name}")
    for step, (norms, theirs) in enumerate(zip(ours.norms, expected.norms, strict=True)):
        assert torch.equal(norms.isnan(), theirs.isnan()), f"{what}: step {step}"
        bound = 1e-6 * theirs.double().nan_to_num() if step == 0 else 1e-5 * theirs.nan_to_num()
        assert_within(norms.nan_to_num(), theirs.nan_to_num(), bound, f"{what}: norms of {step}")
