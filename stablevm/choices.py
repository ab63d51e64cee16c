"""The choices that options share with the library, without importing torch."""

from typing import Literal

# What a network is trained on; `interpolant.INTERPOLANTS` has a path for each name.
PathName = Literal["linear", "cosine"]
Prediction = Literal["v", "x"]
TimeName = Literal["uniform", "lognormal", "logit_normal"]
LossName = Literal["si", "stablevm"]
Anchors = Literal["bank", "batch"]
# How alignment fades with time, and how images get an encoder's size.
WeightName = Literal["hard", "hard_high", "sigmoid", "cosine", "snr", "constant"]
Resize = Literal["bicubic", "antialiased"]
# Arithmetic of a network that samples, of one that is trained, and of an autoencoder that encodes.
Precision = Literal["fp32", "bf16", "fp16"]
MixedPrecision = Literal["no", "fp16", "bf16"]
EncoderPrecision = Literal["fp32", "bf16"]
# Which weights of a checkpoint: the moving average, or those of the last step.
Weights = Literal["ema", "model"]
# How an image is cut to a square or scaled.
Transform = Literal["scale", "center-crop-dhariwal", "center-crop", "center-crop-wide", "pad", "none"]
SquareTransform = Literal["center-crop-dhariwal", "center-crop", "none"]
# Distances between features: of float32 values, or as ADM's script rounds them.
Arithmetic = Literal["exact", "adm"]
# Labels of generated images.
LabelSampling = Literal["equal", "random"]
