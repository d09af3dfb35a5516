"""`gradloc select` and `gradloc export`, through main as a user calls them."""

from __future__ import annotations

import json
import re

import pytest
import torch

from gradloc import GradientProfile, LayerMap, LayerPlan
from gradloc.cli import main
from gradloc.cli.arguments import load_outline
from gradloc.measurement import Measurement, ProfiledLayer
from gradloc.models import load_model

# R of the seven layers of the tiny GPT-2, all apart; against matched spans the order is reversed.
RATIOS = (1.0, 2.0, 7.0, 3.0, 6.0, 4.0, 5.0)


def profile_of(model: torch.nn.Module, granularity: str = "submodule") -> GradientProfile:
    layers = LayerMap.from_model(model, granularity=granularity)
    ratios = [RATIOS[index % 7] for index in range(len(layers))]
    known = [
        ProfiledLayer(one.name, one.kind, one.stack, one.block, one.num_elements) for one in layers
    ]
    nan = (float("nan"),) * len(ratios)
    ones = Measurement((1.0,) * len(ratios), nan)
    return GradientProfile(
        layers=tuple(known),
        probes={"updated": Measurement(tuple(ratios), nan), "new": ones},
        references={
            "all": dict.fromkeys(("updated", "new"), ones),
            "matched-spans": dict.fromkeys(
                ("updated", "new"), Measurement(tuple(r * r for r in ratios), nan)
            ),
        },
        granularity=granularity,
    )


@pytest.fixture(scope="module")
def model(model_folder):
    return load_model(model_folder)[0]


@pytest.fixture
def profile_file(model, tmp_path):
    path = tmp_path / "profile.json"
    profile_of(model).save(path)
    return path


@pytest.fixture
def plan_file(model, tmp_path):
    path = tmp_path / "plan.json"
    names = LayerMap.from_model(model).names
    LayerPlan({name: float(name.endswith(("1.attn", "1.mlp"))) for name in names}).save(path)
    return path


