"""For all tests: one torch thread, as every worker has; two on two busy cores cost far more than they give."""

import torch

torch.set_num_threads(1)
