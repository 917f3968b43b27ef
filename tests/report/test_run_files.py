"""Files of a run are read whole, or refused with a message."""

from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from lit_recon.report.run_files import read_curves


def test_no_point_of_the_curves_is_dropped(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path / "tensorboard")) as writer:
        for step in range(10_050):  # more than TensorBoard keeps by default
            writer.add_scalar("block_00/loss/train", step, step)
        for depth in range(3):  # a second x axis, which starts again at zero
            writer.add_scalar("depth/held_out_before", depth / 4, depth)
    curves = read_curves(tmp_path)
    assert curves["block_00/loss/train"] == [(step, step) for step in range(10_050)]
    assert curves["depth/held_out_before"] == [(0, 0.0), (1, 0.25), (2, 0.5)]
