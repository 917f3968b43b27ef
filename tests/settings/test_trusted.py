"""Of another person's configuration runs what is expected of a run, and nothing else."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lit_recon.settings.trusted import check_trusted

EXPECTED = (
    "lit_recon.modules.masked_weights.MaskedWeights",
    "lit_recon.modules.losses.mean_squared",
    "torch.optim.SGD",
    "torch.nn.functional.mse_loss",
    "lightning.pytorch.callbacks.EarlyStopping",
    "transformers.get_cosine_schedule_with_warmup",
    "mine_to_be_trusted.Mine",
)
FOREIGN = (
    *("os.system", "builtins.eval", "torch.load", "torch.hub.load", "torch.serialization.load", "pickle.loads"),
    *("lit_recon.system.cache.os.system", "mine_to_be_trusted.os.system", "subprocess.Popen", "hydra.utils.call"),
    *("lit_recon.fit.run.run", "transformers.AutoModelForCausalLM.from_pretrained", "torch.optim.optimizer.torch.load"),
)


@pytest.fixture
def own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a file in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("mine_to_be_trusted.py").write_text("import os\n\n\nclass Mine: ...\n")
    return tmp_path


@pytest.mark.parametrize("target", EXPECTED)
def test_what_is_expected_of_a_run_may_run(own_file: Path, target: str) -> None:
    check_trusted(OmegaConf.create({"a": {"_target_": target}}), "resume=run")


@pytest.mark.parametrize("target", FOREIGN)
def test_anything_else_is_refused_unless_the_command_line_names_it_too(own_file: Path, target: str) -> None:
    config = OmegaConf.create({"a": {"b": [{"_target_": target}]}})
    with pytest.raises(ValueError, match=rf"resume=run: .*a\.b\.0\._target_={target}, which is neither"):
        check_trusted(config, "resume=run")
    check_trusted(config, "resume=run", trusted={target})
