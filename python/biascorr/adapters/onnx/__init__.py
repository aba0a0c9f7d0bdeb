"""ONNX models as networks. Needs onnx and onnxruntime; imported only where a model is."""
