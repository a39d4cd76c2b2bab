"""What the processor of this machine can."""

import torch

HAS_BFLOAT16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
"""Whether oneDNN multiplies bfloat16 numbers on it, as with AVX-512; else PyTorch does, slowly."""
