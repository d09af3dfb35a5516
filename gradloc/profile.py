"""GradientProfile: how strongly every layer reacts to probes, against ordinary text.

A profile is data: it measures nothing (`trace_gradients` does) and chooses nothing (policies do).
Drawing it is the work of `profile_plot` and `profile_table`, its file format is in `profile_file`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from gradloc.files import read_json, write_json
from gradloc.measurement import Measurement, ProfiledLayer, check_measurements
from gradloc.profile_file import SCHEMA, VERSION, profile_from_json, profile_to_json
from gradloc.wording import quoted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from gradloc.layers import LayerMap


@dataclass(frozen=True)
class GradientProfile:
    """Per layer: probe norm, reference norm, their ratio.

    Args:
        layers: the layers, in the order of their `LayerMap`.
        probes: probe kind -> its measurement.
        references: reference loss ("all", "matched-spans") -> probe kind -> the reference that this
            kind is compared with. With "all" every kind has the same one.
        reference_loss: the reference that the ratios use; `with_reference` chooses another that is
            held.
        granularity: of the `LayerMap`.
        seed: of the random spans.
        step: training step at which the model was traced; 0 before training.
        gradloc_version: that measured.
        torch_version: that measured.

    Raises:
        ValueError: no layers or kinds, names that occur twice, lengths that differ, a norm that is
            negative or not finite, a layer that reacts to probes and not at all to the reference.
    """

    layers: tuple[ProfiledLayer, ...]
    probes: Mapping[str, Measurement]
    references: Mapping[str, Mapping[str, Measurement]]
    reference_loss: str = "all"
    granularity: str = "submodule"
    seed: int = 0
    step: int = 0
    gradloc_version: str = "unknown"
    torch_version: str = "unknown"

    def __post_init__(self) -> None:
        check_measurements(self.layers, self.probes, self.references)
        if self.reference_loss not in self.references:
            raise ValueError(
                f"reference_loss={self.reference_loss!r} is not among {list(self.references)}"
            )

    @classmethod
    def from_norms(
        cls,
        probe_norms: Mapping[str, Mapping[str, float]],
        reference_norms: Mapping[str, float],
        *,
        matched_norms: Mapping[str, float] | None = None,
        step: int = 0,
    ) -> GradientProfile:
        """Make a profile from norms measured elsewhere, without standard errors.

        Args:
            probe_norms: kind -> layer -> norm.
            reference_norms: layer -> norm with the loss on all tokens.
            matched_norms: layer -> norm with the loss on matched spans, where measured.
            step: training step of the measurement.

        Raises:
            ValueError: as the class; or a kind that names other layers than the reference.
        """
        names = tuple(reference_norms)

        def measured(norms: Mapping[str, float], what: str) -> Measurement:
            if set(norms) != set(names):
                raise ValueError(
                    f"{what} names {len(norms)} layers, reference_norms {len(names)}: "
                    "name the same ones"
                )
            return Measurement(tuple(norms[name] for name in names), (math.nan,) * len(names))

        references = {"all": measured(reference_norms, "reference_norms")}
        if matched_norms is not None:
            references["matched-spans"] = measured(matched_norms, "matched_norms")
        probes = {
            kind: measured(norms, f"probe_norms[{kind!r}]") for kind, norms in probe_norms.items()
        }
        return cls(
            layers=tuple(ProfiledLayer(name) for name in names),
            probes=probes,
            references={loss: dict.fromkeys(probes, one) for loss, one in references.items()},
            step=step,
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Layer names."""
        return tuple(layer.name for layer in self.layers)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Probe kinds, in the order in which they were given."""
        return tuple(self.probes)

    @property
    def available_reference_losses(self) -> tuple[str, ...]:
        """The references that were measured; `reference_loss` is the one in use."""
        return tuple(self.references)

    @property
    def probe_norms(self) -> dict[str, dict[str, float]]:
        """Kind -> layer -> mean gradient norm over the kind's batches."""
        return {kind: self._named(probe.norms) for kind, probe in self.probes.items()}

    @property
    def reference_norms(self) -> dict[str, float]:
        """Layer -> mean norm over the reference's batches (and kinds, if measured per kind)."""
        return self._named(_mean([one.norms for one in self._reference.values()]))

    @property
    def standard_errors(self) -> dict[str, dict[str, float]]:
        """Kind, or "reference" -> layer -> standard error of the norm; nan for one batch.

        The references of several kinds are measured on the same batches, so their errors go
        together: the error of their mean is taken to be the mean of their errors, its upper bound.
        """
        errors = {kind: self._named(probe.standard_errors) for kind, probe in self.probes.items()}
        errors["reference"] = self._named(
            _mean([one.standard_errors for one in self._reference.values()])
        )
        return errors

    @property
    def relative(self) -> dict[str, float]:
        """Layer -> R, the probe norm averaged over kinds / the reference norm; 0 for 0 / 0."""
        probe = _mean([one.norms for one in self.probes.values()])
        return self._named(_ratios(probe, tuple(self.reference_norms.values())))

    @property
    def relative_by_kind(self) -> dict[str, dict[str, float]]:
        """Kind -> layer -> R of that kind, against the reference matched to it."""
        reference = self._reference
        return {
            kind: self._named(_ratios(probe.norms, reference[kind].norms))
            for kind, probe in self.probes.items()
        }

    @property
    def relative_standard_errors(self) -> dict[str, float]:
        """Layer -> standard error of `relative`, to first order, the kinds independent."""
        errors = self.standard_errors
        norms = self.probe_norms
        result = {}
        for name, ratio in self.relative.items():
            probe = sum(norms[kind][name] for kind in self.kinds)
            probe_error = math.sqrt(sum(errors[kind][name] ** 2 for kind in self.kinds))
            reference = self.reference_norms[name]
            if probe == 0 or reference == 0:
                result[name] = 0.0
            else:
                result[name] = ratio * math.hypot(
                    probe_error / probe, errors["reference"][name] / reference
                )
        return result

    @property
    def mean_relative(self) -> float:
        """Mean of `relative` over the layers: the threshold of the paper's selection."""
        return math.fsum(self.relative.values()) / len(self.layers)

    @property
    def above_mean(self) -> tuple[str, ...]:
        """Names of the layers whose R is above the mean; the drawings mark them."""
        mean = self.mean_relative
        return tuple(name for name, ratio in self.relative.items() if ratio > mean)

    def with_reference(self, reference_loss: str) -> GradientProfile:
        """The same profile with its ratios taken against another reference that it holds.

        Raises:
            ValueError: it doesn't hold that one.
        """
        if reference_loss not in self.references:
            raise ValueError(
                f"reference_loss={reference_loss!r} was not measured (the profile holds "
                f"{', '.join(map(repr, self.references))}): "
                f"trace again with reference_loss={reference_loss!r}"
            )
        return replace(self, reference_loss=reference_loss)

    def with_kinds(self, kinds: Sequence[str]) -> GradientProfile:
        """The same profile with only these probe kinds.

        Raises:
            ValueError: a kind that it doesn't hold, or none.
        """
        unknown = [kind for kind in kinds if kind not in self.probes]
        if unknown or not kinds or isinstance(kinds, str):
            raise ValueError(
                f"kinds={kinds!r}: choose one or more of the profile's kinds, {list(self.kinds)}"
            )
        return replace(
            self,
            probes={kind: self.probes[kind] for kind in kinds},
            references={
                loss: {kind: one[kind] for kind in kinds} for loss, one in self.references.items()
            },
        )

    def check(self, layers: LayerMap) -> None:
        """Check that the profile is of the model that `layers` describes.

        Raises:
            ValueError: names or sizes of layers differ; some are listed.
        """
        model = {layer.name: layer.num_elements for layer in layers}
        mine = {layer.name: layer.num_elements for layer in self.layers}
        parts = [
            f"{what}: {quoted(names)}"
            for what, names in (
                ("layers only in the profile", [name for name in mine if name not in model]),
                ("layers only in the model", [name for name in model if name not in mine]),
                (
                    "layers of another size",
                    [n for n in mine if mine[n] and mine[n] != model.get(n, mine[n])],
                ),
            )
            if names
        ]
        if parts:
            raise ValueError(
                f"the profile is from another model ({'; '.join(parts)}): trace this "
                "model, with the same granularity as its layers (the profile's is "
                f"{self.granularity!r})"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the profile as JSON, whole or not at all."""
        write_json(path, profile_to_json(self), schema=SCHEMA, version=VERSION)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> GradientProfile:
        """Read a profile that `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is not a whole profile; says what is wrong in it.
        """
        return profile_from_json(read_json(path, schema=SCHEMA, version=VERSION), os.fspath(path))

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draw a heatmap of layers against probe kinds, one panel a reference held.

        Args:
            path: where to write it; the suffix chooses the format (.png, .svg, .pdf). None: only
                return it.

        Returns:
            The matplotlib figure.

        Raises:
            ValueError: a suffix that matplotlib cannot write.
            OSError: `path` cannot be written.
        """
        from gradloc.profile_plot import plot_profile

        return plot_profile(self, path)

    def table(self, *, width: int = 100) -> str:
        """The profile as text with bars, `width` columns wide, a table for each reference held."""
        from gradloc.profile_table import profile_table

        return profile_table(self, width=width)

    def __str__(self) -> str:
        return (
            f"GradientProfile({len(self.layers)} layers, kinds {', '.join(self.kinds)}; "
            f"reference {self.reference_loss!r}, step {self.step})"
        )

    @property
    def _reference(self) -> Mapping[str, Measurement]:
        return self.references[self.reference_loss]

    def _named(self, values: Sequence[float]) -> dict[str, float]:
        return dict(zip(self.names, values, strict=True))


def _mean(rows: Sequence[Sequence[float]]) -> tuple[float, ...]:
    return tuple(math.fsum(column) / len(rows) for column in zip(*rows, strict=True))


def _ratios(probe: Sequence[float], reference: Sequence[float]) -> tuple[float, ...]:
    # 0 / 0: the layer takes no part in the loss, so there is nothing that it could learn. x / 0 is
    # refused before.
    return tuple(p / r if r > 0 else 0.0 for p, r in zip(probe, reference, strict=True))
