"""Lightning: ``Trainer(strategy=DPStrategy(...))`` trains a ``LightningModule`` privately, on several ranks too."""

from dpcompile.integrations.lightning.on_ranks import DPDDPStrategy, DPModelParallelStrategy
from dpcompile.integrations.lightning.one_device import DPStrategy

__all__ = ["DPDDPStrategy", "DPModelParallelStrategy", "DPStrategy"]
