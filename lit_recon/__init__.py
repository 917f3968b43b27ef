"""lit_recon: local reconstruction of pruned language models, one window at a time, with PyTorch Lightning.

The command is `python -m lit_recon.fit`; `lit_recon.report` compares runs, `lit_recon.evaluate` measures any
checkpoint, and `lit_recon.verify` says which weights of any model folder are zero. From Python:

    from lit_recon import PythonDocs, load, perplexity, prune_and_reconstruct

Public names are imported when they are first used, so that `import lit_recon` loads neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_recon.activations.datamodule import Batch as Batch
    from lit_recon.activations.propagation import Propagation as Propagation
    from lit_recon.activations.store import StoreSettings as StoreSettings
    from lit_recon.data.files import Files as Files
    from lit_recon.data.hub import Hub as Hub
    from lit_recon.data.mixture import Mixture as Mixture
    from lit_recon.data.python_docs import PythonDocs as PythonDocs
    from lit_recon.data.self_generated import SelfGenerated as SelfGenerated
    from lit_recon.data.source import Samples as Samples
    from lit_recon.data.source import TextSource as TextSource
    from lit_recon.evaluate.perplexity import perplexity as perplexity
    from lit_recon.fit.library import load as load
    from lit_recon.fit.library import prune_and_reconstruct as prune_and_reconstruct
    from lit_recon.fit.output.library_run import Reconstruction as Reconstruction
    from lit_recon.model.matrices import Matrix as Matrix
    from lit_recon.model.partition import Partition as Partition
    from lit_recon.model.windows import Window as Window
    from lit_recon.modules.least_squares import LeastSquares as LeastSquares
    from lit_recon.modules.losses import mean_squared as mean_squared
    from lit_recon.modules.masked_weights import MaskedWeights as MaskedWeights
    from lit_recon.pruning.criteria import Criterion as Criterion
    from lit_recon.pruning.criteria.magnitude import Magnitude as Magnitude
    from lit_recon.pruning.criteria.wanda import Wanda as Wanda
    from lit_recon.pruning.masks import Masks as Masks
    from lit_recon.pruning.patterns import NM as NM
    from lit_recon.pruning.patterns import Pattern as Pattern
    from lit_recon.pruning.patterns import Unstructured as Unstructured
    from lit_recon.reconstruction.fit_settings import FitSettings as FitSettings
    from lit_recon.reconstruction.window_result import WindowResult as WindowResult

__version__ = "0.10.0"

_MODULES = {
    "activations.datamodule": ("Batch",),
    "activations.propagation": ("Propagation",),
    "activations.store": ("StoreSettings",),
    "data.files": ("Files",),
    "data.hub": ("Hub",),
    "data.mixture": ("Mixture",),
    "data.python_docs": ("PythonDocs",),
    "data.self_generated": ("SelfGenerated",),
    "data.source": ("Samples", "TextSource"),
    "evaluate.perplexity": ("perplexity",),
    "fit.library": ("load", "prune_and_reconstruct"),
    "fit.output.library_run": ("Reconstruction",),
    "model.matrices": ("Matrix",),
    "model.partition": ("Partition",),
    "model.windows": ("Window",),
    "modules.least_squares": ("LeastSquares",),
    "modules.losses": ("mean_squared",),
    "modules.masked_weights": ("MaskedWeights",),
    "pruning.criteria": ("Criterion",),
    "pruning.criteria.magnitude": ("Magnitude",),
    "pruning.criteria.wanda": ("Wanda",),
    "pruning.masks": ("Masks",),
    "pruning.patterns": ("NM", "Pattern", "Unstructured"),
    "reconstruction.fit_settings": ("FitSettings",),
    "reconstruction.window_result": ("WindowResult",),
}
_PLACES = {name: module for module, names in _MODULES.items() for name in names}
__all__ = ["__version__", *sorted(_PLACES)]  # noqa: PLE0604  # names only


def __getattr__(name: str) -> Any:
    """A public name, from where it is defined (PEP 562)."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    """The public names."""
    return __all__