def error_of(capsys, arguments) -> str:
    assert main([str(one) for one in arguments]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("gradloc: error: ")
    return line.removeprefix("gradloc: error: ")


def selected(profile_file, tmp_path, *options: str) -> LayerPlan:
    path = tmp_path / "made" / "plan.json"
    assert main(["select", str(profile_file), "--output", str(path), *options]) == 0
    return LayerPlan.load(path)


@pytest.mark.parametrize(
    ("options", "positions"),
    [
        ([], {2, 4, 6}),  # R is the mean over kinds: 1 to 4 in halves; 2.5 is not above the mean
        (["--threshold", "top-k:2"], {2, 4}),
        (["--threshold", "top_k:2"], {2, 4}),
        (["--threshold", "bottom-k:3"], {0, 1, 3}),
        (["--threshold", "quantile:0.5"], {2, 4, 6}),
        (["--threshold", "3.6"], {2}),
        (["--threshold", "3.6", "--kinds", "updated"], {2, 4, 5, 6}),
        (["--threshold", "top-k:1", "--reference-loss", "matched-spans"], {0}),
        (["--policy", "all"], set(range(7))),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_select_by_threshold(profile_file, tmp_path, model, options, positions) -> None:
    plan = selected(profile_file, tmp_path, *options)
    names = LayerMap.from_model(model).names
    assert tuple(plan.scales) == names
    expected = {name for index, name in enumerate(names) if index in positions}
    assert set(plan.active) == expected


def test_select_scales(profile_file, tmp_path) -> None:
    ratios = [(ratio + 1) / 2 for ratio in RATIOS]
    plan = selected(profile_file, tmp_path, "--policy", "scale")
    assert list(plan.scales.values()) == pytest.approx([7 * r / sum(ratios) for r in ratios])
    plan = selected(profile_file, tmp_path, "--policy", "scale", "--normaliser", "max")
    assert list(plan.scales.values()) == pytest.approx([r / 4 for r in ratios])


def test_select_at_random(profile_file, tmp_path) -> None:
    draw = ["--policy", "random", "--random-layers", "3"]
    plans = [selected(profile_file, tmp_path, *draw, "--seed", str(seed)) for seed in range(4)]
    assert {len(plan.active) for plan in plans} == {3}
    assert len({plan.active for plan in plans}) > 1
    assert selected(profile_file, tmp_path, *draw) == plans[0]


def test_select_shows_what_it_chose(profile_file, tmp_path, model, model_folder, capsys) -> None:
    plan = selected(
        profile_file, tmp_path, "--threshold", "top-k:2", "--kinds", "updated", "--model",
        str(model_folder),
    )  # fmt: skip
    shown = capsys.readouterr().out
    layers = LayerMap.from_model(model)
    rows = dict(re.findall(r"^(transformer\S+) +(\S+ +\S+)$", shown, flags=re.M))
    assert {name: row.split() for name, row in rows.items()} == {
        name: [f"{ratio:g}", "1" if name in plan.active else "-"]
        for name, ratio in zip(layers.names, RATIOS, strict=True)
    }
    sizes = {layer.name: layer.num_elements for layer in layers}
    trained, total = sum(sizes[name] for name in plan.active), sum(sizes.values())
    assert (
        f"2 of 7 layers train, {trained:,} of {total:,} parameters ({trained / total:.1%})" in shown
    )
    assert str(plan.memory(model)) in shown
    assert shown.endswith(f"plan: {tmp_path / 'made' / 'plan.json'}\n")


def test_a_share_that_is_not_known_is_left_out(tmp_path, capsys) -> None:
    path = tmp_path / "profile.json"
    GradientProfile.from_norms({"new": {"a": 3.0, "b": 1.0}}, {"a": 1.0, "b": 1.0}).save(path)
    assert selected(path, tmp_path).active == ("a",)
    assert "1 of 2 layers train: traced gradients" in capsys.readouterr().out


@pytest.mark.parametrize("policy", ["freeze", "scale", "all", "random"])
def test_select_reads_no_option_in_vain(profile_file, tmp_path, capsys, policy) -> None:
    options = {
        "--threshold": ("top-k:2", ["freeze"]),
        "--normaliser": ("max", ["scale"]),
        "--random-layers": ("2", ["random"]),
        "--seed": ("5", ["random"]),
        "--kinds": ("new", ["freeze", "scale"]),
        "--reference-loss": ("matched-spans", ["freeze", "scale"]),
    }
    for flag, (value, readers) in options.items():
        if policy not in readers:
            path = tmp_path / "unwritten.json"
            arguments = ["select", profile_file, "--policy", policy, flag, value, "--output", path]
            message = f"{flag} is for --policy {' or '.join(readers)}, not {policy}"
            assert error_of(capsys, arguments) == message
            assert not path.exists()


def test_select_refuses(profile_file, plan_file, tmp_path, capsys) -> None:
    path = tmp_path / "unwritten.json"
    select = ["select", profile_file, "--output", path]
    assert "no such file" in error_of(capsys, ["select", tmp_path / "no.json", "--output", path])
    assert "not 'gradloc.profile'" in error_of(capsys, ["select", plan_file, "--output", path])
    assert "no layer is above 9" in error_of(capsys, [*select, "--threshold", "9"])
    assert "only 7 layers" in error_of(capsys, [*select, "--threshold", "top-k:8"])
    assert "choose one or more" in error_of(capsys, [*select, "--kinds", "old"])
    assert "no such model folder" in error_of(capsys, [*select, "--model", tmp_path / "none"])
    assert not path.exists()
    before = profile_file.read_bytes()
    same = ["select", profile_file, "--output", profile_file]
    assert "is the profile itself" in error_of(capsys, same)
    assert profile_file.read_bytes() == before
    assert "is a folder" in error_of(capsys, ["select", profile_file, "--output", tmp_path])
    for wrong in (["--threshold", "top-k:x"], ["--threshold", "bottom-k"], ["--policy", "best"]):
        arguments = [*select, *wrong]
        with pytest.raises(SystemExit, match="2"):
            main([str(one) for one in arguments])


def test_select_of_another_model(profile_file, model, model_folder, tmp_path, capsys) -> None:
    profile = GradientProfile.load(profile_file)
    other = tmp_path / "other.json"
    GradientProfile.from_norms(
        {"new": dict.fromkeys((*profile.names[:-1], "x"), 2.0)},
        dict.fromkeys((*profile.names[:-1], "x"), 1.0),
    ).save(other)
    path = tmp_path / "unwritten.json"
    arguments = ["select", other, "--policy", "all", "--model", model_folder, "--output", path]
    assert "the profile is from another model" in error_of(capsys, arguments)
    assert not path.exists()


@pytest.mark.parametrize("granularity", ["submodule", "block", "tensor"])
def test_from_profile_to_other_trainers(model, model_folder, tmp_path, capsys, granularity) -> None:
    """The whole way: the names that another trainer unfreezes are those of the layers chosen."""
    profile_of(model, granularity).save(tmp_path / "profile.json")
    plan = selected(tmp_path / "profile.json", tmp_path, "--threshold", "top-k:3")
    layers = LayerMap.from_model(model, granularity=granularity)
    active = {n for one in layers if one.name in plan.active for n in one.parameters}
    export = ["export", str(tmp_path / "made" / "plan.json"), "--model", str(model_folder)]
    capsys.readouterr()
    assert main([*export, "--to", "regex"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    found = [re.compile(line) for line in printed.out.splitlines()]
    names = [name for name, _ in model.named_parameters()]
    assert {name for name in names if any(one.search(name) for one in found)} == active
    assert main([*export, "--to", "param-groups", "--output", str(tmp_path / "groups.json")]) == 0
    assert capsys.readouterr().out == f"param-groups: {tmp_path / 'groups.json'}\n"
    (group,) = json.loads((tmp_path / "groups.json").read_text())
    assert (group["lr_scale"], set(group["params"])) == (1.0, active)


def test_export_to_peft_and_axolotl(plan_file, model_folder, tmp_path, capsys) -> None:
    export = ["export", str(plan_file), "--model", str(model_folder), "--to"]
    assert main([*export, "peft"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "target_modules": ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
        "layers_to_transform": [1],
        "layers_pattern": "h",
        "fan_in_fan_out": True,
    }
    path = tmp_path / "new folder" / "unfrozen.yaml"
    assert main([*export, "axolotl", "--output", str(path)]) == 0
    assert path.read_text().splitlines()[-2:] == [
        "unfrozen_parameters:",
        "  - '^transformer.h.1.'",
    ]


@pytest.mark.parametrize("to", ["axolotl", "peft", "regex", "param-groups"])
def test_scales_that_are_lost_are_told(plan_file, model_folder, capsys, to) -> None:
    scales = dict(LayerPlan.load(plan_file).scales)
    LayerPlan({**scales, "transformer.h.0.attn": 0.5, "transformer.ln_f": 1.0}).save(plan_file)
    assert main(["export", str(plan_file), "--model", str(model_folder), "--to", to]) == 0
    printed = capsys.readouterr()
    lost = "note: the learning-rate scales (0.5 to 0.5) are lost"
    assert (lost in printed.err) == (to != "param-groups")
    assert ("note: no adapter in transformer.ln_f" in printed.err) == (to == "peft")
    assert "note" not in printed.out


def test_export_refuses(plan_file, profile_file, model, model_folder, tmp_path, capsys) -> None:
    path = tmp_path / "unwritten"
    rest = ["--model", model_folder, "--to", "regex", "--output", path]
    assert "no such file" in error_of(capsys, ["export", tmp_path / "no.json", *rest])
    assert "not 'gradloc.plan'" in error_of(capsys, ["export", profile_file, *rest])
    nowhere = ["export", plan_file, "--model", tmp_path / "none", "--to", "regex"]
    assert "no such model folder" in error_of(capsys, nowhere)
    itself = ["export", plan_file, *rest[:-1], plan_file]
    assert "is the plan itself" in error_of(capsys, itself)
    other = tmp_path / "other.json"
    LayerPlan({"model.layers.0.mlp": 1.0}).save(other)
    assert "does not fit the model" in error_of(capsys, ["export", other, *rest])
    names = LayerMap.from_model(model).names
    LayerPlan(dict.fromkeys(names, 0.0)).save(other)
    assert "nothing trains" in error_of(capsys, ["export", other, *rest])
    assert not path.exists()
    with pytest.raises(SystemExit, match="2"):
        main(["export", str(plan_file), "--model", str(model_folder), "--to", "trl"])


def test_the_outline_is_the_model_without_weights(model, model_folder) -> None:
    outline = load_outline(str(model_folder))
    assert {parameter.device.type for parameter in outline.parameters()} == {"meta"}
    assert outline.lm_head.weight is outline.transformer.wte.weight
    looks = [(name, one.shape, one.dtype) for name, one in model.named_parameters()]
    assert [(name, one.shape, one.dtype) for name, one in outline.named_parameters()] == looks
    assert LayerMap.from_model(outline).names == LayerMap.from_model(model).names


def test_a_model_without_an_outline_is_loaded(monkeypatch, model_folder, capsys) -> None:
    import transformers

    def refuse(*_, **__):
        raise NotImplementedError("on the meta device")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_config", refuse)
    loaded = load_outline(str(model_folder))
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu"}
    assert capsys.readouterr().err == f"loading {model_folder}\n"


@pytest.mark.parametrize("command", ["select", "export"])
def test_help_has_an_example(command, capsys) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert f"example:\n  gradloc {command}" in capsys.readouterr().out
