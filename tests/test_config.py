"""The configuration: what is refused and how it is said, overrides, the way back to YAML."""

from __future__ import annotations

from pathlib import Path

import pytest

from medpsp.config import BACKBONES, Config, TrainConfig
from medpsp.configio import dump_yaml, load_config
from medpsp.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
SMALL = "data: {archive: in, classes: [background, liver]}\n"


def load(folder: Path, text: str, *overrides: str) -> Config:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides)


def reason(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(folder, text, *overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


STAGES = TrainConfig().stages


def test_defaults_of_a_small_file(tmp_path: Path) -> None:
    config = load(tmp_path, SMALL)
    assert config.data.classes == ("background", "liver")
    assert config.model.bins == (1, 3, 5, 7)
    assert (config.loss.dice, config.loss.focal, config.loss.gamma) == (0.7, 0.3, 2.0)
    assert config.train.stages == STAGES
    assert [s.fraction for s in config.train.stages] == [0.2, 0.6, 1.0]
    assert config.shards == Path("runs/default/shards")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("trian: {ranks: 2}", "trian: unknown key; did you mean 'train'?"),
        ("train: {batchsize: 2}", "train.batchsize: unknown key; did you mean 'train.batch_size'?"),
        ("train: {zzz: 2}", "train.zzz: unknown key; legal: accumulate, augment_on"),
        ("model: {backbone: resnet81}", "did you mean 'resnet18'?"),
        (
            "train: {stages: [{name: a, steps: 1, lrr: 1}]}",
            "train.stages.0.lrr: unknown key; did you mean 'train.stages.0.lr'?",
        ),
    ],
)
def test_unknown_names_get_a_near_miss(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in reason(tmp_path, SMALL + text)


def test_unknown_key_below_an_optional_section(tmp_path: Path) -> None:
    text = "data: {archive: a, classes: [b, c], window: {centre: 40, width: 400}}"
    assert "data.window.centre: unknown key; did you mean 'data.window.center'?" in reason(
        tmp_path, text
    )


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.batch_size=many", "train.batch_size: Input should be a valid integer"),
        ("train.batch_size=1.5", "got 1.5"),
        ("train.batch_size=true", "train.batch_size: expected a number, got True"),
        ("train.clip_norm=yes", "train.clip_norm: expected a number, got True"),
        (
            "train.size=64",
            "train.size: Input should be a valid tuple, got 64; a list is written in brackets",
        ),
        ("train.size=[64]", "train.size.1: required, but not given"),
        ("data.classes=liver", "data.classes: Input should be a valid tuple, got 'liver'"),
        ("steps=64", "steps: unknown key; did you mean 'train.steps'?"),
        ("train=3", "train: Input should be a valid dictionary"),
        ("train.batch_size=0", "train.batch_size: Input should be greater than or equal to 1"),
        ("train.stages.0.lr=0", "train.stages.0.lr: Input should be greater than 0, got 0"),
        ("train.stages.0.lr=.inf", "train.stages.0.lr: Input should be a finite number"),
        ("loss.gamma=.nan", "loss.gamma: Input should be a finite number"),
        ("train.stages.0.fraction=1.5", "less than or equal to 1, got 1.5"),
        ("train.stages.0.name=a/b", "train.stages.0.name: String should match pattern"),
        ("train.stages=[]", "train.stages: Tuple should have at least 1 item"),
        ("model.output_stride=4", "model.output_stride: Input should be 8, 16 or 32, got 4"),
        ("model.dropout=1", "model.dropout: Input should be less than 1, got 1"),
        ("model.bins=[3, 0]", "model.bins.1: Input should be greater than or equal to 1, got 0"),
        ("model={psp_channels: 9, bins: [1, 2, 3, 5, 6]}", "psp_channels 9: 5 bins need 10"),
        ("export.opset=12", "export.opset: Input should be 11, 13, 18, 19 or 20, got 12"),
        (
            "export.opset=11",
            "opset 11 has no per-channel int8: set export.variants=[], or export.opset=13",
        ),
        ("export.variants=[cpu, cpu]", "export.variants: the same one twice"),
        ("export.allow={speed: whatever it is}", "export.allow.speed"),
        ("export.allow={latency: no}", "export.allow.latency"),
        ("export.codes={spleen: {category: [SCT, '1', a], type: [SCT, '2', b]}}", "codes: spleen"),
        ("seed=-1", "seed: Input should be greater than or equal to 0, got -1"),
        ("data.split={val: 0.5, test: 0.5}", "val + test must stay below 1, got 1"),
        ("data.label_map={7: 2}", "sends 7 to 2; classes are 0..1 and 255 is ignore"),
        ("data.label_names={Milz: spleen}", "label_names leads to spleen; classes are"),
        *(
            (f"data.label_pattern='{p}'", f"label_pattern '{p}': fields are {{PatientID}}")
            for p in ("{Name}.nii", "{}.nii", "{0}", "{PatientID", "{folder.x}")
        ),
        ("data.modalities=[ct]", "modalities: 'ct', expected a DICOM code in capitals, as CT"),
        ("data.classes=[a, '  ']", "classes: '  ' is blank, or has a backslash"),
        ("data.classes=[a, 'b\\c']", "is blank, or has a backslash or control character"),
        ("data.classes=[a, a]", "classes must differ, got a, a"),
        ("data.archive=", "data.archive: Input is not a valid path"),
    ],
)
def test_wrong_types_and_ranges(tmp_path: Path, override: str, expected: str) -> None:
    assert expected in reason(tmp_path, SMALL, override)


