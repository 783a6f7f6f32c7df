"""LoRA adapters, merged into the weights of their base model before anything else: W + scaling B A (arXiv 2106.09685).

The adapter is read as `peft` saves it, and `peft` is not needed for it. Only what is exactly that sum is merged; every
other kind of adapter (DoRA, LoHa, trained embeddings, ...) is refused by the name of its setting.
"""

from calib.lora.adapter import Adapter, adapter_from_directory
from calib.lora.merge import check_merge, write_merged

__all__ = ["Adapter", "adapter_from_directory", "check_merge", "write_merged"]
