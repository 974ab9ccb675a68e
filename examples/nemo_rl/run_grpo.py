"""NeMo-RL's ``examples/run_grpo.py`` with a band. Not run here: it needs GPUs.

Run it in a checkout of NeMo-RL whose environments have bandpo; the arguments are NeMo-RL's::

    uv run --with bandpo python path/to/run_grpo.py --config examples/configs/grpo_math_1B.yaml
"""

import runpy

from bandpo.integrations.nemo_rl import install

if __name__ == "__main__":
    install(region="(kl@0.01).cap(10)")
    runpy.run_path("examples/run_grpo.py", run_name="__main__")
