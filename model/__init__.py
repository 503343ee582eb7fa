"""Retriever models and the language model of the ranker.

Nothing is imported here: ``model.hub`` does not need torch.
"""

import logging

# peft imports bitsandbytes, which warns that optional kernels are missing.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# Liger warns of each backend that is not installed, whichever it uses.
logging.getLogger("liger_kernel.backends").setLevel(logging.ERROR)