def test_one_value_per_channel_is_refused_before_batch_norm_does(tmp_path: Path) -> None:
    tiny = ("train.size=[32, 32]", "train.batch_size=2", "train.ranks=2")
    assert "BatchNorm needs two" in reason(tmp_path, SMALL, *tiny, "model.output_stride=32")
    assert load(tmp_path, SMALL, *tiny).train.size == (32, 32)
    assert load(tmp_path, SMALL, *tiny, "train.batch_size=4").train.batch_size == 4


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "expected a mapping at the top, got nothing"),
        ("- a\n", "expected a mapping at the top, got a list"),
        ("a: [\n", "not YAML (line 2)"),
        ("out: 2024-13-45\n", "not YAML"),  # looks like a date and is none
        (SMALL + "1: 2\n", "1: Keys should be strings"),
        ("data: {classes: [a, b]}\n", "data.archive: required, but not given"),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in reason(tmp_path, text)


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"out: \xff\xfe")
    for path in (tmp_path / "none.yaml", tmp_path, tmp_path / "latin.yaml"):
        with pytest.raises(ConfigError, match="cannot be read"):
            load_config(path)


def test_rate_in_short_notation_is_a_number(tmp_path: Path) -> None:
    text = SMALL + "train: {stages: [{name: a, steps: 1, lr: 1e-4}]}\n"  # YAML 1.1 reads a string
    assert load(tmp_path, text).train.stages[0].lr == 1e-4


def test_overrides(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        SMALL + "train:\n",  # an empty section
        "train.stages.0.lr=3e-4",
        "train.stages.2.steps=5",
        "train.size.1=64",
        "model.bins.0=2",
        "data.modalities.1=PT",
        "data.window.center=40",
        "data.window.width=400",
        "data.label_map.7=1",
        "model.pretrained=weights.pth",
        "out=here",
    )
    first, second, third = config.train.stages
    assert (first.lr, first.steps, first.name) == (3e-4, 900, "warm")
    assert second == STAGES[1]
    assert third.steps == 5
    assert config.train.size == (256, 64)
    assert config.model.bins == (2, 3, 5, 7)
    assert config.data.modalities == ("CT", "PT")
    assert config.data.window is not None
    assert (config.data.window.center, config.data.window.width) == (40, 400)
    assert config.data.label_map == {7: 1}
    assert config.model.pretrained == Path("weights.pth")
    assert config.out == Path("here")
    assert load(tmp_path, SMALL).train.stages == STAGES  # nothing sticks to the defaults


