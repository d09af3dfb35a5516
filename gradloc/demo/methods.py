"""The ways of continuing that the demo compares: full training, the paper's two, two controls.

Names, words for people, and the plan of each; trains nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from gradloc.layers import LayerMap
from gradloc.plan import LayerPlan
from gradloc.policies import AllLayers, RandomLayers, TracedGradientPolicy
from gradloc.profile import GradientProfile


@dataclass(frozen=True)
class Method:
    """A way of continuing.

    Args:
        name: in file names.
        title: in tables.
        about: a sentence for someone who has never heard of it.
        lr_factor: of the demo's learning rate.
    """

    name: str
    title: str
    about: str
    lr_factor: float = 1.0


FULL = Method("full", "Full AdamW", "Every layer trains, as in ordinary continued pretraining.")
GENTLE = Method(
    "full-half",
    "Full, lr/2",
    "A control: full training at half the learning rate, the plain way to forget less.",
    lr_factor=0.5,
)
FREEZE = Method(
    "tgl-fp",
    "TGL + FP",
    "Traced gradient layers, frozen parameters: only the layers whose ratio R is above the mean "
    "train; all others are frozen.",
)
SCALE = Method(
    "tgl-alr",
    "TGL + ALR",
    "Traced gradient layers, adaptive learning rates: every layer trains, at a rate proportional "
    "to its R and on average the full one.",
)
RANDOM = Method(
    "random",
    "Random",
    "A control: as many layers as TGL + FP trains, drawn at random, others in each run.",
)

METHODS = (FULL, GENTLE, FREEZE, SCALE, RANDOM)


def make_plan(
    method: Method, layers: LayerMap, profile: GradientProfile, *, seed: int
) -> LayerPlan:
    """The plan of a method.

    Args:
        method: one of `METHODS`.
        layers: the model's layers.
        profile: of the model before it continues.
        seed: of the random layers; the other plans do not depend on it.
    """
    if method in (FULL, GENTLE):
        return AllLayers()(layers)
    if method == SCALE:
        return TracedGradientPolicy(mode="scale")(profile)
    freeze = TracedGradientPolicy(mode="freeze")(profile)
    if method == FREEZE:
        return freeze
    return RandomLayers(count=len(freeze.active), seed=seed)(layers)
