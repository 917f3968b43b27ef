"""Versions of what computed a result, which stand next to it."""

from importlib.metadata import version

from lit_recon import __version__

LIBRARIES = ("torch", "lightning", "transformers", "datasets", "torchmetrics", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """Versions of lit_recon and of the libraries that numbers depend on."""
    return {"lit_recon": __version__} | {name: version(name) for name in LIBRARIES}
