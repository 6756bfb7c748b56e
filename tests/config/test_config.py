"""Recipes: what is misspelt, misplaced or doubled is refused by its key; what is shipped loads and survives a dump."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from vae_ds.config import PretrainConfig, RunConfig, Settings
from vae_ds.config.loading import dump, load, read_recipe, shipped_recipes
from vae_ds.errors import ConfigError

RECIPE = """
name: trial
data: {corpus: text, path: texts}
phases:
  - {name: warmup, steps: 30, freeze: [decoder], beta: {schedule: constant, value: 0}}
  - name: full
    epochs: 2
    beta: {schedule: linear, max: 1, over_epochs: 4}
    optimizer: {lr: 5e-5}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    file = tmp_path / "trial.yaml"
    file.write_text(RECIPE, encoding="utf-8")
    return str(file)


def with_text(tmp_path: Path, text: str) -> RunConfig:
    file = tmp_path / "case.yaml"
    file.write_text(text, encoding="utf-8")
    return load(RunConfig, str(file))


def kind_of(name: str) -> type[RunConfig] | type[PretrainConfig]:
    return RunConfig if "phases" in yaml.safe_load(read_recipe(name)[0]) else PretrainConfig


def test_the_papers_recipes_and_the_demo_are_shipped() -> None:
    assert {"demo", "demo-yardstick", "ptb", "snli", "yahoo", "yelp"} <= set(shipped_recipes())


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_loads_and_survives_a_dump(name: str, tmp_path: Path) -> None:
    config = load(kind_of(name), name)
    stored = tmp_path / "config.yaml"
    stored.write_text(dump(config), encoding="utf-8")
    assert load(kind_of(name), str(stored)) == config
    assert dump(load(kind_of(name), str(stored))) == dump(config)


def test_a_dump_is_complete(recipe: str) -> None:
    """A default that changes later must not change what an old run's config.yaml says."""

    def missing(settings: Settings, tree: dict[str, Any]) -> list[str]:
        wanted = {field.alias or name: name for name, field in type(settings).model_fields.items()}
        inner = [
            missing(value, tree[key])
            for key, name in wanted.items()
            if isinstance(value := getattr(settings, name), Settings) and key in tree
        ]
        return sorted(set(wanted) - set(tree)) + [name for names in inner for name in names]

    config = load(RunConfig, recipe)
    tree = yaml.safe_load(dump(config))
    assert missing(config, tree) == []
    for phase, stored in zip(config.phases, tree["phases"], strict=True):
        assert missing(phase, stored) == []
    assert tree["schema_version"] == 1


def test_settings_are_frozen(recipe: str) -> None:
    config = load(RunConfig, recipe)
    with pytest.raises(ValidationError):
        config.seed = 1
    with pytest.raises(ValidationError):
        config.phases[0].optimizer.lr = 1.0
    with pytest.raises(TypeError):
        config.phases[0] = config.phases[1]  # type: ignore[index]


def test_a_number_without_a_point_is_a_number(recipe: str) -> None:
    """PyYAML alone reads `5e-5` as a string."""
    assert load(RunConfig, recipe).phases[1].optimizer.lr == 5e-5
    assert load(RunConfig, recipe, ["phases.1.optimizer.lr=2e-3"]).phases[1].optimizer.lr == 2e-3
    assert load(RunConfig, recipe, ["name=e5"]).name == "e5"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("phases: [{name: a, steps: 1}]\nsede: 1", ["unknown key `sede`", "did you mean `seed`?"]),
        ("phases: [{name: a, steps: 1}]\nmodel: {latent_dims: 8}", ["`model.latent_dims`", "`latent_dim`"]),
        (
            "phases: [{name: a, steps: 1, optimizer: {learning_rate: 1}}]",
            ["unknown key `phases.0.optimizer.learning_rate`"],
        ),
        ("phases: [{name: a, steps: 1, free_bit: {nats: 1}}]", ["`phases.0.free_bit`", "`free_bits`"]),
        ("phases: [{name: a, steps: 1, beta: {schedule: linear, over_step: 5}}]", ["over_step", "`over_steps`"]),
        ("phases: [{name: a, steps: 1, beta: {schedule: lineal}}]", ["phases.0.beta", "lineal"]),
        ("phases: [{name: a, steps: 1}]\nbatch: {global: 0}", ["`batch.global`", "found 0"]),
        ("phases: [{name: a, steps: 1}]\nmodel: {latent_dim: 0}", ["`model.latent_dim`", "found 0"]),
        ("phases: [{name: a, steps: 1}]\nmodel: {latent_dim: many}", ["`model.latent_dim`", "found 'many'"]),
        ("phases: [{name: a, steps: 1}]\nprecision: fp64", ["`precision`", "found 'fp64'"]),
        ("phases: [{name: a, steps: 1}]\nschema_version: 2", ["`schema_version`", "found 2"]),
        ("phases: []", ["`phases`"]),
        ("name: x", ["`phases` is missing"]),
        ("phases: [{steps: 3}]", ["`phases.0.name` is missing"]),
        ("phases: [{name: a}]", ["exactly one of epochs, steps", "found none"]),
        ("phases: [{name: a, steps: 1, epochs: 1}]", ["exactly one of epochs, steps", "epochs and steps"]),
        (
            "phases: [{name: a, steps: 1, beta: {schedule: linear, over_steps: 5, over_epochs: 1}}]",
            ["exactly one of over_epochs, over_steps, over_fraction"],
        ),
        ("phases: [{name: a, steps: 1}, {name: a, steps: 1}]", ["phase names must differ"]),
        ("phases: [{name: a, steps: 1}]\ndata: {corpus: text}", ["`data`", "corpus `text` needs `path`"]),
        ("phases: [{name: a, steps: 1, beta: {schedule: cyclical, zero: 0.9}}]", ["`zero` + `ramp` is 1.15"]),
        ("- a list", ["a recipe is a mapping", "found list"]),
        ("seed: 1\nname: x\nseed: 2", ["case.yaml:3", "duplicate key `seed`"]),
        ("phases:\n  - {name: a, steps: 1, steps: 2}", ["case.yaml:2", "duplicate key `steps`"]),
        ("name: x\nphases: [", ["case.yaml:2", "not valid YAML"]),
        ("name: !!python/object:os.system {}", ["case.yaml:1", "not valid YAML"]),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, said: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        with_text(tmp_path, text)
    message = str(caught.value)
    assert "case.yaml" in message
    assert "\n" not in message
    for part in said:
        assert part in message


