"""The sweep: every text architecture of the installed transformers through anatomy, surgery and ONNX Runtime."""
