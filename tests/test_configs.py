"""Every YAML of conf/ composes, and instantiates to an object."""

from functools import partial
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import get_object, instantiate

from lit_recon.pruning.masks import Masks
from lit_recon.settings.conf import CONF

FILES = sorted(path.relative_to(CONF).with_suffix("").as_posix() for path in CONF.rglob("*/*.yaml"))
MEMBERS = [
    file for file in FILES if not file.startswith("experiment/") and not file.endswith("/none")
]  # experiments: tests/runs/test_experiments.py
REQUIRED = {
    "model/hf": ["model.name=a/b"],
    "data/files": ["data.paths=[a.txt]"],
    "data/hub": ["data.name=a/b"],
    "data/custom": ["data._target_=lit_recon.data.python_docs.PythonDocs"],
    "criterion/custom": ["criterion._target_=lit_recon.pruning.criteria.wanda.Wanda"],
    "criterion/file": ["criterion.masks={masks}"],
    "loss/custom": ["loss._target_=lit_recon.modules.losses.mean_squared"],
    "module/custom": ["module._target_=lit_recon.modules.masked_weights.MaskedWeights"],
}


@pytest.mark.parametrize("member", MEMBERS)
def test_every_member_of_every_group_instantiates(member: str, tmp_path: Path) -> None:
    group, name = member.split("/")
    Masks().save(tmp_path / "masks.safetensors")
    required = [word.format(masks=tmp_path / "masks.safetensors") for word in REQUIRED.get(member, [])]
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        cfg = compose("fit", overrides=[f"{group}={name}", *required])
    node = cfg.module[group] if group in ("optimizer", "scheduler") else cfg[group]
    if group == "walk":
        assert node == name
        return
    made = instantiate(node, _convert_="all")
    assert (made.func if isinstance(made, partial) else type(made)) is get_object(node._target_)


def test_a_group_has_at_least_two_members() -> None:
    for group in (path for path in CONF.rglob("*") if path.is_dir()):
        assert len(list(group.glob("*.yaml"))) >= 2, group.relative_to(CONF)


def test_the_default_configuration_is_the_recipe_of_the_readme() -> None:
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        cfg = compose("fit")
    assert (cfg.sparsity, cfg.data.num_samples, cfg.data.length, cfg.data.batch_size) == (0.5, 32, 256, 2)
    assert (cfg.module.warmup, cfg.trainer.max_epochs) == (0.1, 1)
    data, scores = cfg.data, cfg.criterion._target_.rpartition(".")[2]
    readme = (CONF.parent / "README.md").read_text(encoding="utf-8")
    for said in (
        f"reconstructs it on {data.num_samples} samples of {data.length} tokens",
        f"unstructured {cfg.sparsity:.0%} per {cfg.pattern.scope} by {scores}",
        f"({cfg.windows.by}), {data.num_samples // data.batch_size} steps each",
        f"{data.evaluation_samples} sequences of {data.evaluation_length} tokens",
    ):
        assert said in readme, said