@pytest.mark.parametrize(
    ("preset", "names", "rates", "fractions"),
    [
        ("progressive", ["warm", "broad", "full"], [1e-3] * 3, [0.2, 0.6, 1]),
        ("article", ["backbone", "head", "all"], [1e-4, 5e-5, 1e-5], [0.2, 0.6, 1]),
        ("onecycle", ["rise", "fall"], [4e-5, 1e-3], [1, 1]),
    ],
)
def test_presets_are_stages(
    tmp_path: Path, preset: str, names: list[str], rates: list[float], fractions: list[float]
) -> None:
    wish = (f"train.preset={preset}", "train.steps=90")
    stages = load(tmp_path, SMALL, *wish).train.stages
    assert [stage.name for stage in stages] == names
    assert [stage.lr for stage in stages] == rates
    assert [stage.fraction for stage in stages] == fractions
    assert sum(stage.steps for stage in stages) == 90
    # an item is changed of these stages, whatever the order on the command line
    changed = load(tmp_path, SMALL, "train.stages.1.lr=0.5", *wish).train.stages
    assert [stage.lr for stage in changed] == [rates[0], 0.5, *rates[2:]]
    text = SMALL + "train: {preset: " + preset + ", stages: [{name: a, steps: 1, lr: 1}]}\n"
    assert [stage.name for stage in load(tmp_path, text).train.stages] == ["a"]
    for override in wish:  # they would put aside what somebody has written
        with pytest.raises(ConfigError, match=r"has train\.stages of its own; change those"):
            load(tmp_path, text, override)
    # those of a resolved file are the preset's, and follow
    resolved = dump_yaml(load(tmp_path, SMALL, f"train.preset={preset}", "train.steps=30"))
    assert load(tmp_path, resolved, *wish).train.stages == stages
    assert load(tmp_path, resolved, "train.steps=90").train.stages == stages


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.stages=[{name: a, lr: 1}]", "steps or epochs: give one of them"),
        ("train.stages=[{name: a, lr: 1, steps: 1, epochs: 1}]", "steps or epochs: give one"),
        ("train.preset=best", "train.preset: Input should be 'progressive', 'article' or"),
        ("train.accumulate=3", "batch_size 16 cannot be shared by 1 ranks with 3 micro-batches"),
        ("train={engine: zero3, ema: 0.9}", "ema: not with engine zero3"),
        ("train={engine: zero1, compile: true}", "compile: with engine ddp only, not zero1"),
        ("train={accumulate: 2, compile: reduce-overhead}", "not with accumulate above 1"),
        ("model.head=[refine]", "model.head"),
        ("train={augment_on: device, transforms: [{name: x}]}", "albumentations runs on the CPU"),
        ("train.transforms=[{p: 1}]", "transforms: each needs a name"),
        ("model={head: shallow, output_stride: 32}", "a shallow backbone ends at 8 or 16"),
        ("model={in_channels: 2}", "in_channels 2: a slice is grey (1) or RGB (3)"),
        ("model={in_channels: 3, windows: [{center: 1, width: 2}]}", "windows: they are of grey"),
        ("export.allow.latency=Your reason", "latency: 'Your reason' is no reason; say in 8"),
        ("export.allow.latency='          '", "is no reason; say in 8 characters or more why"),
        ("export.allow.speed=a reason given", "or 'latency', got 'speed'"),
    ],
)
def test_what_does_not_fit_together(tmp_path: Path, override: str, expected: str) -> None:
    assert expected in reason(tmp_path, SMALL, override)


def test_stride_and_channels_follow_from_the_rest(tmp_path: Path) -> None:
    heads = {"refine": (16, False), "classic": (8, True), "shallow": (8, False)}
    models = {head: load(tmp_path, SMALL, f"model.head={head}").model for head in heads}
    assert {head: (m.output_stride, m.aux) for head, m in models.items()} == heads
    windows = "[{center: 40, width: 400}, {center: 600, width: 2000}]"
    model = load(tmp_path, SMALL, f"model.windows={windows}", "model.context=2").model
    assert model.channels == 2 * 5
    assert load(tmp_path, SMALL, "model.backbone=timm/resnet34").model.backbone == "timm/resnet34"


