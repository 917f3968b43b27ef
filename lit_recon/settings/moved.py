"""Dotted paths from before version 0.3.0, and their new places: of settings, and of imports in a user's own files."""

MOVED = {
    "lit_recon.modules.reconstruction.ReconstructionModule": "lit_recon.modules.masked_weights.MaskedWeights",
    "lit_recon.modules.least_squares.LeastSquaresModule": "lit_recon.modules.least_squares.LeastSquares",
    "lit_recon.criteria.wanda.Wanda": "lit_recon.pruning.criteria.wanda.Wanda",
    "lit_recon.criteria.magnitude.Magnitude": "lit_recon.pruning.criteria.magnitude.Magnitude",
    "lit_recon.masks.Unstructured": "lit_recon.pruning.patterns.Unstructured",
    "lit_recon.masks.NM": "lit_recon.pruning.patterns.NM",
    "lit_recon.losses.mean_squared": "lit_recon.modules.losses.mean_squared",
    "lit_recon.losses.mean_absolute": "torch.nn.functional.l1_loss in a function of your own",
    "lit_recon.models.HubModel": "lit_recon.model.loading.HubModel",
    "lit_recon.models.WheelModel": "lit_recon.model.wheels.WheelModel",
    "lit_recon.partition.Partition": "lit_recon.model.partition.Partition",
    "lit_recon.regime.Regime": "lit_recon.activations.propagation.Propagation",
    "lit_recon.store.StoreSettings": "lit_recon.activations.store.StoreSettings",
}

FOLDERS = {  # of modules that files of the user's own import from
    "activations": "activations.datamodule",
    "blocks": "model.decoder",
    "captured": "activations.matrix_inputs",
    "chain": "activations.chain",
    "criteria": "pruning.criteria",
    "halves": "model.halves",
    "losses": "modules.losses",
    "masks": "pruning.patterns",
    "matrices": "model.matrices",
    "models": "model.loading",
    "modules.reconstruction": "modules.masked_weights",
    "moments": "activations.gram",
    "packed_masks": "pruning.masks",
    "partition": "model.partition",
    "regime": "activations.propagation",
    "windows": "model.windows",
}
