"""SkyRL 0.3.0 with a band. Not run here: it needs GPUs and vLLM.

The arguments are SkyRL's, and one of them selects the loss::

    python examples/skyrl/train.py trainer.algorithm.policy_loss_type=bandpo ...
"""

from skyrl.train.entrypoints import main_base

from bandpo.integrations.skyrl import register

if __name__ == "__main__":
    register(region="(kl@0.01).cap(10)")  # before SkyRL checks the name and starts Ray
    main_base.main()
