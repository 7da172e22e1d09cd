import torch

torch.set_num_threads(1)  # the tests share two cores with whatever else runs
