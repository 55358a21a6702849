"""A guide whose process ends itself by SIGKILL in the middle of a fit, if FRAGILE says that it is the one."""

import os
import signal

from pyro_vae import svi
from pyro_vae.guides.mean_field import MeanField

svi.SAVE_SECONDS = 0.0  # after every epoch
LAST_CALL = 15  # of 2 batches in each epoch, after a few to try it out


class Fragile(MeanField):
    """Mean-field normals, as long as they last."""

    calls = 0

    def forward(self, features):
        Fragile.calls += self.training
        if os.environ.get("FRAGILE") == os.environ.get("RANK", "0") and Fragile.calls == LAST_CALL:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(features)