def test_a_known_key_of_another_place_is_not_suggested_as_itself(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        with_text(tmp_path, "phases: [{name: a, steps: 1}]\nlatent_dim: 8")
    assert "unknown key `latent_dim`" in str(caught.value)
    assert "did you mean `latent_dim`?" not in str(caught.value)


@pytest.mark.parametrize("bad", [b"name: \xff\xfe", b"\x80"])
def test_a_recipe_that_is_not_utf8(tmp_path: Path, bad: bytes) -> None:
    file = tmp_path / "case.yaml"
    file.write_bytes(bad)
    with pytest.raises(ConfigError, match="not UTF-8 at byte"):
        load(RunConfig, str(file))


def test_a_missing_recipe() -> None:
    with pytest.raises(ConfigError, match="no such recipe file"):
        load(RunConfig, "nowhere/mine.yaml")
    with pytest.raises(ConfigError, match=r"no recipe `ptp` \(did you mean `ptb`\?\); shipped: .*yelp"):
        load(RunConfig, "ptp")


def test_overrides_reach_lists_and_sections(recipe: str) -> None:
    config = load(
        RunConfig,
        recipe,
        ["phases.0.steps=15", "phases.1.beta.max=0.5", "batch.global=8", "logging.every=1", "phases.0.freeze=[bias]"],
    )
    assert config.phases[0].steps == 15
    assert config.phases[0].freeze == ("bias",)
    assert config.phases[1].beta.max == 0.5  # type: ignore[union-attr]
    assert config.batch.global_size == 8
    assert config.logging.every == 1
    assert config.data.path == "texts"


def test_a_whole_list_entry_can_be_replaced(recipe: str) -> None:
    config = load(RunConfig, recipe, ["phases.1={name: other, steps: 4}"])
    assert [phase.name for phase in config.phases] == ["warmup", "other"]


def test_null_clears_a_setting(recipe: str) -> None:
    assert load(RunConfig, recipe, ["data.limit=7"]).data.limit == 7
    assert load(RunConfig, recipe, ["data.limit=7", "data.limit=null"]).data.limit is None


def test_an_override_replaces_its_rival(recipe: str) -> None:
    """The recipe says two epochs; `--set phases.1.steps=9` alone must mean nine steps, not a contradiction."""
    phase = load(RunConfig, recipe, ["phases.1.steps=9", "phases.1.beta.over_steps=5"]).phases[1]
    assert (phase.steps, phase.epochs) == (9, None)
    assert (phase.beta.over_steps, phase.beta.over_epochs) == (5, None)  # type: ignore[union-attr]


def test_two_rival_overrides_contradict_each_other(recipe: str) -> None:
    with pytest.raises(ConfigError, match="exactly one of epochs, steps"):
        load(RunConfig, recipe, ["phases.1.steps=9", "phases.1.epochs=1"])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("batch.global", "KEY=VALUE"),
        ("=3", "KEY=VALUE"),
        ("phases.2.steps=3", "an index from 0 to 1"),
        ("phases.first.steps=3", "an index from 0 to 1"),
        ("phases.0.stepz=3", "unknown key `phases.0.stepz` (did you mean `steps`?)"),
        ("modle.base=x", "unknown key `modle` (did you mean `model`?)"),
        ("name.first=x", "`name` has no keys"),
        ("seed=[", "not valid YAML"),
    ],
)
def test_wrong_overrides_are_named(recipe: str, override: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(RunConfig, recipe, [override])
    assert said in str(caught.value)


def test_overrides_leave_what_an_anchor_shares_alone(tmp_path: Path) -> None:
    text = "phases:\n  - {name: a, steps: 1, optimizer: &o {lr: 1}}\n  - {name: b, steps: 1, optimizer: *o}\n"
    file = tmp_path / "case.yaml"
    file.write_text(text, encoding="utf-8")
    config = load(RunConfig, str(file), ["phases.0.optimizer.lr=2"])
    assert [phase.optimizer.lr for phase in config.phases] == [2, 1]
