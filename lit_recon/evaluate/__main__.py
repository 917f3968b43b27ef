"""The command `python -m lit_recon.evaluate`: how good a checkpoint is, whoever made it. --help explains.

prepare: the configuration becomes objects, and everything that can be wrong is found     -> exit status 2
run:     load, verify, measure one layer at a time, add to the record
"""

import lit_recon.system.environment  # noqa: F401, before what it is for

# isort: split
from omegaconf import DictConfig

from lit_recon.evaluate.configure import is_text, prepare
from lit_recon.evaluate.run import run
from lit_recon.settings.command import Call, Command, refusing


def evaluate(cfg: DictConfig, call: Call) -> None:
    """Prepare and run.

    Args:
        cfg: The composed configuration.
        call: This call of the command.
    """
    run(refusing(prepare, cfg), call.console)


main = Command(config="evaluate", task=evaluate, is_text=is_text, example="checkpoint=runs/first").main


if __name__ == "__main__":
    main()
