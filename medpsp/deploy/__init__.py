"""ONNX export, quantization, verification and the torch-free predictor."""
