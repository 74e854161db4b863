"""Batch normalisation without running statistics: always the batch at hand, in evaluation too.

EcoFed's code (arXiv 2304.05495) sets ``track_running_stats=False`` everywhere, and HeteroFL (Diao et al., arXiv 2010.01264,
"static batch normalisation") trains so: nothing but weights has then to be averaged or sent.
"""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def use_batch_statistics(model: nn.Module) -> nn.Module:
    """Make every batch normalisation of ``model`` use the batch's own statistics, in place; returns ``model``.

    The running means, variances and counters leave the model's state.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.track_running_stats = False
            # The flag alone is not enough: in evaluation torch uses the running statistics as long as they exist.
            module.running_mean = module.running_var = module.num_batches_tracked = None
    return model
