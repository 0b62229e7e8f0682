"""What the tests of training share; their fixtures are in conftest.py."""

import torch

SETTINGS = dict(arch="cifar_resnet20", epochs=3, batch_size=16, lr=0.05)


def weights(run):
    return torch.cat([value.flatten().double() for value in run.model.state_dict().values()])
