"""Python imports this at its start. A script then takes its CPU for one that is fast in bfloat16,
or for one that is not: see --fast-bf16 in conftest.py.
"""

import os

import torch

CAPABILITIES = torch.cpu.get_capabilities() | {"amx_bf16": os.environ["FAST_BF16"] == "yes"}
torch.cpu.get_capabilities = lambda: CAPABILITIES
