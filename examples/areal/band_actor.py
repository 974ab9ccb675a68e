"""AReaL 1.0.4 with a band. Not run here: it needs GPUs and an inference engine.

Import this module at the head of a training script, before ``PPOTrainer`` builds its actor. With a
single controller the workers import it as well, because they get the path of ``BandActor``.
"""

import areal.engine
from areal.engine import FSDPPPOActor

from bandpo.integrations.areal import install

install(region="(kl@0.01).cap(10)")


class BandActor(FSDPPPOActor):
    """AReaL's actor, in a module whose import installs the loss."""


areal.engine.FSDPPPOActor = BandActor
