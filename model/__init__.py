"""Retriever models by code, and the LLM ranker.

Modules are imported where they are used: finding a base model needs no torch.
"""

import logging

# When peft imports it, it asks for optional kernels.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
