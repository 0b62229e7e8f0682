"""What the tests of training share; their fixtures are in conftest.py."""

import torch

SETTINGS = dict(arch="cifar_resnet20", epochs=3, batch_size=16, lr=0.05)


def weights(run):
    return torch.cat([value.flatten().double() for value in run.model.state_dict().values()])


class RunAgain:
    """In place of CUDA graphs: what was captured is run once more, with what its inputs then hold."""

    def __init__(self):
        self.aside = self.captured = self.replayed = 0

    def run_aside(self, run):
        self.aside += 1
        return run()

    def capture(self, run):
        self.captured += 1

        def replay():
            self.replayed += 1
            return run()

        return replay
