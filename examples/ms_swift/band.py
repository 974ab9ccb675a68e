"""ms-swift 4.6.0 with a band. Not run here: it needs a GPU.

The file is a plugin, and all other arguments are ms-swift's::

    swift rlhf --rlhf_type grpo --external_plugins examples/ms_swift/band.py --num_iterations 2 ...
"""

from bandpo.integrations.ms_swift import install

install(region="(kl@0.01).cap(10)")