def test_a_later_override_wins_over_file_and_earlier_ones(tmp_path: Path) -> None:
    text = SMALL + "train: {batch_size: 2}\n"
    assert load(tmp_path, text, "train.batch_size=4", "train.batch_size=8").train.batch_size == 8


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.batch_size", "expected key=value"),
        ("=3", "expected key=value"),
        ("out=a: b: c", "is not a YAML value"),
        ("out=2024-13-45", "is not a YAML value"),
        ("train.stages.3.lr=1", "expected an index below 3, got '3'"),
        ("train.stages.first.lr=1", "expected an index below 3, got 'first'"),
        ("train.stages.\u00b2.lr=1", "expected an index below 3"),
        ("data.archive.x.y=1", "'data.archive' holds a value, not a section"),
        ("train.stage.0.lr=1", "train.stage: unknown key; did you mean 'train.stages'?"),
    ],
)
def test_overrides_that_lead_nowhere(tmp_path: Path, override: str, expected: str) -> None:
    assert expected in reason(tmp_path, SMALL, override)


def test_frozen(tmp_path: Path) -> None:
    config = load(tmp_path, SMALL)
    with pytest.raises(ValueError, match="frozen"):
        config.train.batch_size = 3


def test_dump_and_load_give_an_equal_tree(tmp_path: Path) -> None:
    text = (
        "out: runs/x\nseed: 7\n"
        "data: {archive: a, labels: b, classes: [bg, liver, spleen], window: {center: 40.5, "
        "width: 400}, label_map: {1: 1, 6: 2, 9: 255}, split: {val: 0.1, test: 0.0}}\n"
        "model: {backbone: convnext_tiny, pretrained: w.safetensors, head: classic, bins: [1, 2]}\n"
        "train: {stages: [{name: a, steps: 3, lr: 1e-5, trains: head}]}\n"
    )
    config = load(tmp_path, text)
    assert config.data.label_map == {1: 1, 6: 2, 9: 255}
    assert load(tmp_path, dump_yaml(config)) == config
    assert load(tmp_path, dump_yaml(load(tmp_path, SMALL))) == load(tmp_path, SMALL)


def test_every_shipped_configuration_loads() -> None:
    paths = sorted((ROOT / "configs").glob("*.yaml"))
    assert "demo.yaml" in [path.name for path in paths]
    for path in paths:
        config = load_config(path)
        assert config.train.batch_size % config.train.ranks == 0, path.name
        fractions = [stage.fraction for stage in config.train.stages]
        assert fractions == sorted(fractions), path.name
        header = path.read_text(encoding="utf-8").split("\n", 1)[0]
        assert header.startswith("#"), path.name


def test_every_backbone_is_accepted(tmp_path: Path) -> None:
    for name in BACKBONES:
        assert load(tmp_path, SMALL, f"model.backbone={name}").model.backbone == name


def test_another_head_brings_its_own_stride(tmp_path: Path) -> None:
    """Also where the file is a resolved one, which says both."""
    path = tmp_path / "c.yaml"
    path.write_text(dump_yaml(load_config(ROOT / "configs/demo.yaml")))
    found = load_config(path, ("model.head=classic",)).model
    assert (found.output_stride, found.aux) == (8, True)
    found = load_config(path, ("model.output_stride=16", "model.head=classic")).model
    assert (found.output_stride, found.aux) == (16, True)


@pytest.mark.parametrize(
    ("model", "override", "found"),
    [
        ("{head: refine, output_stride: 16, aux: false}", "classic", (8, True)),  # as resolved
        ("{head: classic, output_stride: 8, aux: true}", "refine", (16, False)),
        ("{head: refine, output_stride: 8, aux: true}", "refine", (8, True)),  # by hand
        ("{output_stride: 32}", "classic", (32, True)),
        ("{head: clasic}", "classic", (8, True)),
        ("{head: null}", "classic", (8, True)),
    ],
)
def test_another_head_leaves_what_was_written_by_hand(
    tmp_path: Path, model: str, override: str, found: tuple[int, bool]
) -> None:
    text = SMALL + f"model: {model}\n"
    chosen = load(tmp_path, text, f"model.head={override}").model
    assert (chosen.output_stride, chosen.aux) == found


@pytest.mark.parametrize("train", ["5", "steps=300", "[preset]"])
def test_a_section_that_is_none_is_one_line(tmp_path: Path, train: str) -> None:
    with pytest.raises(ConfigError, match="train"):
        load(tmp_path, SMALL + f"train: {train}\n", "seed=3")
