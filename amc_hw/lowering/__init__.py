"""From a graph of torch.fx to fused operators.

An operator's value is an image (N, C, H, W), tokens (N, H * W, C) or a vector (N, C). Code that permutes and reshapes
gives the same value along other axes (`amc_hw.layout`), until an operator needs it as it is. Of an image with its
channels last (N, H, W, C) a linear layer is a convolution of one pixel.
"""
