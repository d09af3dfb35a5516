"""Small training runs that several test files share: settings, data, a reference, comparisons."""

import os

import torch
from conftest import make_gpt2
from transformers import Trainer, TrainerCallback, TrainingArguments

from gradloc import LayerMap, LayerPlan
from gradloc.probes import by_kind, probe_batches, read_probes
from gradloc.training.callback import LocalizationCallback
from gradloc.training.config import TrainConfig
from gradloc.training.corpus import packed_corpus, text_batches
from gradloc.training.localized_trainer import collate_blocks
from gradloc.training.tracing import Tracing

BLOCK = 16


def make_dataset(tokenizer, text_file):
    return packed_corpus(text_file, tokenizer, block_size=BLOCK)


def make_tracing(tokenizer, text_file, probe_file):
    probes = by_kind(read_probes(probe_file))
    return Tracing(
        probes={kind: probe_batches(ps, tokenizer, batch_size=2) for kind, ps in probes.items()},
        reference=text_batches(text_file, tokenizer, block_size=16, batch_size=2, max_batches=4),
    )


def settings(output, **changes):
    """Of `gradloc.training.train`."""
    usual = {
        "max_steps": 8,
        "batch_size": 2,
        "learning_rate": 3e-3,
        "weight_decay": 0.1,
        "save_steps": 3,
        "logging_steps": 1,
        "progress": False,
    }
    return TrainConfig(output=output, **{**usual, **changes})


def arguments(output, **changes):
    """Of a plain Trainer; clipping is in force at this norm."""
    # TrainingArguments with torch_compile, and older ones with bf16, leave these behind for all
    # Trainers that come after.
    for name in ("ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_DYNAMO_MODE"):
        os.environ.pop(name, None)
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    usual = {
        "max_steps": 8,
        "per_device_train_batch_size": 2,
        "learning_rate": 3e-3,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        # Larger than rounding noise in gradients, which Adam would make as large as any other.
        "adam_epsilon": 1e-4,
        "seed": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(output_dir=str(output), **{**usual, **changes})


def plain_trainer(model, args, dataset, method, *, callbacks=(), **kwargs):
    """The two lines of `docs/trainer.md`."""
    return Trainer(
        model=model,
        args=args,
        train_dataset=dataset,
        data_collator=collate_blocks,
        optimizer_cls_and_kwargs=method.optimizer(args),
        callbacks=[method, *callbacks],
        **kwargs,
    )


class MaskedAdamW(TrainerCallback):
    """The reference: torch's AdamW, whose gradients of frozen layers are None, clipped by torch.

    Scales are 0 or 1 here. `plan_at(step)` is the plan from that step on.
    """

    def __init__(self, model, plan_at, max_norm):
        self.layers = LayerMap.from_model(model)
        self.model, self.plan_at, self.max_norm = model, plan_at, max_norm
        self.norms = []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        plan = self.plan_at(state.global_step)
        for _, parameter, layer in self.layers.parameters(self.model):
            if plan.scales[self.layers.names[layer]] == 0:
                parameter.grad = None
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        self.norms.append(norm.item())


def reference_trainer(model, args, dataset, plan_at, *, callbacks=(), **kwargs):
    """Plain Trainer with torch's AdamW over the plan's layers. `args` are used up."""
    reference = MaskedAdamW(model, plan_at, args.max_grad_norm)
    args.max_grad_norm = 0.0
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=dataset,
        data_collator=collate_blocks,
        callbacks=[reference, *callbacks],
        **kwargs,
    )
    trainer.reference = reference
    return trainer


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def attention_plan(model):
    names = LayerMap.from_model(model).names
    return LayerPlan({name: float(name.endswith("attn")) for name in names})


def assert_equal(found, expected):
    worst = max(((found[name] - expected[name]).abs().max().item(), name) for name in expected)
    same = all(torch.equal(found[name], expected[name]) for name in expected)
    assert same, f"largest difference {worst}"


def assert_close(found, expected, start, *, within=1e-4):
    """Off by at most `within` of the largest movement of the tensor, and by rounding.

    But for the keys' biases in GPT-2: softmax takes out what they add, so their gradients are
    rounding alone, which Adam makes as large as any other.
    """
    for name, end in expected.items():
        off = (found[name] - end).abs()
        if name.endswith("c_attn.bias"):
            queries, _, values = off.chunk(3)
            off = torch.cat([queries, values])
        moved = (end - start[name]).abs().max().item()
        worst = off.max().item()
        rounding = 4 * torch.finfo(end.dtype).eps * end.abs().max().item() if moved else 0.0
        assert worst <= within * moved + rounding, f"{name}: off by {worst}, moved by {moved}"
    assert not all(torch.equal(expected[name], start[name]) for name in expected)


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def model_and_method(tokenizer, *, dropout=True, **choice):
    model = make_gpt2(tokenizer)
    if not dropout:
        without_dropout(model)
    return model, LocalizationCallback(model, **choice)


class StopAt(TrainerCallback):
    """A kill: raises in the middle of the run."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt
