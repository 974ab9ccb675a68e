"""ROLL 0.3.0 with a band. Not run here: it needs GPUs. This folder has to be on the PYTHONPATH."""

from bandpo.integrations.roll import BandActorWorker
from bandpo.integrations.settings import LossSettings


class MyWorker(BandActorWorker):
    """The worker that ``actor_train.worker_cls`` names."""

    settings = LossSettings("(kl@0.01).cap(10)")
